"""Machine code of every kernel we ship, on every chip we name: `python -m bench.codegen [--json FILE] [CASE...]`.

Compiled ahead of time with the launcher's own signatures, no GPU needed; see bench.machine for how it is read.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.cases import CASES, Case
from bench.cases.case import backward
from bench.machine import CHIPS, Chip, Code, Launch, capture, compile_launch, inspect
from bench.report import table, write

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def launches(case: Case, dtype: torch.dtype) -> list[Launch]:
    """What a case launches, forward and backward."""
    call = case.build(dtype, "cpu", **case.small)

    def run() -> None:
        output = call.op(*call.inputs)
        if call.backward_bytes is not None:
            backward(output, call.inputs)

    return capture(run)


def faults(case: Case, dtype: torch.dtype, code: Code, chip: Chip) -> list[str]:
    """What is wrong with a kernel's code, by the rules every shipped kernel keeps."""
    found = []
    if code.spills:
        found.append(f"{code.spills} bytes of registers spilled")
    if code.shared > chip.shared_limit:
        found.append(f"{code.shared} bytes of shared memory, the chip has {chip.shared_limit}")
    if case.kind == "stream" and code.widest_load < 16:
        found.append(f"widest load {code.widest_load} bytes")
    if code.has_dot and dtype != torch.float32 and not code.tensor_core:
        found.append("a product that misses the matrix unit")
    if dtype == torch.float32 and code.tf32:
        found.append("fp32 rounded to tf32")
    return found


def codes(case: Case, dtype: torch.dtype, chip: Chip) -> Iterator[Code]:
    for launch in launches(case, dtype):
        yield inspect(compile_launch(launch, chip), chip)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="ids of cases, or the start of them; all where none is named")
    parser.add_argument("--json", type=Path, help="default: bench/results/codegen.json, where no case is named")
    args = parser.parse_args()
    chosen = [case for case in CASES if not args.cases or case.id.startswith(tuple(args.cases))]
    if not chosen:
        parser.error(f"no case begins with {args.cases}; known: {', '.join(case.id for case in CASES)}")
    rows: list[dict[str, Any]] = []
    for case in chosen:
        for dtype in DTYPES:
            for chip in CHIPS.values():
                for code in codes(case, dtype, chip):
                    name = str(dtype).removeprefix("torch.")
                    rows.append(
                        {"case": case.id, "dtype": name} | asdict(code) | {"faults": faults(case, dtype, code, chip)}
                    )
    head = (
        "case",
        "kernel",
        "dtype",
        "chip",
        "warps",
        "regs",
        "spills",
        "shared",
        "matrix",
        "load",
        "occup.",
        "faults",
    )
    keys = (
        "case",
        "kernel",
        "dtype",
        "chip",
        "num_warps",
        "registers",
        "spills",
        "shared",
        "tensor_core",
        "widest_load",
    )
    print(table(head, ([*(row[k] for k in keys), row["occupancy"], "; ".join(row["faults"])] for row in rows)))
    print(f"\n{sum(bool(row['faults']) for row in rows)} of {len(rows)} have a fault")
    write(args.json, "codegen", rows, bool(args.cases))


if __name__ == "__main__":
    main()
