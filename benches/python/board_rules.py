"""Rules of the two boards as checks of a trained model; boards.py makes the model.

Their sources are linked from docs/boards.md.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Literal

from bd3lm.checkpoint import Checkpoint
from bd3lm.config import ObjectiveConfig, TrainConfig
from bd3lm.data import Dataset
from bd3lm.evaluate import Likelihood
from bd3lm.evaluate.score import Scoring

NANO_PARAMETERS = 162_000_000
NANO_BLOCK = 16
NANO_NATS = 3.44
NANO_RECORD_TOKENS = 1_310_720_000
"""Of v0, the only entry: 10,000 steps of 131,072 tokens."""
GPT2_VOCAB = 50_258
"""GPT-2's ids and the mask."""
GOLF_BYTES = 16_000_000
GOLF_SECONDS = 600.0
GOLF_DOCUMENTS = 50_000
GOLF_RECORD = 1.0611
"""Bits a byte of the best merged entry, which is autoregressive."""

Verdict = Literal["kept", "broken", "not comparable"]


@dataclass(frozen=True)
class Rule:
    """One rule of a board, and whether an entry keeps it.

    Attributes:
        rule: in a few words.
        value: of the entry.
        verdict: ``not comparable`` on another text or machine than the board's.
    """

    rule: str
    value: str
    verdict: Verdict


@dataclass(frozen=True)
class Count:
    """Size of a text, counted twice.

    Attributes:
        documents: of the text.
        tokens: ids, the EOS of every document included.
        raw_bytes: UTF-8 bytes of the text that was read.
        decoded_bytes: UTF-8 bytes of what the ids decode to.
    """

    documents: int
    tokens: int
    raw_bytes: int
    decoded_bytes: int


