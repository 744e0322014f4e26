"""A run under a name that a shell and rich would take apart."""

from __future__ import annotations

import pytest

from bd3lm.cli import train
from tests.integration.strangers.common import TINY


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test waits for a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, corpus):
    """A run on prepared data, both below a folder with a space and brackets in its name."""
    root = tmp_path_factory.mktemp("strange") / "my [runs] :key:"
    root.mkdir()
    (root / "data [v2]").symlink_to(corpus)
    train.main(["--data", str(root / "data [v2]"), "--out", str(root / "r [1]"), *TINY])
    return root


@pytest.fixture
def checkpoint(folder):
    return str(folder / "r [1]" / "checkpoint")
