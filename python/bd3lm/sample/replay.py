"""Record the forwards of a sample, and write them as a page or a picture that plays them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from bd3lm.config import SampleConfig, check
from bd3lm.extras import require
from bd3lm.files import write_text
from bd3lm.sample.events import Sample
from bd3lm.sample.prompts import Prompt
from bd3lm.sample.sampler import Sampler

HIDDEN = "░"
"""Sign of a masked token."""
Kind = Literal["given", "drawn", "new", "masked"]
SURE, LIKELY = 0.9, 0.5
"""Probabilities from which a new token is shown as sure, or as likely."""
COLOURS = {"sure": "#0072b2", "likely": "#009e73", "unsure": "#d55e00"}
"""Colours of new tokens by confidence, from Okabe and Ito's palette for colour-blind readers."""


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one kind.

    Attributes:
        text: decoded; one :data:`HIDDEN` for each masked token.
        kind: given by the prompt, drawn before, new in this forward, or masked.
    """

    text: str
    kind: Kind


@dataclass(frozen=True)
class Frame:
    """A sample after one forward.

    Attributes:
        pieces: its text so far.
        forward: number of the forward, from 1.
        confidence: probability of the new tokens under the model; their geometric mean where
            there are several; None without new tokens.
        complete: whether a block ends here.
        sample: the finished sample, in its last frame.
    """

    pieces: tuple[Piece, ...]
    forward: int
    confidence: float | None
    complete: bool = False
    sample: Sample | None = None

    @property
    def text(self) -> str:
        """All pieces."""
        return "".join(piece.text for piece in self.pieces)

    @property
    def level(self) -> str:
        """``sure``, ``likely`` or ``unsure``; empty without new tokens."""
        if self.confidence is None:
            return ""
        if self.confidence >= SURE:
            return "sure"
        return "likely" if self.confidence >= LIKELY else "unsure"

    @property
    def caption(self) -> str:
        """One line on the forward, or on the finished sample."""
        if self.sample is not None:
            drawn = self.sample
            return f"{len(drawn.ids)} tokens, {drawn.nfe} forwards, ended by {drawn.stop}"
        sure = "" if self.confidence is None else f", p = {self.confidence:.2g} ({self.level})"
        return f"forward {self.forward}{sure}"


def record(
    sampler: Sampler, cfg: SampleConfig, prompt: Prompt = "", number: int = 0
) -> Iterator[Frame]:
    """Draw one sample and yield a frame after each forward.

    Args:
        sampler: with a tokenizer.
        cfg: the sampling settings; ``num`` is not used.
        prompt: see :data:`bd3lm.sample.sampler.Prompt`.
        number: of the row, which with the seed is its randomness.

    Raises:
        ConfigError: as of :meth:`Sampler.generate`; a sampler without a tokenizer.
    """
    check(sampler.tokenizer is not None, "tokenizer", None, "one, to record text")
    given = sampler.encode(prompt)
    ids: list[int] = [sampler.bos_id, *(sampler.mask_id if i is None else i for i in given)]
    from_prompt = {i + 1 for i, token in enumerate(given) if token is not None}
    forward, before = 0, 0.0
    for event in sampler.stream(replace(cfg, num=1), [prompt], first=number, every_step=True):
        block = event.blocks[number]
        old = ids[event.start : event.start + len(block)]
        old += [sampler.mask_id] * (len(block) - len(old))
        ids[event.start : event.start + len(block)] = block
        new = {
            event.start + i
            for i, (a, b) in enumerate(zip(old, block, strict=True))
            if a != b and event.start + i > 0
        }
        confidence = None
        if not event.complete:
            forward += 1
            total = event.log_prob[number]
            if new:
                confidence = math.exp((total - before) / len(new))
            before = total
        pieces = _pieces(sampler, ids, from_prompt, new)
        sample = event.ended.get(number)
        if sample is not None and sample.text is not None:
            pieces = (Piece(sample.text, "drawn"),)
        yield Frame(pieces, forward, confidence, event.complete, sample)


def _pieces(
    sampler: Sampler, ids: Sequence[int], given: set[int], new: set[int]
) -> tuple[Piece, ...]:
    """Text of the tokens after BOS, cut where their kind changes.

    Tokens between masks are decoded together, for a character or a space may depend on two.
    """
    tokenizer = sampler.tokenizer
    assert tokenizer is not None
    kinds: list[Kind] = [_kind(i, t == sampler.mask_id, given, new) for i, t in enumerate(ids)]
    pieces: list[Piece] = []
    for masked, run in groupby(range(1, len(ids)), key=lambda i: kinds[i] == "masked"):
        places = list(run)
        if masked:
            pieces.append(Piece(HIDDEN * len(places), "masked"))
            continue
        written = 0
        for _, part in groupby(places, key=lambda i: kinds[i]):
            last = list(part)[-1]
            text = tokenizer.decode(ids[places[0] : last + 1])
            pieces.append(Piece(text[written:], kinds[last]))
            written = len(text)
    return tuple(pieces)


def _kind(position: int, masked: bool, given: set[int], new: set[int]) -> Kind:
    if masked:
        return "masked"
    if position in new:
        return "new"
    return "given" if position in given else "drawn"


@dataclass
class Recording:
    """Frames of one sample or of several, one after the other."""

    frames: list[Frame] = field(default_factory=list)

    def keep(self, frames: Iterable[Frame]) -> Iterator[Frame]:
        """Pass frames on, and keep them."""
        for frame in frames:
            self.frames.append(frame)
            yield frame

    def save(self, path: Path | str, *, fps: float = 20.0) -> None:
        """Write a page (.html) or an animated picture (.gif).

        Args:
            path: the file.
            fps: frames a second.

        Raises:
            ConfigError: another ending.
            MissingPackageError: a .gif without Pillow and matplotlib's fonts.
        """
        path = Path(path)
        if path.suffix == ".gif":
            _save_gif(self.frames, path, fps)
            return
        check(path.suffix == ".html", "path", path, "a .html or .gif file")
        write_text(path, self.html(fps=fps))

    def html(self, *, fps: float = 20.0) -> str:
        """A page that needs no other file."""
        frames = [
            {
                "pieces": [[piece.text, piece.kind] for piece in frame.pieces],
                "level": frame.level,
                "caption": frame.caption,
            }
            for frame in self.frames
        ]
        # A text may hold tags that end the script, or begin another inside it.
        data = json.dumps(frames).replace("<", "\\u003c")
        rules = "".join(f".new.{name} {{ color: {value} }}\n" for name, value in COLOURS.items())
        return PAGE.replace("@RULES@", rules).replace("@FPS@", f"{fps:g}").replace("@FRAMES@", data)

    def _repr_html_(self) -> str:
        """The page in a frame of its own, for a notebook."""
        page = escape(self.html(), quote=True)
        return f'<iframe srcdoc="{page}" width="100%" height="320" frameborder="0"></iframe>'


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>bd3lm: a sample as it is drawn</title>
<style>
body { font: 16px/1.5 sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em }
#text { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 10em }
.given { color: #666 }
.masked { color: #bbb }
.new { font-weight: bold; text-decoration: underline }
.new.likely { text-decoration-style: dashed }
.new.unsure { text-decoration-style: dotted }
@RULES@#caption { color: #444; font-size: 14px }
input[type=range] { width: 100% }
</style></head><body>
<div id="text"></div>
<p id="caption"></p>
<input id="place" type="range" min="0" value="0" aria-label="forward">
<button id="play">pause</button>
<label>frames a second <input id="fps" type="number" min="1" max="200" value="@FPS@"></label>
<script>
const frames = @FRAMES@;
const get = id => document.getElementById(id);
let at = 0, playing = true;
get("place").max = frames.length - 1;
function draw() {
  const frame = frames[at];
  get("text").replaceChildren(...frame.pieces.map(([text, kind]) => {
    const span = document.createElement("span");
    span.textContent = text;
    span.className = kind === "new" ? "new " + frame.level : kind;
    return span;
  }));
  get("caption").textContent = frame.caption;
  get("place").value = at;
}
function tick() {
  if (playing && at < frames.length - 1) { at += 1; draw(); }
  setTimeout(tick, 1000 / Math.max(Number(get("fps").value) || 1, 0.1));
}
get("play").onclick = () => {
  if (!playing && at === frames.length - 1) at = 0;
  playing = !playing;
  get("play").textContent = playing ? "pause" : "play";
};
get("place").oninput = () => { at = Number(get("place").value); draw(); };
if (frames.length) { draw(); tick(); }
</script></body></html>
"""


