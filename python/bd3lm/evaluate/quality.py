"""Simple measures of sampled text that need no second model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def words(text: str) -> list[str]:
    """Words of a text, lower case: runs of letters, inner apostrophes included.

    Examples:
        >>> words("Don't panic, it's 42!")
        ["don't", 'panic', "it's"]
    """
    return [word.lower() for word in _WORD.findall(text)]


def known_word_share(samples: Iterable[str], vocabulary: set[str]) -> float:
    """Share of sampled words (with repetition) that ``vocabulary`` holds, in [0, 1].

    The last word of a sample is left out, for a length limit may have cut it.
    """
    sampled = [word for sample in samples for word in words(sample)[:-1]]
    if not sampled:
        return 0.0
    return sum(word in vocabulary for word in sampled) / len(sampled)


def distinct_n(texts: Sequence[str], n: int = 2, limit: int | None = None) -> float:
    """Different word n-grams / all word n-grams; at equal numbers of words, comparable.

    Args:
        texts: n-grams do not cross from one text to the next.
        n: words of a gram.
        limit: stop after that many grams, so that two sets can be compared at equal size.
    """
    grams: list[tuple[str, ...]] = []
    for text in texts:
        tokens = words(text)
        grams.extend(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
    grams = grams[:limit]
    return len(set(grams)) / len(grams) if grams else 0.0
