"""Milliseconds a decoded token against the context it stands in: python -m bench.context [--model micro-d]

A step reads the weights once whatever was generated before it; only attention grows. Prompts of plain tokens, so the
context is exact. Medians over `--tokens` steps with 20th and 80th percentile; the contexts take turns.
"""

import argparse
import json
import statistics
import time

import torch

from nvlm_runtime import NVLM


def step_times(model: NVLM, context: int, tokens: int) -> list[float]:
    """Seconds of each step after a prompt of `context` tokens."""
    stream = model.stream(input_ids=[9] * context, max_new_tokens=tokens + 2, ignore_eos=True)
    steps = stream._pieces
    next(steps)  # the prefill, and the first token
    next(steps)
    times = []
    for _ in range(tokens):
        started = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="micro-d")
    parser.add_argument("--contexts", type=int, nargs="+", default=[32, 128, 512, 1024])
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model = NVLM.load(args.model)
    times: dict[int, list[float]] = {context: [] for context in args.contexts}
    for _ in range(args.rounds):
        for context in args.contexts:
            times[context] += step_times(model, context, args.tokens)
    print(f"{args.model}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    print("context   p20    p50    p80  ms a token   against the first")
    rows = []
    for context in args.contexts:
        p20, p50, p80 = (1e3 * statistics.quantiles(times[context], n=10)[i] for i in (1, 4, 7))
        rows.append({"context": context, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80})
        print(f"{context:7d} {p20:6.2f} {p50:6.2f} {p80:6.2f} {'':14s} {p50 / rows[0]['p50_ms']:.2f}x")
    print(
        json.dumps({"model": args.model, "threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows})
    )


if __name__ == "__main__":
    main()
