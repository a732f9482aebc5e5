"""The benches run, say what they measured, and count what is there. No time is asserted."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import context, decode, generate
from bench.peers.contestants import Ours, Transformers, contestants
from bench.peers.llama_peer import KINDS, write_gguf
from bench.reports import tables
from bench.reports.card import image_key_bytes, weight_bytes
from bench.reports.report import RESULTS, setting
from bench.setup.synthetic import SHAPES, full_tokenizer, random_model, shape_config, synthetic
from nvlm_runtime import NVLM
from nvlm_runtime.analysis import eager
from nvlm_runtime.analysis.profile import phase_ops, profile_request
from nvlm_runtime.commands.cli import main
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.engine.slots import BatchSlots
from nvlm_runtime.engine.step_bytes import step_bytes
from nvlm_runtime.inputs.image import plan_tiles
from nvlm_runtime.model.quantize import scheme_of
from tests.small import small_engine

RECEIPT = Path(__file__).parents[2] / "examples" / "receipt.png"
STAGES = ("open", "tile", "encode", "project", "prefill", "decode")


@pytest.fixture(scope="module")
def micro():
    return NVLM.load("micro-d", dtype=torch.float32)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One quick run: its result, and where its files are."""
    folder = tmp_path_factory.mktemp("bench")
    args = ["--quick", "--peers", "transformers", "--image", str(RECEIPT), "--json", str(folder / "rows.json")]
    return generate.run(generate.parser().parse_args(args)), folder


def test_quick_measures_everything(quick):
    result, folder = quick
    found = {(row["measure"], row["at"], row["contestant"]) for row in result["rows"]}
    new = f"{plan_tiles(*Image.open(RECEIPT).size, 64).num_tiles} tiles, new"
    for name in ("eager", "ours", "transformers"):
        assert {("tile_ms", 1, name), ("first_token_s", new, name), ("working_mb", new, name)} <= found
        assert {("token_ms", 32, name), ("token_ms", 128, name)} <= found
        assert {("tokens_per_s", 1, name), ("tokens_per_s", 2, name)} <= found
    assert ("first_token_s", new.replace("new", "handle"), "ours") in found
    for row in result["rows"]:
        assert 0 <= row["p20"] <= row["p50"] <= row["p80"] and row["num"] >= 1, row
        assert row["p50"] > 0 or row["measure"] == "working_mb", row
        assert row["measure"] in generate.UNITS and row["part"] in generate.PARTS
    assert {"cpu", "cpu_threads", "huge_pages", "torch", "commit"} <= result["setting"].keys()
    saved = json.loads((folder / "rows.json").read_text())
    assert saved["model"] == "micro-d" and set(saved["parts"]) == {"vision", "first", "decode", "batches"}
    assert "memory's limit" in generate.show(result["rows"]) and "MB" in generate.show_card(result["card"])


def test_a_part_measured_again_replaces_itself(quick, tmp_path):
    result, _ = quick
    path = tmp_path / "rows.json"
    generate.save(path, "micro-d", generate.PARTS, result)
    rows = [row | {"p50": -1.0} for row in result["rows"] if row["part"] == "decode"]
    generate.save(path, "micro-d", ("decode",), result | {"rows": rows})
    parts = json.loads(path.read_text())["parts"]
    assert all(row["p50"] == -1 for row in parts["decode"]["rows"])
    assert all(row["p50"] >= 0 for row in parts["batches"]["rows"])
    with pytest.raises(ValueError, match="holds 'micro-d', not 'micro-x'"):
        generate.save(path, "micro-x", ("decode",), result)


