"""The original implementation's checkpoints: same logits, same losses, same files.

``tests/golden/original.npz`` holds results of the original on a CPU in float32, with scaled
dot-product attention and dropout off, for a network of V=24, L=32, width 32, two layers, two heads
and a conditioning of 8, at every weight set to :func:`tests.checkpoints.weight` of its name.
``bd3lm_S``, ``mdlm``, ``ar``, ``sedd``: logits of its Hugging Face model (its own training code
gives the same bits).
``cached_4``: the same block by block through its cache, allocated in float32: a block's noised ids
are scored, then its clean ids stored. ``told_4``: its training network with one noise level a
position, 0 for the clean half. ``loss_*``: noised ids, loss weight, mask probability and nats that
its loss drew and computed on the clean ids ``x0`` with t in [1e-3, 1]; ``sedd_full`` with t = 1,
where the noise level that its network sees is capped.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as hf
import torch
from safetensors.torch import load_file, save_file

from bd3lm.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, save_original
from bd3lm.cli import evaluate, sample
from bd3lm.config import ModelConfig, NoiseConfig, TrainConfig
from bd3lm.data import Batch, Tokenizer, load_tokenizer, prepare
from bd3lm.data.resolve import open_splits
from bd3lm.errors import CheckpointError, ConfigError, MissingFileError
from bd3lm.model import KVCache, Transformer
from bd3lm.training import Trainer, run_training
from tests.checkpoints import weight
from tests.integration.conftest import Silent, story

VOCAB, LENGTH, WIDTH, HEADS, DEPTH, COND = 24, 32, 32, 2, 2, 8
MASK = VOCAB - 1
GOLDEN = dict(np.load(Path(__file__).parent.parent / "golden" / "original.npz"))
X0, XT = (torch.from_numpy(GOLDEN[name].astype(np.int64)) for name in ("x0", "xt"))
EVERY = torch.arange(X0.numel())
SYSTEMS = {
    "bd3lm": {"cross_attn": True, "causal": False, "adaln": True},
    "mdlm": {"cross_attn": False, "causal": False, "adaln": True},
    "sedd": {"cross_attn": False, "causal": False, "adaln": True, "time_conditioning": True},
    "ar": {"cross_attn": False, "causal": True, "adaln": False},
}


# --- a checkpoint in the original's layout, without its code ------------------------------------


def original_shapes(adaln: bool, vocab: int = VOCAB) -> dict[str, tuple[int, ...]]:
    """Every weight of the original's network."""
    shapes: dict[str, tuple[int, ...]] = {
        "vocab_embed.embedding": (vocab, WIDTH),
        "output_layer.norm_final.weight": (WIDTH,),
        "output_layer.linear.weight": (vocab, WIDTH),
        "output_layer.linear.bias": (vocab,),
    }
    for layer in range(DEPTH):
        shapes |= {
            f"blocks.{layer}.norm1.weight": (WIDTH,),
            f"blocks.{layer}.attn_qkv.weight": (3 * WIDTH, WIDTH),
            f"blocks.{layer}.attn_out.weight": (WIDTH, WIDTH),
            f"blocks.{layer}.norm2.weight": (WIDTH,),
            f"blocks.{layer}.mlp.0.weight": (4 * WIDTH, WIDTH),
            f"blocks.{layer}.mlp.0.bias": (4 * WIDTH,),
            f"blocks.{layer}.mlp.2.weight": (WIDTH, 4 * WIDTH),
            f"blocks.{layer}.mlp.2.bias": (WIDTH,),
        }
        if adaln:
            shapes[f"blocks.{layer}.adaLN_modulation.weight"] = (6 * WIDTH, COND)
            shapes[f"blocks.{layer}.adaLN_modulation.bias"] = (6 * WIDTH,)
    if adaln:
        shapes |= {
            "sigma_map.mlp.0.weight": (COND, 256),
            "sigma_map.mlp.0.bias": (COND,),
            "sigma_map.mlp.2.weight": (COND, COND),
            "sigma_map.mlp.2.bias": (COND,),
            "output_layer.adaLN_modulation.weight": (2 * WIDTH, COND),
            "output_layer.adaLN_modulation.bias": (2 * WIDTH,),
        }
    return {f"backbone.{name}": shape for name, shape in shapes.items()}


