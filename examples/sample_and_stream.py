"""Draw samples, then watch one denoise.

Run: python examples/sample_and_stream.py [CHECKPOINT]
"""

import sys
from pathlib import Path

from train_on_text import trained

import bd3lm


def main(checkpoint: Path, length: int = 64) -> None:
    """Print three samples, and each forward of a fourth."""
    run = bd3lm.load_checkpoint(checkpoint)
    for sample in run.generate("The Mole", num=3, length=length):
        per_token = sample.log_prob / max(sample.nfe, 1)
        print(f"{sample.text!r}: {sample.nfe} forwards, {per_token:.2f} nats a token")

    # Several tokens a forward where the model is sure: fewer forwards, no longer exact.
    fast = run.generate("The Mole", num=1, length=length, entropy_bound=4.0)[0]
    print(f"{fast.text!r}: {fast.nfe} forwards")

    tokenizer = run.tokenizer
    for event in run.stream("The Mole", num=1, length=24):
        if event.complete:  # the block as its last forward left it
            continue
        tokens = event.blocks[0]
        words = ["▒▒▒" if t == tokenizer.mask_id else tokenizer.decode([t]) for t in tokens]
        print(f"{event.start:3} |{'|'.join(words)}|")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else trained())
