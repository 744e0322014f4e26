"""Checkpoints of the Llama family: the logits of transformers, at every rotation and bias.

``tests/golden/llama_family.npz`` holds logits of transformers in float32 for small models at
every weight set to :func:`tests.checkpoints.weight` of its name, each with the ``config.json``
that the library wrote (``_v4``: by its version 4.57, the others by 5.24). ``tests/extras`` writes
it.
"""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
import torch
from safetensors.torch import load_file, save_file

from bd3lm import load_checkpoint as open_checkpoint
from bd3lm.checkpoint import load_checkpoint, save_hf
from bd3lm.config import TrainConfig, from_dict, preset
from bd3lm.data import load_tokenizer
from bd3lm.errors import CheckpointError, ConfigError, MissingFileError
from bd3lm.evaluate import distinct_n  # noqa: F401 - the package imports without the extra
from bd3lm.training import run_training
from tests.checkpoints import weight
from tests.integration.conftest import Silent, config, corpus  # noqa: F401 - fixtures

GOLDEN = Path(__file__).parent.parent / "golden" / "llama_family.npz"
VOCAB = 20
IDS = torch.tensor([0, 5, 17, 3, 3, 9, 12, 1, 19, 7, 6, 14])
SPECIAL = ["<|endoftext|>", "<|spare|>"]


def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN)) if GOLDEN.exists() else {}


CASES = sorted(name for name in golden() if "." not in name)


def write_folder(folder: Path, case: str = "llama", **changes: object) -> Path:
    """A checkpoint as the library writes it."""
    found = golden()
    folder.mkdir(parents=True)
    meta = json.loads(str(found[f"{case}.config"])) | changes
    meta = {name: value for name, value in meta.items() if value != "drop"}
    (folder / "config.json").write_text(json.dumps(meta))
    shapes = json.loads(str(found[f"{case}.shapes"]))
    tensors = {name: weight(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    vocab = {token: i for i, token in enumerate([*SPECIAL, *(f"w{i}" for i in range(2, VOCAB))])}
    inner = hf.Tokenizer(hf.models.WordLevel(vocab, unk_token="w2"))
    inner.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(SPECIAL)
    inner.save(str(folder / "tokenizer.json"))
    return folder


# --- import -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(tmp_path, case):
    loaded = load_checkpoint(write_folder(tmp_path / "model", case))
    with torch.no_grad():
        mine = loaded.model(IDS[None], 1)[0, :, :VOCAB].numpy()
    theirs = golden()[case]
    assert np.abs(theirs).max() > 1  # the comparison means something
    np.testing.assert_allclose(mine, theirs, atol=2e-5)
    assert loaded.config.system == "ar"


@pytest.mark.parametrize("case", ["qwen3", "llama3", "smollm3"])
def test_an_imported_model_scores_and_samples_at_once(tmp_path, case):
    """Packed, through the cache and token by token: the greedy tokens of whole forwards."""
    checkpoint = open_checkpoint(write_folder(tmp_path / "model", case), device="cpu")
    sample = checkpoint.generate("w5 w17 w3", length=14, temperature=0)[0]
    ids = [0, 5, 17, 3]
    while len(ids) < 14:
        with torch.no_grad():
            logits = checkpoint.model(torch.tensor([ids]), 1)[0, -1]
        logits[checkpoint.tokenizer.mask_id] = -torch.inf
        ids.append(int(logits.argmax()))
        if ids[-1] == 0:
            break
    assert [0, *sample.ids] == [i for n, i in enumerate(ids) if n == 0 or i != 0]


def test_the_mask_is_a_new_row_or_a_named_unused_one(tmp_path):
    folder = write_folder(tmp_path / "model", "smollm2")
    new = load_checkpoint(folder)
    assert (new.tokenizer.mask_id, new.model.vocab_size) == (VOCAB, VOCAB + 1)
    mean = weight("model.embed_tokens.weight", (VOCAB, 16)).mean(0)
    torch.testing.assert_close(new.model.embed.weight[VOCAB], mean)
    assert new.model.head.weight is new.model.embed.weight

    named = load_tokenizer(folder, mask_token="<|spare|>")
    assert (named.mask_id, named.vocab_size) == (1, VOCAB)
    assert named.encode("w5 w17") == [5, 17]
    spare = load_checkpoint(folder, tokenizer=named)
    assert spare.model.vocab_size == VOCAB
    with pytest.raises(ConfigError, match="mask-token = w3: must be an added token"):
        load_tokenizer(folder, mask_token="w3")
    with pytest.raises(ConfigError, match="must be a token other than those of a text's ends"):
        load_tokenizer(folder, mask_token="<|endoftext|>")
    with pytest.raises(ConfigError, match=r"must be left out: .* has <\|mask\|>"):
        named.with_mask("<|endoftext|>")
    with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
        load_checkpoint(folder, tokenizer="default")


def test_rows_that_pad_the_vocabulary_stay(tmp_path):
    """Qwen's matrices have more rows than its tokenizer has ids; the first of them is the mask."""
    folder = write_folder(tmp_path / "model", "qwen3", vocab_size=VOCAB + 4)
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], torch.full((4, 16), 0.1)])
    save_file(tensors, folder / "model.safetensors")
    loaded = load_checkpoint(folder)
    assert (loaded.tokenizer.mask_id, loaded.config.model.vocab_size) == (VOCAB, VOCAB + 4)
    with torch.no_grad():
        logits = loaded.model(IDS[None], 1)
    assert logits.shape[-1] == VOCAB + 4
    np.testing.assert_allclose(logits[0, :, :VOCAB].numpy(), golden()["qwen3"], atol=2e-5)


