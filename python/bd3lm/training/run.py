"""A whole run: data → training → likelihood → samples → ``summary.json``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bd3lm.checkpoint.record import read_json
from bd3lm.checkpoint.steps import FOLDER, StepFolders
from bd3lm.config import TrainConfig, check, from_dict, to_dict
from bd3lm.data import Dataset
from bd3lm.data.resolve import Splits, Verify, open_splits
from bd3lm.device import check_attention, compute_dtype, inference, resolve_device
from bd3lm.errors import CheckpointError, ConfigError, MissingFileError, StorageError
from bd3lm.evaluate import Likelihood, distinct_n, known_word_share
from bd3lm.evaluate.quality import words
from bd3lm.extras import require
from bd3lm.files import write_json, write_text
from bd3lm.model import Transformer, for_inference
from bd3lm.model.memory import training_memory
from bd3lm.model.scaling import rank_cost
from bd3lm.model.threads import adaptive_waiting
from bd3lm.ranks.group import ALONE, Ranks, joined, lost_ranks
from bd3lm.sample import Sample, Sampler
from bd3lm.systems import build_system
from bd3lm.training.callbacks import Callback, Callbacks, RunStart
from bd3lm.training.directory import (
    check_holds_run,
    holds_run,
    removed_on_failure,
    run_directory,
)
from bd3lm.training.failures import explained
from bd3lm.training.initial import adopt_shape
from bd3lm.training.interrupt import immediate
from bd3lm.training.mirror import Mirror, open_mirror
from bd3lm.training.parallel import check_ranks
from bd3lm.training.profile import StepProfiler
from bd3lm.training.reporter import Reporter
from bd3lm.training.settings import absolute_paths, check_resumed
from bd3lm.training.trainer import Trainer, resume_command

SUMMARY = "summary.json"


def saved_config(out: Path) -> TrainConfig:
    """Read the settings of the run in ``out``, to resume it.

    Raises:
        CheckpointError: there is no run, or its ``config.json`` is damaged.
    """
    check_holds_run(out)
    file = out / "config.json"
    try:
        return from_dict(TrainConfig, read_json(file))
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


@adaptive_waiting()
def run_training(
    cfg: TrainConfig,
    out: Path,
    reporter: Reporter,
    *,
    resume: bool = False,
    profile: bool = False,
    verify: Verify = "auto",
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train, score the validation split, draw samples; returns the content of ``summary.json``.

    Under ``torchrun``, or in a Slurm job step of several tasks, every process calls this, and they
    train together.

    Args:
        cfg: the settings; see :func:`check_resumed` for those that may change when resuming.
        out: directory of the run. New, unless resuming.
        reporter: receives the events.
        resume: continue the run in ``out`` from its last checkpoint, from its first step if it
            has saved none, and begin it if there is none. A run that has ended is not run again.
        profile: also watch a few steps, for ``out/profile.json``.
        verify: when the data sets are verified; see :class:`bd3lm.data.Dataset`.
        callbacks: follow the lines of ``metrics.jsonl``, on rank 0.

    Raises:
        ExistsError: ``out`` already holds files and ``resume`` is off, or another process trains
            in it.
        InterruptedRunError: a signal; the run can be resumed.
        LostRankError: another process of the job has ended.
        Bd3lmError: any bad input, before training starts and with nothing left behind; a failure
            of the machine.
    """
    cfg = absolute_paths(cfg)
    with joined(cfg.device, cfg.parallel.timeout_minutes) as ranks:
        check_ranks(cfg, ranks)
        _check_early(cfg)
        on_cpu = resolve_device(cfg.device).type == "cpu"
        check(on_cpu or not profile, "profile", profile, "False unless device = cpu")
        with explained(out), _directory(out, ranks, resume=resume):
            if cfg.mirror is not None:
                url, keep = cfg.mirror, cfg.keep
                ranks.by_first(lambda: open_mirror(url, out, keep, resume=resume))
            started = ranks.by_first(lambda: resume and holds_run(out))
            with immediate(f"stopped. Continue the run with: {resume_command(out)}"):
                if started:
                    cfg = ranks.by_first(partial(adopt_shape, cfg, out))
                    ended = ranks.every(lambda: _ended(cfg, out))
                    if ended is not None:
                        reporter.note(f"{out} has ended already, after step {cfg.steps}")
                        return ended
                how = {"started": started, "profile": profile, "verify": verify}
                return _run(cfg, out, reporter, ranks, callbacks, **how)


@contextmanager
def _directory(out: Path, ranks: Ranks, *, resume: bool) -> Iterator[None]:
    """Hold the directory of the run, on rank 0 for all of them."""
    held = run_directory(out, resume=resume) if ranks.first else nullcontext()
    ranks.by_first(held.__enter__)
    try:
        yield
    finally:
        held.__exit__(None, None, None)


