"""The native step against the decoder's own, fp64 the judge; its rows' bits in any batch; the library's file."""

import copy
import importlib
from dataclasses import replace

import pytest
import torch

from nvlm_kernels import native
from nvlm_runtime.config import CrossConfig, RopeScaling
from nvlm_runtime.engine.logits import EagerLogits, NativeLogits
from nvlm_runtime.engine.native import NativeDecoder
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.model.cache import CrossKV, KVCache
from nvlm_runtime.model.decoder import CrossView, Decoder
from nvlm_runtime.model.past import make_past
from tests.engine.test_batch import PARAMS, answers, fresh, requests
from tests.small import TEXT, randomise

CPU = torch.device("cpu")
YARN = RopeScaling(4.0, 128)
SHAPES = {
    "small": TEXT,
    "llama tied": replace(TEXT, architecture="LlamaForCausalLM", tie_word_embeddings=True),
    "heads of 16": replace(TEXT, hidden_size=96),
    "heads of 64": replace(TEXT, hidden_size=384, intermediate_size=250),
    "heads of 128": replace(TEXT, hidden_size=256, num_attention_heads=2, num_key_value_heads=1),
    "heads of 80": replace(TEXT, hidden_size=160, num_attention_heads=2, num_key_value_heads=1),
    "seven heads a kv head": replace(TEXT, hidden_size=448, num_attention_heads=14, num_key_value_heads=2),
    "nine heads a kv head": replace(TEXT, hidden_size=288, num_attention_heads=9, num_key_value_heads=1),
    "one kv head a head": replace(TEXT, num_key_value_heads=6),
    "yarn": replace(TEXT, rope_scaling=YARN),
}
GATED = {
    "none": CrossConfig(layers=(0, 2)),
    "before swiglu": CrossConfig(layers=(1, 3), placement="before", ffn="swiglu"),
    "gelu4x": CrossConfig(layers=(0, 1, 2, 3), ffn="gelu4x"),
}
LENGTHS, NUM_KEYS, BATCH = [1, 40, 300, 17], 90, 4


def setting(text, cross, dtype, seed=0):
    """A decoder, filled caches and a step's inputs; rows stand at different lengths, one sees no image."""
    decoder = randomise(Decoder(text, cross), seed).to(dtype)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    cache = KVCache.allocate(text, BATCH, max(LENGTHS) + 8, CPU, dtype)
    cache.k.copy_(noise(*cache.k.shape))
    cache.v.copy_(noise(*cache.v.shape))
    kv = intervals = None
    if cross:
        shape = (len(cross.layers), BATCH, NUM_KEYS, text.num_key_value_heads, text.head_dim)
        kv = CrossKV(noise(*shape), noise(*shape))
        intervals = torch.tensor([[[0, NUM_KEYS]], [[5, 6]], [[0, 0]], [[30, 70]]])
    token = torch.randint(0, text.vocab_size, (BATCH,), generator=generator)
    return decoder, cache, kv, intervals, token, torch.tensor(LENGTHS)


def eager(decoder, cache, kv, intervals, token, position):
    view = CrossView(kv, intervals) if kv else None
    visible = int(position.max()) + 1
    past = make_past(position[:, None], decoder.attention, cache, visible)
    hidden = decoder(decoder.embed_tokens(token[:, None]), position[:, None], past, view)
    return decoder.logits(hidden[:, 0])


def double(decoder, cache, kv, intervals, token, position):
    """The same in fp64. Its cosines and sines are the eager step's, which knows angles to fp32 only."""
    wide = copy.deepcopy(decoder).double()
    cache = KVCache(cache.k.double(), cache.v.double())
    return eager(wide, cache, kv and CrossKV(kv.k.double(), kv.v.double()), intervals, token, position), cache


def run(step, cache, kv, intervals, token, position, active=None):
    logits = torch.zeros(len(token), step.vocab_size)
    active = torch.ones(len(token), dtype=torch.bool) if active is None else active
    step.step(token, position, active, cache, kv, intervals, logits)
    return logits


