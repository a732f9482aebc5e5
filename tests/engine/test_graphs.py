"""Captured steps, run here without capture: the same answers, and nothing built after the warm-up."""

import inspect
import random
import warnings
from dataclasses import fields

import pytest
import torch

from nvlm_runtime.commands.cli import _parser
from nvlm_runtime.commands.loading import load_model
from nvlm_runtime.engine.graphs import bucket_of, chunks_of_buckets
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.options import Options
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.engine.serving import Engine
from nvlm_runtime.model.features import Features
from tests.engine.test_batch import LARGE, PARAMS, SMALL, answers, fresh, requests
from tests.model.test_model import picture

VARIANTS = ("d", "x", "h")


@pytest.mark.parametrize("variant", VARIANTS)
def test_graphs_give_the_same_tokens(variant):
    want = answers(variant)
    model = fresh(variant, graphs=True, chunk=64)
    assert [out.token_ids for out in model.generate(requests(model), params=PARAMS)] == want
    for request, ids in zip(requests(model), want, strict=True):
        stream = model.stream(request, params=PARAMS)
        for _ in stream:
            pass
        assert stream.output.token_ids == ids


@torch.inference_mode()
def test_features_that_encoding_has_written_over_are_projected_all_the_same():
    runner = fresh("d", graphs=True).runner
    first, second = torch.randn(2, 3, 3, 32, 32)
    encoded = runner.encode(first)
    want, kept = runner.project(encoded), Features(encoded.patches.clone())
    assert runner.encode(second) is encoded and not torch.equal(runner.project(encoded), want)
    assert torch.equal(runner.project(kept), want)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_built_after_warmup(variant):
    """A hundred requests of random sizes and ways to draw."""
    model = fresh(variant, graphs=True, chunk=64)
    assert model.compiles_after_warmup == 0
    phases = model.warmup(max_model_len=300, max_images=2)
    assert phases.keys() == {"encode", "buffers", "prefill", "first", "step"}
    rng = random.Random(0)
    sizes = [(32, 32), (64, 32), (96, 32), (64, 64), (160, 32), (96, 64), (32, 96)]
    ways = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9}, {"repetition_penalty": 1.2}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(100):
            images = [picture(rng.choice(sizes), number) for _ in range(rng.randrange(3))]
            text = " ".join(["word"] * rng.randrange(1, 20))
            model.generate(text, images, max_new_tokens=rng.randrange(1, 6), ignore_eos=True, **rng.choice(ways))
    assert model.compiles_after_warmup == 0
    with pytest.warns(RuntimeWarning, match="after warm-up"):
        model.generate("word " * 60, max_new_tokens=300, ignore_eos=True)  # longer than was said
    assert model.compiles_after_warmup > 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_built_after_an_engine_s_warmup(variant):
    """A dozen requests at a time, of random sizes, on three rows."""
    model = fresh(variant, graphs=True, chunk=64)
    rng = random.Random(1)
    sizes = [(32, 32), (64, 32), (96, 32), (64, 64)]
    with warnings.catch_warnings(), Engine(model, max_batch_size=3, max_model_len=300, warmup=True) as engine:
        warnings.simplefilter("error")
        assert engine.warmed.keys() == {"encode", "prefill", "first", "step"}
        answers = []
        for number in range(12):
            images = [picture(rng.choice(sizes), number)] * rng.randrange(2)
            prepared = engine.prepare(" ".join(["word"] * rng.randrange(1, 20)), images)
            params = GenerationParams(
                max_new_tokens=rng.randrange(1, 8), temperature=rng.choice([0.0, 1.0]), seed=number, ignore_eos=True
            )
            answers.append(engine.submit(prepared, params=params))
        assert all(answer.result(60).token_ids for answer in answers)
    assert model.compiles_after_warmup == 0


def test_the_watch_sees_triton(monkeypatch):
    from types import SimpleNamespace

    from triton import knobs

    seen = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **given: seen.append(given))
    model = fresh("d")
    model.warmup(max_model_len=64)
    with pytest.warns(RuntimeWarning, match="Triton compiled a_kernel after warm-up"):
        knobs.runtime.jit_post_compile_hook(fn=SimpleNamespace(name="a_kernel"))
    assert model.compiles_after_warmup == 1 and len(seen) == 1


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100, 511, 1000])
def test_chunks_are_powers_of_two_but_for_a_short_last_one(length):
    for start in (0, 7):
        found = chunks_of_buckets(start + length, start, 256)
        assert [first for first, _ in found] == [start, *(end for _, end in found[:-1])] and found[-1][
            1
        ] == start + length
        sizes = [end - first for first, end in found]
        assert all(size in (32, 64, 128, 256) for size in sizes[:-1]) and (
            sizes[-1] < 32 or sizes[-1] in (32, 64, 128, 256)
        )


def test_buckets():
    assert [bucket_of(n, 6) for n in range(1, 7)] == [1, 2, 4, 4, 6, 6]


def test_deterministic_rows_take_steps_of_their_own():
    model = fresh("x", graphs=True, deterministic=True, chunk=64)
    got = model.generate(requests(model), params=GenerationParams(max_new_tokens=4, ignore_eos=True))
    assert [out.token_ids for out in got] == [ids[:4] for ids in answers("x")]
    steps = [step.name for step in model.runner.steps.values() if step.name.startswith("step")]
    assert steps and all(name.startswith("step 1 ") for name in steps)


def test_a_chunk_at_the_end_of_a_row_leaves_the_next_row_alone():
    """Its padding goes to the padding after the row."""
    model = fresh("d", graphs=True, chunk=32)
    rows = [model.request(model.prepare("What?", [image]), PARAMS) for image in (LARGE, SMALL)]
    alone = [
        fresh("d").generate("What?", [image], max_new_tokens=12, ignore_eos=True).token_ids for image in (LARGE, SMALL)
    ]
    batch = model.batch(2, max(row.num_positions for row in rows), 0)
    batch.admit(rows[1])
    while len(rows[1].token_ids) < 3:
        batch.advance()
    batch.admit(rows[0])
    while not batch.is_idle:
        batch.advance()
    assert [row.token_ids for row in rows] == alone


def options(**given) -> Options:
    parameters = inspect.signature(NVLM).parameters
    defaults = {field.name: parameters[field.name].default for field in fields(Options)}
    return Options(**defaults | given)


@pytest.mark.parametrize("graphs", ["auto", None])
def test_steps_are_captured_on_cuda_devices_by_default(graphs):
    cuda, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert options().graphs == "auto"
    assert options(graphs=graphs).uses_graphs(cuda) and not options(graphs=graphs).uses_graphs(cpu)
    for other in ({"check": True}, {"speculate": 2}):
        assert not options(graphs=graphs, **other).uses_graphs(cuda)
    for asked in (True, False):
        assert [options(graphs=asked).uses_graphs(device) for device in (cuda, cpu)] == [asked, asked]
    with pytest.raises(ValueError, match="graphs must be True, False or .auto., got 'on'"):
        options(graphs="on")


@pytest.mark.parametrize("words, want", [([], None), (["--graphs"], True), (["--no-graphs"], False)], ids=str)
def test_the_shell_passes_graphs_on(words, want, monkeypatch):
    seen = {}
    monkeypatch.setattr(NVLM, "load", lambda name, **given: seen.update(given))
    load_model(_parser().parse_args(["chat", *words]))
    assert seen["graphs"] is want