@dataclass(frozen=True)
class Score:
    """Bits a byte of a whole text.

    Attributes:
        nats: a token; the NELBO.
        bits_per_byte: nats of all tokens / ln 2 / raw bytes.
        mc_error: standard error of the estimator in bits a byte; 0 where it is exact.
        data_error: standard error of the choice of rows, in bits a byte.
        marginal_bits_per_byte: exact likelihood of first hitting, from the same forwards; None
            above S = 4.
        estimator: of the NELBO.
        scored_tokens: tokens that the nats are of.
        count: of the text.
        seconds: of scoring.
    """

    nats: float
    bits_per_byte: float
    mc_error: float
    data_error: float
    marginal_bits_per_byte: float | None
    estimator: str
    scored_tokens: int
    count: Count
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every token was scored, and the ids decode to the bytes that were read."""
        count = self.count
        return self.scored_tokens == count.tokens and count.raw_bytes == count.decoded_bytes


@dataclass(frozen=True)
class Entry:
    """A trained model, and its findings.

    Attributes:
        config: settings of its run.
        device: that it was trained and scored on.
        parameters: embeddings included; tied ones count once.
        vocab_size: ids, the mask included.
        train_rows: rows of the training text.
        train_seconds: of the steps.
        score: on the validation text.
        artifact: bytes by part; empty where the board has no limit.
    """

    config: TrainConfig
    device: str
    parameters: int
    vocab_size: int
    train_rows: int
    train_seconds: float
    score: Score
    artifact: dict[str, int]

    def trained_on(self, name: str) -> bool:
        """Whether both texts are called so: a name is all that is known of a text."""
        names = (self.config.data or "", self.config.valid or "")
        return all(name in text.lower().replace("-", "") for text in names)


def count_text(data: Dataset) -> Count:
    """Count documents, tokens and bytes of a prepared text."""
    tokens = decoded = 0
    for index in range(data.num_documents):
        ids = data.document(index)
        tokens += len(ids)
        text = ids[:-1] if ids[-1] == data.tokenizer.eos_id else ids
        decoded += len(data.tokenizer.decode(text.tolist()).encode())
    return Count(data.num_documents, tokens, data.manifest.num_bytes, decoded)


def score_text(loaded: Checkpoint, data: Dataset) -> Score:
    """Score every token: exactly up to S = 4, else by the stratified estimator."""
    scoring = Scoring.prepare(loaded, data, repeats=loaded.config.eval.repeats)
    exact = scoring.config.estimator == "exact"
    begun = time.perf_counter()
    found = scoring.likelihood("marginal" if exact else "nelbo")
    seconds = time.perf_counter() - begun
    return _in_bytes(found, count_text(data), scoring.config.estimator, seconds)


def _in_bytes(found: Likelihood, count: Count, estimator: str, seconds: float) -> Score:
    assert found.nelbo is not None
    scale = found.tokens / math.log(2) / count.raw_bytes
    return Score(
        nats=found.nelbo,
        bits_per_byte=found.nelbo * scale,
        mc_error=found.mc_error * scale,
        data_error=(found.data_error or 0.0) * scale,
        marginal_bits_per_byte=found.nll * scale if found.likelihood == "marginal" else None,
        estimator=estimator,
        scored_tokens=found.tokens,
        count=count,
        seconds=seconds,
    )


def _verdict(kept: bool, comparable: bool = True) -> Verdict:
    if not comparable:
        return "not comparable"
    return "kept" if kept else "broken"


def nano_rules(entry: Entry) -> list[Rule]:
    """Rules of nano-block-diffusion."""
    cfg, score = entry.config, entry.score
    rows = cfg.steps * cfg.batch_size
    tokens = rows * cfg.seq_len
    its_text = entry.trained_on("finewebedu") and entry.vocab_size == GPT2_VOCAB
    bound_alone = cfg.noise.weighting == "nelbo" and cfg.objective == ObjectiveConfig()
    error = score.mc_error / score.bits_per_byte * score.nats
    return [
        Rule(
            f"at most {NANO_PARAMETERS:,} parameters",
            f"{entry.parameters:,}",
            _verdict(entry.parameters <= NANO_PARAMETERS),
        ),
        Rule(f"blocks of {NANO_BLOCK}", str(cfg.block), _verdict(cfg.block == NANO_BLOCK)),
        Rule(
            "the block-diffusion objective alone",
            "the NELBO's weights" if bound_alone else "another",
            _verdict(bound_alone and cfg.system == "bd3lm"),
        ),
        Rule(
            "samples in the data's order",
            "shuffled" if cfg.shuffle else "in its order",
            _verdict(not cfg.shuffle),
        ),
        Rule(
            "no sample twice",
            f"{rows:,} rows of {entry.train_rows:,}",
            _verdict(rows <= entry.train_rows),
        ),
        Rule(
            "FineWeb-Edu in GPT-2 tokens",
            f"{cfg.data or 'the text of the package'}, {entry.vocab_size:,} ids",
            _verdict(True, its_text),
        ),
        Rule(
            f"at most {NANO_NATS} nats a token",
            f"{score.nats:.4f} ± {error:.4f} (s.e. of the estimator)",
            _verdict(score.nats <= NANO_NATS, its_text),
        ),
        Rule(
            f"fewer training tokens than {NANO_RECORD_TOKENS:,}",
            f"{tokens:,}",
            _verdict(tokens < NANO_RECORD_TOKENS, its_text),
        ),
    ]


def golf_rules(entry: Entry) -> list[Rule]:
    """Rules of parameter-golf."""
    score, size = entry.score, sum(entry.artifact.values())
    parts = " + ".join(f"{part} {number:,}" for part, number in entry.artifact.items())
    its_text = entry.trained_on("fineweb") and score.count.documents == GOLF_DOCUMENTS
    its_machine = "H100" in entry.device
    return [
        Rule(
            f"an artifact of at most {GOLF_BYTES:,} bytes",
            f"{size:,} = {parts}",
            _verdict(size <= GOLF_BYTES),
        ),
        *(
            Rule(
                f"{what} in {GOLF_SECONDS:.0f} s on 8 H100",
                f"{seconds:.0f} s on {entry.device}",
                _verdict(seconds <= GOLF_SECONDS, its_machine),
            )
            for what, seconds in (("trained", entry.train_seconds), ("scored", score.seconds))
        ),
        Rule(
            "every token scored, every byte counted",
            f"{score.scored_tokens:,} of {score.count.tokens:,} tokens; {score.count.raw_bytes:,} "
            f"bytes read, {score.count.decoded_bytes:,} decoded",
            _verdict(score.complete),
        ),
        Rule(
            f"FineWeb's first {GOLF_DOCUMENTS:,} documents",
            f"{score.count.documents:,} documents of "
            f"{entry.config.valid or entry.config.data or 'the text of the package'}",
            _verdict(True, its_text),
        ),
        Rule(
            f"below the record, {GOLF_RECORD} bits a byte",
            f"{score.bits_per_byte:.4f}",
            _verdict(score.bits_per_byte < GOLF_RECORD, its_text),
        ),
    ]