def test_pictures(quick, tmp_path):
    from bench.reports.chart import draw

    draw(quick[0]["rows"], "micro-d", tmp_path / "speed.png")
    with Image.open(tmp_path / "speed.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(2**20)) > 50
    with pytest.raises(ValueError, match="nothing to draw"):
        draw([], "micro-d", tmp_path / "nothing.png")


def test_a_picture_without_matplotlib_is_refused_first(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    monkeypatch.setattr(NVLM, "load", lambda *args, **kwargs: pytest.fail("work was done"))
    assert main(["profile", str(RECEIPT), "What?", "--png", str(tmp_path / "a.png")]) == 2
    assert "nvlm-runtime[viz]" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        generate.main(["micro-d", "--png", str(tmp_path / "a.png")])
    assert ended.value.code == 2 and "nvlm-runtime[viz]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "a model or --shape"),
        (["micro-d", "--shape", "micro"], "a model or --shape"),
        (["micro-d", "--against", "x"], "--against needs --shape"),
        (["micro-d", "--variant", "x"], "--variant belongs to --shape"),
        (["micro-d", "--rounds", "0"], "--rounds"),
        (["micro-d", "--contexts", "5000"], "--contexts must be from 1 to 2032"),
        (["micro-x", "--peers", "transformers", "--only", "vision"], "transformers has only what is NVLM-D"),
        (["micro-d", "--peers", "vllm", "--only", "vision"], "peers must be transformers"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_bad_arguments(argv, message, monkeypatch):
    monkeypatch.setattr(generate, "card", lambda *args: {})
    monkeypatch.setattr(generate, "show_card", lambda values: "")
    with pytest.raises(ValueError, match=message):
        generate.run(generate.parser().parse_args(argv))


def test_contestants_give_the_same_answer(micro):
    """A time is worth something only beside the same work: all three draw the same tokens of the same picture."""
    picture, question = Image.open(RECEIPT).convert("RGB"), "What is the total?"
    ours = micro.generate(question, [picture], max_new_tokens=8, ignore_eos=True).token_ids
    assert ours[:5] == micro.tokenizer.encode("17.40")
    plain = eager.generate(micro.model, micro.prepare(question, [picture]), 8, micro.tokenizer.vocab_size)
    assert plain.token_ids == ours
    assert Transformers(micro).answer(picture, question, 8) == ours


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_plain_answers_as_the_engine(variant):
    engine = small_engine(variant)
    picture = Image.effect_noise((90, 60), 80).convert("RGB")
    prepared = engine.prepare("What is the total?", [picture])
    given = eager.generate(engine.model, prepared, 6, engine.tokenizer.vocab_size)
    ours = engine.generate("What is the total?", [picture], max_new_tokens=6, ignore_eos=True)
    assert given.token_ids == ours.token_ids
    assert len(given.token_seconds) == 5 and all(given.timings[stage] > 0 for stage in STAGES[1:])
    with pytest.raises(ValueError, match="num_tokens must be from 1"):
        eager.generate(engine.model, prepared, 0, 512)


@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_plain_vision_encoder_is_the_vision_encoder(norm_type):
    config = shape_config("micro", "d").vision
    config = type(config)(**{**vars(config), "norm_type": norm_type, "qk_normalization": norm_type == "rms_norm"})
    from nvlm_runtime.model.vision import InternViT
    from tests.small import randomise

    vision_encoder = randomise(InternViT(config)).double()
    pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(
        eager.encode(vision_encoder, pixels), vision_encoder(pixels), rtol=1e-5, atol=1e-5
    )  # _rms computes in fp32


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_the_cards_bytes_are_the_tensors(variant):
    engine = small_engine(variant)
    counts = weight_bytes(engine.model)
    assert counts.pop("total") == sum(counts.values()) == sum(p.nbytes for p in engine.model.parameters())
    assert counts["cross"] == sum(p.nbytes for n, p in engine.model.named_parameters() if "cross_attn" in n)
    decoder = engine.model.language_model
    assert counts["head"] == decoder.lm_head.weight.nbytes and counts["embedding"] == decoder.embed_tokens.weight.nbytes
    assert counts["layers"] == sum(
        p.nbytes for n, p in (*decoder.layers.named_parameters(), *decoder.norm.named_parameters()) if "cross_" not in n
    )
    slots = BatchSlots.allocate(engine.config, 1, 99, 0, 512, engine.device, engine.dtype)
    reads = step_bytes(engine.model)
    assert 100 * reads.token == slots.cache.k.nbytes + slots.cache.v.nbytes
    assert reads.total(10, rows=2) == counts["layers"] + counts["head"] + 20 * reads.token
    handle = engine.encode_image(Image.new("RGB", (96, 64)))
    plan = plan_tiles(96, 64, 32)
    expected = handle.kv.k.nbytes + handle.kv.v.nbytes if handle.kv else 0
    assert image_key_bytes(engine.config, engine.tokenizer, plan, engine.dtype) == expected
    assert (expected > 0) == (variant != "d")
    if handle.kv:
        assert reads.image_key * handle.kv.k.shape[2] == expected
        once = sum(p.nbytes for n, p in decoder.named_parameters() if "cross_attn.k_" in n or "cross_attn.v_" in n)
        seen = counts["layers"] + counts["head"] + counts["cross"] - once + 5 * reads.token + expected
        assert reads.total(5, handle.kv.k.shape[2]) == seen, "keys and values are projected once an image"


def test_quantised_weights_are_read_as_they_are_kept():
    engine = NVLM.load("micro-x", quantize={"decoder": "int8", "head": "int4"}, reuse=False)
    reads, config = step_bytes(engine.model), engine.config.text
    layer = engine.model.language_model.layers[0]
    linears = (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    assert all(linear.weight.dtype == torch.int8 for linear in linears)
    kept = sum(linear.weight.nbytes + linear.scale.nbytes for linear in linears) * config.num_hidden_layers
    head = engine.model.language_model.lm_head
    kept += head.nibbles.nbytes + head.scale.nbytes
    assert kept <= reads.weights < 1.05 * kept, "norms and biases beside them"


def test_an_answer_says_what_its_steps_read(micro):
    output = micro.generate("What is the total?", images=[RECEIPT], max_new_tokens=5, ignore_eos=True)
    context = output.num_prompt_tokens + 2
    assert output.step_bytes == step_bytes(micro.model).total(context)
    seconds = sorted(output.token_seconds)
    assert output.read_rate() == pytest.approx(output.step_bytes / (seconds[1] + seconds[2]) * 2)
    assert micro.generate("What?", max_new_tokens=1, ignore_eos=True).read_rate() is None


@pytest.mark.parametrize("native", ["auto", False])
def test_context_tells_host_time_from_the_native_step(native):
    (row,) = context.measure("micro-x", [4], tokens=6, rounds=2, native=native)
    assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["context"] == 4
    if native is False:
        assert row["host_p50_ms"] is None
    else:
        assert 0 < row["host_p50_ms"] < row["p50_ms"]


def test_synthetic_models():
    engine = synthetic("micro", "x")
    assert engine.dtype == torch.bfloat16 and engine.tokenizer.vocab_size == engine.config.text.vocab_size
    assert all(parameter.isfinite().all() for parameter in engine.model.parameters())
    assert len(engine.generate("Hello?", max_new_tokens=4, ignore_eos=True).token_ids) == 4
    with pytest.raises(ValueError, match="shape must be one of"):
        shape_config("qwen", "d")
    with pytest.raises(ValueError, match="variant must be one of"):
        shape_config("micro", "y")


def test_the_real_shape_has_the_published_sizes():
    """InternViT-300M: 304 M parameters. Qwen2-0.5B: 494 M, of which 136 M embed 151,936 rows, shared with its head."""
    config = shape_config("qwen2-0.5b+internvit-300m", "d")
    assert set(SHAPES) == {"qwen2-0.5b+internvit-300m", "micro"} and config.tokens_per_tile == 256
    with torch.device("meta"):
        from nvlm_runtime.model.model import NVLMModel

        counts = weight_bytes(NVLMModel(config))
    assert counts["vision"] // 4 == 304_012_288
    assert counts["layers"] // 4 == 494_032_768 - 151_936 * 896
    assert counts["head"] // 4 == counts["embedding"] // 4 == 151_674 * 896


def test_a_full_tokenizer_draws_any_token():
    tokenizer = full_tokenizer(1000)
    assert tokenizer.vocab_size == 1000 and tokenizer.decode([999]) == "<token 999>"
    assert tokenizer.encode("What is the total?") == full_tokenizer(600).encode("What is the total?")


def test_random_models_are_repeatable():
    config = shape_config("micro", "d")
    one, two = (random_model(config, torch.bfloat16, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_ours_steps_behind_images(micro):
    player = contestants(micro, [])["ours"]
    assert type(player) is Ours
    prepared = micro.prepare("What is the total?", [RECEIPT])
    assert len(list(player.steps_of([prepared, prepared], 3))) == 3
    assert len(list(player.steps(1, 32, 2))) == 2 and len(list(player.steps(1, 32, 2))) == 2


def test_a_quantised_contestant_shares_what_it_does_not_change(micro):
    players = contestants(micro, [], [{"vision": "int8_dynamic", "head": "int8"}])
    assert list(players) == ["eager", "ours", "ours, vision=int8_dynamic head=int8"]
    model = players["ours, vision=int8_dynamic head=int8"].engine.model
    assert scheme_of(model) == {"vision": "int8_dynamic", "head": "int8"} and scheme_of(micro.model) == {}
    both = dict(micro.model.named_parameters())
    assert all(parameter is both[name] for name, parameter in model.named_parameters())
    rows = [{"measure": "token_ms", "at": 9, "contestant": name} for name in players]
    generate.add_limits(rows, players, 1e9)
    assert rows[0]["limit"] == rows[1]["limit"] > rows[2]["limit"] > 0


def test_the_trace_has_every_stage(capsys, tmp_path):
    trace = tmp_path / "trace.json"
    code = main(["profile", str(RECEIPT), "What is the total?", "--rounds", "1", "--json", "--trace", str(trace)])
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert code == 0 and values["text"] == "17.40"
    assert [phase["phase"] for phase in values["phases"]] == list(STAGES)
    assert sum(phase["share"] for phase in values["phases"]) == pytest.approx(1)
    assert all(phase["seconds"] > 0 and phase["eager_seconds"] > 0 for phase in values["phases"])
    events = json.loads(trace.read_text())["traceEvents"]
    count = {stage: sum(event.get("name") == f"nvlm.{stage}" for event in events) for stage in STAGES}
    assert min(count.values()) >= 1 and count["decode"] == len(values["token_seconds"])
    ops = {phase["phase"]: dict(phase["ops"]) for phase in values["phases"]}
    assert "aten::argmax" in ops["decode"]
    assert ops["encode"].keys() & {"native::attention", "aten::_scaled_dot_product_flash_attention_for_cpu"}


def test_profile_says_what_it_needs(micro):
    with pytest.raises(ValueError, match="reuse=False"):
        profile_request(micro, "What?", [], GenerationParams())
    engine = small_engine("d", reuse=False, image_cache_bytes=0)
    with pytest.raises(ValueError, match="greedy"):
        profile_request(engine, "What?", [], GenerationParams(temperature=1.0))
    with pytest.raises(ValueError, match="rounds"):
        profile_request(engine, "What?", [], GenerationParams(), rounds=0)
    result = profile_request(engine, "What?", [], GenerationParams(max_new_tokens=3, ignore_eos=True), rounds=1)
    assert [phase.phase for phase in result.phases if phase.seconds > 0] == ["open", "prefill", "decode"]


def test_a_stages_ops_are_its_own():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        a = torch.ones(8, 8)
        a @ a
        with torch.profiler.record_function("nvlm.encode"):
            a + a
        torch.sort(a)
        with torch.profiler.record_function("nvlm.decode"):
            a * a
    ops = {stage: [name for name, _ in found] for stage, found in phase_ops(seen.events()).items()}
    assert ops == {"encode": ["aten::add"], "decode": ["aten::mul"]}


def test_stages_are_drawn(tmp_path, capsys):
    path = tmp_path / "stages.png"
    assert main(["profile", str(RECEIPT), "What is the total?", "--rounds", "1", "--png", str(path)]) == 0
    assert "prefill" in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.width > 500


def test_setting_names_the_machine():
    found = setting()
    assert found["cpu_threads"] == torch.get_num_threads() and found["commit"]
    assert found["huge_pages"] in (None, "always", "madvise", "never")


def test_the_page_holds_the_results():
    assert tables.PAGE.is_file(), "docs/benchmarks.md holds the tables; python -m bench.reports.tables writes into it"
    text = tables.PAGE.read_text()
    assert tables.renewed(text, tables.section()) == text, "run python -m bench.reports.tables"


def test_readme_table(quick):
    saved = json.loads((quick[1] / "rows.json").read_text())
    lines = tables.speed(saved).splitlines()
    assert lines[2] == "|  | eager | ours | transformers | memory bandwidth limit |"
    row = next(row for row in saved["parts"]["decode"]["rows"] if row["contestant"] == "ours" and row["at"] == 128)
    (line,) = [line for line in lines if line.startswith("| ms per token, context of 128 tokens ")]
    assert line.split(" | ")[2].startswith(f"{row['p50']:.3g} (")
    with pytest.raises(ValueError, match="once each"):
        tables.renewed("no markers", "x")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("generate-*.json")), ids=lambda path: path.stem)
def test_committed_results_name_their_machine(path):
    for part in json.loads(path.read_text())["parts"].values():
        assert part["setting"]["cpu"] and not part["setting"]["commit"].endswith("-dirty")


def test_a_step_stands_beside_the_reads_around_it(monkeypatch):
    now, told = [0.0], []

    def taking(name, *seconds):
        left = iter(seconds)

        def run():
            told.append(name)
            now[0] += next(left)

        return run

    monkeypatch.setattr(decode.time, "perf_counter", lambda: now[0])
    read = taking("read", 1, 2, 4, 8, 16, 32, 64)
    turns = decode.measure(read, {"a": taking("a", 9, 10, 11), "b": taking("b", 9, 20, 21)}, rounds=2)
    assert told == ["read", *["a", "read", "b", "read"] * 3]
    assert turns["a"] == decode.Turns([10, 11], [(4 + 8) / 2, (16 + 32) / 2])
    assert turns["b"] == decode.Turns([20, 21], [(8 + 16) / 2, (32 + 64) / 2])


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_gets_our_weights(kind, tmp_path):
    """Every tensor in the file, under llama.cpp's name, within a step of what it was made of."""
    import gguf

    model = random_model(shape_config("micro", "d"), torch.bfloat16)
    read = write_gguf(model, kind, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    decoder, text = model.language_model, model.config.text
    assert len(tensors) == 3 + 12 * text.num_hidden_layers
    assert read == sum(t.data.nbytes for name, t in tensors.items() if name != "token_embd.weight")
    qkv, up = decoder.layers[1].self_attn.qkv_proj, decoder.layers[1].mlp.gate_up_proj
    inner = text.num_attention_heads * text.head_dim
    kv = text.num_key_value_heads * text.head_dim
    wanted = {
        "output.weight": decoder.lm_head.weight,
        "blk.1.attn_k.weight": qkv.weight[inner : inner + kv],
        "blk.1.attn_v.bias": qkv.bias[inner + kv :],
        "blk.1.ffn_up.weight": up.weight[text.intermediate_size :],
    }
    for name, want in wanted.items():
        got = torch.from_numpy(gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        error = (got.view(want.shape) - want.float()).abs().max()
        assert error <= {"bf16": 0, "q8_0": 0.005, "q4_0": 0.13}[kind] * want.abs().max(), name


def test_llama_cpp_has_no_gated_layers(tmp_path):
    with pytest.raises(ValueError, match="compared on NVLM-D"):
        write_gguf(random_model(shape_config("micro", "x"), torch.bfloat16), "bf16", tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_llama_cpp_is_asked_for_by_name(monkeypatch, capsys):
    monkeypatch.setattr(decode, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["decode", "--shape", "micro", "--peers", "llama.cpp"])
    with pytest.raises(SystemExit):
        decode.main()
    assert "needs llama-cpp-python" in capsys.readouterr().err
