"""The published layout, written here by hand from its description, against the loader; and everything it refuses."""

import io
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nvlm_runtime.checkpoint.tensors import parameter_counts
from nvlm_runtime.checkpoint.weights import INDEX, load, save
from nvlm_runtime.commands import loading
from nvlm_runtime.config import RopeScaling, from_hf, to_hf
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.micro.vocabulary import make_tokenizer
from nvlm_runtime.presets import INTERNVIT_300M, PRESETS
from tests.small import CONFIGS, small_model

HIDDEN, HEADS, DUMMY, HEAD_DIM, FFN, IMAGE, PATCH = 100, 25, 7, 4, 64, 32, 8
TEXT, TEXT_FFN, KV, VOCAB, LAYERS, VIT_LAYERS = 32, 48, 16, 512, 2, 2


def published_config() -> dict:
    return {
        "architectures": ["NVLM_D"],
        "model_type": "NVLM_D",
        "torch_dtype": "bfloat16",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": IMAGE,
        "select_layer": -1,
        "ps_version": "v2",
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 6,
        "use_thumbnail": True,
        "template": "chatml",
        "vision_config": {
            "model_type": "intern_vit_6b",
            "hidden_size": HIDDEN,
            "num_hidden_layers": VIT_LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": FFN,
            "image_size": IMAGE,
            "patch_size": PATCH,
            "num_channels": 3,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "qk_normalization": True,
            "qkv_bias": False,
            "use_flash_attn": True,
        },
        "llm_config": {
            "architectures": ["Qwen2ForCausalLM"],
            "_name_or_path": "Qwen/Qwen2-72B-Instruct",
            "hidden_size": TEXT,
            "intermediate_size": TEXT_FFN,
            "hidden_act": "silu",
            "attention_bias": True,
            "mlp_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "max_position_embeddings": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": LAYERS,
            "rope_theta": 1000000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "vocab_size": VOCAB,
            "cross_attention_hidden_size": None,
        },
    }


