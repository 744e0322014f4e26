"""The launch table: which entry a GPU and a head width get, and how a user's file replaces it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bd3lm.errors import ConfigError
from bd3lm.model.attention.triton import tuning


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    tuning.tables.cache_clear()
    yield
    tuning.tables.cache_clear()


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_89"),
        ((8, 7), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_80"),
        ((12, 0), "sm_89"),
    ],
)
def test_every_gpu_gets_a_table_whose_limits_it_meets(
    capability: tuple[int, int], arch: str
) -> None:
    assert tuning.architecture(capability) == arch


def test_a_gpu_without_bf16_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"7\.5: must be 8\.0 or newer"):
        tuning.architecture((7, 5))


def test_every_table_has_every_kernel_and_width() -> None:
    for kernels in tuning.tables().values():
        assert set(kernels) == {"forward", "keys", "queries", "decode"}
        for entries in kernels.values():
            assert {"32", "64", "128", "256"} <= set(entries)


def test_widths_without_an_entry_take_the_next_power_of_two() -> None:
    for width, like in ((16, 32), (24, 32), (48, 64), (80, 128), (192, 256)):
        found = tuning.tiles("forward", "sm_90", width, wide=False)
        assert found == tuning.tiles("forward", "sm_90", like, wide=False)
    own = tuning.tiles("keys", "sm_80", 96, wide=False)
    assert own != tuning.tiles("keys", "sm_80", 128, wide=False)


def test_a_file_replaces_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"sm_90": {"forward": {"64": [64, 32, 4, 2]}}}))
    monkeypatch.setenv(tuning.OVERRIDE, str(path))
    assert tuning.tiles("forward", "sm_90", 64, wide=False) == (64, 32, 4, 2)
    assert tuning.tiles("forward", "sm_90", 128, wide=False) == (128, 64, 8, 3)


@pytest.mark.parametrize("text", ["{", '{"sm_90": 3}', '{"sm_90": {"forward": {"64": [1, 2]}}}'])
def test_a_file_that_is_no_table_is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    monkeypatch.setenv(tuning.OVERRIDE, str(path))
    with pytest.raises(ConfigError, match="broken"):
        tuning.tables()
    monkeypatch.setenv(tuning.OVERRIDE, str(tmp_path / "missing.json"))
    with pytest.raises(ConfigError, match="missing"):
        tuning.tables()
