"""Functions of the original implementation, taken out of its files: it need not import here."""

from __future__ import annotations

import ast
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from timing import skip


def functions(file: str, *names: str) -> dict[str, Callable[..., Any]] | None:
    """Functions or methods of the folder that BD3LM_PEER names; None, said aloud, without it."""
    path = Path(os.environ.get("BD3LM_PEER", ""), file)
    if "BD3LM_PEER" not in os.environ or not path.is_file():
        skip(f"original's {', '.join(names)}", f"BD3LM_PEER does not name a folder with {file}")
        return None
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.stmt] = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in names
    ]
    found: dict[str, Any] = {"torch": torch, "itertools": itertools}
    exec(compile(ast.Module(nodes, []), str(path), "exec"), found)
    return {name: found[name] for name in names}


def masks() -> Callable[[int, int, int, tuple[float, float] | None], Any] | None:
    """Levels and masks of (rows, L, S, clip), as methods of a stand-in with its settings."""
    methods = functions("diffusion.py", "_sample_t", "q_xt", "_resample_q_xt")
    if methods is None:
        return None

    def run(rows: int, seq_len: int, block_size: int, clip: tuple[float, float] | None) -> Any:
        low, high = clip or (1e-3, 1.0)
        config = SimpleNamespace(
            training=SimpleNamespace(resample=clip is not None),
            model=SimpleNamespace(length=seq_len),
        )
        me = SimpleNamespace(
            block_size=block_size, mask_index=3, antithetic_sampling=True, config=config
        )
        me._resample_q_xt = MethodType(methods["_resample_q_xt"], me)
        shape, cpu = (rows, seq_len), torch.device("cpu")
        p = methods["_sample_t"](me, shape, cpu, low, high, block_size)
        return methods["q_xt"](me, torch.zeros(shape, dtype=torch.int64), p, block_size, low, high)

    return run


def group_texts() -> Callable[..., Any] | None:
    """Grouping of (examples, L, BOS, EOS)."""
    found = functions("dataloader.py", "_group_texts")
    return None if found is None else found["_group_texts"]
