"""``bd3lm sample``: text from a checkpoint."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from bd3lm.cli.common import PlainConsole, check_checkpoint, parse, read_text, run
from bd3lm.config import AttentionName, SampleConfig, check, check_whole
from bd3lm.errors import FormatError

if TYPE_CHECKING:
    from bd3lm.ranks.group import Ranks
    from bd3lm.sample import Sample, Sampler
    from bd3lm.sample.prompts import Prompt


@dataclass(frozen=True)
class SampleArgs:
    """Draw text from a trained model, block by block.

    With --hole the prompt is filled in instead of continued: each hole takes --hole-tokens tokens,
    and the sample ends with the prompt. A hole sees the text to its left, and the text to its
    right inside its own block.
    """

    checkpoint: tyro.conf.Positional[Path]
    """A run, a checkpoint in it, or a checkpoint of the original implementation (a directory or a
    name on the Hugging Face hub)."""
    tokenizer: str | None = None
    """Tokenizer of a checkpoint that carries none: a file, a folder or a hub name. None: gpt2."""
    prompt: str = ""
    """Text that every sample begins with."""
    prompts: Path | None = None
    """File with a prompt a line, or - for standard input. Each gets --num samples. In a .jsonl file
    a line is a JSON string."""
    hole: str | None = None
    """Characters that mark a hole in a prompt, ___ say. Spaces before a hole belong to it."""
    hole_tokens: int = 1
    """Tokens that fill a hole."""
    draw: Annotated[SampleConfig, tyro.conf.arg(name="")] = field(default_factory=SampleConfig)
    block_size: int | None = None
    """Sample with blocks of another size than the trained one."""
    as_ar: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Sample a model with a causal clean stream as the autoregressive model that it also is."""
    batch_size: int = 16
    """Samples drawn at once."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Matrices of the forwards. auto: bf16 where the device multiplies it faster. Logits and
    probabilities are summed in wider types."""
    attention: AttentionName = "auto"
    """Attention backend."""
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Print one JSON object a sample and nothing else."""
    live: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Show samples while they are drawn, one after the other: in a terminal each forward,
    elsewhere each finished block."""
    fps: float = 20.0
    """Forwards shown a second, at most, with --live. 0: as fast as they are drawn."""
    save_live: Path | None = None
    """Write the forwards of the samples to a page that plays them: .html, or .gif."""

    def __post_init__(self) -> None:
        check_whole("batch-size", self.batch_size, 1)
        check_whole("hole-tokens", self.hole_tokens, 1)
        if self.block_size is not None:
            check_whole("block-size", self.block_size, 1)
        check(not (self.json and self.live), "live", True, "off where --json is on")
        check(0 <= self.fps <= 1000, "fps", self.fps, "from 0 to 1000")
        check(self.hole != "", "hole", repr(self.hole), "at least one character")
        check(not (self.prompt and self.prompts), "prompts", self.prompts, "given without --prompt")
        endings = (".html", ".gif")
        page = self.save_live
        check(page is None or page.suffix in endings, "save-live", page, "a .html or .gif file")
        for name in ("prompt", "hole"):
            text = getattr(self, name) or ""
            valid = text.isascii() or text.encode(errors="replace").decode() == text
            check(valid, name, ascii(text), "valid UTF-8 text")


def main(argv: list[str] | None = None, prog: str = "bd3lm-sample") -> None:
    """Entry point of ``bd3lm-sample`` and ``bd3lm sample``."""
    run(lambda: sample(parse(SampleArgs, prog, argv)))


def sample(args: SampleArgs) -> None:
    """Load, draw, print."""
    check_checkpoint(args.checkpoint)
    prompts = [_parts(prompt, args) for prompt in _prompts(args)]

    from bd3lm.ranks.group import joined

    with joined(args.device) as ranks:
        live = args.live or args.save_live is not None
        check(ranks.size == 1 or not live, "live", True, "off where several ranks sample")
        _sample(args, prompts, ranks)


def _sample(args: SampleArgs, prompts: Sequence[Prompt], ranks: Ranks) -> None:
    from bd3lm.checkpoint import load_checkpoint
    from bd3lm.device import check_attention, inference, resolve_device
    from bd3lm.sample import Sampler

    device = resolve_device(args.device)
    loaded = load_checkpoint(args.checkpoint, device, args.tokenizer)
    loaded = loaded.as_autoregressive() if args.as_ar else loaded
    how = dataclasses.replace(loaded.config, precision=args.precision, attention=args.attention)
    check_attention(how, device)
    loaded.model.use_attention(args.attention)
    matrices, arithmetic = inference(how, device)
    sampler = Sampler.from_checkpoint(loaded, args.block_size, matrices)
    with arithmetic:
        if args.live or args.save_live is not None:
            _live(args, sampler, prompts)
        else:
            _draw(args, sampler, prompts, ranks)


