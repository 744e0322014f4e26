"""Score text under a checkpoint: :func:`score`, :func:`conditional_likelihood`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from bd3lm.checkpoint import Checkpoint, load_checkpoint
from bd3lm.config import EstimatorName, EvalConfig, LikelihoodName, TrainConfig, check
from bd3lm.data import Dataset, NoiseSpec, Rows, Schedule
from bd3lm.data.hub import PREFIX
from bd3lm.data.remote import CACHE_SIZE
from bd3lm.data.resolve import Place, Verify, as_place, below, is_prepared, open_data
from bd3lm.data.store import TokenArrays
from bd3lm.device import autocast, check_attention
from bd3lm.errors import ConfigError, MissingFileError
from bd3lm.evaluate.likelihood import Likelihood, RowSource, evaluate_likelihood
from bd3lm.evaluate.variance import nelbo_variance
from bd3lm.evaluate.windows import Part, Windows
from bd3lm.ranks.group import ALONE, Ranks
from bd3lm.storage import is_url
from bd3lm.systems.sized_noise import schedule_of

Text = Dataset | Path | str | Sequence[str]
"""A prepared data set; a path of one, or of a text file; or one or several texts."""
Ids = str | Sequence[int]
"""A text, or token ids."""


def score(
    checkpoint: Checkpoint | Path | str,
    data: Text | None = None,
    *,
    likelihood: LikelihoodName = "nelbo",
    estimator: EstimatorName | str = "auto",
    repeats: int = 8,
    block_size: int | None = None,
    batch_size: int = 64,
    max_rows: int | None = None,
    seed: int = 0,
    per_token: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Likelihood:
    """Score a text: nats a token, perplexity and bits per byte, with standard errors.

    Rows are packed as those that the checkpoint was trained on. Strings are scored as they are,
    without an EOS; documents of a file end with one.

    Args:
        checkpoint: a loaded one, its directory, or its name on the hub.
        data: the text; a ``str`` is a text itself, a ``Path`` a file or a prepared directory. None:
            the validation split of the checkpoint's run.
        likelihood: nelbo, marginal, left-to-right, confidence or orders
            (:func:`evaluate_likelihood`, docs/estimators.md).
        estimator: of the NELBO; auto: exact up to S = 4, stratified above.
        repeats: draws of a sampled estimator; orders of the multi-order bound.
        block_size: S; None: the trained one.
        batch_size: rows a forward.
        max_rows: score so many rows, spread evenly over the text; None: all.
        seed: of the sampled estimators.
        per_token: also keep each token's nats (``token_ids``, ``token_nats``).
        progress: called with (rows done, rows in all).

    Raises:
        Bd3lmError: a checkpoint or a text that cannot be read, or a likelihood that this model
            does not have.

    Examples:
        >>> result = score("runs/demo/checkpoint", "The old house stood by the river.",
        ...                likelihood="marginal")  # doctest: +SKIP
        Examples:
            >>> result.nll, result.bpb  # doctest: +SKIP
    """
    loaded = _loaded(checkpoint)
    with tempfile.TemporaryDirectory() as work:
        scoring = Scoring.prepare(
            loaded,
            _open(loaded, data, Path(work)),
            estimator=estimator,
            repeats=repeats,
            block_size=block_size,
        )
        return scoring.likelihood(
            likelihood,
            batch_size=batch_size,
            max_rows=max_rows,
            seed=seed,
            per_token=per_token,
            progress=progress,
        )


def conditional_likelihood(
    checkpoint: Checkpoint | Path | str,
    prompt: Ids,
    answer: Ids,
    *,
    likelihood: LikelihoodName = "nelbo",
    estimator: EstimatorName | str = "auto",
    repeats: int = 8,
    block_size: int | None = None,
    seed: int = 0,
    per_token: bool = False,
) -> Likelihood:
    """Score an answer given a prompt.

    The prompt is clean context, its tail in the answer's first block too. Positions behind the
    answer in its last block stay masked, so this is the likelihood of a sampler that fills them
    last; an answer that ends its block does not depend on that. Text longer than the trained
    length L is scored in the windows of the sampler, each token once.

    Args:
        checkpoint: a loaded one, its directory, or its name on the hub.
        prompt: a text or token ids without BOS; may be empty.
        answer: likewise; texts are tokenized together and split where the prompt's tokens end.
        likelihood: as of :func:`score`.
        estimator: exact, stratified or count; auto as of :func:`score`.
        repeats: as of :func:`score`.
        block_size: S; None: the trained one.
        seed: of the sampled estimators; draws are a function of the seed and the tokens.
        per_token: also keep each token's nats.

    Returns:
        Its ``row_nats`` sum to the nats of the answer; ``bpb`` is None where ids were given.

    Raises:
        Bd3lmError: as of :func:`score`, and for an empty answer.
    """
    loaded = _loaded(checkpoint)
    part = encode_pair(loaded, prompt, answer)
    rows = answer_windows(loaded, [part], block_size)
    scoring = Scoring.prepare(
        loaded, rows, estimator=estimator, repeats=repeats, block_size=block_size
    )
    scoring.num_bytes = len(answer.encode()) if isinstance(answer, str) else None
    return scoring.likelihood(likelihood, seed=seed, per_token=per_token)


def encode_pair(loaded: Checkpoint, prompt: Ids, answer: Ids) -> Part:
    """Ids of a prompt and an answer, tokenized together where both are texts."""
    encode = loaded.tokenizer.encode
    if not (isinstance(prompt, str) and isinstance(answer, str)):
        ids = (encode(part) if isinstance(part, str) else list(part) for part in (prompt, answer))
        return next(ids), next(ids)
    before = encode(prompt) if prompt else []
    whole = encode(prompt + answer)
    return whole[: len(before)], whole[len(before) :]


def answer_windows(
    loaded: Checkpoint, parts: Sequence[Part], block_size: int | None = None
) -> Windows:
    """Rows that score answers given prompts, for a checkpoint's tokens and trained length."""
    return Windows(
        parts,
        seq_len=loaded.config.seq_len,
        block_size=loaded.system(block_size).block_size,
        bos_id=loaded.tokenizer.bos_id,
        mask_id=loaded.tokenizer.mask_id,
        vocab_size=loaded.tokenizer.vocab_size,
    )