def original_tensors(adaln: bool = True, vocab: int = VOCAB) -> dict[str, torch.Tensor]:
    tensors = {n: weight(n, s) for n, s in original_shapes(adaln, vocab).items()}
    half = torch.arange(0, WIDTH // HEADS, 2).float() / (WIDTH // HEADS)
    return tensors | {"backbone.rotary_emb.inv_freq": 1.0 / (10_000**half)}


def write_original(
    folder: Path, system: str = "bd3lm", block_size: int = 4, vocab: int = VOCAB, **changes: object
) -> Path:
    """A folder as the original saves it; ``changes`` go to its config.json."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "bd3lm",
        "block_size": block_size,
        "vocab_size": vocab,
        "model_length": LENGTH,
        "hidden_dim": WIDTH,
        "cond_dim": COND,
        "n_blocks": DEPTH,
        "n_heads": HEADS,
        "dropout": 0.1,
        "time_conditioning": False,
        **SYSTEMS[system],
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = original_tensors(bool(config["adaln"]), vocab)
    if system == "bd3lm":
        tensors |= {
            "sampling_eps_min": torch.tensor(0.45),
            "sampling_eps_max": torch.tensor(0.95),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """23 words, so that the mask is the 24th."""
    ids = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, MASK)}
    inner = hf.Tokenizer(hf.models.WordLevel(ids, unk_token="w1"))
    return Tokenizer(inner.to_str(), "23 words")


@pytest.fixture
def load(tmp_path, words):
    """Write a checkpoint of the original's and load it."""

    def made(system: str = "bd3lm", block_size: int = 4, **changes: object) -> Checkpoint:
        folder = write_original(tmp_path / system, system, block_size, **changes)
        return load_checkpoint(folder, tokenizer=words)

    return made


def agrees(features: torch.Tensor, model: Transformer, name: str) -> None:
    logits = model.logits(features).detach().reshape(GOLDEN[name].shape)
    assert GOLDEN[name].std() > 0.5
    np.testing.assert_allclose(logits.numpy(), GOLDEN[name], rtol=0, atol=1e-5)


# --- the same function --------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["auto", "dense"])
@pytest.mark.parametrize("block_size", [4, 16, 32])
def test_training_logits(load, block_size, attention):
    loaded = load(block_size=block_size)
    model = loaded.model.use_attention(attention)
    assert (loaded.config.system, loaded.config.block) == ("bd3lm", block_size)
    agrees(model.denoise(XT, X0, block_size, EVERY), model, f"bd3lm_{block_size}")
    if block_size == LENGTH:
        agrees(model.encode(XT, LENGTH), model, "mdlm")


@pytest.mark.parametrize("attention", ["auto", "dense"])
def test_cached_logits(load, attention):
    model = load().model.use_attention(attention)
    cache = KVCache(model.cfg, 2, LENGTH, torch.device("cpu"))
    parts = []
    for block in torch.arange(LENGTH).split(4):
        parts.append(model.encode(XT[:, block], 4, cache=cache))
        model.encode(X0[:, block], 4, cache=cache, commit=4, select=EVERY[:0])
    agrees(torch.cat(parts, dim=1), model, "cached_4")


@pytest.mark.parametrize("attention", ["auto", "dense"])
def test_logits_of_the_other_systems(load, attention):
    ar, mdlm, sedd = (load(name) for name in ("ar", "mdlm", "sedd"))
    assert [c.config.system for c in (ar, mdlm, sedd)] == ["ar", "mdlm", "sedd"]
    assert [c.config.block for c in (ar, mdlm, sedd)] == [1, LENGTH, LENGTH]
    for loaded in (ar, mdlm, sedd):
        loaded.model.use_attention(attention)
    agrees(ar.model.encode(X0, 1), ar.model, "ar")
    agrees(mdlm.model.encode(XT, LENGTH), mdlm.model, "mdlm")
    sigma = torch.from_numpy(GOLDEN["sigma_sedd"])[:, None]
    agrees(sedd.model.encode(XT, LENGTH, sigma=sigma), sedd.model, "sedd")


def test_a_level_a_block_and_none_for_the_clean_stream(load):
    """The original's network can do it, though its training never uses it."""
    plain = load().model
    model = Transformer(dataclasses.replace(plain.cfg, time_conditioning=True), VOCAB).eval()
    model.load_state_dict(plain.state_dict())
    sigma = torch.from_numpy(GOLDEN["sigma_told"])
    agrees(model.denoise(XT, X0, 4, EVERY, sigma=sigma), model, "told_4")


@pytest.mark.parametrize("name", ["bd3lm_4", "bd3lm_16", "mdlm", "sedd", "sedd_full"])
def test_losses(load, name):
    """Loss and likelihood on the noise that the original drew."""
    system, _, size = name.partition("_")
    loaded = load(system, int(size) if size.isdigit() else LENGTH)
    xt = torch.from_numpy(GOLDEN[f"loss_{name}_xt"].astype(np.int64))
    weight, prob = (torch.from_numpy(GOLDEN[f"loss_{name}_{x}"]) for x in ("weight", "prob"))
    masked = (xt == MASK).flatten().nonzero().flatten()
    batch = Batch(
        x0=X0,
        xt=xt,
        masked=masked,
        weight=weight.flatten()[masked],
        mask_prob=prob[:, :: loaded.config.block].contiguous(),
        doc_ids=None,
        noisable=torch.ones_like(xt, dtype=torch.bool),
        num_noisable=2 * (LENGTH - 1),
        block_size=loaded.config.block,
        step=0,
    )
    with torch.no_grad():
        total = loaded.system().loss(loaded.model, batch)
        scored = loaded.system().scorer(loaded.model, X0, None)(xt, masked, batch.mask_prob)
    nats = GOLDEN[f"loss_{name}_nlls"]
    assert total.item() == pytest.approx(nats.sum(), rel=1e-5)
    ours = np.zeros(nats.size, dtype=np.float32)
    ours[masked.numpy()] = (scored * batch.weight).numpy()
    np.testing.assert_allclose(ours.reshape(nats.shape), nats, rtol=1e-5, atol=1e-5)


def test_autoregressive_loss(load):
    loaded = load("ar")
    select = EVERY.view(2, LENGTH)[:, 1:].flatten()
    with torch.no_grad():
        scored = loaded.system().scorer(loaded.model, X0, None)(X0, select, torch.ones(2, LENGTH))
    np.testing.assert_allclose(
        scored.view(2, LENGTH - 1).numpy(), GOLDEN["loss_ar_nlls"], rtol=1e-5, atol=1e-5
    )


# --- the same files -----------------------------------------------------------------------------


@pytest.mark.parametrize("system", list(SYSTEMS))
def test_saving_gives_back_every_bit(load, tmp_path, words, system):
    loaded = load(system)
    save_original(tmp_path / "back", loaded)
    source = tmp_path / system
    theirs, ours = (load_file(f / "model.safetensors") for f in (source, tmp_path / "back"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "back")
    )
    block = {"bd3lm": 4, "ar": 1}.get(system, LENGTH)
    cond = 0 if system == "ar" else COND
    assert after.items() >= (before | {"block_size": block, "cond_dim": cond}).items()
    again = load_checkpoint(tmp_path / "back")  # its tokenizer lies next to it
    assert again.tokenizer.sha256 == words.sha256
    assert again.config == loaded.config


def test_a_tuned_clip_is_kept(load):
    assert load().config.noise.clip == pytest.approx((0.45, 0.95))


def test_a_time_conditioned_mdlm_stays_one(load, tmp_path):
    """The layout itself cannot tell it from SEDD, so its parameterization is written down."""
    told = load("mdlm", time_conditioning=True, parameterization="subs")
    assert told.config.system == "mdlm"
    assert told.model.cfg.time_conditioning
    save_original(tmp_path / "back", told)
    assert load_checkpoint(tmp_path / "back").config == told.config


def test_weights_in_parts_in_bins_and_in_half_precision(tmp_path, words):
    whole = load_checkpoint(write_original(tmp_path / "whole"), tokenizer=words)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    names = sorted(tensors)
    for kind in ("model.safetensors", "pytorch_model.bin", "bfloat16"):
        folder = write_original(tmp_path / kind)
        (folder / "model.safetensors").unlink()
        if kind == "bfloat16":
            save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "model.safetensors")
        else:
            parts = {"a.weights": names[::2], "b.weights": names[1::2]}
            save = save_file if kind == "model.safetensors" else torch.save
            for part, inside in parts.items():
                save({n: tensors[n] for n in inside}, folder / part)
            index = {"weight_map": {n: part for part, inside in parts.items() for n in inside}}
            (folder / f"{kind}.index.json").write_text(json.dumps(index))
        model = load_checkpoint(folder, tokenizer=words).model
        for name, tensor in whole.model.state_dict().items():
            expected = tensor.bfloat16().float() if kind == "bfloat16" else tensor
            assert torch.equal(model.state_dict()[name], expected), (kind, name)
            assert model.state_dict()[name].dtype == torch.float32
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    model = load_checkpoint(folder, tokenizer=words).model
    assert torch.equal(model.head.weight, whole.model.head.weight)


