"""Cost of each decoding rule by itself: total variation to a known source, against forwards.

The exact posterior of a Markov chain takes the place of the network (bd3lm.evaluate.oracle).
pictures.py draws the figures.

Run: python benches/python/oracle.py [--num N] [--out FILE]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import RESULTS, write

from bd3lm.config import SampleConfig
from bd3lm.evaluate.oracle import MarkovSource, compare_decoding
from bd3lm.sample.strategies import Strategy
from bd3lm.sample.strategies.ordered import by_confidence, left_to_right

SIZE = 8
STAY = 0.9
RULES: dict[str, list[tuple[dict[str, Any], Strategy | None]]] = {
    "first hitting": [({}, None)],
    "left to right": [({}, left_to_right)],
    "confidence": [({}, by_confidence)],
    "ancestral": [({"steps": n}, None) for n in (1, 2, 4, 8, 16, 64)],
    "tokens a forward": [({"tokens_per_forward": k}, None) for k in (2, 3, 4, 7)],
    "threshold": [({"threshold": p}, None) for p in (0.95, 0.9, 0.8, 0.6, 0.4)],
    "entropy bound": [({"entropy_bound": b}, None) for b in (0.1, 0.3, 0.6, 1.0, 2.0)],
    "greedy, confidence": [({"temperature": 0.0}, by_confidence)],
}


def main() -> None:
    """Draw, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=50_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "oracle.json")
    args = parser.parse_args()
    source = MarkovSource.sticky(2, STAY, SIZE - 1)
    found = []
    for rule, settings in RULES.items():
        for setting, strategy in settings:
            value = next(iter(setting.values()), None)
            cfg = SampleConfig(**{"top_p": 1.0, **setting})
            point = compare_decoding(
                source, {rule: (cfg, strategy)}, block_size=SIZE, num=args.num
            )[rule]
            found.append({"rule": rule, "value": value, **asdict(point)})
            print(
                f"{rule} {'' if value is None else value}: {point.forwards:.3f} forwards a token, "
                f"total variation {point.total_variation:.4f} (exact draws: {point.floor:.4f})"
            )
    write(args.out, {"states": 2, "stay": STAY, "size": SIZE, "num": args.num, "found": found})


if __name__ == "__main__":
    main()
