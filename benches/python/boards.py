"""An entry for one of the field's two boards: train, score, check every rule.

``nano`` is lapp0/nano-block-diffusion: the fewest training tokens to 3.44 nats a GPT-2 token of
FineWeb-Edu with blocks of 16. ``golf`` is openai/parameter-golf: the fewest bits a byte of FineWeb
by a model of 16 MB. The rules and where they are written: docs/boards.md.

``--scale full`` has the board's sizes and reads FineWeb; ``--scale small`` has the same rules with
a model of minutes on two cores and the text of the package. Options of ``bd3lm-train`` change the
entry's settings. The same command again continues a run that was stopped, and scores one that has
ended. Findings are written to OUT/board.json.

Run: python benches/python/boards.py nano|golf --out DIR [--scale small|full] [OPTIONS]
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from board_rules import NANO_BLOCK, Entry, Rule, golf_rules, nano_rules, score_text
from safetensors.torch import load, save

import bd3lm
from bd3lm.checkpoint import load_checkpoint
from bd3lm.cli.common import PlainConsole, parse, run
from bd3lm.cli.progress import RichReporter
from bd3lm.cli.summary import duration, facts
from bd3lm.config import TrainConfig, preset
from bd3lm.data import Rows
from bd3lm.data.resolve import open_splits
from bd3lm.device import resolve_device
from bd3lm.files import write_json
from bd3lm.model import Transformer
from bd3lm.training import holds_run, run_training


def pack(model: Transformer) -> bytes:
    """Compress the weights: matrices to 8 bits with a scale a row, vectors to 16, then zlib."""
    packed = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float().cpu()
        if weight.ndim < 2:
            packed[name] = weight.half()
            continue
        scale = (weight.abs().amax(1, keepdim=True) / 127).half()
        packed[name] = (weight / scale.float().clamp(min=1e-7)).round().clamp(-127, 127).char()
        packed[f"{name}.scale"] = scale
    return zlib.compress(save(packed), 9)


def unpack(artifact: bytes, model: Transformer) -> None:
    """Put packed weights into a model of the same shape."""
    packed = load(zlib.decompress(artifact))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = packed.get(f"{name}.scale")
            weight = packed[name].float()
            parameter.copy_(weight if scale is None else weight * scale.float())


def code_bytes() -> dict[str, int]:
    """Bytes of the code: this script and its rules, and the Python sources of the package."""
    package = Path(bd3lm.__file__).parent
    scripts = Path(__file__), Path(__file__).with_name("board_rules.py")
    parts = {"scripts": scripts, "package": package.rglob("*.py")}
    return {part: sum(p.stat().st_size for p in files) for part, files in parts.items()}


def nano_entry(scale: str) -> TrainConfig:
    """BD3-LM with S = 16, one pass over the data in its order."""
    base = preset("demo", block_size=NANO_BLOCK, shuffle=False, eval={"final_rows": 64})
    if scale == "small":
        return replace(base, batch_size=32, steps=256)
    shape = replace(base.model, width=768, depth=16, heads=6)
    return replace(
        base,
        data="hub:HuggingFaceFW/fineweb-edu@10BT[100000:]",
        valid="hub:HuggingFaceFW/fineweb-edu@10BT[:10000]",
        tokenizer="gpt2",
        model=shape,
        seq_len=1024,
        batch_size=128,
        steps=8000,
    )


def golf_entry(scale: str) -> TrainConfig:
    """BD3-LM with S = 4, a causal clean stream and the next-token loss (docs/recipe.md)."""
    base = preset("joint", eval={"final_rows": 64})
    if scale == "small":
        return base
    return replace(
        base,
        data="hub:fineweb@docs_selected[50000:]",
        valid="hub:fineweb@docs_selected[:50000]",
        model=replace(base.model, width=384, depth=4, heads=6),
        seq_len=1024,
        batch_size=128,
        steps=5000,
    )


BOARDS: dict[str, tuple[Callable[[str], TrainConfig], Callable[[Entry], list[Rule]]]] = {
    "nano": (nano_entry, nano_rules),
    "golf": (golf_entry, golf_rules),
}


def make_entry(board: str, cfg: TrainConfig, out: Path, console: PlainConsole) -> Entry:
    """Train or continue the run in ``out``, and score it; for golf as its artifact holds it."""
    with RichReporter(console, cfg.steps) as reporter:
        summary = run_training(cfg, out, reporter, resume=out.exists() and holds_run(out))
    device = resolve_device(cfg.device)
    loaded = load_checkpoint(out, device)
    artifact = {}
    if board == "golf":
        weights = pack(loaded.model)
        (out / "artifact.bin").write_bytes(weights)
        unpack(weights, loaded.model)
        tokenizer = len(loaded.tokenizer.json.encode())
        artifact = {"weights": len(weights), **code_bytes(), "tokenizer": tokenizer}
    texts = open_splits(
        cfg.data, cfg.valid, cfg.tokenizer, out / "data", console.print, text_field=cfg.text_field
    )
    rows = Rows(
        texts.train,
        seq_len=cfg.seq_len,
        block_size=cfg.largest_block,
        packing=cfg.packing,
        row_eos=cfg.row_eos,
    )
    return Entry(
        config=cfg,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "a processor",
        parameters=summary["parameters"],
        vocab_size=loaded.tokenizer.vocab_size,
        train_rows=len(rows),
        train_seconds=summary["seconds"],
        score=score_text(loaded, texts.valid),
        artifact=artifact,
    )


def report(board: str, entry: Entry, out: Path, console: PlainConsole) -> None:
    """Print the score, its parts and the verdicts, and write them to ``board.json``."""
    score, count = entry.score, entry.score.count
    rules = BOARDS[board][1](entry)
    lines = {
        "NELBO": f"{score.bits_per_byte:.4f} bits a byte, {score.nats:.4f} nats a token "
        f"({score.estimator})",
        "": f"± {score.mc_error:.4f} (estimator) ± {score.data_error:.4f} (rows) bits a byte",
        "text": f"{count.documents:,} documents, {count.tokens:,} tokens, {count.raw_bytes:,} "
        f"bytes: {count.raw_bytes / count.tokens:.3f} bytes a token",
        "trained": f"{entry.config.steps * entry.config.batch_size * entry.config.seq_len:,} "
        f"tokens in {duration(entry.train_seconds)}, {entry.parameters:,} parameters",
    }
    if score.marginal_bits_per_byte is not None:
        lines["exact"] = f"{score.marginal_bits_per_byte:.4f} bits a byte by first hitting"
    facts(console, f"Scored {out}", lines)
    console.print()
    facts(console, f"Rules of {board}", {r.rule: f"{r.verdict:14}  {r.value}" for r in rules})
    found = {"board": board, **asdict(score), "parameters": entry.parameters}
    write_json(out / "board.json", found | {"rules": [asdict(rule) for rule in rules]})


def main() -> None:
    """Parse, train, score, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("board", choices=BOARDS)
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument("--scale", choices=("small", "full"), default="small")
    args, words = parser.parse_known_args()
    default = BOARDS[args.board][0](args.scale)
    console = PlainConsole()
    cfg = parse(TrainConfig, f"boards.py {args.board}", words, default=default)
    report(args.board, make_entry(args.board, cfg, args.out, console), args.out, console)


if __name__ == "__main__":
    run(main)
