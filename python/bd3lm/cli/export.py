"""``bd3lm export``: a checkpoint in another layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bd3lm.cli.common import PlainConsole, check_checkpoint, parse, read_text, run
from bd3lm.config import check
from bd3lm.errors import ExistsError

if TYPE_CHECKING:
    from bd3lm.checkpoint import Checkpoint

DESCRIPTION = """Write a checkpoint in another layout.

sdar: what SGLang, LMDeploy, JetEngine and transformers serve (Qwen3 tensors, preset qwen).
hf: for transformers; autoregressive models become Llama, Qwen or SmolLM3, others BD3LM.
bd3lm: our own, e.g. of imported weights, with another token as the mask."""


@dataclass(frozen=True)
class ExportArgs:
    """Options of the command."""

    checkpoint: tyro.conf.Positional[str]
    """Run or checkpoint directory, its URL, .gguf file or name on the Hugging Face hub."""
    out: tyro.conf.Positional[Path]
    """New directory."""
    layout: Literal["sdar", "hf", "bd3lm"]
    """Layout of the new directory."""
    vocab: Literal["engines", "keep"] = "engines"
    """sdar: engines moves the mask to id 151669 and pads to 151936 rows, as SGLang and LMDeploy
    assume; keep leaves the ids, for JetEngine and transformers."""
    text: Path | None = None
    """sdar: text file on which ids that were never trained must not be decoded, a document a line.
    None: the English text shipped with the package."""
    mask_token: str | None = None
    """Added token of an autoregressive model that becomes the mask. None: a new id."""
    as_ar: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Write a model with a causal clean stream as the autoregressive model that it also is."""

    def __post_init__(self) -> None:
        for name, default in (("vocab", "engines"), ("text", None)):
            value = getattr(self, name)
            unused = self.layout == "sdar" or value == default
            check(unused, name, value, f"left out with layout = {self.layout}")


def main(argv: Sequence[str] | None = None, prog: str = "bd3lm export") -> None:
    """Entry point of ``bd3lm export``."""
    run(lambda: export(parse(ExportArgs, prog, argv, description=DESCRIPTION)))


def export(args: ExportArgs) -> None:
    """Load, write, report."""
    check_checkpoint(args.checkpoint)
    if args.out.exists():
        raise ExistsError(f"{args.out} already exists; choose another directory")
    from bd3lm.checkpoint import load_checkpoint

    loaded = load_checkpoint(args.checkpoint)
    if args.mask_token is not None:
        tokenizer = loaded.tokenizer.with_mask(args.mask_token)
        loaded = load_checkpoint(args.checkpoint, tokenizer=tokenizer)
    loaded = loaded.as_autoregressive() if args.as_ar else loaded
    _write(args, loaded)
    count = sum(p.numel() for p in loaded.model.parameters())
    shape = f"{loaded.config.system}, {count / 1e6:.1f}M parameters"
    PlainConsole().print(
        f"{args.out}: layout {args.layout}, {shape}, mask id {loaded.tokenizer.mask_id}"
    )


def _write(args: ExportArgs, loaded: Checkpoint) -> None:
    from bd3lm.checkpoint import save_checkpoint, save_hf, save_sdar

    if args.layout == "hf":
        save_hf(args.out, loaded)
    elif args.layout == "sdar":
        text = None if args.text is None else read_text(args.text).splitlines()
        save_sdar(args.out, loaded, vocab=args.vocab, text=text)
    else:
        save_checkpoint(
            args.out,
            loaded.config,
            loaded.tokenizer,
            step=loaded.step,
            averaged={name: p.detach() for name, p in loaded.model.named_parameters()},
            training={},
            state={"system": loaded.learned} if loaded.learned else {},
        )
