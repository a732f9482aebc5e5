"""A decoding step on a CPU, route by route: python -m bench.decode [--shape ...] [--peers transformers llama.cpp]

Every route has the same decoder behind a cache of noise: plain PyTorch, the native step on the dtype's weights, on int8
and on int4, transformers' Qwen2, and llama.cpp on the weights as bf16, q8_0 and q4_0 (one row). They take turns in one
process, with a read of memory that no cache holds between each two: a step's share of the roof is of the speed around
it, as a machine that others share changes its own, and the median of such shares. A step's bytes are the weights and
the keys and values it reads, as they are stored.
"""

import argparse
import copy
import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from bench.peers.llama_peer import KINDS, LlamaRow, write_gguf
from bench.reports import report
from bench.reports.card import READ_BYTES
from bench.setup.synthetic import SHAPES, random_model, shape_config
from nvlm_kernels.native import load_library
from nvlm_runtime.engine.native import NativeDecoder
from nvlm_runtime.engine.step_bytes import StepBytes, step_bytes
from nvlm_runtime.model.cache import KVCache
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import make_past
from nvlm_runtime.model.quantize import quantize

Run = Callable[[], None]
CPU = torch.device("cpu")
ROUTES = ("plain", "native", "int8", "int4")
PEERS = {"transformers": ("transformers",), "llama.cpp": tuple(f"llama.cpp {kind}" for kind in KINDS)}


class Routes:
    """The routes of one decoder; `run` gives a step of `batch` rows at a context."""

    def __init__(self, model: NVLMModel, capacity: int, most: int, names: list[str]):
        self.config, self.dtype = model.config, model.language_model.embed_tokens.weight.dtype
        self.decoder = model.language_model
        self.library = load_library()
        self.cache = KVCache.allocate(model.config.text, most, capacity, CPU, self.dtype)
        self.cache.k.normal_()
        self.cache.v.normal_()
        self.token = torch.arange(5, 5 + most)
        self.active = torch.ones(most, dtype=torch.bool)
        self.logits = torch.empty(most, model.config.text.vocab_size)
        self.native, self.bytes = {}, {}
        for name in names:
            if name in PEERS["llama.cpp"]:
                continue
            twin = model if name in ("plain", "native", "transformers") else self._quantised(model, name)
            if name not in ("plain", "transformers"):
                self.native[name] = NativeDecoder(twin.language_model, self.library)
            self.bytes[name] = step_bytes(twin)
        self.peer = self._transformers(model) if "transformers" in names else None
        self.llama = {name: self._llama(model, name, capacity) for name in names if name in PEERS["llama.cpp"]}

    @staticmethod
    def _quantised(model: NVLMModel, kind: str) -> NVLMModel:
        twin = copy.copy(model)
        twin._modules = dict(model._modules)
        twin.language_model = copy.deepcopy(model.language_model)
        quantize(twin, {"decoder": kind, "head": kind})
        return twin

    def _llama(self, model: NVLMModel, name: str, capacity: int) -> LlamaRow:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            weights = write_gguf(model, name.split()[-1], path)
            row = LlamaRow(path, capacity)
            text = model.config.text
            token = 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim  # of its fp16 cache
            self.bytes[name] = StepBytes(weights, 0, token, 0)
        return row

    def _transformers(self, model: NVLMModel):
        from bench.peers.transformers_peer import transformers_model

        return transformers_model(model, 0)

    def run(self, name: str, batch: int, context: int) -> Run:
        position = torch.full((batch,), context - 1)
        cache, token = self.cache.rows(0, batch), self.token[:batch]
        if name == "plain":
            at = position[:, None]

            def plain() -> None:
                past = make_past(at, self.decoder.attention, cache, context)
                self.decoder.logits(self.decoder(self.decoder.embed_tokens(token[:, None]), at, past)[:, 0])

            return plain
        if name == "transformers":
            return self._peer_step(batch, context)
        if name in self.llama:
            return self.llama[name].step(context)
        logits, active = self.logits[:batch], self.active[:batch]
        return lambda: self.native[name].step(token, position, active, cache, None, None, logits)

    def _peer_step(self, batch: int, context: int) -> Run:
        from transformers import DynamicCache

        past, text = DynamicCache(), self.config.text
        shape = (batch, text.num_key_value_heads, context - 1, text.head_dim)
        for layer in range(text.num_hidden_layers):
            past.update(torch.randn(shape).to(self.dtype), torch.randn(shape).to(self.dtype), layer)
        model, ids = self.peer, self.token[:batch, None]

        def step() -> None:
            model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past.crop(-1)

        return step


