"""Text as people have it: every kind is read, or refused with the reason."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bd3lm.data import Dataset, Tokenizer, load_tokenizer, prepare, read_documents
from bd3lm.data.resolve import open_splits
from bd3lm.errors import Bd3lmError, ConfigError, EmptyCorpusError, FormatError

STORY = "The old house stood by the river, and nobody lived there.\n"


def documents(folder: Path, tokenizer: Tokenizer) -> list[str]:
    data = Dataset(folder)
    return [tokenizer.decode(data.document(i).tolist()) for i in range(data.num_documents)]


def test_one_book(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = STORY * 40
    (tmp_path / "book.txt").write_text(text)
    for share in (0.02, 0.1, 0.5):
        out = tmp_path / f"set{share}"
        train, valid = prepare([tmp_path / "book.txt"], tokenizer, out, valid_fraction=share)
        parts = [documents(out / side, tokenizer) for side in ("train", "valid")]
        assert [len(part) for part in parts] == [1, 1]
        assert parts[0][0] + parts[1][0] == text
        assert train.num_bytes + valid.num_bytes == len(text)
        assert abs(valid.num_bytes / len(text) - share) < 0.05


def test_open_splits_of_one_small_file(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_text(STORY * 35)
    notes: list[str] = []
    splits = open_splits(
        str(tmp_path / "input.txt"), None, "default", tmp_path / "work", notes.append
    )
    assert splits.train.num_tokens > 10 * splits.valid.num_tokens > 0
    assert notes == [f"tokenizing {tmp_path}/input.txt, 5% of it held out for validation"]


def test_few_documents_and_a_small_share(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for i in range(14):
        (tmp_path / f"book{i:02}.txt").write_text(f"book {i}: {STORY}")
    made = prepare([tmp_path], tokenizer, tmp_path / "set", valid_fraction=0.02)
    assert [m.num_documents for m in made] == [13, 1]
    assert documents(tmp_path / "set" / "valid", tokenizer) == [f"book 13: {STORY}"]


def test_a_document_that_cannot_be_divided(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(EmptyCorpusError, match="validation would hold 0 of 1 documents of"):
        prepare([tmp_path / "x.txt"], tokenizer, tmp_path / "set", valid_fraction=0.1)
    assert not (tmp_path / "set").exists()


def test_the_reason_of_an_empty_corpus(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "n": 1}\n{"text": "b", "n": 2}\n')
    with pytest.raises(EmptyCorpusError, match="none of the 2 records has n = 3"):
        prepare([path], tokenizer, tmp_path / "set", where=("n", "3"))
    path.write_text('{"text": null}\n{"text": ""}\n{"text": ""}\n')
    with pytest.raises(EmptyCorpusError, match="of 3 records, 2 empty, 1 null"):
        prepare([path], tokenizer, tmp_path / "set")


def test_records_are_counted_in_the_manifest(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = [
        '{"text": "one", "x": NaN}',
        '{"text": null}',
        '{"text": "half \\ud83d"}',
        "{",
        '{"text": ""}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    (manifest,) = prepare([tmp_path / "x.jsonl"], tokenizer, tmp_path / "set")
    records = manifest.records
    assert records is not None
    assert documents(tmp_path / "set", tokenizer) == ["one", "half \ufffd"]
    assert (records.read, records.null, records.repaired, records.bad, records.empty) == (
        *(5, 1, 1),
        *(1, 1),
    )
    assert records.first_bad is not None
    assert "record 4: not valid JSON" in records.first_bad
    assert Dataset(tmp_path / "set").manifest == manifest
    with pytest.raises(FormatError, match="record 4: not valid JSON"):
        prepare([tmp_path / "x.jsonl"], tokenizer, tmp_path / "strict", strict=True)


def test_numbers_and_fields_of_fields(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = [
        {"data": {"body": f"text {i}"}, "n": i, "even": i % 2 == 0, "x": i / 2} for i in range(4)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "x.parquet")
    pq.write_table(
        pa.Table.from_pylist(lines).cast(
            pa.schema(
                [
                    ("data", pa.struct([("body", pa.large_string())])),
                    ("n", pa.int8()),
                    ("even", pa.bool_()),
                    ("x", pa.float32()),
                ]
            )
        ),
        tmp_path / "y.parquet",
    )
    for name in ("x.jsonl", "x.parquet", "y.parquet"):
        for where, numbers in [
            (("n", "1"), [1]),
            (("even", "true"), [0, 2]),
            (("even", "False"), [1, 3]),
            (("x", "0.5"), [1]),
            (("data.body", "text 3"), [3]),
        ]:
            found = read_documents(tmp_path / name, text_field="data.body", where=where)
            assert found == [f"text {i}" for i in numbers], (name, where)


def test_parquet_of_every_usual_shape(tmp_path: Path) -> None:
    texts = [STORY * (i % 3) if i % 5 else None for i in range(300)]
    expected = [text for text in texts if text]
    table = pa.table({"Text": texts, "list": [["a"]] * 300})
    for codec in ("none", "snappy", "gzip", "brotli", "zstd", "lz4"):
        for options in (
            {"data_page_version": "2.0"},
            {"use_dictionary": False, "column_encoding": {"Text": "DELTA_BYTE_ARRAY"}},
            {"use_dictionary": False, "column_encoding": {"Text": "DELTA_LENGTH_BYTE_ARRAY"}},
            {"row_group_size": 7, "write_page_checksum": True},
        ):
            path = tmp_path / "x.parquet"
            names = {k: v for k, v in options.items() if k != "column_encoding"}
            if "column_encoding" in options:
                pq.write_table(table.select(["Text"]), path, compression=codec, **options)
            else:
                pq.write_table(table, path, compression=codec, **names)
            assert read_documents(path) == expected, (codec, options)
    pq.write_table(table, path)
    with pytest.raises(FormatError, match="its column list is a list: must be one value"):
        read_documents(path, text_field="list")
    with pytest.raises(FormatError, match=r"no column gone, only Text, list\.list\.element"):
        read_documents(path, text_field="gone")


def test_a_damaged_page_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"text": [STORY + str(i) for i in range(100)]}),
        path,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match="not a readable parquet file"):
        read_documents(path)


def test_standard_input(tokenizer: Tokenizer, tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": STORY + str(i)}) + "\n" for i in range(30)).encode()
    code = "from bd3lm.cli.prepare import main; main()"
    for place, content in [
        ("-", lines),
        ("/dev/stdin", lines),
        ("-", gzip.compress(lines)),
        ("-", b"[" + lines.replace(b"}\n", b"},")[:-1] + b"]"),
    ]:
        out = tmp_path / "set"
        arguments = [place, "--out", str(out), "--valid-fraction", "0.1"]
        subprocess.run(
            [sys.executable, "-c", code, *arguments], input=content, check=True, capture_output=True
        )
        found = documents(out / "train", tokenizer) + documents(out / "valid", tokenizer)
        assert sorted(found) == sorted(STORY + str(i) for i in range(30))
        subprocess.run(["rm", "-r", str(out)], check=True)


def test_another_tokenizer_than_the_data_has(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(STORY * 40)
    other = tmp_path / "other.json"
    definition = json.loads(tokenizer.json)
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    other.write_text(json.dumps(definition))
    prepare([tmp_path / "x.txt"], load_tokenizer(other), tmp_path / "set", valid_fraction=0.2)
    notes: list[str] = []
    work = tmp_path / "work"
    for name in ("default", str(other)):
        open_splits(str(tmp_path / "set"), None, name, work, notes.append)
    third = tmp_path / "third.json"
    definition["model"]["merges"] = definition["model"]["merges"][:-1]
    third.write_text(json.dumps(definition))
    with pytest.raises(ConfigError, match=r"tokenizer = .*third\.json: must be left out or the"):
        open_splits(str(tmp_path / "set"), None, str(third), work, notes.append)
    # Text given with prepared data is made with that data's tokenizer.
    splits = open_splits(
        str(tmp_path / "set" / "train"), str(tmp_path / "x.txt"), "default", work, notes.append
    )
    assert splits.valid.manifest.tokenizer_sha256 == splits.train.manifest.tokenizer_sha256


def test_a_field_of_another_name(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"sentence": "a"}\n')
    path = tmp_path / "x.jsonl"
    with pytest.raises(FormatError, match="it has no field text, only sentence"):
        open_splits(str(path), None, "default", tmp_path / "work", print)


@pytest.mark.slow
def test_one_line_longer_than_a_part(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Long texts like text8 and enwik8 get the ids of the whole."""
    text = ("anarchism originated as a term of abuse " * (68_000_000 // 40)).rstrip()
    (tmp_path / "text8").write_text(text)
    ids = tokenizer.encode(text[: 40 * 1000])
    for lines in (False, True):
        (manifest,) = prepare([tmp_path / "text8"], tokenizer, tmp_path / "set", lines=lines)
        assert manifest.num_documents == 1
        assert manifest.num_bytes == len(text)
        assert manifest.records is not None
        assert manifest.records.long == 1
        data = Dataset(tmp_path / "set").document(0)
        # The text repeats, and so do its ids, also over the cuts.
        period = len(tokenizer.encode(text[: 40 * 100])) // 100
        body = data[period:-1]
        assert (body[period:] == body[:-period]).all()
        assert data[: len(ids) - period].tolist() == ids[:-period]
        subprocess.run(["rm", "-r", str(tmp_path / "set")], check=True)


MEMORY = """
import sys
from pathlib import Path
from bd3lm.data import load_tokenizer, prepare


def peak():  # of this process alone: ru_maxrss begins at that of the parent
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024


tokenizer = load_tokenizer("default")
before = peak()
(manifest,) = prepare([sys.argv[1]], tokenizer, sys.argv[2])
print(manifest.num_documents, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts of Linux")
def test_a_page_of_long_texts_takes_little_more_than_itself(tmp_path: Path) -> None:
    texts = ["the old house " * (60_000_000 // 14)] * 12
    pq.write_table(
        pa.table({"text": texts}), tmp_path / "x.parquet", compression="zstd", use_dictionary=False
    )
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "x.parquet", tmp_path / "set"],
        capture_output=True,
        text=True,
        check=True,
    )
    count, megabytes = map(int, done.stdout.split())
    assert count == 12
    assert 700 < megabytes < 1400, "720 MB are the page itself"


def mutated(content: bytes, draw: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(damaged))
        match draw.randrange(4):
            case 0:
                damaged[at] ^= 1 << draw.randrange(8)
            case 1:
                del damaged[at : at + draw.randrange(1, 50)]
            case 2:
                damaged[at:at] = os.urandom(draw.randrange(1, 9))
            case _:
                damaged[at : at + 4] = draw.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        if not damaged:
            return b""
    return bytes(damaged)


@pytest.mark.parametrize(
    "count", [6, pytest.param(200, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_damaged_files_are_read_or_named(count: int, tmp_path: Path) -> None:
    rows = [{"text": STORY + str(i), "n": i} for i in range(50)]
    lines = "\n".join(map(json.dumps, rows)).encode()
    contents = {"x.jsonl": lines, "x.json": json.dumps(rows).encode(), "x.txt": lines}
    contents |= {"x.jsonl.gz": gzip.compress(lines)}
    for suffix, codec in ((".zst", "zstd"),):
        contents[f"x.jsonl{suffix}"] = pa.compress(lines, codec=codec, asbytes=True)
    for codec in ("none", "snappy", "gzip", "brotli", "zstd", "lz4"):
        path = tmp_path / "whole.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path, compression=codec)
        contents[f"{codec}.parquet"] = path.read_bytes()
    draw = random.Random(0)
    for name, content in contents.items():
        for _ in range(count):
            (tmp_path / name).write_bytes(mutated(content, draw))
            try:
                read_documents(tmp_path / name, where=("n", "3") if draw.random() < 0.3 else None)
            except Bd3lmError as error:
                assert "\n" not in str(error)
