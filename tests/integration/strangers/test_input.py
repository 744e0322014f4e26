"""Text, tokenizers and places as people have them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bd3lm.cli import evaluate, prepare, sample, train
from tests.integration.strangers.common import TINY, refused

# --- text and tokenizers as people have them ------------------------------------------------------


def test_one_text_file_works_from_anywhere(tmp_path, capsys, monkeypatch):
    """A lone book, named by a relative path: trained, scored and sampled, also from elsewhere."""
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    book = " ".join(f"the old house of {i} stood by the river" for i in range(400))
    (here / "book.txt").write_text("\ufeff" + book, encoding="utf-8")
    monkeypatch.chdir(here)
    train.main(["--data", "book.txt", "--out", "run", *TINY])
    capsys.readouterr()
    os.rename(here / "run", elsewhere / "moved")
    (here / "book.txt").unlink()
    monkeypatch.chdir(elsewhere)
    evaluate.main(["moved", "--json"])  # the text is part of the run
    assert json.loads(capsys.readouterr().out)["tokens"] > 100
    sample.main(["moved", "--length", "16", "--prompt", "the old"])
    assert "the old" in capsys.readouterr().out
    train.main(["--out", "moved", "--resume", "--steps", "3"])
    assert "3 steps" in capsys.readouterr().out


def test_prepared_data_is_found_from_any_folder(folder, tmp_path, capsys, monkeypatch):
    """A run that was given relative paths; and what is said when the data has moved too."""
    monkeypatch.chdir(folder)
    out = tmp_path / "run"
    train.main(["--data", "data [v2]", "--out", str(out), *TINY])
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    moved = tmp_path / "moved"
    out.rename(moved)
    evaluate.main(["moved", "--json"])
    scored = json.loads(capsys.readouterr().out)
    train.main(["--out", "moved", "--resume", "--steps", "3"])
    capsys.readouterr()
    data = folder / "data [v2]"
    elsewhere = folder / "data"
    data.rename(elsewhere)
    try:
        sentence = refused(capsys, evaluate.main, "moved")
        assert f" no {data}/valid; name it with --data" in sentence
        evaluate.main(["moved", "--json", "--data", str(elsewhere)])
        assert json.loads(capsys.readouterr().out)["tokens"] == scored["tokens"]
        more = ["--out", "moved", "--resume", "--steps", "4"]
        sentence = refused(capsys, train.main, *more)
        assert "name the place where the same data is now with --data" in sentence
        train.main([*more, "--data", str(elsewhere)])
        assert "4 steps" in capsys.readouterr().out
    finally:
        elsewhere.rename(data)


def test_text_as_people_have_it(tmp_path, capsys):
    """One bad record costs one record, counted and shown; --strict refuses it."""
    lines = [
        '{"text": "the old house", "score": NaN, "meta": {"lang": "en"}}',
        '{"text": null, "meta": {"lang": "en"}}',
        '{"text": "half \\ud83d of an emoji", "meta": {"lang": "en"}}',
        '{"text": "it says <|mask|> and [MASK]", "meta": {"lang": "en"}}',
        '{"text": "cut off',
        '{"text": "la vieille maison", "meta": {"lang": "fr"}}',
        '{"text": 7, "meta": {"lang": "en"}}',
    ]
    file = tmp_path / "x.ndjson"
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    words = [file, "--where", "meta.lang=en"]
    prepare.main([*map(str, words), "--out", str(tmp_path / "o")])
    shown = capsys.readouterr().out
    assert "3 documents" in shown
    assert "1 with half a surrogate pair" in shown
    records = json.loads((tmp_path / "o" / "manifest.json").read_text())["records"]
    counts = {name: records[name] for name in ("read", "filtered", "null", "bad", "repaired")}
    assert counts == {"read": 7, "filtered": 1, "null": 1, "bad": 2, "repaired": 1}
    sentence = refused(capsys, prepare.main, *words, "--out", tmp_path / "s", "--strict")
    assert "record 5" in sentence


def test_a_tokenizer_as_people_have_it(tmp_path, capsys, tokenizer):
    """Dropout left on, a hole among the ids, one special token, another name of the mask."""
    definition = json.loads(tokenizer.json)
    model = definition["model"]
    model["dropout"] = 0.3
    kept = [token for token in definition["added_tokens"] if token["id"] == tokenizer.eos_id]
    last = max(model["vocab"].values())
    kept.append(dict(kept[0], id=last + 7, content="<|mdm_mask|>"))
    model["vocab"] = {k: v for k, v in model["vocab"].items() if v != tokenizer.mask_id}
    model["vocab"]["<|mdm_mask|>"] = last + 7
    (tmp_path / "t.json").write_text(json.dumps(definition | {"added_tokens": kept}))
    (tmp_path / "t.txt").write_text("the old house stood by the river\n" * 50)
    words = [str(tmp_path / "t.txt"), "--tokenizer", str(tmp_path / "t.json"), "--out"]
    contents = []
    for name in "ab":
        prepare.main([*words, str(tmp_path / name)])
        contents.append((tmp_path / name / "tokens.bin").read_bytes())
    assert contents[0] == contents[1]
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert (manifest["mask_id"], manifest["vocab_size"]) == (last + 7, last + 8)
    assert manifest["bos_id"] == manifest["eos_id"] == tokenizer.eos_id


# --- where output may go --------------------------------------------------------------------------


@pytest.mark.parametrize("split", [[], ["--valid-fraction", "0.5"]])
def test_prepare_writes_into_an_empty_folder(tmp_path, monkeypatch, split):
    monkeypatch.chdir(tmp_path)
    lines = "\n".join(f"the old house {i}" for i in range(20))
    Path("t.txt").write_text(lines)
    Path("here").mkdir()
    Path("real").mkdir()
    Path("link").symlink_to("real")
    inside = Path("here").stat().st_ino
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "../link", "../new"):
        prepare.main(["../t.txt", "--lines", *split, "--out", out])
        names = {"train", "valid"} if split else {"manifest.json", "tokens.bin"}
        assert names <= set(os.listdir(out))
        assert not any(name.startswith(".") for name in os.listdir(out))
    assert Path(".").stat().st_ino == inside
    assert Path("../link").is_symlink()
    assert not [name for name in os.listdir("..") if name.startswith(".")]


def test_outputs_that_cannot_be_made(tmp_path, capsys):
    text = tmp_path / "t.txt"
    text.write_text("the old house")
    assert "already exists" in refused(capsys, prepare.main, text, "--out", text)
    assert "is a file" in refused(capsys, train.main, "--out", text, *TINY)
    assert "/proc/x1" in refused(capsys, prepare.main, text, "--out", "/proc/x1/y")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "already exists" in refused(capsys, prepare.main, text, "--out", tmp_path / "full")