def _run(
    cfg: TrainConfig,
    out: Path,
    reporter: Reporter,
    ranks: Ranks,
    callbacks: Sequence[Callback],
    *,
    started: bool,
    profile: bool,
    verify: Verify,
) -> dict[str, Any]:
    keeps = started or not ranks.first
    with nullcontext() if keeps else removed_on_failure(out), lost_ranks():
        if not started:
            cfg = ranks.by_first(partial(adopt_shape, cfg, out))
            _check_early(cfg)
        # From here on the run can be resumed.
        ranks.by_first(lambda: write_json(out / "config.json", to_dict(cfg)))
        splits = ranks.first_then_all(
            lambda: _splits(cfg, out, reporter, started=started, verify=verify)
        )
        trainer = _trainer(cfg, splits, out, reporter, ranks, resume=started)
        _sampler(trainer, trainer.model).resolve(cfg.sample)  # refused before training
        if cfg.mirror is not None:
            ranks.by_first(partial(_begin_mirror, trainer, cfg.mirror))
    reporter.note(_headline(trainer, splits))
    if profile:
        trainer.profiler = StepProfiler(cfg.steps - trainer.steps_done)
    trainer.callbacks = Callbacks(callbacks if ranks.first else (), reporter.note)
    start = RunStart(out, to_dict(cfg), trainer.steps_done)
    with _mirrored(trainer), trainer.callbacks.following(start) as ended:
        trainer.run()
        result = trainer.validate(quick=False)
        ranks.rest()
        with trainer.averaged() as model:
            ended |= ranks.by_first(lambda: _finish(trainer, model, splits, result))
    return ended


def _begin_mirror(trainer: Trainer, url: str) -> None:
    mirror = Mirror(url, trainer.out, trainer.checkpoints)
    mirror.begin()
    trainer.mirror = mirror


@contextmanager
def _mirrored(trainer: Trainer) -> Iterator[None]:
    """Wait at the end of the block until the copy of the run is complete.

    Raises:
        StorageError: it is not, and the block ended without an error.
    """
    mirror, note = trainer.mirror, trainer.reporter.note

    def finish() -> None:
        if mirror is not None:
            note(f"uploading the last checkpoint to {mirror.remote}")
            mirror.finish()

    try:
        yield
    except Exception:
        try:
            finish()
        except StorageError as failure:
            note(str(failure))
        raise
    trainer.ranks.rest()
    trainer.ranks.by_first(finish)


def _finish(
    trainer: Trainer, model: Transformer, splits: Splits, result: Likelihood
) -> dict[str, Any]:
    """Draw samples, write the summary."""
    samples, quality = _sample(trainer, model, splits)
    summary = _summary(trainer, result, samples, quality)
    if trainer.profiler is not None:
        summary["profile"] = trainer.profiler.result()._asdict()
        write_json(trainer.out / "profile.json", summary["profile"])
    write_json(trainer.out / SUMMARY, summary)
    return summary


def _splits(
    cfg: TrainConfig, out: Path, reporter: Reporter, *, started: bool, verify: Verify
) -> Splits:
    tokenizer = cfg.tokenizer
    if started and os.path.isabs(tokenizer) and not os.path.exists(tokenizer):
        latest = StepFolders(out / FOLDER, cfg.keep).latest()  # every checkpoint has a copy of it
        tokenizer = tokenizer if latest is None else str(latest / "tokenizer.json")
    try:
        return open_splits(
            cfg.data,
            cfg.valid,
            tokenizer,
            out / "data",
            reporter.note,
            text_field=cfg.text_field,
            verify=verify,
            cache_size=cfg.cache_size,
        )
    except MissingFileError as error:
        if not started:
            raise
        where = "name the place where the same data is now with --data or --valid"
        raise MissingFileError(f"{error}; {where}") from error


@adaptive_waiting()
def train_only(cfg: TrainConfig, splits: Splits, out: Path, reporter: Reporter) -> None:
    """Train to the last step and save, for other programs to build on.

    Args:
        cfg: the settings; ``data`` and ``valid`` are not read.
        splits: the text.
        out: directory of the run, which exists and is empty.
        reporter: receives the events.

    Raises:
        Bd3lmError: settings that do not fit the text, or a loss that is no number.
    """
    _check_early(cfg)
    with explained(out):
        write_json(out / "config.json", to_dict(cfg))
        _trainer(cfg, splits, out, reporter).run()


def _trainer(
    cfg: TrainConfig,
    splits: Splits,
    out: Path,
    reporter: Reporter,
    ranks: Ranks = ALONE,
    *,
    resume: bool = False,
) -> Trainer:
    """Make a trainer at its first step or, resuming, at the one it had reached."""
    _check_data(cfg, splits)
    latest = StepFolders(out / FOLDER, cfg.keep).latest
    resumes = resume and ranks.by_first(latest) is not None
    trainer = Trainer(cfg, splits.train, splits.valid, out, reporter, ranks, resumes=resumes)
    if resumes:
        trainer.resume()
        return trainer
    ranks.by_first(lambda: trainer.metrics.rewind(-1))
    if cfg.init_from is not None:
        trainer.start_from(cfg.init_from)
    return trainer


