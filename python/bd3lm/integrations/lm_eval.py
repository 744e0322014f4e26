"""The model ``bd3lm`` of EleutherAI's lm-evaluation-harness (extra ``lm-eval``).

    python -m bd3lm.integrations.lm_eval --model bd3lm \
        --model_args pretrained=runs/demo/checkpoint --tasks my_task --include_path tasks/

All options but the model's arguments are the harness's own. Importing this module registers the
model; results name the likelihood and its estimator under ``config``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal, cast

import lm_eval.models  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
import numpy as np
import torch
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from bd3lm.checkpoint import load_checkpoint
from bd3lm.config import MAX_EXACT_BLOCK, LikelihoodName, SampleConfig, check
from bd3lm.device import inference, resolve_device
from bd3lm.errors import Bd3lmError
from bd3lm.evaluate.score import Scoring, answer_windows
from bd3lm.evaluate.windows import Part
from bd3lm.sample import Sampler
from bd3lm.sample.strategies import Strategy
from bd3lm.sample.strategies.ordered import by_confidence, left_to_right

MAX_NEW_TOKENS = 256
"""Tokens of an answer where the task names no number: the harness's default."""
STRATEGIES: dict[str, Strategy] = {"left-to-right": left_to_right, "confidence": by_confidence}
"""Decoding order of a likelihood; the others are those of first hitting."""