def scoring_rows(cfg: TrainConfig, data: Dataset | TokenArrays) -> Rows:
    """Pack the rows a run is scored on: as its training rows, with nothing left out.

    A text with prompts is packed by ``best_fit``, and its responses alone are scored.

    Args:
        cfg: settings of the run; ``eval.stride`` lets the rows overlap.
        data: the text.
    """
    return Rows(
        data,
        seq_len=cfg.seq_len,
        block_size=cfg.block,
        packing="best_fit" if data.core.num_prompt_tokens else cfg.packing,
        row_eos=cfg.row_eos,
        stride=cfg.eval.stride,
        keep_last=True,
    )


@dataclass
class Scoring:
    """A checkpoint and rows, checked and ready to be scored.

    Attributes:
        loaded: the checkpoint.
        config: its settings, with those of the scoring in place.
        rows: the rows to score.
        num_bytes: UTF-8 bytes of the text; None where they are not known.
        schedule: levels of the ``bernoulli`` estimator.
    """

    loaded: Checkpoint
    config: TrainConfig
    rows: RowSource
    num_bytes: int | None
    schedule: Schedule

    @classmethod
    def prepare(
        cls,
        loaded: Checkpoint,
        data: Dataset | TokenArrays | Windows,
        *,
        estimator: EstimatorName | str = "auto",
        repeats: int = 8,
        block_size: int | None = None,
        stride: int | None = None,
        row_eos: bool = False,
        schedule: str = "loglinear",
        precision: str = "fp32",
        attention: str = "auto",
    ) -> Scoring:
        """Check the settings against the checkpoint and pack the rows.

        Args:
            loaded: the checkpoint.
            data: documents, which are packed, or rows.
            estimator: of the NELBO.
            repeats: draws of a sampled estimator.
            block_size: S; None: the trained one.
            stride: rows overlap and score their last ``stride`` tokens; None: they do not.
            row_eos: close every row with a scored EOS.
            schedule: of the ``bernoulli`` estimator, with the run's own parameters.
            precision: auto, fp32 or bf16.
            attention: backend.

        Raises:
            ConfigError: a setting that the checkpoint or its system does not allow.
        """
        same = loaded.config
        size = same.block if block_size is None else block_size
        changes: dict[str, object] = {
            "block_size": size,
            "objective": same.objective.of_one_size(size),
            "precision": precision,
            "attention": attention,
            "row_eos": same.row_eos or row_eos,
        }
        settings: dict[str, object] = {"estimator": estimator, "repeats": repeats, "stride": stride}
        try:  # the run's own checks decide whether this combination is allowed
            cfg = dataclasses.replace(same, eval=EvalConfig(**settings), **changes)  # type: ignore[arg-type]
        except ConfigError as error:  # eval.repeats of a run is `repeats` here
            raise error.renamed(error.field.removeprefix("eval.")) from None
        check_attention(cfg, next(loaded.model.parameters()).device)
        loaded.model.use_attention(attention)
        levels = dataclasses.replace(cfg.noise, schedule=schedule, paper_weights=False)
        rows = data if isinstance(data, Windows) else scoring_rows(cfg, data)
        num_bytes = data.manifest.num_bytes if isinstance(data, Dataset) else None
        if isinstance(data, TextArrays):
            num_bytes = data.num_bytes
        return cls(loaded, cfg, rows, num_bytes, schedule_of(levels))

    def likelihood(
        self,
        likelihood: LikelihoodName = "nelbo",
        *,
        batch_size: int = 64,
        max_rows: int | None = None,
        seed: int = 0,
        per_token: bool = False,
        greedy: bool = False,
        progress: Callable[[int, int], None] | None = None,
        ranks: Ranks = ALONE,
    ) -> Likelihood:
        """Score the rows; arguments as of :func:`evaluate_likelihood`."""
        with self._autocast():
            return evaluate_likelihood(
                self.loaded.system(self.config.block_size),
                self.loaded.model,
                self.rows,
                likelihood=likelihood,
                estimator=self.config.estimator,
                repeats=self.config.eval.repeats,
                batch_size=batch_size,
                max_rows=max_rows,
                num_bytes=self.num_bytes,
                seed=seed,
                schedule=self.schedule,
                per_token=per_token,
                greedy=greedy,
                progress=progress,
                ranks=ranks,
            )

    def variance_noise(self, estimator: EstimatorName | None) -> NoiseSpec:
        """The noise whose variance :meth:`variance` takes.

        Args:
            estimator: count or bernoulli, over all levels; None: the run's own training noise.

        Raises:
            ConfigError: a run that masks by frequency, without an estimator.
        """
        gap = self.loaded.config.noise.frequency_gap
        check(
            estimator is not None or gap == 0,
            "variance",
            True,
            "off, or go with --estimator count or bernoulli: a run that masks by frequency has a "
            "Var. NELBO on its training data only",
        )
        if estimator is not None:
            return NoiseSpec(self.schedule, estimator=estimator)
        return self.loaded.system(self.config.block_size).noise(0)

    def variance(self, noise: NoiseSpec, batch_size: int = 64, ranks: Ranks = ALONE) -> float:
        """Var. NELBO of packed rows (docs/math.md §6)."""
        assert isinstance(self.rows, Rows)
        system = self.loaded.system(self.config.block_size)
        with self._autocast():
            return nelbo_variance(
                system, self.loaded.model, self.rows, noise, batch_size=batch_size, ranks=ranks
            )

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast(self.config, next(self.loaded.model.parameters()).device)


