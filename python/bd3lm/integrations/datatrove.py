"""Steps of datatrove pipelines that write a data set (extra ``datatrove``).

    from bd3lm.integrations.datatrove import DatasetJoiner, DatasetWriter

    tasks = 64
    steps = [JsonlReader("s3://corpus"), DatasetWriter("out")]
    write = SlurmPipelineExecutor(steps, tasks=tasks)
    SlurmPipelineExecutor([DatasetJoiner("out", tasks)], tasks=1, depends=write).run()

Each task writes a shard. The last step joins the shards by a manifest, without a rewrite.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep  # pyright: ignore[reportMissingImports]

from bd3lm.data import join, load_tokenizer, prepare_texts
from bd3lm.data.shards import shard_name
from bd3lm.errors import EmptyCorpusError, MissingFileError
from bd3lm.files import write_text


class DatasetWriter(PipelineStep):
    """Tokenize the documents of a task into a shard of a data set.

    A shard is whole or not there. A task that is run again after its shard was completed leaves
    the shard as it is, and a task without documents leaves a mark.

    Args:
        out: directory of the data set, on a file system that all tasks share.
        tokenizer: as for :func:`bd3lm.load_tokenizer`.
    """

    name = "bd3lm data set"
    type = "💽 - WRITER"

    def __init__(self, out: Path | str, tokenizer: str = "default") -> None:
        super().__init__()
        self.out, self.tokenizer = str(out), tokenizer

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write the shard of this task; passes no document on."""
        shard = Path(self.out) / shard_name(rank)
        if not shard.exists() and not _mark(shard).exists():
            texts = (document.text for document in data or ())
            try:
                manifest = prepare_texts(texts, load_tokenizer(self.tokenizer), shard)
            except EmptyCorpusError:
                shard.parent.mkdir(parents=True, exist_ok=True)
                write_text(_mark(shard), "")
            else:
                self.stat_update("documents", value=manifest.num_documents)
                self.stat_update("tokens", value=manifest.num_tokens)
        yield from ()


class DatasetJoiner(PipelineStep):
    """Join the shards of :class:`DatasetWriter`, as a pipeline of one task.

    Args:
        out: directory of the data set.
        tasks: how many tasks wrote to it.
    """

    name = "bd3lm join"
    type = "💽 - WRITER"

    def __init__(self, out: Path | str, tasks: int) -> None:
        super().__init__()
        self.out, self.tasks = str(out), tasks

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write the manifest.

        Raises:
            MissingFileError: a task has left no shard.
        """
        shards = [Path(self.out) / shard_name(task) for task in range(self.tasks)]
        for shard in shards:
            if not shard.exists() and not _mark(shard).exists():
                raise MissingFileError(f"{shard} is missing: run its task again, then join")
        join(self.out, [shard.name for shard in shards if shard.exists()])
        yield from ()


def _mark(shard: Path) -> Path:
    """The file that a task without documents leaves."""
    return shard.with_name(f"{shard.name}.empty")