@register_model("bd3lm")
class BD3LM(LM):
    """A checkpoint of bd3lm, scored and sampled by one and the same order of revealing.

    Args:
        pretrained: a checkpoint's directory, or its name on the hub.
        tokenizer: for a checkpoint that carries none.
        likelihood: marginal, left-to-right, confidence, orders or nelbo (docs/estimators.md).
            auto: marginal up to S = 4, its bound ``orders`` above and for time-conditioned
            models, nelbo where scores need not sum to one.
        repeats: orders, or draws of a sampled NELBO.
        block_size: S; None: the trained one.
        batch_size: rows a forward.
        max_batch_size: not used; the harness passes it.
        device: auto, cpu, cuda or cuda:N.
        precision: fp32, bf16 or auto.
        seed: of sampled estimators and of samples.

    Raises:
        Bd3lmError: a checkpoint that cannot be read, or a likelihood that it does not have.
    """

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        likelihood: str = "auto",
        repeats: int = 8,
        block_size: int | None = None,
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        device: str | None = None,
        precision: Literal["auto", "fp32", "bf16"] = "fp32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._device = _device(device)
        self.loaded = load_checkpoint(pretrained, self._device, tokenizer)
        self.system = self.loaded.system(block_size)
        self.block_size, self.repeats, self.precision = block_size, repeats, precision
        number = 32 if batch_size == "auto" else int(batch_size)
        check(number >= 1, "batch_size", batch_size, "at least 1")
        self.batch_size, self.seed = number, seed
        self.likelihood: LikelihoodName = self._resolve(likelihood)
        self.estimator = ""
        self._sampler: Sampler | None = None

    def _resolve(self, likelihood: str) -> LikelihoodName:
        if likelihood != "auto":
            return cast("LikelihoodName", likelihood)
        if self.system.unnormalized_scores:
            return "nelbo"
        conditioned = self.loaded.config.model.time_conditioning
        small = self.system.block_size <= MAX_EXACT_BLOCK
        return "marginal" if small and not conditioned else "orders"

    @property
    def tokenizer_name(self) -> str:
        """Digest of the tokenizer, for the harness's caches."""
        return self.loaded.tokenizer.sha256

    def get_model_info(self) -> dict[str, Any]:
        """Facts that the harness writes into its results."""
        return {
            "bd3lm_likelihood": self.likelihood,
            "bd3lm_estimator": self.estimator,
            "bd3lm_upper_bound": self.likelihood in ("nelbo", "orders"),
            "bd3lm_repeats": self.repeats,
            "bd3lm_block_size": self.system.block_size,
            "bd3lm_system": self.system.name,
            "bd3lm_step": self.loaded.step,
        }

    # --- likelihoods -------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation given its context, and whether it is greedy.

        Greedy means that greedy decoding gives the continuation: in the likelihood's order, or in
        every order that was scored where it has several.
        """
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each whole text behind a BOS; long ones in windows."""
        texts = [self.loaded.tokenizer.encode(request.args[0]) for request in requests]
        return [found for found, _ in self._score([((), text) for text in texts])]

    def _pair(self, context: str, continuation: str) -> Part:
        """Tokenize as the harness does: spaces that end a context belong to the continuation."""
        encode = self.loaded.tokenizer.encode
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if not context:
            return (), encode(continuation)
        whole, before = encode(context + continuation), encode(context)
        if len(whole) > len(before):
            return whole[: len(before)], whole[len(before) :]
        return before, encode(continuation)

    def _score(self, parts: Sequence[Part]) -> list[tuple[float, bool]]:
        """Nothing to score has probability one."""
        scored = [index for index, (_, answer) in enumerate(parts) if len(answer)]
        results = [(0.0, True)] * len(parts)
        if not scored:
            return results
        windows = answer_windows(self.loaded, [parts[index] for index in scored], self.block_size)
        scoring = Scoring.prepare(
            self.loaded,
            windows,
            repeats=self.repeats,
            block_size=self.block_size,
            precision=self.precision,
        )
        found = scoring.likelihood(
            self.likelihood, batch_size=self.batch_size, seed=self.seed, greedy=True
        )
        self.estimator = found.estimator
        assert found.row_greedy is not None
        nats = windows.totals(found.row_nats, len(scored))
        missed = windows.totals((~found.row_greedy).astype(np.float64), len(scored))
        for place, index in enumerate(scored):
            results[index] = (-float(nats[place]), bool(missed[place] == 0))
        return results

    # --- samples -----------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Continue each context up to a stop string, EOS or ``max_gen_toks`` tokens.

        Greedy unless the task samples. Request i draws the random numbers of row i,
        in any batch.
        """
        texts: list[str] = []
        for options, group in groupby((request.args for request in requests), key=_options):
            contexts = [context for context, _ in group]
            for start in range(0, len(contexts), self.batch_size):
                part = contexts[start : start + self.batch_size]
                texts += self._continue(part, options, first=len(texts))
        return texts

    def _continue(self, contexts: list[str], options: dict[str, Any], first: int) -> list[str]:
        """Answers of one batch, whose rows share their settings."""
        tokenizer, sampler = self.loaded.tokenizer, self._sampling()
        stops = _stops(options)
        limit = int(options.get("max_gen_toks", MAX_NEW_TOKENS))
        prompts = [tokenizer.encode(text) if text else [] for text in contexts]
        length = 1 + max(map(len, prompts)) + limit
        if sampler.block_size == sampler.window:  # one block is the whole row
            length = min(length, sampler.window)
        cfg = replace(_sample_config(options), length=length, seed=self.seed)
        rows = {first + i: [sampler.bos_id, *prompt] for i, prompt in enumerate(prompts)}
        begins = {number: len(ids) for number, ids in rows.items()}
        running = set(rows)
        strategy = STRATEGIES.get(self.likelihood)
        answers: dict[int, str] = {}
        for event in sampler.stream(cfg, prompts, first=first, strategy=strategy):
            for number, block in event.blocks.items():
                rows[number] = rows[number][: event.start] + block
            for number, sample in event.ended.items():
                rows[number] = [sampler.bos_id, *sample.ids]
                running.discard(number)
            for number in event.blocks:
                ids = rows[number][begins[number] :]
                answers[number] = tokenizer.decode(ids[:limit])
                if len(ids) >= limit or any(stop in answers[number] for stop in stops):
                    running.discard(number)
            if not running:
                break
        return [_cut(answers[number], stops) for number in sorted(answers)]

    def _sampling(self) -> Sampler:
        if self._sampler is None:
            dtype, _ = inference(
                replace(self.loaded.config, precision=self.precision), self._device
            )
            self._sampler = Sampler.from_checkpoint(self.loaded, self.block_size, dtype)
        return self._sampler


def _device(name: str | None) -> torch.device:
    """The device of that name; the harness passes cuda:0 where none was given."""
    missing = name is not None and name.startswith("cuda") and not torch.cuda.is_available()
    if missing:
        logging.getLogger(__name__).warning("device = %s: no CUDA device, using the CPU", name)
    return resolve_device("auto" if missing or name is None else name)


def _options(args: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    return args[1]


def _stops(options: dict[str, Any]) -> list[str]:
    """Strings that end an answer."""
    until = options.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def _cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return min((text.split(stop)[0] for stop in stops), key=len, default=text)


def _sample_config(options: dict[str, Any]) -> SampleConfig:
    """Settings of a generation task, in the harness's names."""
    greedy = not options.get("do_sample", False)
    return SampleConfig(
        num=1,
        temperature=0.0 if greedy else float(options.get("temperature", 1.0)),
        top_p=float(options.get("top_p", 1.0)),
        top_k=options.get("top_k"),
    )


def main() -> None:
    """Run the harness's own command with the model ``bd3lm`` registered."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except Bd3lmError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