def test_gpt2_vocabulary(tmp_path, shared_data):
    """50257 ids and the mask after them, from OpenAI's pair of files."""
    gpt2 = str(shared_data / "tokenizers" / "gpt2_vocab.bpe")
    folder = write_original(tmp_path / "gpt2", vocab=50258)
    loaded = load_checkpoint(folder, tokenizer=gpt2)
    assert loaded.system().mask_id == 50257
    assert loaded.tokenizer.bos_id == loaded.tokenizer.eos_id == 50256
    assert loaded.model.vocab_size == 50258
    folder = write_original(tmp_path / "other", vocab=50304)
    with pytest.raises(CheckpointError, match=r"50304 ids and the tokenizer .* 50258, its mask"):
        load_checkpoint(folder, tokenizer=gpt2)


# --- from the command line ----------------------------------------------------------------------


def test_commands_take_it_as_a_checkpoint(tmp_path, capsys):
    """Scores and samples are those of a native checkpoint with the same weights."""
    default = load_tokenizer("default")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(story(seed, 60) for seed in range(4)), encoding="utf-8")
    prepare([text], default, tmp_path / "data" / "valid", lines=True)
    source = write_original(tmp_path / "original", vocab=default.vocab_size)
    loaded = load_checkpoint(source, tokenizer="default")
    weights = loaded.model.state_dict()
    native = tmp_path / "checkpoint"
    save_checkpoint(native, loaded.config, default, step=0, averaged=weights, training={}, state={})
    options = ["--tokenizer", "default", "--json"]
    records = []
    for path in (source, native):
        evaluate.main([str(path), "--data", str(tmp_path / "data" / "valid"), *options])
        sample.main([str(path), "--num", "1", "--length", "16", *options])
        records.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for theirs, ours in zip(*records, strict=True):
        assert {k: v for k, v in theirs.items() if k not in ("checkpoint", "seconds")} == {
            k: v for k, v in ours.items() if k not in ("checkpoint", "seconds")
        }
    assert records[0][0]["block_size"] == 4
    with pytest.raises(SystemExit):
        evaluate.main([str(source), "--data", str(tmp_path / "data"), "--tokenizer", "no.json"])
    assert "tokenizer no.json" in capsys.readouterr().err