def _ended(cfg: TrainConfig, out: Path) -> dict[str, Any] | None:
    """Compare the settings with those of the run; returns its summary if it has ended.

    Raises:
        CheckpointError: the run's settings are damaged.
        ConfigError: a setting that must stay.
    """
    check_resumed(cfg, saved_config(out), out)
    if not ((out / SUMMARY).is_file() and (out / "samples.txt").is_file()):
        return None
    try:
        summary = read_json(out / SUMMARY)
    except CheckpointError:
        return None
    return summary if summary.get("steps") == cfg.steps else None


def _check_early(cfg: TrainConfig) -> None:
    """Refuse everything that can be refused before a single file is read."""
    check_attention(cfg, resolve_device(cfg.device))
    if cfg.lora.rank:
        require("peft", "lora", "lora.rank")
    for size in {cfg.block, *cfg.objective.block_sizes}:
        build_system(cfg.with_block(size), mask_id=0).noise(0).check(cfg.seq_len, size)


def _check_data(cfg: TrainConfig, splits: Splits) -> None:
    _ = splits.valid.tokenizer, splits.train.tokenizer  # read now: the data may be gone at the end
    if splits.valid.manifest.tokenizer_sha256 != splits.train.manifest.tokenizer_sha256:
        raise ConfigError("valid", cfg.valid, "prepared with the tokenizer of the training data")


def _headline(trainer: Trainer, splits: Splits) -> str:
    cfg = trainer.cfg
    parameters = sum(p.numel() for p in trainer.model.parameters())
    item = compute_dtype(cfg, trainer.device).itemsize
    ranks = trainer.ranks.size
    memory = training_memory(cfg, trainer.model, item).total
    where = f"{trainer.device},"
    if ranks > 1:
        memory = rank_cost(cfg, trainer.model, ranks, item).memory
        where = f"{ranks} ranks ({cfg.parallel.strategy}) of {trainer.device}, each with"
    size, trained = _million(parameters), sum(map(torch.numel, trainer.ema.weights.values()))
    if trained < parameters:
        size += f" ({_million(trained)} of adapters)"
    room = f"{memory / 1e9:.1f} GB" if memory >= 1e9 else f"{memory / 1e6:.0f} MB"
    return (
        f"{cfg.system}, S={cfg.block}, L={cfg.seq_len}: {size} parameters, "
        f"{splits.train.num_tokens:,} training tokens, {cfg.steps} steps of "
        f"{cfg.batch_size * cfg.seq_len:,} tokens on {where} about {room} of memory"
    )


def _million(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,}"


def _sample(
    trainer: Trainer, model: Transformer, splits: Splits
) -> tuple[list[Sample], dict[str, float]]:
    """Draw ``cfg.sample.num`` rows with the averaged weights and measure them."""
    cfg, tokenizer = trainer.cfg, trainer.tokenizer
    matrices, arithmetic = inference(cfg, trainer.device)
    sampler = _sampler(trainer, for_inference(model, matrices))
    with arithmetic:
        samples = sampler.generate(cfg.sample)
    texts = [tokenizer.decode(sample.ids) for sample in samples]
    rule = "\n" + "-" * 80 + "\n"
    write_text(trainer.out / "samples.txt", rule.join(texts) + "\n")
    valid = _text(splits.valid)
    size = sum(max(len(words(text)) - 1, 0) for text in texts)
    return samples, {
        "sample_known_words": known_word_share(texts, set(words(_text(splits.train)))),
        "sample_distinct_2": distinct_n(texts),
        "valid_distinct_2": distinct_n([valid], limit=size),
    }


def _sampler(trainer: Trainer, model: Transformer) -> Sampler:
    tokenizer = trainer.tokenizer
    return Sampler(
        model,
        trainer.system,
        window=trainer.cfg.seq_len,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        tokenizer=tokenizer,
    )


def _text(data: Dataset) -> str:
    """Documents of a data set, decoded; at most 32M tokens of it, which bounds memory."""
    parts, tokens = [], 0
    for index in range(data.num_documents):
        ids = data.document(index)
        parts.append(data.tokenizer.decode(ids.tolist()))
        tokens += len(ids)
        if tokens > 1 << 25:
            break
    return "\n".join(parts)


def _summary(
    trainer: Trainer, result: Likelihood, samples: list[Sample], quality: dict[str, float]
) -> dict[str, Any]:
    cfg = trainer.cfg
    return {
        "system": cfg.system,
        "block_size": cfg.block,
        "seq_len": cfg.seq_len,
        "init_from": cfg.init_from,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "steps": trainer.steps_done,
        "tokens": trainer.tokens_done,
        "seconds": trainer.seconds,
        "tokens_per_second": trainer.tokens_per_second,
        "mfu": trainer.mfu,
        "device": str(trainer.device),
        "threads": torch.get_num_threads(),
        "ranks": trainer.ranks.size,
        "val_nelbo": result.nelbo,
        "val_ppl": result.ppl,
        "val_bpb": result.bpb,
        "val_tokens": result.tokens,
        "val_coverage": result.coverage,
        "val_mc_error": result.mc_error,
        "val_data_error": result.data_error,
        "estimator": result.estimator,
        "nfe": sum(sample.nfe for sample in samples) / len(samples),
        **quality,
        "checkpoint": str(trainer.checkpoint),
    }
