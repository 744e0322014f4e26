"""``bd3lm export``: one checkpoint in another layout, or one sentence."""

import json

import pytest

from bd3lm.checkpoint import load_checkpoint
from bd3lm.cli.main import main
from tests.unit.test_llama_family import write_folder


def refused(capsys, *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["export", *map(str, words)])
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_imported_weights_become_a_checkpoint_of_ours_with_a_chosen_mask(tmp_path, capsys):
    folder = write_folder(tmp_path / "model", "smollm2")
    out = tmp_path / "ours"
    main(["export", str(folder), str(out), "--layout", "bd3lm", "--mask-token", "<|spare|>"])
    assert "layout bd3lm, ar, 0.0M parameters, mask id 1" in capsys.readouterr().out
    loaded = load_checkpoint(out)
    assert (loaded.tokenizer.mask_id, loaded.model.vocab_size) == (1, 20)
    assert json.loads((out / "config.json").read_text())["format"] == "bd3lm-checkpoint"
    main(["export", str(out), str(tmp_path / "again"), "--layout", "hf"])
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "llama"

    assert "already exists; choose another" in refused(capsys, folder, out, "--layout", "hf")
    message = refused(capsys, folder, tmp_path / "x", "--layout", "sdar")
    assert "system = ar: must be bd3lm" in message
    assert "--layout hf holds it" in message
    assert not (tmp_path / "x").exists()


def test_options_of_other_layouts_are_refused(tmp_path, capsys):
    words = ("somewhere", tmp_path / "x", "--layout", "hf", "--vocab", "keep")
    assert "vocab = keep: must be left out with layout = hf" in refused(capsys, *words)
    words = ("/nowhere/at/all", tmp_path / "x", "--layout", "hf")
    assert "/nowhere/at/all: no such checkpoint directory" in refused(capsys, *words)
