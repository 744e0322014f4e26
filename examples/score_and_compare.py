"""Score a text under two models and say how sure the difference is.

Run: python examples/score_and_compare.py [CHECKPOINT [OTHER]]

Without OTHER, the same model with blocks of one token is compared. Both score the same rows, so
the error of the difference is far smaller than that of either score.
"""

import statistics
import sys
from pathlib import Path

from train_on_text import trained

import bd3lm
from bd3lm.evaluate import score


def main(checkpoint: Path, other: Path | None = None, data: Path | None = None) -> None:
    """Print both scores, the paired difference, and the least likely tokens."""
    run = bd3lm.load_checkpoint(checkpoint)
    data = data or Path(run.config.data) / "valid"
    first = score(run, data, per_token=True)
    second = score(other, data) if other else score(run, data, block_size=1)
    for name, result in (("first", first), ("second", second)):
        print(
            f"{name}: {result.nll:.4f} ± {result.data_error:.4f} nats a token, "
            f"{result.bpb:.3f} bits per byte"
        )

    rows = len(first.row_nats)
    per_row = [b - a for a, b in zip(first.row_nats, second.row_nats, strict=True)]
    error = statistics.stdev(per_row) * rows**0.5 / first.tokens
    print(f"second - first: {sum(per_row) / first.tokens:+.4f} ± {error:.4f} nats a token")

    tokens = sorted(zip(first.token_nats, first.token_ids, strict=True), reverse=True)
    words = [f"{run.tokenizer.decode([i]).strip()} ({nats:.1f})" for nats, i in tokens[:8]]
    print("least likely:", ", ".join(words))


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:3]]
    main(*given) if given else main(trained())
