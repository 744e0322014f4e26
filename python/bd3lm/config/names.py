"""Names of every choice that settings offer; tests compare each list with the code it names."""

from __future__ import annotations

from typing import Literal

ScheduleName = Literal[
    "loglinear",
    "square",
    "square_root",
    "logarithmic",
    "cosine",
    "gaussian",
    "bimodal_gaussian",
    "table",
]
SystemName = Literal["bd3lm", "mdlm", "sedd", "ar"]
AttentionName = Literal["auto", "triton", "hopper", "flash", "flex", "flex-fa4", "rust", "dense"]
EstimatorName = Literal["exact", "stratified", "count", "bernoulli"]
LikelihoodName = Literal["nelbo", "marginal", "left-to-right", "confidence", "orders"]
DetokenizerName = Literal["lm1b", "wikitext", "ptb", "lambada", "scientific_papers"]
WeightingName = Literal["nelbo", "edm", "iddpm", "sigmoid", "flow_matching", "simple"]
LoggerName = Literal["csv", "tensorboard", "wandb", "trackio"]
PackingName = Literal["wrap", "aligned", "best_fit"]
AdaptedName = Literal["qkv", "out", "mlp.up", "mlp.down"]
