"""The one Transformer and its attention."""

from bd3lm.model.decoding import DecodeStep
from bd3lm.model.head import HeadInputs, head_cross_entropy, head_score_entropy
from bd3lm.model.inference import for_inference
from bd3lm.model.layers import KVCache
from bd3lm.model.transformer import Transformer

__all__ = [
    "DecodeStep",
    "HeadInputs",
    "KVCache",
    "Transformer",
    "for_inference",
    "head_cross_entropy",
    "head_score_entropy",
]