def _prompts(args: SampleArgs) -> list[str]:
    """The prompt, or those of a file."""
    if args.prompts is None:
        return [args.prompt]
    lines = read_text(args.prompts).splitlines()
    if args.prompts.suffix == ".jsonl":
        lines = [_string(line, args.prompts, number) for number, line in enumerate(lines, 1)]
    check(len(lines) >= 1, "prompts", args.prompts, "a file with at least one line")
    return lines


def _string(line: str, path: Path, number: int) -> str:
    """A JSON string."""
    try:
        value = json.loads(line)
    except ValueError as error:
        raise FormatError(f"{path}, line {number}: not JSON ({error})") from error
    if not isinstance(value, str):
        raise FormatError(f"{path}, line {number}: not a JSON string")
    return value


def _parts(prompt: str, args: SampleArgs) -> Prompt:
    """A prompt with its holes: one None for each token to be filled in.

    A byte-level token of a word holds the space before it, so that space is part of the hole.
    """
    if args.hole is None:
        return prompt
    check(args.hole in prompt, "prompt", prompt, f"a text that holds the hole {args.hole}")
    before, *others = prompt.split(args.hole)
    parts: list[int | str | None] = [before.rstrip(" ")]
    for text in others[:-1]:
        parts += [*[None] * args.hole_tokens, text.rstrip(" ")]
    return [*parts, *[None] * args.hole_tokens, others[-1]]


def _rows(
    args: SampleArgs, sampler: Sampler, prompts: Sequence[Prompt]
) -> list[tuple[SampleConfig, Prompt]]:
    """Settings and prompt of each sample. A prompt with holes sets the length itself."""
    rows = []
    for prompt in prompts:
        cfg = dataclasses.replace(args.draw, num=1)
        if args.hole is not None and cfg.length is None:
            cfg = dataclasses.replace(cfg, length=1 + len(sampler.encode(prompt)))
        rows += [(cfg, prompt)] * args.draw.num
    return rows


def _draw(args: SampleArgs, sampler: Sampler, prompts: Sequence[Prompt], ranks: Ranks) -> None:
    """Draw batches of samples of one length, and print each batch when it is finished.

    The ranks of a job draw a batch each, of which rank 0 prints all.
    """
    from itertools import groupby

    from bd3lm.cli.progress import bar

    console = PlainConsole(stderr=args.json)
    batches: list[tuple[int, SampleConfig, list[Prompt]]] = []
    first = 0
    for cfg, group in groupby(_rows(args, sampler, prompts), key=lambda row: row[0]):
        same = [prompt for _, prompt in group]
        for start in range(0, len(same), args.batch_size):
            batch = same[start : start + args.batch_size]
            batches.append((first, cfg, batch))
            first += len(batch)
    total = sum(sampler.length(cfg) * len(batch) for _, cfg, batch in batches)
    done = 0
    with bar(console, shown=ranks.first) as progress:
        task = progress.add_task("sampling", total=total)
        for at in range(0, len(batches), ranks.size):
            some = batches[at : at + ranks.size]
            drawn: list[Sample] = []
            if ranks.rank < len(some):
                first, cfg, batch = some[ranks.rank]
                size = len(batch) * len(some)
                drawn = sampler.generate(
                    cfg,
                    batch,
                    first=first,
                    progress=lambda p, d=done, n=size: progress.update(task, completed=d + p * n),
                )
            for (first, cfg, batch), samples in zip(some, ranks.gather(drawn), strict=False):
                done += len(batch) * sampler.length(cfg)
                for index, one in enumerate(samples, first):
                    if ranks.first:
                        _print(args, index, one, console)


def _print(args: SampleArgs, index: int, drawn: Sample, console: PlainConsole) -> None:
    """Print one sample: its text as it is, or a JSON object."""
    if args.json:
        record: dict[str, Any] = {"index": index} | dataclasses.asdict(drawn)
        sys.stdout.write(json.dumps(record) + "\n")
        return
    title = f"sample {index + 1}: {len(drawn.ids)} tokens, {drawn.nfe} forwards, ended by "
    console.rule(title + drawn.stop)
    console.file.write(f"{drawn.text}\n")


def _live(args: SampleArgs, sampler: Sampler, prompts: Sequence[Prompt]) -> None:
    """Show samples while they are drawn, and keep their forwards for a page."""
    from bd3lm.cli.live import show
    from bd3lm.sample.replay import Recording, record

    console = PlainConsole(stderr=args.json)
    recordings = []
    for number, (cfg, prompt) in enumerate(_rows(args, sampler, prompts)):
        recording = Recording()
        frames = recording.keep(record(sampler, cfg, prompt, number))
        if args.live:
            show(frames, console, args.fps)
        else:
            drawn = [frame.sample for frame in frames if frame.sample is not None]
            _print(args, number, drawn[-1], console)
        recordings.append(recording)
    if args.save_live is not None:
        Recording([frame for one in recordings for frame in one.frames]).save(
            args.save_live, fps=args.fps or 20.0
        )
        console.print(f"wrote {args.save_live}")