@dataclass(frozen=True)
class Turns:
    """What one route did, a round each: its seconds, and those of the reads of memory just before and after, a mean."""

    seconds: list[float]
    reads: list[float]


def measure(read: Run, runs: dict[str, Run], rounds: int) -> dict[str, Turns]:
    """All runs in turn, a read between each two, after a round that does not count."""
    turns = {name: Turns([], []) for name in runs}
    before = timed(read)
    for number in range(rounds + 1):
        for name, run in runs.items():
            took = timed(run)
            after = timed(read)
            if number:
                turns[name].seconds.append(took)
                turns[name].reads.append((before + after) / 2)
            before = after
    return turns


def timed(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def spread(times: list[float]) -> tuple[float, float, float]:
    p20, p50, p80 = (statistics.quantiles(times, n=10, method="inclusive")[i] for i in (1, 4, 7))
    return p20, p50, p80


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen2-0.5b+internvit-300m")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="at the first context")
    parser.add_argument("--routes", nargs="+", choices=ROUTES, default=list(ROUTES))
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=[])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="default: bench/results/decode.json")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    if "llama.cpp" in args.peers and find_spec("llama_cpp") is None:
        parser.error(
            "--peers llama.cpp needs llama-cpp-python: CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python"
        )
    names = [*args.routes, *(name for peer in args.peers for name in PEERS[peer])]
    model = random_model(shape_config(args.shape, "d"), getattr(torch, args.dtype))
    routes = Routes(model, max(args.contexts) + 1, max(args.batches), names)
    memory = torch.from_numpy(np.ones(READ_BYTES // 4, np.float32))
    threads = torch.get_num_threads()

    def read() -> None:
        routes.library.dll.nvlm_read(ctypes.c_void_p(memory.data_ptr()), memory.numel(), threads)

    rows = []
    cases = [(1, context) for context in args.contexts] + [(b, args.contexts[0]) for b in args.batches if b > 1]
    for batch, context in cases:
        alone = PEERS["llama.cpp"] if batch > 1 else ()
        runs = {name: routes.run(name, batch, context) for name in names if name not in alone}
        turns = measure(read, runs, args.rounds)
        base = statistics.median(turns[names[0]].seconds)
        for name in runs:
            p20, p50, p80 = spread(turns[name].seconds)
            num_bytes = routes.bytes[name].total(context, rows=batch)
            pairs = zip(turns[name].seconds, turns[name].reads, strict=True)
            share = statistics.median(num_bytes / took / (memory.nbytes / reading) for took, reading in pairs)
            rows.append(
                {
                    "route": name,
                    "batch": batch,
                    "context": context,
                    "p20_ms": 1e3 * p20,
                    "p50_ms": 1e3 * p50,
                    "p80_ms": 1e3 * p80,
                    "bytes": num_bytes,
                    "read_gb_s": memory.nbytes / statistics.median(turns[name].reads) / 1e9,
                    "share_of_read": share,
                    f"against_{names[0]}": base / p50,
                }
            )
            print(f"{name} {batch} x {context}: {1e3 * p50:.1f} ms", flush=True)
    head = ("route", "rows", "context", "p20", "p50", "p80 ms", "GB", "read GB/s", "share", f"x {names[0]}")
    print(f"\n{args.shape}, {args.dtype}, {threads} threads")
    cells = [(*[row[key] for key in list(row)[:6]], row["bytes"] / 1e9, *list(row.values())[7:]) for row in rows]
    print(report.table(head, cells))
    asked = ("shape", "dtype", "contexts", "batches", "routes", "rounds")
    report.write(args.json, "decode", rows, any(getattr(args, name) != parser.get_default(name) for name in asked))


if __name__ == "__main__":
    main()
