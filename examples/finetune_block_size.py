"""Fine-tune a trained model to another block size.

Run: python examples/finetune_block_size.py [CHECKPOINT]

Larger blocks offer more tokens for one forward, and cost likelihood. A few steps at the new size
win some of it back.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from train_on_text import trained

import bd3lm
from bd3lm.evaluate import score


def main(checkpoint: Path, block_size: int = 16, **settings: Any) -> None:
    """Print bits per byte at ``block_size``, before and after fine-tuning."""
    config = bd3lm.load_checkpoint(checkpoint).config
    config = dataclasses.replace(
        config,
        block_size=block_size,
        init_from=str(checkpoint),
        **{"steps": 100} | settings,
    )
    out = checkpoint.parent.with_name(f"{checkpoint.parent.name}-s{block_size}")
    before = score(checkpoint, Path(config.data) / "valid", block_size=block_size)
    summary = bd3lm.train(config, out)
    print(
        f"S = {block_size}: {before.bpb:.3f} bits per byte before, {summary['val_bpb']:.3f} after"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else trained())