class TextArrays(TokenArrays):
    """Texts in memory, tokenized.

    Args:
        texts: a document each; an EOS is not added.
        loaded: whose tokenizer is used.

    Raises:
        ConfigError: no text, or none with a token.
    """

    def __init__(self, texts: Sequence[str], loaded: Checkpoint) -> None:
        tokenizer = loaded.tokenizer
        documents = [ids for ids in map(tokenizer.encode, texts) if ids]
        check(len(documents) > 0, "text", "empty", "a text with at least one token")
        super().__init__(
            documents,
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            mask_id=tokenizer.mask_id,
        )
        self.num_bytes = sum(len(text.encode()) for text in texts)


def open_text(
    loaded: Checkpoint,
    path: Place | None,
    work: Path,
    note: Callable[[str], None],
    *,
    text_field: str = "text",
    lines: bool = False,
    detokenizer: str | None = None,
    eos: bool = True,
    verify: Verify = "auto",
    cache_size: int | str = CACHE_SIZE,
) -> Dataset:
    """Open the text to score, or tokenize it.

    Args:
        loaded: the checkpoint, whose tokenizer is used.
        path: a prepared directory or one with a ``valid/``, here or at a URL, a text file or
            ``hub:NAME``; None: the validation split of the checkpoint's run.
        work: empty directory for a tokenized text.
        note: called with a line for each slow step.
        text_field: field of jsonl and parquet records that holds the text.
        lines: a text file holds a document a line.
        detokenizer: rules for a tokenized benchmark text.
        eos: end documents of a text with EOS.
        verify: when a prepared data set is verified; see :class:`bd3lm.data.Dataset`.
        cache_size: bytes of the local cache of a data set at a URL.

    Raises:
        Bd3lmError: it cannot be read, or was prepared with another tokenizer.
    """
    path = validation_path(loaded) if path is None else path
    if not is_prepared(path) and is_prepared(below(path, "valid")):
        path = below(path, "valid")
    prepared = is_url(path) or Path(path).is_dir()
    check(
        not prepared or (detokenizer is None and eos and not lines),
        "data",
        path,
        "a text file where lines, detokenizer or no-eos is given: a prepared data set has its own",
    )
    check(
        not lines or not str(path).startswith(PREFIX),
        "lines",
        lines,
        "off for a data set of the hub, which has records",
    )
    data = open_data(
        path,
        loaded.tokenizer,
        work / "data",
        note,
        text_field=text_field,
        lines=lines,
        detokenizer=detokenizer,
        eos=eos,
        verify=verify,
        cache_size=cache_size,
    )
    check(
        data.manifest.tokenizer_sha256 == loaded.tokenizer.sha256,
        "data",
        path,
        f"prepared with the checkpoint's own tokenizer ({loaded.tokenizer.name})",
    )
    return data


def validation_path(loaded: Checkpoint) -> Place:
    """The validation data of a checkpoint's run: in its folder, or named by its settings.

    Raises:
        MissingFileError: there is none.
    """
    cfg = loaded.config
    places: list[Place] = [] if loaded.run is None else [loaded.run / "data" / "valid"]
    if cfg.valid is not None:
        places.append(as_place(cfg.valid))
    elif cfg.data is not None:
        places.append(below(as_place(cfg.data), "valid"))
    for place in places:
        if is_url(place) or Path(place).exists():
            return place
    where = f": there is no {' and no '.join(map(str, places))}" if places else ""
    raise MissingFileError(
        f"{loaded.path}: no validation data of its run was found{where}; name it with --data"
    )


def _loaded(checkpoint: Checkpoint | Path | str) -> Checkpoint:
    if isinstance(checkpoint, Checkpoint):
        return checkpoint
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return load_checkpoint(checkpoint, device)


def _open(loaded: Checkpoint, data: Text | None, work: Path) -> Dataset | TokenArrays:
    if isinstance(data, Dataset):
        return data
    if data is None or isinstance(data, Path):
        return open_text(loaded, data, work, lambda _: None)
    return TextArrays([data] if isinstance(data, str) else list(data), loaded)
