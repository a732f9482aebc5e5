"""What the roof allows: predicted times of every op at the 72B model's shapes. `python -m bench.predict [CASE...]`.

Every number here is predicted, none measured. A step takes the longer of its bytes at the memory's published rate
and its flops at the matrix unit's; eager is the sum over the reference's aten ops, ours the floor of the case (each
array once, one launch each pass), so it is the least time a perfect kernel could take, not what ours takes.
Roof: NVIDIA H100 SXM data sheet, 3.35 TB/s and 989 TFLOP/s dense bf16.
"""

from typing import Any

import torch

from bench.bytes import eager_steps
from bench.cases import Case
from bench.ops import ROOFS
from bench.options import chosen, options
from bench.report import table, write

BYTES_PER_S, FLOPS_PER_S = ROOFS["NVIDIA H100 80GB HBM3"]


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
    parser = options("predict", __doc__)
    args = parser.parse_args()
    rows = [row for case in chosen(parser, args.cases) for row in predict(case)]
    print("Predicted for one H100 SXM in bf16; nothing here was measured.\n")
    keys = ("case", "pass", "bound", "megabytes", "gigaflops", "roof_us", "eager_us", "eager_share_of_roof")
    head = ("case", "pass", "bound by", "MB", "GFLOP", "roof us", "eager us", "eager / roof")
    print(table(head, ([row[key] for key in keys] for row in rows)))
    write(args.json, "predict", rows, bool(args.cases))


if __name__ == "__main__":
    main()
