"""Fill holes in a text.

Run: python examples/infill.py [CHECKPOINT]

A block sees its given tokens and in the blocks before it. A model with S = L (`--system mdlm`)
sees everything that is given.
"""

import sys
from pathlib import Path

from train_on_text import trained

import bd3lm


def main(checkpoint: Path) -> None:
    """Print three ways to fill the same two holes."""
    run = bd3lm.load_checkpoint(checkpoint)
    prompt = ["The Mole", None, None, " by the river", None, None, None, " home."]
    tokens = sum(len(run.tokenizer.encode(p)) if isinstance(p, str) else 1 for p in prompt)
    for sample in run.generate(prompt, num=3, length=1 + tokens):  # BOS and the prompt, no more
        print(sample.text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else trained())
