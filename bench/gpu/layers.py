"""One decoder layer of NVLM-D-72B and one block of its vision encoder, at full size: eager, ours, captured, compiled.

Random bf16 weights, the model's own classes. "eager" is the same code on the references of the ops. Launches are the
kernels that one call starts, counted by torch's profiler. Errors are against the same weights in fp64, beside eager's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench.gpu.step import Part, Row, Visit
from bench.gpu.timing import time_calls
from bench.setup.synthetic import random_model
from nvlm_kernels import _backend
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.model.cache import KVCache
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import make_past
from nvlm_runtime.presets import MICRO_VISION, PRESETS

VOCABULARY = 512
COLUMNS = ("eager", "ours", "compiled")
DECODE = ((1, 2048), (8, 2048), (32, 2048), (1, 32768))  # rows, positions of context
PROMPTS = (1024, 4096)
TILES = (1, 7)


def parts(visit: Visit) -> Iterator[Part]:
    """The decoder layer's decode steps and prompts, the vision encoder's block."""
    for rows, context in ((2, 16),) if visit.quick else DECODE:
        yield f"decoder layer, {rows} rows after {context} tokens", partial(_decode, visit, rows, context)
    for tokens in (16,) if visit.quick else PROMPTS:
        yield f"decoder layer, a prompt of {tokens} tokens", partial(_prompt, visit, tokens)
    for tiles in (1,) if visit.quick else TILES:
        yield f"vision block, {tiles} tiles", partial(_vision, visit, tiles)


def _config(visit: Visit, part: str) -> NVLMConfig:
    """One layer of the part, and as little as there can be of the other."""
    config = PRESETS["micro-d" if visit.quick else "nvlm-d-72b"]
    micro = PRESETS["micro-d"].text
    text = replace(config.text, num_hidden_layers=1, vocab_size=VOCABULARY)
    vision = MICRO_VISION
    if part == "vision":
        text = replace(micro, num_hidden_layers=1, vocab_size=VOCABULARY)
        vision = replace(config.vision, num_hidden_layers=1)
    return replace(config, text=text, vision=vision)


def _model(visit: Visit, part: str) -> NVLMModel:
    return random_model(_config(visit, part), torch.bfloat16, device=visit.device)


def _decode(visit: Visit, rows: int, context: int) -> Iterator[Row]:
    model = _model(visit, "text")
    config, device = model.config.text, torch.device(visit.device)
    positions = torch.full((rows, 1), context, device=device)
    x = torch.randn(rows, 1, config.hidden_size, device=device).bfloat16()

    def forward(model: NVLMModel, cache: KVCache, x: Tensor) -> Tensor:
        past = make_past(positions, "sdpa", cache, context + 1)
        return model.language_model(x, positions, past)

    cache = KVCache.allocate(config, rows, context + 1, device, torch.bfloat16)
    cache.k.normal_()
    cache.v.normal_()
    wide = KVCache.allocate(config, rows, context + 1, device, torch.float64)
    wide.k.copy_(cache.k)
    wide.v.copy_(cache.v)
    yield from _compared(visit, partial(forward, model, cache), partial(_in_fp64, model, forward, wide), x)


def _prompt(visit: Visit, tokens: int) -> Iterator[Row]:
    model = _model(visit, "text")
    positions = torch.arange(tokens, device=visit.device)[None]
    x = torch.randn(1, tokens, model.config.text.hidden_size, device=visit.device).bfloat16()

    def forward(model: NVLMModel, cache: None, x: Tensor) -> Tensor:
        return model.language_model(x, positions, make_past(positions, "sdpa"))

    yield from _compared(visit, partial(forward, model, None), partial(_in_fp64, model, forward, None), x)


def _vision(visit: Visit, tiles: int) -> Iterator[Row]:
    model = _model(visit, "vision")
    size = model.config.vision.image_size
    pixels = torch.randn(tiles, 3, size, size, device=visit.device).bfloat16()

    def forward(model: NVLMModel, cache: None, pixels: Tensor) -> Tensor:
        return model.encode(pixels).patches

    yield from _compared(visit, partial(forward, model, None), partial(_in_fp64, model, forward, None), pixels)


def _in_fp64(model: NVLMModel, forward: Callable[..., Tensor], cache: KVCache | None, x: Tensor) -> Tensor:
    dtype = model.language_model.embed_tokens.weight.dtype
    model.double()
    try:
        with _references():
            return forward(model, cache, x.double())
    finally:
        model.to(dtype)


@contextmanager
def _references() -> Iterator[None]:
    before, _backend.EAGER = _backend.EAGER, True
    try:
        yield
    finally:
        _backend.EAGER = before


@torch.no_grad()
def _compared(
    visit: Visit, forward: Callable[[Tensor], Tensor], in_fp64: Callable[[Tensor], Tensor], x: Tensor
) -> Iterator[Row]:
    exact = in_fp64(x)
    with _references():
        eager = (forward(x.clone()).double() - exact).norm() / exact.norm()
    for column in COLUMNS[: 2 if visit.quick else None]:
        with _references() if column != "ours" else _nothing():
            run = torch.compile(forward, dynamic=False) if column == "compiled" else forward
            error = ((run(x.clone()).double() - exact).norm() / exact.norm()).item()
            row = {"column": column, "launches": _launches(partial(run, x)), "one_by_one_us": _one_by_one(run, x)}
            row["us"] = time_calls([partial(run, x)], 3 if visit.quick else 15)
        yield row | {"error": error, "eager_error": eager.item(), "right": error <= 2 * eager.item() + 1e-3}


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _launches(run: Callable[[], Tensor]) -> int | None:
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in found.events())


def _one_by_one(run: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Microseconds of a call whose kernels are launched one by one: the larger of the host's time and the device's."""
    import time

    count = 20 if torch.cuda.is_available() else 2
    for measured in (False, True):
        began = time.perf_counter()
        for _ in range(count):
            run(x)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if measured:
            return 1e6 * (time.perf_counter() - began) / count
    raise AssertionError