def published_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    padded, real = (HEADS + DUMMY) * HEAD_DIM, HEADS * HEAD_DIM

    def rand(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).bfloat16()

    def pad(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        tensor.narrow(dim, real, padded - real).zero_()
        return tensor

    t = {
        "vision_model.embeddings.class_embedding": rand(1, 1, HIDDEN),
        "vision_model.embeddings.patch_embedding.weight": rand(HIDDEN, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": rand(HIDDEN),
        "vision_model.embeddings.position_embedding": rand(1, 17, HIDDEN),
        "mlp1.0.weight": rand(4 * HIDDEN) + 1,
        "mlp1.0.bias": rand(4 * HIDDEN),
        "mlp1.1.weight": rand(TEXT_FFN, 4 * HIDDEN),
        "mlp1.3.weight": rand(TEXT, TEXT_FFN),
        "language_model.model.embed_tokens.weight": rand(VOCAB, TEXT),
        "language_model.model.norm.weight": rand(TEXT) + 1,
        "language_model.lm_head.weight": rand(VOCAB, TEXT),
    }
    for i in range(VIT_LAYERS):
        layer = f"vision_model.encoder.layers.{i}."
        thirds = [pad(rand(padded, HIDDEN), 0) for _ in range(3)]  # [all q | all k | all v], each padded by itself
        t |= {
            layer + "attn.qkv.weight": torch.cat(thirds),
            layer + "attn.q_norm.weight": pad(rand(padded) + 1, 0),
            layer + "attn.k_norm.weight": pad(rand(padded) + 1, 0),
            layer + "attn.proj.weight": pad(rand(HIDDEN, padded), 1),
            layer + "attn.proj.bias": rand(HIDDEN),
            layer + "norm1.weight": rand(HIDDEN) + 1,
            layer + "norm2.weight": rand(HIDDEN) + 1,
            layer + "ls1": rand(HIDDEN),
            layer + "ls2": rand(HIDDEN),
            layer + "mlp.fc1.weight": rand(FFN, HIDDEN),
            layer + "mlp.fc1.bias": rand(FFN),
            layer + "mlp.fc2.weight": rand(HIDDEN, FFN),
            layer + "mlp.fc2.bias": rand(HIDDEN),
        }
    for i in range(LAYERS):
        layer = f"language_model.model.layers.{i}."
        t |= {
            layer + "self_attn.q_proj.weight": rand(TEXT, TEXT),
            layer + "self_attn.q_proj.bias": rand(TEXT),
            layer + "self_attn.k_proj.weight": rand(KV, TEXT),
            layer + "self_attn.k_proj.bias": rand(KV),
            layer + "self_attn.v_proj.weight": rand(KV, TEXT),
            layer + "self_attn.v_proj.bias": rand(KV),
            layer + "self_attn.o_proj.weight": rand(TEXT, TEXT),
            layer + "mlp.gate_proj.weight": rand(TEXT_FFN, TEXT),
            layer + "mlp.up_proj.weight": rand(TEXT_FFN, TEXT),
            layer + "mlp.down_proj.weight": rand(TEXT, TEXT_FFN),
            layer + "input_layernorm.weight": rand(TEXT) + 1,
            layer + "post_attention_layernorm.weight": rand(TEXT) + 1,
        }
    return t


@pytest.fixture
def checkpoint(tmp_path):
    """A folder in the published layout: three shards, an index, config.json, a tokenizer."""
    folder = tmp_path / "nvlm-d"
    folder.mkdir()
    tensors = published_tensors()
    names = list(tensors)
    weight_map = {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        part = {name: tensors[name].contiguous() for name in names[shard::3]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(published_config()))
    make_tokenizer(VOCAB).save(folder)
    return folder


def edit_shard(folder, name, change):
    """Rewrites the shard that holds `name`, with change(tensors) applied."""
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def test_progress_is_reported_after_every_tensor(checkpoint):
    calls = []
    load(checkpoint, progress=lambda read, total: calls.append((read, total)))
    stored = published_tensors()
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert len(calls) == len(stored) and {total for _, total in calls} == {size}
    assert [read for read, _ in calls] == sorted({read for read, _ in calls})
    assert calls[-1][0] == sum(tensor.nbytes for tensor in stored.values()) <= size


def test_a_large_checkpoint_is_seen_to_be_read_on_a_terminal(checkpoint, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown(large, rank="0"):
        monkeypatch.setattr(loading, "LARGE", large)
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr("sys.stderr", Terminal())
        with loading.loading_bar() as progress:
            load(checkpoint, progress=progress)
        return sys.stderr.getvalue()

    assert "loading" in shown(0)
    assert "loading" not in shown(1 << 30) and not shown(0, rank="1")


def test_published_layout_loads_and_survives_a_round_trip(checkpoint, tmp_path):
    model = NVLM.load(checkpoint)
    assert model.dtype == torch.bfloat16
    assert model.config.vision.num_dummy_heads == DUMMY
    tensors = published_tensors()
    qkv = tensors["vision_model.encoder.layers.1.attn.qkv.weight"]
    got = model.model.vision_model.encoder.layers[1].attn.qkv.weight
    padded, real = (HEADS + DUMMY) * HEAD_DIM, HEADS * HEAD_DIM
    assert torch.equal(got, torch.cat([qkv[i * padded : i * padded + real] for i in range(3)])), "cropped in each third"
    layer = model.model.language_model.layers[1]
    for kind in ("weight", "bias"):
        parts = [tensors[f"language_model.model.layers.1.self_attn.{part}_proj.{kind}"] for part in "qkv"]
        assert torch.equal(layer.self_attn.qkv_proj.get_parameter(kind), torch.cat(parts))
    parts = [tensors[f"language_model.model.layers.1.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(layer.mlp.gate_up_proj.weight, torch.cat(parts))
    pad = model.tokenizer.special("<|vision_pad|>")
    ids = [5, *[pad] * 4, 9, 11]
    image = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8).numpy()
    before = model.logits(ids, [image])
    save(model.model, tmp_path / "again", shard_bytes=20_000)
    model.tokenizer.save(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 3
    assert torch.equal(NVLM.load(tmp_path / "again").logits(ids, [image]), before)
    again = {}
    for file in (tmp_path / "again").glob("*.safetensors"):
        again |= load_file(file)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors), "the padding is put back"


@pytest.mark.parametrize("ffn", ["none", "swiglu", "gelu4x"])
@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_round_trip_of_every_variant(variant, ffn, tmp_path):
    model = small_model(variant) if variant == "d" else small_model(variant, ffn=ffn, placement="before")
    save(model, tmp_path)
    loaded, _ = load(tmp_path)
    assert loaded.config == model.config
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_cross_attention_keys(tmp_path):
    save(small_model("x", ffn="swiglu"), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        layer = "language_model.model.layers.2.cross_attn."
        parts = "norm.weight q_proj.weight k_proj.weight v_proj.weight o_proj.weight gate ffn_norm.weight "
        parts += "gate_proj.weight up_proj.weight down_proj.weight ffn_gate"
        assert {name for name in names if name.startswith(layer)} == {layer + part for part in parts.split()}
        assert file.get_slice(layer + "gate").get_shape() == [1]
        assert {"mlp1.0.weight", "mlp1.0.bias", "mlp1.1.weight"} == {n for n in names if n.startswith("mlp1")}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["NVLM_X"]
    assert config["cross_attention"]["layers"] == [0, 2] and config["cross_attention"]["ffn"] == "swiglu"


def test_tied_embeddings(tmp_path):
    config = CONFIGS["d"]
    model = small_model("d")
    tied = type(model)(replace(config, text=replace(config.text, tie_word_embeddings=True))).eval()
    save(tied, tmp_path)
    loaded, _ = load(tmp_path)
    assert loaded.language_model.lm_head.weight is loaded.language_model.embed_tokens.weight


def test_host_memory_holds_the_weights_once(checkpoint, monkeypatch):
    """Tensors are read one at a time: none but the current one is alive."""
    import weakref

    from nvlm_runtime.checkpoint import weights

    alive: list[weakref.ref] = []
    most = 0
    open_file = weights._open

    class Slice:
        def __init__(self, stored):
            self.stored = stored

        def __getattr__(self, name):
            return getattr(self.stored, name)

        def __getitem__(self, index):
            nonlocal most
            tensor = self.stored[index]
            alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

    class Spy:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_slice(self, name):
            return Slice(self.file.get_slice(name))

    monkeypatch.setattr(weights, "_open", lambda path, stack: Spy(open_file(path, stack)))
    load(checkpoint)
    assert len(alive) >= len(published_tensors()) and most <= 2


def wrong_shape(tensors):
    tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"][:-1].contiguous()


def swapped_crop(tensors):
    """A checkpoint cropped at the end of the whole qkv instead of inside each third."""
    name = "vision_model.encoder.layers.0.attn.qkv.weight"
    padded, real = (HEADS + DUMMY) * HEAD_DIM, HEADS * HEAD_DIM
    thirds = [third[:real] for third in tensors[name].split(padded)]
    tensors[name] = torch.cat([*thirds, torch.zeros(3 * (padded - real), HIDDEN, dtype=torch.bfloat16)])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mlp1.1.weight", wrong_shape, r"mlp1.1.weight has shape \[47, 400\], expected \[48, 400\]"),
        ("mlp1.1.weight", lambda t: t.pop("mlp1.1.weight"), r"index.json names tensors .* mlp1.1.weight"),
        ("mlp1.1.weight", lambda t: t.update(extra=torch.zeros(1)), r"does not list tensors of its shards: extra"),
        ("vision_model.encoder.layers.0.attn.qkv.weight", swapped_crop, "padding heads .* must be zero"),
        (
            "vision_model.encoder.layers.1.attn.proj.weight",
            lambda t: t["vision_model.encoder.layers.1.attn.proj.weight"][0, -1:].fill_(1),
            "layers.1.attn.proj.weight: the padding heads",
        ),
        (
            "vision_model.encoder.layers.1.attn.q_norm.weight",
            lambda t: t["vision_model.encoder.layers.1.attn.q_norm.weight"][-1:].fill_(1),
            "layers.1.attn.q_norm.weight: the padding heads",
        ),
    ],
    ids=["shape", "missing", "unlisted", "crop", "proj padding", "norm padding"],
)
def test_refuses_wrong_tensors(checkpoint, name, change, message):
    edit_shard(checkpoint, name, change)
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


def test_refuses_missing_and_unexpected_names(checkpoint):
    index = json.loads((checkpoint / INDEX).read_text())
    file = index["weight_map"].pop("mlp1.0.bias")
    index["weight_map"]["mlp1.2.bias"] = file
    (checkpoint / INDEX).write_text(json.dumps(index))
    tensors = load_file(checkpoint / file)
    tensors["mlp1.2.bias"] = tensors.pop("mlp1.0.bias")
    save_file(tensors, checkpoint / file)
    with pytest.raises(ValueError, match=r"misses 1 tensors: mlp1.0.bias"):
        load(checkpoint)
    tensors["mlp1.0.bias"] = tensors["mlp1.2.bias"].clone()
    index["weight_map"]["mlp1.0.bias"] = file
    (checkpoint / INDEX).write_text(json.dumps(index))
    save_file(tensors, checkpoint / file)
    with pytest.raises(ValueError, match=r"1 unexpected tensors: mlp1.2.bias"):
        load(checkpoint)


def test_refuses_damaged_files(checkpoint):
    shard = checkpoint / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="00002-of-00003.safetensors is truncated"):
        load(checkpoint)
    shard.write_bytes(b"not tensors at all")
    with pytest.raises(ValueError, match="no safetensors file"):
        load(checkpoint)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of 3 shards: model-00002"):
        load(checkpoint)


def test_refuses_folders_without_a_model(tmp_path, checkpoint):
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        load(tmp_path)
    for file in [*checkpoint.glob("*.safetensors"), checkpoint / INDEX]:
        file.unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        load(checkpoint)
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(checkpoint)
    with pytest.raises(ValueError, match=r"unknown model 'nonsense': expected a checkpoint folder or one of micro-d"):
        NVLM.load("nonsense")
    with pytest.raises(ValueError, match="nvlm-d-72b has no weights in this package"):
        NVLM.load("nvlm-d-72b")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("architectures", ["LlavaForConditionalGeneration"], "architectures must be one of"),
        ("architectures", [["NVLM_D"]], "architectures must be one of"),
        ("vision_config.num_attention_heads", 0, "must be 1 or more"),
        ("vision_config.patch_size", 0, "must be 1 or more"),
        ("vision_config.layer_norm_eps", float("nan"), "layer_norm_eps"),
        ("vision_config.num_dummy_heads", -1, "must be 0 or more"),
        ("llm_config.num_key_value_heads", 0, "must be 1 or more"),
        ("llm_config.num_hidden_layers", -1, "must be 1 or more"),
        ("llm_config.rope_theta", 0, "rope_theta"),
        ("llm_config.attention_bias", 1, "'attention_bias'"),
        ("llm_config.num_attention_heads", 32, "must be even"),
        ("llm_config.rope_scaling", {"type": "yarn", "factor": 4.0, "attention_factor": 2.0}, "attention_factor"),
        ("llm_config.rope_scaling", {"type": "yarn", "factor": 0}, "factor"),
        ("select_layer", -1.0, "'select_layer'"),
        ("torch_dtype", "float8_e4m3fn", "torch_dtype must be one of"),
        ("ps_version", "v3", "'ps_version' must be 'v1' or 'v2'"),
        ("ps_version", None, "has no 'ps_version'"),
        ("use_thumbnail", False, "'use_thumbnail' must be True"),
        ("use_thumbnail", None, "has no 'use_thumbnail'"),
        ("select_layer", -4, "'select_layer'"),
        ("downsample_ratio", 0.25, "'downsample_ratio'"),
        ("force_image_size", 224, "'force_image_size'"),
        ("template", "llama3", "'template'"),
        ("vision_config.num_hidden_layers", None, "vision_config has no 'num_hidden_layers'"),
        ("vision_config.norm_type", "batch_norm", "'norm_type'"),
        ("vision_config.hidden_act", "quick_gelu", "'hidden_act'"),
        ("vision_config.hidden_size", 101, "no multiple"),
        ("vision_config.hidden_size", "100", "must be int"),
        ("llm_config.architectures", ["MistralForCausalLM"], "llm_config architecture"),
        ("llm_config.hidden_act", "gelu", "'hidden_act'"),
        ("llm_config.rope_theta", None, "llm_config has no 'rope_theta'"),
        ("llm_config.rope_scaling", {"type": "linear", "factor": 2.0}, "'yarn'"),
        ("llm_config.use_sliding_window", True, "'use_sliding_window'"),
        ("llm_config.head_dim", 16, "'head_dim'"),
        ("llm_config", None, "has no 'llm_config'"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_config_never_guesses(checkpoint, path, value, message):
    config = published_config()
    *parents, key = path.split(".")
    section = config
    for parent in parents:
        section = section[parent]
    if value is None:
        del section[key]
    else:
        section[key] = value
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("layers", [["a"], [None], [[0]], [0.0, 2.0], [False, True], [2, 0], [0, 9]], ids=str)
def test_cross_layers_are_layer_numbers(layers):
    config = published_config() | {"architectures": ["NVLM_X"]}
    config["cross_attention"] = {"layers": layers, "placement": "inside", "ffn": "none"}
    with pytest.raises(ValueError, match="layer"):
        from_hf(config)


def test_published_config_has_the_published_codes_projector_eps():
    assert from_hf(published_config()).projector_eps == 1e-5


def test_config_reads_yarn():
    """Qwen2 publishes it beside max_position_embeddings 32768: the context is then 131,072."""
    config = published_config()
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config["llm_config"]["rope_scaling"] = scaling
    text = from_hf(config).text
    assert text.rope_scaling == RopeScaling(4.0, 32768) and text.context == 131072
    other = replace(CONFIGS["d"], projector_eps=1e-6)
    other = replace(other, text=replace(other.text, rope_scaling=RopeScaling(2.0, 64, 16.0, 2.0)))
    assert from_hf(to_hf(other, "float32")) == other


def test_a_saved_checkpoint_replaces_the_one_that_stood_there(tmp_path):
    model = small_model("d")
    save(model, tmp_path, shard_bytes=20_000)
    model.mlp1[1].weight.data.zero_()
    save(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert not load(tmp_path)[0].mlp1[1].weight.any()


def test_refuses_tensors_that_are_no_floats(checkpoint):
    name = "language_model.model.norm.weight"
    edit_shard(checkpoint, name, lambda tensors: tensors.update({name: torch.ones(TEXT, dtype=torch.int64)}))
    with pytest.raises(ValueError, match=r"norm.weight is stored as I64, expected one of BF16, F16, F32, F64"):
        load(checkpoint)


@pytest.mark.parametrize("text", ["{", "{}", "[1]", ""], ids=repr)
def test_refuses_a_damaged_tokenizer(checkpoint, text):
    (checkpoint / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer files of .* are damaged"):
        NVLM.load(checkpoint)


def test_refuses_a_tokenizer_larger_than_the_embedding(checkpoint):
    config = published_config()
    config["llm_config"]["vocab_size"] = 300
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        edit_shard(checkpoint, name, lambda t, name=name: t.update({name: t[name][:300].clone()}))
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="tokens, the embedding only 300 rows"):
        NVLM.load(checkpoint)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
    assert from_hf(to_hf(PRESETS[name], "bfloat16")) == PRESETS[name]


def test_parameter_counts_are_the_published_ones():
    counts = parameter_counts(PRESETS["nvlm-d-72b"])
    assert counts == {
        "vision": 6_052_672_640,
        "projector": 620_717_056,
        "decoder": 72_706_203_648,
        "cross": 0,
        "total": 79_379_593_344,
    }
    cross = parameter_counts(PRESETS["nvlm-x-72b"])
    assert round(cross["cross"] / 1e9, 2) == 1.51, "ten layers, GQA, attention alone"
    assert round(cross["projector"] / 1e6) == 105
    assert len(PRESETS["nvlm-x-34b"].cross.layers) == len(PRESETS["nvlm-h-72b"].cross.layers) == 10


def test_small_tower_of_the_family_fits_the_same_classes():
    config = replace(PRESETS["nvlm-d-72b"], vision=INTERNVIT_300M)
    assert parameter_counts(config)["vision"] == 304_012_288
