"""`nvlm init`: the text model in a new NVLM is the text model, token for token, bit for bit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from nvlm_runtime.checkpoint import assembly as assembly_file
from nvlm_runtime.checkpoint.assembly import assemble, gated_layers
from nvlm_runtime.checkpoint.bundled import BUNDLED
from nvlm_runtime.checkpoint.sources import smollm2_file
from nvlm_runtime.checkpoint.weights import load
from nvlm_runtime.checkpoint.weights import save as save_checkpoint
from nvlm_runtime.commands.cli import main
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.model.decoder import Decoder
from nvlm_runtime.model.past import make_past
from tests.checkpoint.backbones import save_gguf, save_text_model, text_model
from tests.inputs.qwen import tiny_backend
from tests.small import VISION, small_model

RECEIPT = Path(__file__).parents[2] / "examples" / "receipt.png"
VISION_ENCODER = (
    "random:hidden_size=32,intermediate_size=48,num_hidden_layers=2,num_attention_heads=4,image_size=32,patch_size=8"
)
IDS = [5, 300, 17, 44, 2, 9, 101, 312, 77, 68, 250]


def init(capsys, *words):
    code = main(["init", *map(str, words)])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def greedy(theirs, ids, num, stop=()):
    """Their argmax, one whole forward a token: nothing of `generate` to be configured."""
    drawn = []
    cache = None
    feed = torch.tensor([ids])
    with torch.inference_mode():
        while len(drawn) < num and not (drawn and drawn[-1] in stop):
            out = theirs(feed, past_key_values=cache, use_cache=True)
            drawn.append(out.logits[0, -1].argmax().item())
            cache, feed = out.past_key_values, torch.tensor([drawn[-1:]])
    return drawn


def picture(width=64, height=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("variant", ["x", "h", "d"])
def test_folder_gives_transformers_answers(capsys, tmp_path, variant, family, tied):
    theirs = text_model(family, tied)
    save_text_model(theirs, tmp_path / "text", max_shard_size="100kB")
    assert len(list((tmp_path / "text").glob("*.safetensors"))) > 1
    cross = [] if variant == "d" else ["--cross-layers", 1, 3]
    init(
        capsys,
        "--variant",
        variant,
        "--text",
        tmp_path / "text",
        "--vision",
        VISION_ENCODER,
        "--out",
        tmp_path / "out",
        *cross,
    )
    ours = NVLM.load(tmp_path / "out")
    assert ours.config.cross is None or ours.config.cross.layers == (1, 3)
    with torch.inference_mode():
        want = theirs(torch.tensor([IDS])).logits[0]
    assert (ours.logits(IDS) - want).abs().max() < 1e-4
    for native in ("auto", False):
        engine = NVLM.load(tmp_path / "out", native=native)
        got = engine.generate(input_ids=IDS, max_new_tokens=32, ignore_eos=True).token_ids
        assert list(got) == greedy(theirs, IDS, 32)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_gates_at_0_are_the_bare_decoder_bit_for_bit(tmp_path, family):
    save_text_model(text_model(family), tmp_path / "text")
    for placement, ffn in (("inside", "none"), ("before", "swiglu")):
        made = assemble("x", tmp_path / "text", VISION_ENCODER, every=2, placement=placement, ffn=ffn)
        bare = Decoder(made.model.config.text, None)
        state = made.model.language_model.state_dict()
        bare.load_state_dict({name: tensor for name, tensor in state.items() if ".cross_attn." not in name})
        engine = NVLM(made.model, made.tokenizer, template=made.template)
        bare.attention = engine.model.language_model.attention
        for images in ([], [picture()]):
            ids = engine.prepare("What is in the picture?", images).input_ids
            with torch.inference_mode():
                positions = torch.arange(len(ids))[None]
                hidden = bare(bare.embed_tokens(torch.tensor([ids])), positions, make_past(positions, bare.attention))
                want = bare.logits(hidden[0])
            assert torch.equal(engine.logits(ids, images), want)
            made.model.language_model.layers[2].cross_attn.gate.data.fill_(1)
            assert torch.equal(engine.logits(ids, images), want) == (not images)
            made.model.language_model.layers[2].cross_attn.gate.data.zero_()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tokens_that_are_missing_are_added(capsys, tmp_path, tied):
    theirs = text_model("qwen2", tied, vocab_size=316)
    save_text_model(theirs, tmp_path / "text")
    _keep_tokens(tmp_path / "text", 316, drop=("<|vision_pad|>",))
    out = init(
        capsys,
        "--variant",
        "x",
        "--text",
        tmp_path / "text",
        "--vision",
        VISION_ENCODER,
        "--out",
        tmp_path / "out",
        "--json",
    )
    values = json.loads(out)
    assert values["added_tokens"] == {"<|vision_pad|>": 316} and values["new_rows"] == 1
    engine = NVLM.load(tmp_path / "out")
    assert engine.tokenizer.special("<|vision_pad|>") == 316
    assert engine.tokenizer.encode("<|vision_pad|>") != [316], "text cannot forge it"
    for ours, old in (
        (engine.model.language_model.embed_tokens, theirs.model.embed_tokens),
        (engine.model.language_model.lm_head, theirs.lm_head),
    ):
        assert ours.weight.shape[0] == 317 and torch.equal(ours.weight[:316], old.weight)
        assert torch.equal(ours.weight[316], old.weight.mean(0))
    assert engine.generate("What?", [picture()], max_new_tokens=2).token_ids


def test_rows_the_text_model_has_are_kept(tmp_path):
    theirs = text_model("llama", vocab_size=330)
    save_text_model(theirs, tmp_path / "text")
    _keep_tokens(tmp_path / "text", 316, drop=("<|vision_pad|>",))
    made = assemble("d", tmp_path / "text", VISION_ENCODER)
    assert made.added == {"<|vision_pad|>": 316} and made.num_new_rows == 0
    assert torch.equal(made.model.language_model.embed_tokens.weight, theirs.model.embed_tokens.weight)


def _keep_tokens(folder: Path, num: int, drop: tuple[str, ...]) -> None:
    """A tokenizer of `num` tokens without those of `drop`: the last merges go, the ids close up."""
    values = json.loads((folder / "tokenizer.json").read_text())
    model = values["model"]
    names = [name for name, _ in sorted(model["vocab"].items(), key=lambda pair: pair[1]) if name not in drop][:num]
    model["vocab"] = {name: number for number, name in enumerate(names)}
    parts = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    model["merges"] = [m for m in parts if {*m, "".join(m)} <= set(names)]
    values["added_tokens"] = [
        each | {"id": model["vocab"][each["content"]]} for each in values["added_tokens"] if each["content"] not in drop
    ]
    (folder / "tokenizer.json").write_text(json.dumps(values))


@pytest.mark.parametrize("quantised", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_gguf_holds_the_same_weights(tmp_path, family, quantised):
    theirs = text_model(family, tied=quantised == "Q8_0", hidden_size=64)
    state = save_gguf(theirs, tmp_path / "text.gguf", quantised)
    made = assemble("x", tmp_path / "text.gguf", VISION_ENCODER, every=3)
    theirs.load_state_dict(state, strict=False)
    engine = NVLM(made.model, made.tokenizer, template=made.template)
    with torch.inference_mode():
        want = theirs(torch.tensor([IDS])).logits[0]
    assert (engine.logits(IDS) - want).abs().max() < 1e-4
    stored = made.model.language_model.embed_tokens.weight
    assert torch.equal(stored, state["model.embed_tokens.weight"])
    text = "user\nWhat is in <tile_1>? 2024"
    tokenizer = Tokenizer(tiny_backend())
    assert made.tokenizer.encode(text) == tokenizer.encode(text) and made.tokenizer.eos_id == tokenizer.eos_id


def test_k_quants_are_read(tmp_path):
    """The gguf package undoes K-quants but cannot make them: the file's bytes are random, its own words the judge."""
    import gguf

    kind = gguf.GGMLQuantizationType.Q4_K
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)

    def with_k(arrays):
        for name in arrays:
            if name == "blk.0.ffn_down.weight":
                data = rng.integers(0, 60, (64, 256 // block * size), dtype=np.uint8)
                return arrays | {name: (data, kind)}
        return arrays

    theirs = text_model("qwen2", intermediate_size=256)
    save_gguf(theirs, tmp_path / "text.gguf", tensors=with_k)
    made = assemble("d", tmp_path / "text.gguf", VISION_ENCODER)
    reader = gguf.GGUFReader(tmp_path / "text.gguf")
    (stored,) = [tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight"]
    want = torch.from_numpy(gguf.quants.dequantize(stored.data, kind).reshape(64, 256))
    assert torch.equal(made.model.language_model.layers[0].mlp.down_proj.weight, want)


@pytest.mark.parametrize("kind", ["nvlm", "internvl", "internvit"])
def test_vision_encoders_come_as_they_are(tmp_path, kind):
    theirs = small_model("d")
    save_checkpoint(theirs, tmp_path / "encoder")
    values = json.loads((tmp_path / "encoder" / "config.json").read_text())
    if kind != "nvlm":
        from safetensors.torch import load_file, save_file

        tensors = load_file(tmp_path / "encoder" / "model.safetensors")
        del values["vision_config"]["num_dummy_heads"]
        if kind == "internvl":
            values |= {
                "architectures": ["InternVLChatModel"],
                "llm_config": {"architectures": ["InternLM2ForCausalLM"]},
            }
            tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("language_model.")}
        else:
            values = values["vision_config"]
            start = "vision_model."
            tensors = {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}
        save_file(tensors, tmp_path / "encoder" / "model.safetensors", metadata={"format": "pt"})
        (tmp_path / "encoder" / "config.json").write_text(json.dumps(values))
    save_text_model(text_model("qwen2"), tmp_path / "text")
    made = assemble("h", tmp_path / "text", tmp_path / "encoder")
    assert made.model.config.vision == VISION
    for name, tensor in made.model.vision_model.state_dict().items():
        assert torch.equal(tensor, theirs.vision_model.state_dict()[name]), name


def test_bundled_vision_encoder_and_seeds(capsys, tmp_path):
    save_text_model(text_model("qwen2"), tmp_path / "text")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        init(
            capsys, "--variant", "h", "--text", tmp_path / "text", "--vision", "micro-d", "--out", tmp_path / name,
            "--seed", seed, "--cross-every", 2, "--cross-ffn", "gelu4x",
        )  # fmt: skip
    a, b, c = (load(tmp_path / name)[0].state_dict() for name in "abc")
    vision_encoder = load(BUNDLED / "micro-d", dtype=torch.float32)[0].vision_model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    differ = {name for name in a if not torch.equal(a[name], c[name])}
    weights = {n for n in a if (".cross_attn." in n or n.startswith("mlp1")) and a[n].dim() > 1}
    assert differ == weights and {name.split(".")[2] for name in weights if ".cross_attn." in name} == {"0", "2"}
    assert all(torch.equal(a[f"vision_model.{name}"], tensor) for name, tensor in vision_encoder.items())
    gates = [a[name] for name in a if name.endswith("gate")]
    assert len(gates) == 4 and not any(gate.any() for gate in gates)


@pytest.mark.parametrize("variant", ["d", "x"])
def test_new_parts_have_the_sizes_they_should(tmp_path, variant):
    """Image tokens as large as embeddings; the vision encoder's features neither vanish nor explode."""
    save_text_model(text_model("llama"), tmp_path / "text")
    sizes = VISION_ENCODER.replace("num_hidden_layers=2", "num_hidden_layers=6")
    model = assemble(variant, tmp_path / "text", sizes, seed=3).model
    with torch.inference_mode():
        features = model.encode(torch.randn(8, 3, 32, 32))
        tokens = model.project(features)
    assert 0.5 < features.patches.std() < 4
    assert 0.8 < tokens.std() / model.language_model.embed_tokens.weight.std() < 1.25


def test_gated_layers():
    assert gated_layers(80) == tuple(range(0, 80, 8)) and gated_layers(60) == tuple(range(0, 60, 6))
    assert gated_layers(30) == tuple(range(0, 30, 3)) and gated_layers(4) == (0, 1, 2, 3) and gated_layers(4, 4) == (0,)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Folders and files that are wrong in one thing each, and one that is right."""
    folder = tmp_path_factory.mktemp("texts")
    right = save_text_model(text_model("qwen2"), folder / "right")

    def changed(name, **values):
        shutil.copytree(right, folder / name)
        config = json.loads((right / "config.json").read_text()) | values
        (folder / name / "config.json").write_text(json.dumps(config))
        return folder / name

    changed("mistral", architectures=["MistralForCausalLM"])
    changed("llama3", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0})
    changed("deeper", num_hidden_layers=5)
    changed("shallower", num_hidden_layers=3)
    changed("wider", intermediate_size=97)
    changed("windows", use_sliding_window=True)
    changed("tied", tie_word_embeddings=True)
    cut = changed("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    (changed("mute") / "tokenizer.json").unlink()
    theirs = text_model("llama")
    save_gguf(theirs, folder / "right.gguf")
    data = (folder / "right.gguf").read_bytes()
    for name, size in (("cut", -1000), ("cut-header", -len(data) + 3000), ("stub", -len(data) + 6)):
        (folder / f"{name}.gguf").write_bytes(data[:size])
    (folder / "png.gguf").write_bytes(b"\x89PNG" + data)
    save_gguf(theirs, folder / "gemma.gguf", **{"general.architecture": "gemma"})
    save_gguf(theirs, folder / "spm.gguf", **{"tokenizer.ggml.model": "llama"})
    save_gguf(theirs, folder / "pre.gguf", **{"tokenizer.ggml.pre": "deepseek-coder"})
    save_gguf(theirs, folder / "linear.gguf", **{"llama.rope.scaling.type": "linear"})
    save_gguf(theirs, folder / "eps.gguf", **{"llama.attention.layer_norm_rms_epsilon": None})
    save_gguf(theirs, folder / "less.gguf", tensors=lambda a: {n: v for n, v in a.items() if "blk.2.ffn_up" not in n})
    save_gguf(theirs, folder / "more.gguf", tensors=lambda a: a | {"blk.0.attn_sinks.weight": a["output_norm.weight"]})
    import gguf

    kind = gguf.GGMLQuantizationType.Q8_1  # what activations are in: no file should hold it
    save_gguf(
        theirs, folder / "q8_1.gguf", tensors=lambda a: a | {"output.weight": (np.zeros((317, 80), np.uint8), kind)}
    )
    return folder


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mistral", "must be 'Qwen2ForCausalLM' or 'LlamaForCausalLM', got ['MistralForCausalLM']"),
        ("llama3", "'rope_type' must be 'yarn', got 'llama3'"),
        ("deeper", "misses 12 tensors: model.layers.4."),
        ("shallower", "holds 12 unexpected tensors: model.layers.3."),
        ("wider", "has shape [96, 64], expected [97, 64]"),
        ("windows", "'use_sliding_window' must be False"),
        ("tied", "the file's lm_head is another"),
        ("cut", "is truncated or no safetensors file"),
        ("mute", "no tokenizer in"),
        ("nothing", "expected a folder, a GGUF file or 'smollm2'"),
        ("cut.gguf", "is truncated or damaged"),
        ("cut-header.gguf", "is truncated or damaged"),
        ("stub.gguf", "is truncated or damaged"),
        ("png.gguf", "is no GGUF file"),
        ("gemma.gguf", "architecture must be llama or qwen2, got 'gemma'"),
        ("spm.gguf", "only byte-level BPE ('gpt2') tokenizers are read from a GGUF, got 'llama'"),
        ("pre.gguf", "tokenizer.ggml.pre must be default, gpt-2, smollm, qwen2 or llama-bpe, got 'deepseek-coder'"),
        ("linear.gguf", "scaled rotary positions (linear"),
        ("eps.gguf", "llama.attention.layer_norm_rms_epsilon must be float, got None"),
        ("less.gguf", "misses 1 tensors: model.layers.2.mlp.up_proj.weight"),
        ("more.gguf", "holds blk.0.attn_sinks.weight, which no Llama"),
        ("q8_1.gguf", "output.weight is quantised as Q8_1, which the gguf package cannot undo"),
    ],
)
def test_text_that_cannot_be_used(capsys, tmp_path, texts, text, message):
    out = tmp_path / "out"
    code = main(["init", "--variant", "x", "--text", str(texts / text), "--vision", VISION_ENCODER, "--out", str(out)])
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir()), "nothing is left behind"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vision", "nowhere"], "no vision encoder 'nowhere'"),
        (["--vision", "random:huge"], "takes micro, 300m, 6b, or NAME=SIZE"),
        (["--vision", "random:hidden_size=0"], "got 'hidden_size=0'"),
        (["--vision", "random:hidden_size=33"], "vision hidden_size 33 is no multiple"),
        (["--vision", "random:image_size=60"], "must be a multiple of twice the patch_size"),
        (["--cross-every", "9"], "one layer of 1 to 4, got one of 9"),
        (["--cross-layers", "2", "1"], "must be ascending, from 0 to 3, got [2, 1]"),
        (["--cross-every", "2", "--cross-layers", "1"], "not both"),
        (["--variant", "d", "--cross-ffn", "swiglu"], "leave --cross-ffn out"),
        (["--max-tiles", "0"], "max_tiles 0"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_options_that_do_not_fit(capsys, tmp_path, texts, words, message):
    out = tmp_path / "out"
    given = ["--variant", "x", "--text", str(texts / "right"), "--vision", VISION_ENCODER, "--out", str(out)]
    code = main(["init", *given, *words])
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not out.exists()


def test_out_is_written_whole_or_not_at_all(capsys, tmp_path, texts, monkeypatch):
    given = [
        "init",
        "--variant",
        "d",
        "--text",
        str(texts / "right"),
        "--vision",
        VISION_ENCODER,
        "--out",
        str(tmp_path / "out"),
    ]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    assert main(given) == 2 and "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
    (tmp_path / "out" / "mine.txt").unlink()

    def full(*args):
        save_checkpoint(*args)
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(assembly_file, "save", full)
        assert main(given) == 2 and "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").iterdir())
    assert main(given) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    NVLM.load(tmp_path / "out")


def test_a_folder_that_filled_up_meanwhile(tmp_path, texts):
    made = assemble("d", texts / "right", VISION_ENCODER)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        made.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_ids_with_gaps_are_not_given_twice(tmp_path, texts):
    """tokenizers numbers a new token by how many there are, which in a vocabulary with gaps is another's id."""
    values = json.loads((texts / "right" / "tokenizer.json").read_text())
    vocab, moved = values["model"]["vocab"], {each["content"] for each in values["added_tokens"]}
    values["added_tokens"] = [each for each in values["added_tokens"] if each["content"] != "<|vision_pad|>"]
    last = max(vocab, key=lambda name: vocab[name] if name not in moved else -1)
    vocab[last] += 50
    del vocab["<|vision_pad|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"ids up to 366: between them \['<\|vision_pad\|>'\] would get the ids"):
        Tokenizer.load(tmp_path).with_specials(["<|vision_pad|>"])


PROMPTS = ("What is the capital of France?", "Write a haiku about the sea in 2024.", "Explain how a rainbow forms.")


@pytest.fixture(scope="module")
def smollm2():
    """transformers reads the file by its own converter: its order of rows and its dequantised weights are the judge."""
    path = smollm2_file()
    options = {"gguf_file": path.name}
    model = transformers.LlamaForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **options).eval()
    return model, transformers.AutoTokenizer.from_pretrained(path.parent, **options)


@pytest.fixture(scope="module")
def made_x():
    return assemble("x", "smollm2", VISION_ENCODER)


def test_smollm2_token_for_token(smollm2, made_x):
    theirs, _ = smollm2
    engine = NVLM(made_x.model, made_x.tokenizer, template=made_x.template)
    assert made_x.added == {"<|vision_pad|>": 49152} and engine.config.cross.layers == tuple(range(0, 30, 3))
    for prompt in PROMPTS:
        got = engine.generate(prompt, style="template", max_new_tokens=16)
        want = greedy(theirs, engine.prepare(prompt, style="template").input_ids, 16, stop=(2,))
        assert list(got.token_ids) == (want[:-1] if want[-1] == 2 else want), got.text
    assert engine.generate(PROMPTS[0], style="template", max_new_tokens=16).text == "The capital of France is Paris."


TEXTS = (
    "Hello world 12345",
    "  indented\n\n\ttabs  and   runs  ",
    "it's 3.14 and 2024, naïve café 日本語 🙂 \u0301",
    "def f(x):\n    return x**2  # 100%\n",
    "<|im_end|> is text here",
)


def test_smollm2_tokenizer(smollm2, made_x):
    _, theirs = smollm2
    for text in TEXTS:
        ids = made_x.tokenizer.encode(text)
        assert made_x.tokenizer.decode(ids) == text
        if "<|" not in text:
            assert ids == theirs(text, add_special_tokens=False).input_ids, text
    assert made_x.tokenizer.special("<repo_name>") == 3 and 3 not in made_x.tokenizer.encode("<repo_name>")
    # each digit alone, blanks before one kept apart from it: llama.cpp's "smollm", which transformers does not know
    assert [made_x.tokenizer.decode([i]) for i in made_x.tokenizer.encode("a  12")] == ["a", "  ", "1", "2"]
    chat = [{"role": "user", "content": "Hi"}]
    want = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    engine = NVLM(made_x.model, made_x.tokenizer, template=made_x.template)
    assert list(engine.prepare("Hi", style="template").input_ids) == want