def clone(cache):
    return KVCache(cache.k.clone(), cache.v.clone())


CASES = [(shape, None) for shape in SHAPES] + [("small", gated) for gated in GATED] + [("heads of 64", "before swiglu")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "gated"), CASES)
@torch.inference_mode()
def test_a_step_is_the_decoders(library, shape, gated, dtype):
    """Three steps, each on the last one's cache: at most twice eager's error, in the logits and in the cache."""
    decoder, cache, kv, intervals, token, position = setting(SHAPES[shape], gated and GATED[gated], dtype)
    step = NativeDecoder(decoder, library)
    ours, theirs = clone(cache), clone(cache)
    for _ in range(3):
        want, exact = double(decoder, ours, kv, intervals, token, position)
        got = run(step, ours, kv, intervals, token, position)
        theirs.k.copy_(exact.k)  # as the exact one, but for this step's own rounding
        eager_cache = KVCache(exact.k.to(dtype).clone(), exact.v.to(dtype).clone())
        error = (got - want).abs().max()
        allowed = 2 * (eager(decoder, eager_cache, kv, intervals, token, position) - want).abs().max()
        assert error <= allowed + 1e-6 * want.abs().max(), (error, allowed)
        for mine, right, other in ((ours.k, exact.k, eager_cache.k), (ours.v, exact.v, eager_cache.v)):
            assert (mine - right).abs().max() <= 2 * (other - right).abs().max() + 1e-6
        token, position = want.argmax(-1), position + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.inference_mode()
def test_a_rows_bits_are_its_own(library, dtype, threads):
    """Whatever the batch, its place in it, and the number of threads."""
    decoder, cache, kv, intervals, token, position = setting(SHAPES["heads of 64"], GATED["before swiglu"], dtype)
    step = NativeDecoder(decoder, library)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = []
    for row in range(BATCH):
        part = KVCache(cache.k[:, row : row + 1].clone(), cache.v[:, row : row + 1].clone())
        image = CrossKV(kv.k[:, row : row + 1].contiguous(), kv.v[:, row : row + 1].contiguous())
        at = slice(row, row + 1)
        alone.append(run(step, part, image, intervals[at], token[at], position[at])[0])
    torch.set_num_threads(threads)
    try:
        for order in ([0, 1, 2, 3], [3, 1], [2, 2, 1, 0, 3, 1, 0, 2, 3], [1] * 17):
            rows = KVCache(cache.k[:, order].clone(), cache.v[:, order].clone())
            image = CrossKV(kv.k[:, order].clone(), kv.v[:, order].clone())
            got = run(step, rows, image, intervals[order], token[order], position[order])
            assert all(torch.equal(row, alone[i]) for row, i in zip(got, order, strict=True)), order
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_a_row_that_sees_nothing_is_the_text_models(library):
    decoder, cache, kv, intervals, token, position = setting(TEXT, GATED["gelu4x"], torch.float32)
    step = NativeDecoder(decoder, library)
    got = run(step, clone(cache), kv, torch.zeros_like(intervals), token, position)
    assert torch.equal(got, run(step, clone(cache), None, None, token, position))


@torch.inference_mode()
def test_gates_far_from_zero(library):
    """e^x has no room there: the gate is 0 or the number itself."""
    decoder, cache, kv, intervals, token, position = setting(TEXT, None, torch.float32)
    for layer in decoder.layers:
        layer.mlp.gate_up_proj.weight[: TEXT.intermediate_size] *= 300
    want, _ = double(decoder, clone(cache), kv, intervals, token, position)
    error = (eager(decoder, clone(cache), kv, intervals, token, position) - want).abs().max()
    got = run(NativeDecoder(decoder, library), clone(cache), kv, intervals, token, position)
    assert (got - want).abs().max() <= 2 * error + 1e-6 * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_nothing_behind_a_row_is_read(library, dtype):
    """Slots not written yet, and image keys outside an interval."""
    decoder, cache, kv, intervals, token, position = setting(SHAPES["heads of 80"], GATED["none"], dtype)
    step = NativeDecoder(decoder, library)
    want = run(step, clone(cache), kv, intervals, token, position)
    for row, length in enumerate(LENGTHS):
        start, end = intervals[row, 0].tolist()
        for side in (cache.k, cache.v):
            side[:, row, length + 1 :] = float("nan")
        for side in (kv.k, kv.v):
            side[:, row, :start] = side[:, row, end:] = float("nan")
    assert torch.equal(run(step, cache, kv, intervals, token, position), want) and want.isfinite().all()


