"""What the roof allows: predicted times of every op at the 72B model's shapes. `python -m bench.predict [CASE...]`.

Every number here is predicted, none measured. A step takes the longer of its bytes at the memory's published rate
and its flops at the matrix unit's; eager is the sum over the reference's aten ops, ours the floor of the case (each
array once, one launch each pass), so it is the least time a perfect kernel could take, not what ours takes.
Roof: NVIDIA H100 SXM data sheet, 3.35 TB/s and 989 TFLOP/s dense bf16.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from bench.bytes import eager_steps
from bench.cases import CASES, Case
from bench.report import table, write

BYTES_PER_S = 3.35e12
FLOPS_PER_S = 989e12


def seconds(num_bytes: int, flops: int) -> float:
    return max(num_bytes / BYTES_PER_S, flops / FLOPS_PER_S)


def predict(case: Case) -> list[dict[str, Any]]:
    call = case.build(torch.bfloat16, "meta", **case.full)
    rows = []
    work = ((call.forward_bytes, call.forward_flops), (call.backward_bytes, call.backward_flops))
    for name, (num_bytes, flops), steps in zip(("forward", "backward"), work, eager_steps(call)):
        if num_bytes is None:
            continue
        roof = seconds(num_bytes, flops)
        eager = sum(seconds(step.bytes, step.flops) for step in steps)
        rows.append(
            {
                "case": case.id,
                "pass": name,
                "predicted": True,
                "bound": "bytes" if num_bytes / BYTES_PER_S > flops / FLOPS_PER_S else "flops",
                "megabytes": num_bytes / 1e6,
                "gigaflops": flops / 1e9,
                "roof_us": roof * 1e6,
                "eager_us": eager * 1e6,
                "eager_share_of_roof": roof / eager,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="ids of cases, or the start of them; all where none is named")
    parser.add_argument("--json", type=Path, help="default: bench/results/predict.json, where no case is named")
    args = parser.parse_args()
    chosen = [case for case in CASES if not args.cases or case.id.startswith(tuple(args.cases))]
    if not chosen:
        parser.error(f"no case begins with {args.cases}; known: {', '.join(case.id for case in CASES)}")
    rows = [row for case in chosen for row in predict(case)]
    print("Predicted for one H100 SXM in bf16; nothing here was measured.\n")
    keys = ("case", "pass", "bound", "megabytes", "gigaflops", "roof_us", "eager_us", "eager_share_of_roof")
    head = ("case", "pass", "bound by", "MB", "GFLOP", "roof us", "eager us", "eager / roof")
    print(table(head, ([row[key] for key in keys] for row in rows)))
    write(args.json, "predict", rows, bool(args.cases))


if __name__ == "__main__":
    main()