# --- animated picture -----------------------------------------------------------------------------

COLUMNS, SIZE = 72, 16
"""Characters of a line, and height of a character in pixels."""
GREYS = {"given": "#666666", "drawn": "#000000", "masked": "#bbbbbb"}


def _save_gif(frames: Sequence[Frame], path: Path, fps: float) -> None:
    """Draw the frames in a font of fixed width; the last one stays for two seconds."""
    image: Any = require("PIL.Image", "plots", "a .gif")
    drawing: Any = require("PIL.ImageDraw", "plots", "a .gif")
    fonts: Any = require("PIL.ImageFont", "plots", "a .gif")
    manager: Any = require("matplotlib.font_manager", "plots", "a .gif")
    font = fonts.truetype(manager.findfont("DejaVu Sans Mono"), SIZE)
    width = font.getlength("m")
    lines = max((len(_cells(frame)) for frame in frames), default=1)
    pictures = []
    for frame in frames:
        picture = image.new(
            "RGB", (int(COLUMNS * width) + SIZE, int((lines + 2) * 1.4 * SIZE)), "white"
        )
        pen = drawing.Draw(picture)
        for row, cells in enumerate(_cells(frame)):
            for column, (character, kind) in enumerate(cells):
                colour = COLOURS[frame.level] if kind == "new" else GREYS[kind]
                place = (SIZE / 2 + column * width, (0.4 + 1.4 * row) * SIZE)
                pen.text(place, character, fill=colour, font=font)
        pen.text((SIZE / 2, (0.4 + 1.4 * (lines + 0.5)) * SIZE), frame.caption, "#444444", font)
        pictures.append(picture)
    check(bool(pictures), "frames", 0, "at least one")
    times = [max(round(1000 / fps), 20)] * (len(pictures) - 1) + [2000]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=times, loop=0)


def _cells(frame: Frame) -> list[list[tuple[str, Kind]]]:
    """Characters with their kinds, in lines of at most :data:`COLUMNS`."""
    lines: list[list[tuple[str, Kind]]] = [[]]
    for piece in frame.pieces:
        for character in piece.text:
            if character == "\n" or len(lines[-1]) == COLUMNS:
                lines.append([])
            if character != "\n":
                lines[-1].append((character, piece.kind))
    return lines
