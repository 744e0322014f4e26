"""A datatrove pipeline writes a data set: in shards, joined by a manifest."""

import json

import pytest

pytest.importorskip("datatrove")

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader

from bd3lm.data import Dataset, load_tokenizer, prepare
from bd3lm.errors import MissingFileError
from bd3lm.integrations.datatrove import DatasetJoiner, DatasetWriter


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for part in range(3):
        records = [{"text": f"the old house {part} stood by the river {i}"} for i in range(40)]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{part}.jsonl").write_text(lines)
    return folder


def pipeline(source, out, logs, tasks):
    steps = [JsonlReader(str(source)), DatasetWriter(out)]
    return LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=str(logs))


def test_a_local_executor_writes_what_prepare_writes(source, tmp_path):
    out, tasks = tmp_path / "out", 4  # more tasks than files: one has no documents
    write = pipeline(source, out, tmp_path / "logs", tasks)
    write.run()
    (tmp_path / "logs" / "completions" / "00001").unlink()  # killed before it was noted
    pipeline(source, out, tmp_path / "logs", tasks).run()
    LocalPipelineExecutor([DatasetJoiner(out, tasks)], logging_dir=str(tmp_path / "join")).run()
    files = sorted(source.glob("*.jsonl"))
    prepare(files, load_tokenizer("default"), tmp_path / "whole")
    joined, whole = Dataset(out), Dataset(tmp_path / "whole")
    assert joined.num_documents == whole.num_documents == 120
    for index in range(whole.num_documents):
        assert joined.document(index).tolist() == whole.document(index).tolist()


def test_a_task_that_is_missing_is_not_joined(source, tmp_path):
    out = tmp_path / "out"
    list(DatasetWriter(out).run(JsonlReader(str(source)).run(rank=0, world_size=2), 0, 2))
    with pytest.raises(MissingFileError, match="shard-00001 is missing"):
        list(DatasetJoiner(out, 2).run())
