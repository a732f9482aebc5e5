"""What the roof allows: predicted times of every op at the 72B model's shapes.
`python -m bench.proofs.predict [CASE...]`.

Every number here is predicted, none measured. A step takes the longer of its bytes at the memory's published rate
and its flops at the matrix unit's; eager is the sum over the reference's aten ops, the roof the floor of the case (each
array once, one launch each pass), the least time a perfect kernel could take. Ours has the floor's flops, those of what
it makes again, and the bytes that `bench.proofs.traffic` counted to reach memory, at shapes scaled down, as a share of
the floor: what rates its products reach, and what a launch takes, no count tells.
Roof: NVIDIA H100 SXM data sheet, 3.35 TB/s and 989 TFLOP/s dense bf16.
"""

import json
from functools import cache
from typing import Any

import torch

from bench.ops import ROOFS
from bench.proofs.bytes import eager_steps
from bench.proofs.cases import Case
from bench.proofs.options import chosen, options
from bench.reports.report import RESULTS, table, write

BYTES_PER_S, FLOPS_PER_S = ROOFS["NVIDIA H100 80GB HBM3"]


def seconds(num_bytes: int, flops: int) -> float:
    return max(num_bytes / BYTES_PER_S, flops / FLOPS_PER_S)


@cache
def counted() -> dict[tuple[str, str], float]:
    """Bytes that reach memory as a share of the floor, by case and pass: the results of `bench.proofs.traffic`."""
    rows = json.loads((RESULTS / "traffic.json").read_text())["rows"]
    return {(row["case"], row["pass"]): row["memory"] / row["floor"] for row in rows}


def predict(case: Case) -> list[dict[str, Any]]:
    call = case.build(torch.bfloat16, "meta", **case.full)
    rows = []
    work = ((call.forward_bytes, call.forward_flops), (call.backward_bytes, call.backward_flops))
    for name, (num_bytes, flops), steps in zip(("forward", "backward"), work, eager_steps(call)):
        if num_bytes is None:
            continue
        roof = seconds(num_bytes, flops)
        eager = sum(seconds(step.bytes, step.flops) for step in steps)
        moved = counted()[case.id, name]
        ours = seconds(num_bytes * moved, flops + (name == "backward") * call.repeated_flops)
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
                "counted_bytes_of_floor": moved,
                "ours_us": ours * 1e6,
                "ours_share_of_roof": roof / ours,
            }
        )
    return rows


def main() -> None:
    parser = options("predict", __doc__)
    args = parser.parse_args()
    rows = [row for case in chosen(parser, args.cases) for row in predict(case)]
    print("Predicted for one H100 SXM in bf16; nothing here was measured.\n")
    keys = ("case", "pass", "bound", "megabytes", "gigaflops", "roof_us", "eager_us", "eager_share_of_roof")
    keys += ("ours_us", "ours_share_of_roof")
    head = ("case", "pass", "bound by", "MB", "GFLOP", "roof us", "eager us", "roof / eager", "ours us", "roof / ours")
    print(table(head, ([row[key] for key in keys] for row in rows)))
    write(args.json, "predict", rows, bool(args.cases))


if __name__ == "__main__":
    main()