@torch.inference_mode()
def test_a_row_at_rest_writes_nothing(library):
    decoder, cache, _, _, token, position = setting(TEXT, None, torch.float32)
    step, after = NativeDecoder(decoder, library), clone(cache)
    active = torch.tensor([True, False, True, False])
    position[1], position[3] = 10**9, -5  # where it stands is not even looked at
    got = run(step, after, None, None, token, position, active)
    assert torch.equal(after.k[:, 1::2], cache.k[:, 1::2]) and torch.equal(after.v[:, 1::2], cache.v[:, 1::2])
    assert not torch.equal(after.k[:, 0], cache.k[:, 0])
    assert torch.equal(got[0], run(step, clone(cache), None, None, token, position, active)[0])


@torch.inference_mode()
def test_not_finite_stays_in_its_row(library):
    decoder, cache, _, _, token, position = setting(TEXT, None, torch.float32)
    step = NativeDecoder(decoder, library)
    want = run(step, clone(cache), None, None, token, position)
    cache.k[:, 1, 3] = float("nan")
    got = run(step, clone(cache), None, None, token, position)
    assert got[1].isnan().all() and torch.equal(got[[0, 2, 3]], want[[0, 2, 3]])
    cache.k[:, 1, 3] = 0
    assert run(step, clone(cache), None, None, token, position).isfinite().all(), "nothing of it is left behind"


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_native_and_plain_give_the_same_tokens(variant, library):
    want = answers(variant, native=False)
    model = fresh(variant, native=True, cache_folder=library.path.parent)
    assert isinstance(model.runner.backend, NativeLogits)
    assert [out.token_ids for out in model.generate(requests(model), params=PARAMS)] == want
    with torch.no_grad():
        model.model.language_model.norm.weight.mul_(-1)
    plain = NVLM(model.model, model.tokenizer, native=False)
    got = model.generate(requests(model), params=PARAMS)
    assert [out.token_ids for out in got] == [out.token_ids for out in plain.generate(requests(plain), params=PARAMS)]


def test_fp16_is_refused(library):
    with pytest.raises(ValueError, match="takes float32 and bfloat16 on a CPU, layers.0.qkv_proj is torch.float16"):
        NativeDecoder(Decoder(TEXT, None).half(), library)


def test_the_library_is_built_once_and_never_used_when_damaged(tmp_path, monkeypatch):
    module = importlib.import_module("nvlm_kernels.native.library")
    monkeypatch.setattr(module, "FLAGS", tuple(flag.replace("-O3", "-O0") for flag in module.FLAGS))  # built sooner
    first = native.load_library(tmp_path)
    assert first.built and not native.load_library(tmp_path).built
    whole = first.path.read_bytes()
    damaged = tmp_path / "elsewhere"
    damaged.mkdir()
    (damaged / first.path.name).write_bytes(whole[:-100])
    first.path.with_suffix(".sha256").rename(damaged / first.path.with_suffix(".sha256").name)
    again = native.load_library(damaged)
    assert again.built and (damaged / first.path.name).stat().st_size == len(whole)
    assert {path.suffix for path in damaged.iterdir()} == {".so", ".sha256"}


def test_without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.BuildError, match=r"needs a C\+\+ compiler .* found none.*--no-native"):
        native.load_library(tmp_path)
    assert isinstance(fresh("d").runner.backend, EagerLogits), "not asked for: plain PyTorch"
    with pytest.raises(native.BuildError):
        fresh("d", native=True)


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(native.BuildError, match="could not build decode.cpp, attention.cpp, int8.cpp: no such target"):
        native.load_library(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
