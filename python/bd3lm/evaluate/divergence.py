"""Divergence of sampled text from held-out text: n-grams, and MAUVE.

Generative perplexity can be lowered by samplers that have learned nothing, for it rewards text
that is too probable. A divergence from held-out text rises both when samples are too narrow and
when they are too wild.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bd3lm.config import check
from bd3lm.data import Dataset, read_documents
from bd3lm.data.resolve import Verify
from bd3lm.errors import ConfigError, MissingFileError
from bd3lm.evaluate.generative import CausalLM
from bd3lm.evaluate.quality import words
from bd3lm.extras import install_hint


@dataclass(frozen=True)
class Divergence:
    """Jensen-Shannon divergence between two texts' distributions of n-grams.

    Attributes:
        n: words of a gram.
        nats: between samples and reference, in [0, log 2]; biased upwards at few grams.
        floor: between two parts of the reference of the samples' size, which have the same bias;
            None where the reference is shorter than twice the samples.
        grams: compared on either side.
    """

    n: int
    nats: float
    floor: float | None
    grams: int


def ngram_divergence(samples: Sequence[str], reference: Sequence[str], n: int = 2) -> Divergence:
    """Compare the word n-grams of samples with those of held-out text, at equal numbers.

    Args:
        samples: texts; n-grams do not cross from one to the next.
        reference: held-out texts, best twice as long.
        n: words of a gram, at least 1.

    Raises:
        ConfigError: no n-gram on one side.
    """
    check(n >= 1, "n", n, "at least 1")
    drawn, held = list(_grams(samples, n)), list(_grams(reference, n))
    count = min(len(drawn), len(held))
    check(count > 0, "samples", f"{len(drawn)} and {len(held)} {n}-grams", "texts with some")
    floor = None
    if len(held) >= 2 * count:
        floor = jensen_shannon(held[:count], held[count : 2 * count])
    return Divergence(n, jensen_shannon(drawn[:count], held[:count]), floor, count)


def jensen_shannon(left: Iterable[object], right: Iterable[object]) -> float:
    """Jensen-Shannon divergence of two empirical distributions, in nats.

    Examples:
        >>> round(jensen_shannon("aabb", "ccdd"), 6), jensen_shannon("ab", "ba")
        (0.693147, 0.0)
    """
    a, b = Counter(left), Counter(right)
    names = sorted(a.keys() | b.keys(), key=repr)
    p = np.array([a[name] for name in names]) / a.total()
    q = np.array([b[name] for name in names]) / b.total()
    middle = (p + q) / 2

    def relative_entropy(x: np.ndarray) -> float:
        seen = x > 0
        return float((x[seen] * np.log(x[seen] / middle[seen])).sum())

    return (relative_entropy(p) + relative_entropy(q)) / 2


def mauve(evaluator: CausalLM, samples: Sequence[str], reference: Sequence[str]) -> float:
    """MAUVE between samples and held-out texts, in [0, 1]; 1 is the same distribution.

    Texts are represented by the evaluator's last hidden state at their last token. The figure
    depends on the evaluator and on the number of texts: compare under equal ones.

    Args:
        evaluator: a causal language model.
        samples: texts, a few hundred or more.
        reference: as many held-out texts of about the same length.

    Raises:
        ConfigError: the extra ``mauve`` is not installed.
    """
    if find_spec("mauve") is None:
        raise ConfigError("mauve", True, f"off without its package: {install_hint('mauve')}")
    from mauve import compute_mauve  # pyright: ignore[reportMissingImports]

    features = [
        np.stack([evaluator.feature(text) for text in texts]) for texts in (samples, reference)
    ]
    return float(compute_mauve(p_features=features[0], q_features=features[1]).mauve)


def reference_texts(path: Path, verify: Verify = "auto") -> list[str]:
    """Documents of a text file or of a prepared directory, decoded.

    Args:
        path: of the file or directory.
        verify: when a prepared directory is verified; see :class:`bd3lm.data.Dataset`.

    Raises:
        MissingFileError: there is nothing at that path.
    """
    if not path.exists():
        raise MissingFileError(f"{path}: no such file or directory")
    if not path.is_dir():
        return read_documents(path)
    data = Dataset(path, verify=verify)
    return [data.tokenizer.decode(data.document(i).tolist()) for i in range(data.num_documents)]


def pieces(texts: Iterable[str], size: int, count: int) -> list[str]:
    """The first texts cut into at most ``count`` pieces of ``size`` words each.

    Examples:
        >>> pieces(["a b c d e", "f g"], 2, 3)
        ['a b', 'c d', 'f g']
    """
    found: list[str] = []
    for text in texts:
        parts = text.split()
        found += [" ".join(parts[i : i + size]) for i in range(0, len(parts) - size + 1, size)]
        if len(found) >= count:
            break
    return found[:count]


def _grams(texts: Iterable[str], n: int) -> Iterable[tuple[str, ...]]:
    for text in texts:
        tokens = words(text)
        yield from (tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
