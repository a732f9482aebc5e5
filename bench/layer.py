"""One decoder layer of NVLM-D-72B at its true size, on one process and over ranks: python -m bench.layer [--ranks 2]

A checkpoint of the layer alone (0.88 B parameters, bfloat16, random, with a small vocabulary) is loaded by one process
with all threads, then by ranks that share the threads out, each its own slices. A prompt of 100 tokens and a single
token go through it; outputs are held against the same weights in fp64: over ranks the error may be at most twice that
of one process. Beside each time stands what `nvlm plan` says from this machine's measured roof, a rank's share of it.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.reports.card import READ_BYTES, gemm_rate
from bench.reports.report import table, write
from bench.setup.gloo import run_ranks
from bench.setup.synthetic import random_model
from bench.train_step import percentiles
from nvlm_runtime.analysis.devices import Device, read_bandwidth
from nvlm_runtime.analysis.plan import Workload, plan_model
from nvlm_runtime.checkpoint.weights import load, save
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import CausalPast
from nvlm_runtime.parallel.group import SOLO, Group
from nvlm_runtime.presets import MICRO_VISION, PRESETS

TOKENS = {"prompt": 100, "token": 1}
VOCABULARY = 512


def layer_config(name: str) -> NVLMConfig:
    config = PRESETS[name]
    return replace(
        config,
        vision=MICRO_VISION,
        text=replace(config.text, num_hidden_layers=1, vocab_size=VOCABULARY),
        cross=None if config.cross is None else replace(config.cross, layers=(0,)),
    )


def inputs(width: int, tokens: int) -> Tensor:
    return torch.randn(1, tokens, width, generator=torch.Generator().manual_seed(tokens))


def through(model: NVLMModel, x: Tensor) -> Tensor:
    """x: [1, T, C], through the layer and the norm behind it."""
    positions = torch.arange(x.shape[1])[None]
    return model.language_model(x, positions, CausalPast(positions, model.language_model.attention))


@torch.inference_mode()
def measure(group: Group, folder: Path, rounds: int) -> dict[str, Any]:
    """Of each input: the output, and the seconds of every round."""
    model, _ = load(folder, group=group)
    found: dict[str, Any] = {}
    for name, tokens in TOKENS.items():
        x = inputs(model.config.text.hidden_size, tokens).bfloat16()
        out, times = through(model, x.clone()), []
        for _ in range(rounds):
            group.wait()
            began = time.perf_counter()
            through(model, x.clone())
            times.append(time.perf_counter() - began)
        found[name] = {"out": out, "seconds": times}
    return found


def errors(found: dict[str, Any], exact: dict[str, Tensor]) -> dict[str, float]:
    """Of each input: the distance to fp64, as a share of its size."""
    return {name: ((found[name]["out"].double() - want).norm() / want.norm()).item() for name, want in exact.items()}


@torch.inference_mode()
def in_fp64(folder: Path) -> dict[str, Tensor]:
    model, _ = load(folder, dtype=torch.float64)
    width = model.config.text.hidden_size
    return {name: through(model, inputs(width, num).bfloat16().double()) for name, num in TOKENS.items()}


def planned(config: NVLMConfig, size: int, machine: Device) -> dict[str, float]:
    """Seconds by `nvlm plan`, where each of `size` ranks has its share of the machine."""
    share = replace(machine, bandwidth=machine.bandwidth / size, flops=machine.flops / size)
    seconds = plan_model(config, Workload(1, TOKENS["prompt"], 0), share, size).seconds
    return dict(zip(TOKENS, seconds.values(), strict=True))


def compare(config: NVLMConfig, sizes: list[int], rounds: int, threads: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    machine = Device("this machine", 0, read_bandwidth("cpu", READ_BYTES), gemm_rate())
    runs: dict[int, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_model(config, torch.bfloat16)
        save(model, folder)
        del model
        exact = in_fp64(folder)
        for size in sizes:
            if size == 1:
                runs[size] = [measure(SOLO, folder, rounds)]
            else:
                each = max(1, threads // size)
                runs[size] = run_ranks(size, measure, folder, rounds, threads=each, timeout=600)
    rows = []
    first = errors(runs[sizes[0]][0], exact)
    for size, ranks in runs.items():
        apart = [errors(rank, exact) for rank in ranks]
        for what in TOKENS:
            slowest = [max(round_) for round_ in zip(*(rank[what]["seconds"] for rank in ranks), strict=True)]
            low, middle, high = percentiles(slowest) if len(slowest) > 1 else 3 * slowest
            rows.append(
                {
                    "ranks": size,
                    "input": what,
                    "tokens": TOKENS[what],
                    "ms": {"p20": 1e3 * low, "p50": 1e3 * middle, "p80": 1e3 * high},
                    "planned_ms": 1e3 * planned(config, size, machine)[what],
                    "error": max(each[what] for each in apart),
                    "error_of_one": first[what],
                    "read_gb_per_s": machine.bandwidth / 1e9,
                    "gemm_gflop_per_s": machine.flops / 1e9,
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    cells = [
        [
            row["ranks"],
            row["tokens"],
            "{p50:.0f} ({p20:.0f}-{p80:.0f})".format(**row["ms"]),
            f"{row['planned_ms']:.0f}",
            f"{row['error']:.2e}",
            f"{row['error'] / row['error_of_one']:.2f}x",
        ]
        for row in rows
    ]
    return table(("ranks", "tokens", "ms", "planned ms", "error against fp64", "of one process's"), cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.layer", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(PRESETS), default="nvlm-d-72b")
    parser.add_argument(
        "--ranks", type=int, nargs="+", default=[1, 2], help="the first is what others are held against"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="default: bench/results/layer.json, of nvlm-d-72b")
    args = parser.parse_args(argv)
    if min(*args.ranks, args.rounds, args.threads) < 1 or args.ranks[0] != 1:
        parser.error("--rounds and --threads must be at least 1, and --ranks begins with 1")
    rows = compare(layer_config(args.model), args.ranks, args.rounds, args.threads)
    print(show(rows))
    write(args.json, "layer", rows, args.model != "nvlm-d-72b")
    wrong = [row for row in rows if row["error"] > 2 * row["error_of_one"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
