"""Local copies of data at a URL: the oldest go where there are too many, but none in use."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from bd3lm import user_cache
from bd3lm.errors import ConfigError
from bd3lm.user_cache import USED, cached_copy


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for 3000 bytes, of a process that uses nothing of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(user_cache.VARIABLE, "3kB")
    monkeypatch.setattr(user_cache, "_held", {})
    return tmp_path / "bd3lm"


def copy(folder: Path, name: str, used: int, kind: str = "data") -> Path:
    """A copy of 1000 bytes that nobody uses, and the time of its last use."""
    made = folder / kind / name
    (made / "shard").mkdir(parents=True)
    (made / "shard" / "file").write_bytes(bytes(1000))
    (made / USED).touch()
    os.utime(made / USED, (used, used))
    return made


def test_the_oldest_make_room_for_a_new_one(folder, capsys):
    old = [copy(folder, name, used) for used, name in enumerate("abc")]
    checkpoint = copy(folder, "d", -1, "checkpoints")
    with cached_copy("data", "b"):  # now the one used last
        pass
    assert [path.exists() for path in old] == [True, True, True]
    assert not checkpoint.exists()
    with cached_copy("data", "e") as new:
        (new / "file").write_bytes(bytes(1500))
    assert [path.exists() for path in (*old, new)] == [False, True, False, True]
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["b", "e"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert said[1] == (
        f"{folder}: removed 2 of 4 copies, those used longest ago, to stay within "
        "BD3LM_CACHE_LIMIT (3e-06 GB)"
    )


def test_none_that_is_in_use_is_removed(folder):
    first = copy(folder, "first", 1)
    with (first / USED).open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # as another process has it
        for name in ("second", "third"):
            with cached_copy("data", name) as mine:
                (mine / "file").write_bytes(bytes(2000))
        assert all((folder / "data" / name).is_dir() for name in ("first", "second", "third"))
    with cached_copy("data", "third"):
        pass
    assert not first.exists()


def test_a_copy_that_was_removed_is_made_again(folder):
    for _ in range(2):
        with cached_copy("data", "a") as made:
            assert sorted(path.name for path in made.iterdir()) == [".lock", USED]
        (made / USED).unlink()
        (made / ".lock").unlink()
        made.rmdir()


def test_a_limit_that_is_none(folder, monkeypatch):
    monkeypatch.setenv(user_cache.VARIABLE, "much")
    with (
        pytest.raises(ConfigError, match=r"^BD3LM_CACHE_LIMIT = much: must be a number of bytes"),
        cached_copy("data", "a"),
    ):
        pass
