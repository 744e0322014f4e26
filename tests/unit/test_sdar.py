"""Export to the layout that serving engines read: same logits, same tokens, or a refusal."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bd3lm.checkpoint import Checkpoint, load_checkpoint, save_hf, save_sdar
from bd3lm.checkpoint.sdar import ENGINE_MASK, ENGINE_ROWS
from bd3lm.config import ModelConfig, RopeScaling, SampleConfig
from bd3lm.data import Tokenizer, load_tokenizer
from bd3lm.errors import ConfigError
from bd3lm.model import KVCache, Transformer
from bd3lm.sample import Sampler
from tests.checkpoints import random_checkpoint

SHAPE = {"width": 16, "depth": 2, "heads": 2, "kv_heads": 1, "head_dim": 16, "mlp_width": 24}


def trained(system: str = "bd3lm", *, direction: float = 1.0, **shape: object) -> Checkpoint:
    """A small model with the common direction of its features that training gives."""
    return random_checkpoint("qwen", system, SHAPE | shape, spread=0.2, direction=direction)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return trained()


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdar") / "model"
    save_sdar(out, checkpoint)
    return out


def test_the_folder_is_what_engines_expect(checkpoint, exported):
    meta = json.loads((exported / "config.json").read_text())
    assert meta["architectures"] == ["SDARForCausalLM"]
    assert (meta["model_type"], meta["mask_token_id"]) == ("sdar", ENGINE_MASK)
    assert (meta["vocab_size"], meta["tie_word_embeddings"]) == (ENGINE_ROWS, False)
    assert (meta["block_size"], meta["head_dim"], meta["pad_token_id"]) == (4, 16, 0)
    tensors = load_file(exported / "model.safetensors")
    assert tensors["lm_head.weight"].shape == (ENGINE_ROWS, 16)
    assert tensors["model.layers.1.self_attn.q_norm.weight"].shape == (16,)
    for name in meta["auto_map"].values():
        assert (exported / f"{name.split('.')[0]}.py").is_file()
    tokenizer, own = load_tokenizer(exported), checkpoint.tokenizer
    assert tokenizer.mask_id == ENGINE_MASK
    text = "The old house\n\tstood — there."
    assert tokenizer.encode(text) == own.encode(text)
    assert tokenizer._inner.encode(text).ids == [own.bos_id, *own.encode(text)]


def test_logits_are_equal_block_by_block_through_the_cache(checkpoint, exported):
    loaded = load_checkpoint(exported)
    old, new = checkpoint.tokenizer.mask_id, ENGINE_MASK
    torch.manual_seed(1)
    ids = torch.randint(2, checkpoint.model.vocab_size, (2, 16))
    xt = torch.where(torch.rand(ids.shape) < 0.5, old, ids)
    caches = [KVCache(c.model.cfg, 2, 16, torch.device("cpu")) for c in (checkpoint, loaded)]
    for start in range(0, 16, 4):
        found = []
        for one, cache, mask in zip((checkpoint, loaded), caches, (old, new), strict=True):
            block = xt[:, start : start + 4]
            block = torch.where(block == old, mask, block)
            clean = ids[:, start : start + 4]
            with torch.no_grad():
                found.append(one.model.logits(one.model.encode(block, 4, cache=cache)))
                one.model.encode(clean, 4, cache=cache, commit=4)
        trained_ids = [i for i in range(checkpoint.model.vocab_size) if i != old]
        assert torch.equal(found[0][..., trained_ids], found[1][..., trained_ids])
        # Neither the mask nor a padding row wins or takes probability.
        unused = torch.ones(ENGINE_ROWS, dtype=torch.bool)
        unused[trained_ids] = False
        assert not unused[found[1].argmax(-1)].any()
        assert found[1].softmax(-1)[..., unused].sum(-1).max() < 1e-4


def low_confidence(model: Transformer, ids: list[int], length: int, threshold: float) -> list[int]:
    """SGLang's LowConfidence, written again: greedy over the whole vocabulary, block by block.

    The prompt and masks up to a multiple of S are given; a finished block is encoded once more.
    """
    size, mask = 4, ENGINE_MASK
    tokens = ids + [mask] * (length - len(ids))
    cache = KVCache(model.cfg, 1, length, torch.device("cpu"))
    for start in range(0, length, size):
        block = torch.tensor(tokens[start : start + size])
        while (block == mask).any():
            logits = model.logits(model.encode(block[None], size, cache=cache))[0]
            hidden = block == mask
            x = torch.where(hidden, logits.argmax(-1), block)
            p = logits.float().softmax(-1).gather(-1, x[:, None])[:, 0]
            confidence = torch.where(hidden, p, -torch.inf)
            transfer = confidence > threshold
            if not transfer.any():
                transfer[confidence.topk(1).indices] = True
            block[transfer] = x[transfer]
        model.encode(block[None], size, cache=cache, commit=size)
        tokens[start : start + size] = block.tolist()
    return tokens


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.9])
@torch.inference_mode()
def test_engines_decode_the_same_tokens(checkpoint, exported, threshold):
    engine = load_checkpoint(exported).model
    sampler = Sampler.from_checkpoint(checkpoint)
    prompt = "The old house stood by"
    cfg = SampleConfig(temperature=0, top_p=1, order="confidence", threshold=threshold, length=32)
    sample = sampler.generate(cfg, [prompt])[0]
    ids = [0, *checkpoint.tokenizer.encode(prompt)]
    expected = low_confidence(engine, ids, 32, threshold)
    closed = [*expected[len(ids) :], 0].index(0) + len(ids)
    assert [0, *sample.ids] == expected[:closed]
    if threshold == 0.05:
        assert sample.nfe < len(expected) - len(ids)  # several tokens a forward


def test_the_export_reads_back(checkpoint, exported, tmp_path):
    loaded = load_checkpoint(exported)
    assert (loaded.config.system, loaded.config.block, loaded.config.seq_len) == ("bd3lm", 4, 32)
    wanted = {"tied_embeddings": False, "vocab_size": ENGINE_ROWS}
    assert loaded.config.model == dataclasses.replace(checkpoint.config.model, **wanted)
    save_sdar(tmp_path / "again", loaded)
    first, second = (load_file(f / "model.safetensors") for f in (exported, tmp_path / "again"))
    trained_ids = [i for i in range(checkpoint.model.vocab_size) if i != 1]
    for name, tensor in first.items():
        rows = trained_ids if "embed" in name or "lm_head" in name else slice(None)
        assert torch.equal(tensor[rows], second[name][rows])


def test_ids_may_stay_for_engines_that_take_any(checkpoint, tmp_path):
    save_sdar(tmp_path / "keep", checkpoint, vocab="keep", text=["A text of our own."])
    meta = json.loads((tmp_path / "keep" / "config.json").read_text())
    own = checkpoint.tokenizer
    assert (meta["vocab_size"], meta["mask_token_id"]) == (own.vocab_size, own.mask_id)
    assert load_checkpoint(tmp_path / "keep").tokenizer.special == own.special


def test_a_mask_without_a_name_gets_one(checkpoint, tmp_path):
    """Checkpoint of a converted model, whose mask is the id after the tokenizer's last."""
    definition = json.loads(checkpoint.tokenizer.json)
    del definition["model"]["vocab"]["<|mask|>"]
    definition["added_tokens"] = [t for t in definition["added_tokens"] if t["id"] != 1]
    definition["model"]["vocab"] |= {"unused": 1}
    tokenizer = Tokenizer(json.dumps(definition), "without")
    shape = dataclasses.replace(checkpoint.config.model, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    model = Transformer(shape, tokenizer.vocab_size).eval()
    model.load_state_dict(
        checkpoint.model.state_dict()
        | {
            name: torch.cat([m, m.mean(0, keepdim=True)])
            for name, m in checkpoint.model.state_dict().items()
            if name in ("embed.weight", "head.weight")
        }
    )
    config = dataclasses.replace(checkpoint.config, model=shape)
    save_sdar(tmp_path / "x", Checkpoint(config, model, tokenizer, 0, Path(".")), vocab="keep")
    assert load_tokenizer(tmp_path / "x").mask_id == tokenizer.mask_id == tokenizer.vocab_size - 1


@pytest.mark.parametrize(
    ("system", "shape", "sentence"),
    [
        ("ar", {}, "system = ar: must be bd3lm: .*--layout hf holds it"),
        ("bd3lm", {"qk_norm": False}, "model.qk-norm = False: must be True: .*--layout hf"),
        ("bd3lm", {"mlp": "relu2"}, "model.mlp = relu2: must be swiglu: .*--layout hf"),
        ("bd3lm", {"norm": "layernorm"}, "model.norm = layernorm: must be rmsnorm"),
        ("bd3lm", {"cond_width": 8}, "model.cond-width = 8: must be 0: .*--layout hf"),
        ("bd3lm", {"cond_width": 8, "time_conditioning": True}, "conditioning.*--layout bd3lm"),
        ("bd3lm", {"mlp_bias": True}, "model.mlp-bias = True: must be False"),
        ("bd3lm", {"out_bias": True}, "model.out-bias = True: must be False"),
        ("bd3lm", {"nope_layers": (1,)}, r"model.nope-layers = \(1,\): must be \(\)"),
        (
            "bd3lm",
            {"rope_scaling": RopeScaling("linear", 2.0)},
            "rope-scaling.kind = linear: must be none",
        ),
    ],
)
def test_what_engines_would_decode_wrongly_is_refused(tmp_path, system, shape, sentence):
    with pytest.raises(ConfigError, match=sentence):
        save_sdar(tmp_path / "out", trained(system, **shape))
    assert not (tmp_path / "out").exists()


def test_ids_that_could_win_are_refused(checkpoint, tmp_path):
    """Features without a common direction leave no row that loses everywhere."""
    confused = trained(direction=0.0)
    with torch.no_grad():
        confused.model.norm.weight.copy_(torch.tensor([3.0, -3.0] * 8))
        confused.model.head.weight.mul_(0.02)
    with pytest.raises(ConfigError, match=r"never trained = .*: must be at most .*--layout hf"):
        save_sdar(tmp_path / "out", confused)
    assert not (tmp_path / "out").exists()


# --- the layout for transformers' own classes ---------------------------------------------------


@pytest.mark.parametrize(
    ("name", "system", "shape"),
    [
        ("tiny", "bd3lm", {"cond_width": 8, "kv_heads": None}),
        ("tiny", "mdlm", {"cond_width": 8, "kv_heads": None}),
        ("tiny", "sedd", {"cond_width": 8, "kv_heads": None}),
        ("tiny", "ar", {"kv_heads": None}),
        ("demo", "bd3lm", {}),
        ("qwen", "bd3lm", {"rope_scaling": RopeScaling("yarn", 4.0, 16)}),
        ("qwen", "bd3lm", {"qk_norm": False, "qkv_bias": True, "nope_layers": (1,)}),
        ("qwen", "bd3lm", {"vocab_size": 16_390}),
        ("qwen", "ar", {"qk_norm": False, "nope_layers": (1,), "mlp_bias": True}),
    ],
)
def test_every_shape_has_a_layout_for_transformers(tmp_path, name, system, shape):
    checkpoint = random_checkpoint(name, system, SHAPE | shape)
    cfg, model, tokenizer = checkpoint.config, checkpoint.model, checkpoint.tokenizer
    save_hf(tmp_path / "hf", checkpoint)
    loaded = load_checkpoint(tmp_path / "hf")
    assert loaded.config.system == system
    assert loaded.tokenizer.special == tokenizer.special
    resolved = {"kv_heads": model.cfg.num_kv_heads, "mlp_width": model.cfg.hidden}
    expected = dataclasses.replace(cfg.model, **resolved, dropout=0.0)
    assert dataclasses.replace(loaded.config.model, dropout=0.0, **resolved) == expected
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[key], tensor)


def test_a_told_block_model_has_no_layout_for_transformers(tmp_path):
    told = trained(cond_width=8, time_conditioning=True)
    with pytest.raises(ConfigError, match=r"time-conditioning = True: .*--layout bd3lm holds it"):
        save_hf(tmp_path / "out", told)


def test_heads_trained_apart_stay_apart(checkpoint, tmp_path):
    """transformers trains a tied head and its embedding as two matrices."""
    from safetensors.torch import save_file

    save_hf(tmp_path / "hf", checkpoint)
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["backbone.output_layer.linear.weight"] += 1
    save_file(tensors, file)
    loaded = load_checkpoint(tmp_path / "hf")
    assert not loaded.config.model.tied_embeddings
    torch.testing.assert_close(loaded.model.head.weight, loaded.model.embed.weight + 1)


def test_the_default_of_the_head_width_is_a_share_of_the_width():
    assert ModelConfig(width=12, heads=3).head_width == 4
    assert ModelConfig(width=10, heads=3, head_dim=6).head_width == 6
    with pytest.raises(ConfigError, match="head-dim = 5: must be even"):
        ModelConfig(head_dim=5)
