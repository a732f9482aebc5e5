"""Milliseconds a decoded token against the context it stands in: python -m bench.context [micro-d micro-x micro-h]

A step reads the weights once whatever was generated before it; only attention grows. Prompts of plain tokens, so the
context is exact. Medians over `--tokens` steps of each round with 20th and 80th percentile; the contexts take turns.
"host" is what of a step passes outside the native step: drawing, the batch's own work, Python.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.reports import report
from nvlm_runtime import NVLM
from nvlm_runtime.engine.native import NativeDecoder

MODELS = ("micro-d", "micro-x", "micro-h")


@contextmanager
def native_seconds() -> Iterator[list[float]]:
    """While it is open, every native step adds its seconds."""
    original, found = NativeDecoder.step, []

    def step(self: NativeDecoder, *args: Any) -> None:
        began = time.perf_counter()
        original(self, *args)
        found.append(time.perf_counter() - began)

    NativeDecoder.step = step
    try:
        yield found
    finally:
        NativeDecoder.step = original


def step_times(model: NVLM, context: int, tokens: int) -> list[tuple[float, float | None]]:
    """Seconds of each step after a prompt of `context` tokens, and those outside the native step; None without one."""
    steps = iter(model.stream(input_ids=[9] * context, max_new_tokens=tokens + 2, ignore_eos=True)._pieces)
    next(steps)  # the prefill, and the first token
    next(steps)
    times = []
    with native_seconds() as inside:
        for number in range(1, tokens + 1):
            began = time.perf_counter()
            next(steps)
            spent = time.perf_counter() - began
            times.append((spent, spent - inside[-1] if len(inside) == number else None))
    return times


def measure(name: str, contexts: Sequence[int], tokens: int, rounds: int, **options: Any) -> list[dict[str, Any]]:
    """A row a context."""
    model = NVLM.load(name, **options)
    times: dict[int, list[tuple[float, float | None]]] = {context: [] for context in contexts}
    for _ in range(rounds):
        for context in contexts:
            times[context] += step_times(model, context, tokens)
    rows = []
    for context in contexts:
        row: dict[str, Any] = {"model": name, "context": context}
        whole, host = zip(*times[context])
        for kind, values in (("", whole), ("host_", host)):
            cuts = [None] * 9 if None in values else statistics.quantiles(values, n=10)
            row |= {f"{kind}p{10 * (i + 1)}_ms": cuts[i] and 1e3 * cuts[i] for i in (1, 4, 7)}
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.context", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL", help="(default: the micro models)")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32, 128, 512, 1024])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="(default: bench/results/context.json for all at full length)")
    args = parser.parse_args(argv)
    if min(*args.contexts, args.tokens, args.rounds) < 1:
        parser.error("--contexts, --tokens and --rounds must be at least 1")
    rows = [row for name in args.models for row in measure(name, args.contexts, args.tokens, args.rounds)]
    cells = []
    for row in rows:
        first = next(each for each in rows if each["model"] == row["model"])
        times = [row[f"{kind}p{p}_ms"] for kind in ("", "host_") for p in (20, 50, 80)]
        cells.append((row["model"], row["context"], *times, f"{row['p50_ms'] / first['p50_ms']:.2f}x"))
    names = ("ms p20", "p50", "p80", "host p20", "p50", "p80")
    print(report.table(("", "context", *names, "against the first"), cells))
    report.write(args.json, "context", rows, tuple(args.models) != MODELS or args.tokens * args.rounds < 300)


if __name__ == "__main__":
    main()
