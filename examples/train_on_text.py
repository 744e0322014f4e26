"""Train a small model on a text file, score it, and draw from it.

Run: python examples/train_on_text.py [TEXT]

TEXT holds a paragraph a line; without it a novel from the package is used. About a minute on two
cores. The other examples use the model that this one leaves in runs/example.
"""

import json
import lzma
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import bd3lm

RUNS = Path("runs")


def main(text: Path | None = None, out: Path = RUNS / "example", **settings: Any) -> Path:
    """Train on ``text`` and return the checkpoint; ``settings`` change those of the preset."""
    text = text or write_novel(RUNS / "novel.txt")
    data = RUNS / f"{text.stem}-data"
    if not data.exists():
        tokenizer = bd3lm.load_tokenizer("default")
        bd3lm.prepare([text], tokenizer, data, lines=True, valid_fraction=0.05)

    config = bd3lm.preset("demo", data=str(data), **{"steps": 100} | settings)
    summary = bd3lm.train(config, out)
    print(f"{summary['val_bpb']:.3f} bits per byte of text that the model has not seen")

    run = bd3lm.load_checkpoint(out / "checkpoint")
    print(run.generate("The Mole", length=64, num=1)[0].text)
    return out / "checkpoint"


def write_novel(path: Path) -> Path:
    """Write a novel from the package to ``path``, a paragraph a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    corpus = files("bd3lm") / "assets" / "default_corpus.jsonl.xz"
    with corpus.open("rb") as packed, lzma.open(packed) as lines:
        books = [json.loads(line) for line in lines]
    novel = next(b["text"] for b in books if b["title"] == "The Wind in the Willows")
    paragraphs = [" ".join(p.split()) for p in novel.split("\n\n")]
    path.write_text("\n".join(p for p in paragraphs if p) + "\n", encoding="utf-8")
    return path


def trained() -> Path:
    """Return the checkpoint of this example's run; train it if there is none."""
    checkpoint = RUNS / "example" / "checkpoint"
    return checkpoint if checkpoint.exists() else main()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