def test_weights_in_parts_are_read(tmp_path):
    folder = write_folder(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: t.half() for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": files}))
    loaded = load_checkpoint(folder)
    assert loaded.model.embed.weight.dtype == torch.float32
    with torch.no_grad():
        mine = loaded.model(IDS[None], 1)[0, :, :VOCAB].numpy()
    np.testing.assert_allclose(mine, golden()["llama"], atol=2e-2)  # the weights were rounded


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gemma3"}, "its model_type = gemma3 must be one of llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act = gelu: must be silu"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope_type = longrope"),
        ({"layer_types": ["sliding_attention"] * 2}, "sliding_attention: must be False"),
        ({"num_hidden_layers": 3}, "holds 2 blocks; its config.json says model.depth = 3"),
        ({"num_hidden_layers": 1}, r"holds a tensor model\.layers\.1\..* does not have"),
        ({"hidden_size": 32, "head_dim": 4}, r"embed_tokens.weight of shape \[20, 16\]"),
        ({"hidden_size": "drop"}, "config.json does not say hidden_size"),
        ({"num_attention_heads": 3, "head_dim": None}, "model.heads = 3: must be a divisor"),
    ],
)
def test_what_cannot_be_read_says_so(tmp_path, changes, sentence):
    folder = write_folder(tmp_path / "model", **changes)
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(folder)


def test_a_gguf_file_needs_its_extra_or_its_package(tmp_path):
    with pytest.raises(MissingFileError, match="no such file"):
        load_checkpoint(tmp_path / "none.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"bad\.gguf"):
        load_checkpoint(tmp_path / "bad.gguf")


# --- training and export ------------------------------------------------------------------------


def test_a_run_takes_shape_and_tokenizer_from_the_checkpoint(tmp_path):
    folder = write_folder(tmp_path / "model", "smollm2")
    text = tmp_path / "text.jsonl"
    documents = [" ".join(f"w{2 + (i * j) % 18}" for j in range(60)) for i in range(30)]
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    base = preset("qwen", data=str(text), steps=2, batch_size=2, seq_len=16, device="cpu")
    cfg = dataclasses.replace(
        base,
        init_from=str(folder),
        mask_token="<|spare|>",
        eval=dataclasses.replace(base.eval, every=0),
        sample=dataclasses.replace(base.sample, num=1, length=12),
    )
    summary = run_training(cfg, tmp_path / "run", Silent())
    saved = from_dict(TrainConfig, json.loads((tmp_path / "run" / "config.json").read_text()))
    assert (saved.model.width, saved.model.kv_heads, saved.model.tied_embeddings) == (16, 2, True)
    trained = load_checkpoint(tmp_path / "run" / "checkpoint")
    assert (trained.config.system, trained.tokenizer.mask_id) == ("bd3lm", 1)
    assert math.isfinite(summary["val_nelbo"])
    again = run_training(cfg, tmp_path / "run", Silent(), resume=True)  # it has ended
    assert again == summary
    cold = dataclasses.replace(cfg, init_from=None, mask_token="x")
    with pytest.raises(ConfigError, match="mask-token = x: must be None unless init-from"):
        run_training(cold, tmp_path / "b", Silent())
    nowhere = dataclasses.replace(cfg, init_from=str(tmp_path / "no"))
    with pytest.raises(MissingFileError):
        run_training(nowhere, tmp_path / "c", Silent())
    assert not (tmp_path / "c").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("case", CASES)
def test_export_gives_back_every_bit(tmp_path, case):
    folder = write_folder(tmp_path / "model", case)
    save_hf(tmp_path / "again", load_checkpoint(folder))
    theirs, mine = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert theirs.keys() == mine.keys()
    assert all(torch.equal(theirs[name], mine[name]) for name in theirs)
    assert (tmp_path / "again" / "README.md").is_file()
    first, second = load_checkpoint(folder).config, load_checkpoint(tmp_path / "again").config
    assert dataclasses.replace(first, tokenizer="") == dataclasses.replace(second, tokenizer="")
    kinds = [json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again")]
    assert kinds[0]["model_type"] == kinds[1]["model_type"]
