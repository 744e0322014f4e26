"""Small texts, data and models that many tests share."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bd3lm.config import ModelConfig
from bd3lm.data import Tokenizer, load_tokenizer
from bd3lm.data.store import TokenArrays
from bd3lm.model import Transformer

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, children would ignore it

torch.set_num_threads(1)  # models this small lose more to threads than they gain

TEXTS = [
    "The old house stood by the river, and nobody lived there.",
    "def f(x):\n\treturn {x: [i ** 2 for i in range(10)]}  # café\r\n\n",
    "日本語の文章と中文句子，한국어도。",
    "👩‍👩‍👧‍👦 🏳️‍🌈 naïve e\u0301 \u00a0\u2003\u200b spaces   at the end   ",
    "x",
]
MASK_ID = 15
VOCAB_SIZE = 16


def fakes_a_gpu() -> bool:
    """Return whether fake CUDA tensors need no driver; PyTorch 2.9 calls it for some of them."""
    try:
        with FakeTensorMode():
            torch.zeros(2, device="cuda")[:1].add_(1)
    except RuntimeError:
        return False
    return True


fake_gpu = pytest.mark.skipif(not fakes_a_gpu(), reason="this PyTorch fakes no GPU without one")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Text and vocabularies that are not part of the package."""
    root = os.environ.get("BD3LM_TEST_DATA")
    if not root:
        pytest.skip("BD3LM_TEST_DATA does not name the folder with the larger test data")
    return Path(root) / "data"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The shipped one."""
    return load_tokenizer("default")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A jsonl file of `TEXTS`."""
    path = tmp_path / "corpus.jsonl"
    lines = (json.dumps({"text": text, "number": str(i % 2)}) for i, text in enumerate(TEXTS))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tiny_model(vocab_size: int = VOCAB_SIZE, **changes: object) -> Transformer:
    """A two-layer model with random weights everywhere, head and closed branches included."""
    cfg = dataclasses.replace(ModelConfig(width=16, depth=2, heads=2), **changes)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = Transformer(cfg, vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return model.eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Clean ids behind a BOS (id 0)."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, MASK_ID, shape, generator=generator)
    ids[..., 0] = 0
    return ids


def token_arrays(num: int, seed: int = 0) -> TokenArrays:
    """One document of random ids."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, MASK_ID, (num,), generator=generator).tolist()
    return TokenArrays([ids], vocab_size=VOCAB_SIZE, bos_id=0, eos_id=1, mask_id=MASK_ID)


@pytest.fixture(scope="session")
def trained() -> tuple[Transformer, TokenArrays]:
    """A small model that has learned something, so that losses depend on the level."""
    from bd3lm.data import Loader, Rows
    from bd3lm.systems import BlockDiffusion

    torch.manual_seed(0)
    ids = [[1 + (i * i + 3 * i) % 7 for i in range(4000)]]
    data = TokenArrays(ids, vocab_size=VOCAB_SIZE, bos_id=0, eos_id=1, mask_id=MASK_ID)
    model = Transformer(ModelConfig(width=32, depth=2, heads=2), VOCAB_SIZE)
    system = BlockDiffusion(4, MASK_ID)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = Loader(Rows(data, seq_len=16, block_size=4), 32, 1)
    for step in range(40):
        batch = loader.batch(step, system.noise(step))
        (system.loss(model, batch) / batch.num_noisable).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), data