def test_training_starts_from_it(tmp_path):
    default = load_tokenizer("default")
    for split in ("train", "valid"):
        text = tmp_path / f"{split}.txt"
        text.write_text("\n".join(story(seed, 60) for seed in range(8)), encoding="utf-8")
        prepare([text], default, tmp_path / "data" / split, lines=True)
    source = write_original(tmp_path / "original", "mdlm", vocab=default.vocab_size)
    cfg = TrainConfig(
        data=str(tmp_path / "data"),
        seq_len=LENGTH,
        block_size=8,
        steps=1,
        batch_size=2,
        device="cpu",
        precision="fp32",
        init_from=str(source),
        model=ModelConfig(width=WIDTH, depth=DEPTH, heads=HEADS, cond_width=COND),
    )
    splits = open_splits(cfg.data, None, "default", tmp_path, print)
    trainer = Trainer(cfg, splits.train, splits.valid, tmp_path / "trainer", Silent())
    trainer.start_from(source)
    theirs = load_file(source / "model.safetensors")
    assert torch.equal(trainer.model.head.bias, theirs["backbone.output_layer.linear.bias"])
    summary = run_training(cfg, tmp_path / "run", Silent())
    assert summary["init_from"] == str(source)
    trained = load_checkpoint(tmp_path / "run" / "checkpoint")
    save_original(tmp_path / "exported", trained)
    again = load_checkpoint(tmp_path / "exported")
    assert again.config.system == "bd3lm"
    assert again.config.block == 8
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor)


