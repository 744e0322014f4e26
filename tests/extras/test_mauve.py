"""MAUVE through its own package, with features that are known."""

import numpy as np
import pytest

pytest.importorskip("mauve", reason="needs the extra mauve; run by make check-extras")

from bd3lm.evaluate.divergence import mauve


class Features:
    """Features of a text: its number, and Gaussian noise around a centre."""

    def feature(self, text):
        seed, centre = text.split()
        noise = np.random.default_rng(int(seed)).normal(size=8)
        return (noise + float(centre)).astype(np.float32)


def test_equal_laws_are_near_one_and_others_are_not():
    held, near, far = (
        [f"{number + start} {centre}" for number in range(300)]
        for start, centre in ((0, 0.0), (1000, 0.0), (2000, 3.0))
    )
    assert mauve(Features(), near, held) > 0.8
    assert mauve(Features(), far, held) < 0.2
