"""Machine code of every kernel we ship, on every chip we name:
`python -m bench.proofs.codegen [--json FILE] [CASE...]`.

Compiled ahead of time with the launcher's own signatures, no GPU needed; see bench.proofs.machine for how it is read.
"""

from dataclasses import asdict
from typing import Any

import torch

from bench.proofs.cases import Case
from bench.proofs.cases.case import backward
from bench.proofs.machine import CHIPS, Chip, Code, Launch, capture, compile_launch, inspect
from bench.proofs.options import chosen, options
from bench.reports.report import table, write

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


def main() -> None:
    parser = options("codegen", __doc__)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for case in chosen(parser, args.cases):
        for dtype in DTYPES:
            made = launches(case, dtype)
            for chip in CHIPS.values():
                for code in (inspect(compile_launch(launch, chip), chip) for launch in made):
                    name = str(dtype).removeprefix("torch.")
                    rows.append(
                        {"case": case.id, "dtype": name} | asdict(code) | {"faults": faults(case, dtype, code, chip)}
                    )
    keys = "case kernel dtype chip num_warps registers spills shared tensor_core widest_load".split()
    head = "case kernel dtype chip warps regs spills shared matrix load occup. faults".split()
    print(table(head, ([*(row[k] for k in keys), row["occupancy"], "; ".join(row["faults"])] for row in rows)))
    print(f"\n{sum(bool(row['faults']) for row in rows)} of {len(rows)} have a fault")
    write(args.json, "codegen", rows, bool(args.cases))


if __name__ == "__main__":
    main()