def test_a_hub_name_is_fetched_without_its_code(tmp_path, words, monkeypatch):
    """Requests to the hub, without the hub itself."""
    asked = []
    folder = write_original(tmp_path / "hub")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("bd3lm.hub.connect", lambda: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path)
    loaded = load_checkpoint("kuleshov-group/mdlm-owt", tokenizer=words)
    assert loaded.path == folder
    assert [name for name, _ in asked] == ["kuleshov-group/mdlm-owt"] * 2
    assert "config.json" in asked[0][1]
    assert not any("py" in p.rpartition(".")[2] or p == "*" for _, ps in asked for p in ps)

    def fails(name: str, allow_patterns: list[str]) -> str:
        raise OSError("no network\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    sentence = r"nobody/nothing: no such checkpoint directory, and .* \(no network\)"
    with pytest.raises(MissingFileError, match=sentence):
        load_checkpoint("nobody/nothing")
    (tmp_path / "runs").mkdir()
    with pytest.raises(MissingFileError, match=r"no such checkpoint directory$"):
        load_checkpoint("runs/typo")  # a folder that exists is never looked for on the hub


# --- models that cannot be loaded or saved --------------------------------------------------------


class RunsCode:
    """Unpickling this would call a function."""

    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"drop": "backbone.blocks.1.attn_qkv.weight"}, r"no tensor backbone.blocks.1.attn_qkv"),
        (
            {"add": "backbone.blocks.2.norm1.weight"},
            r"a tensor backbone.blocks.2.norm1.weight that",
        ),
        (
            {"reshape": "backbone.output_layer.linear.bias"},
            r"linear.bias of shape \[3\]; this .*24",
        ),
        ({"base": 500.0}, "inv_freq of another base than 10000"),
        ({"config": {"n_heads": 3}}, "model.heads = 3: must be a divisor of model.width"),
        ({"config": {"block_size": 5}}, "block-size = 5: must be a divisor of seq-len = 32"),
        ({"config": {"time_conditioning": True}}, "tells its clean stream the noise level"),
        ({"config": {"n_blocks": "many"}}, "cannot be loaded: .*'many'"),
        ({"without": "model_length"}, "config.json does not say model_length"),
        ({"without": "vocab_size"}, "config.json does not say vocab_size"),
        ({"without": "hidden_dim"}, "is not a bd3lm checkpoint"),
        ({"without": None}, "has no config.json"),
        ({"weights": None}, "holds neither model.safetensors nor pytorch_model.bin"),
        ({"weights": RunsCode()}, "more than tensors, which could run code"),
        ({"weights": [torch.zeros(1)]}, "does not hold tensors by name"),
        ({"index": {"weight_map": {"x": "../x.safetensors"}}}, "does not lie beside it"),
        ({"index": {"weight_map": {"x": "x.safetensors"}}}, "x.safetensors is missing"),
        ({"index": []}, "is not a JSON object"),
        ({"index": {"weight_map": {"x": 3}}}, "is not an index of weight files"),
    ],
)
def test_what_does_not_load_says_so(tmp_path, words, capsys, change, sentence):
    folder = write_original(tmp_path / "bad", **change.get("config", {}))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    if "drop" in change:
        del tensors[change["drop"]]
    if "add" in change:
        tensors[change["add"]] = torch.zeros(WIDTH)
    if "reshape" in change:
        tensors[change["reshape"]] = torch.zeros(3)
    if "base" in change:
        half = torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS)
        tensors["backbone.rotary_emb.inv_freq"] = change["base"] ** -half
    save_file(tensors, file)
    if "without" in change:
        config = json.loads((folder / "config.json").read_text())
        config.pop(change["without"], None)
        (folder / "config.json").write_text(json.dumps(config))
        if change["without"] is None:
            (folder / "config.json").unlink()
    if "weights" in change or "index" in change:
        file.unlink()
    if change.get("weights") is not None:
        torch.save(change["weights"], folder / "pytorch_model.bin")
    if "index" in change:
        (folder / "model.safetensors.index.json").write_text(json.dumps(change["index"]))
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_checkpoint(folder, tokenizer=words)
    assert "\n" not in str(caught.value)
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mlp": "relu2"}, "model.mlp = relu2: must be gelu: the original's layout"),
        ({"kv_heads": 1}, "model.kv-heads = 1: must be 2: the original's layout"),
        ({"mlp_width": 64}, "model.mlp-width = 64: must be 128: the original's layout"),
        ({"cond_width": COND, "time_conditioning": True}, "model.time-conditioning = True"),
    ],
)
def test_what_the_layout_cannot_hold_is_not_saved(tmp_path, words, changes, sentence):
    shape = ModelConfig(width=WIDTH, depth=1, heads=HEADS, **changes)
    config = TrainConfig(seq_len=LENGTH, model=shape, noise=NoiseConfig())
    model = Transformer(shape, VOCAB)
    with pytest.raises(ConfigError, match=sentence):
        save_original(tmp_path / "no", Checkpoint(config, model, words, 0, tmp_path))
    assert not (tmp_path / "no").exists()


def test_a_native_checkpoint_keeps_its_own_tokenizer(load, tmp_path, words):
    loaded = load()
    weights = loaded.model.state_dict()
    native = tmp_path / "native"
    save_checkpoint(native, loaded.config, words, step=7, averaged=weights, training={}, state={})
    assert load_checkpoint(native, tokenizer=words).step == 7
    with pytest.raises(CheckpointError, match=r"another tokenizer .* than default"):
        load_checkpoint(native, tokenizer="default")
