"""Bytes every op really moves, against the floor and against plain torch: `python -m bench.proofs.traffic [CASE...]`.

Runs the kernels in the interpreter, fp16, where every lane of every load and store can be seen; masked lanes are not
counted. Columns, in bytes over the floor (each array a pass needs once, each it makes once):
    moved     what kernels and torch ops of ours load and store; matmul cases read their operands again for every
              block, which a cache serves, so
    memory    counts an address once a launch: what is left for the memory where the cache holds. A streaming kernel's
              weights are read again by every program too, so its `moved` is above its `memory` by that
    eager     the reference, every aten op reading its inputs and writing its outputs once
    compiled  the graphs Inductor would emit for the reference, by its own count, after its fusions
"""

import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.proofs.cases import Case


def measure(case: "Case", with_compiled: bool = True) -> list[dict[str, Any]]:
    """A row a pass: forward and backward, and inference where a product that keeps nothing for a backward moves other
    bytes. Needs TRITON_INTERPRET=1 set before torch or triton is imported.
    """
    import torch

    from bench.proofs.bytes import EagerBytes, compiled_bytes, eager_steps
    from bench.proofs.cases.case import backward
    from bench.proofs.interpreter import MemoryTrace

    torch.manual_seed(0)
    call = case.build(torch.float16, "cpu", **(case.traced or case.small))
    rows = []
    with MemoryTrace() as trace, EagerBytes() as torch_ops:
        output = call.op(*call.inputs)
    ours = {"forward": (trace, torch_ops.bytes)}
    if call.backward_bytes is not None:
        if call.weight_bytes:
            with MemoryTrace() as trace, EagerBytes() as torch_ops, torch.no_grad():
                call.op(*call.inputs)
            if trace.total() != ours["forward"][0].total():
                ours["inference"] = (trace, torch_ops.bytes)
        grads = [torch.ones_like(t) for t in _outputs(output)]
        with MemoryTrace() as trace, EagerBytes() as torch_ops:
            backward(output, call.inputs, grads)
        ours["backward"] = (trace, torch_ops.bytes)
    eager = [sum(step.bytes for step in steps) for steps in eager_steps(call)]
    compiled: list[int | None] = [None, None]
    if with_compiled:
        compiled[0] = compiled_bytes(call.ref, call.inputs, False)
        if call.backward_bytes is not None:
            compiled[1] = compiled_bytes(call.ref, call.inputs, True) - compiled[0]
    floors = (call.forward_bytes, call.backward_bytes)
    for name, (trace, extra) in ours.items():
        floor, plain, fused = (values[name == "backward"] for values in (floors, eager, compiled))
        total = trace.total()
        rows.append(
            {
                "case": case.id,
                "kind": case.kind,
                "dims": case.traced or case.small,
                "pass": name,
                "launches": len(trace.launches),
                "floor": floor,
                "weights": call.weight_bytes,
                "moved": total.loaded + total.stored + extra,
                "memory": total.unique_loaded + total.unique_stored + extra,
                "eager": plain,
                "compiled": fused,
                "by_argument": {
                    f"{kernel}.{argument}": asdict(access) for (kernel, argument), access in trace.access.items()
                },
            }
        )
    return rows


def _outputs(output: Any) -> list[Any]:
    from bench.proofs.cases.case import tensors_in

    return [t for t in tensors_in(output) if t.requires_grad]


def main() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from bench.proofs.options import chosen, options
    from bench.reports.report import table, write

    parser = options("traffic", __doc__)
    args = parser.parse_args()
    rows = [row for case in chosen(parser, args.cases) for row in measure(case)]
    columns = ("moved", "memory", "eager", "compiled")
    head = ("case", "pass", "launches", "floor MB", *columns)
    print(
        table(
            head,
            (
                [r["case"], r["pass"], r["launches"], r["floor"] / 1e6, *(r[c] and r[c] / r["floor"] for c in columns)]
                for r in rows
            ),
        )
    )
    write(args.json, "traffic", rows, bool(args.cases))


if __name__ == "__main__":
    main()
