"""Times every op on a GPU: eager, compiled, ours. `python -m bench.ops [CASE...] [--base REV] [--json FILE]`.

Median of cold-L2 runs with the 20th and 80th percentile, bf16, at the 72B model's shapes, forward and backward
(timed apart: the backward of a graph that was made once). Rates count the bytes and flops the case needs at least,
whatever an implementation moves, and the share of the roof is theirs. `--base` times ours at another commit beside it.
Without a GPU it says so and stops; `pytest bench --benchmark-only` runs everywhere.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from bench.proofs.cases import Call, Case
from bench.proofs.cases.case import tensors_in
from bench.proofs.errors import errors_of
from bench.proofs.options import chosen, options
from bench.reports.report import table, write
from nvlm_runtime.analysis.devices import DEVICES

# Published peaks: bytes/s of memory, dense bf16 flops/s.
ROOFS = {device.name: (device.bandwidth, device.flops) for device in DEVICES.values()} | {
    "NVIDIA B200": (8.0e12, 2250e12),
    "AMD Instinct MI300X": (5.3e12, 1307e12),
}
Timing = tuple[float, float, float]


def time_us(run: Callable[[], Any]) -> Timing:
    """p20, p50, p80 in microseconds; the L2 cache is flushed before each run."""
    return tuple(1e3 * t for t in triton.testing.do_bench(run, warmup=25, rep=200, quantiles=(0.2, 0.5, 0.8)))


def time_case(fn: Callable[..., Any], call: Call) -> list[Timing]:
    """Forward and, where there is one, backward."""
    times = [time_us(lambda: fn(*call.inputs))]
    if call.backward_bytes is not None:
        output = fn(*call.inputs)
        outputs = [t for t in tensors_in(output) if t.requires_grad]
        wanted = [t for t in call.inputs if isinstance(t, torch.Tensor) and t.requires_grad]
        grads = [torch.ones_like(t) for t in outputs]
        times.append(time_us(lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)))
    return times


def check(call: Call) -> None:
    """No time without a right answer: outputs, gradients and caches, at most twice eager's error against fp64."""
    for error in errors_of(call):
        if not error.is_right:
            raise SystemExit(
                f"wrong answer: {error.what} errs by {error.error:.2e}, allowed {error.allowed:.2e}; nothing was timed"
            )


def measure(case: Case, ours_only: bool) -> list[dict[str, Any]]:
    """A row a pass."""
    call = case.build(torch.bfloat16, "cuda", **case.full)
    check(call)
    columns = {"triton": time_case(call.op, call)}
    if not ours_only:
        columns["eager"] = time_case(call.ref, call)
        columns["compiled"] = time_case(torch.compile(call.ref, dynamic=False), call)
    memory, peak = ROOFS.get(torch.cuda.get_device_name(), (None, None))
    rows = []
    work = ((call.forward_bytes, call.forward_flops), (call.backward_bytes, call.backward_flops))
    for i, (name, (num_bytes, flops)) in enumerate(zip(("forward", "backward"), work)):
        if num_bytes is None:
            continue
        seconds = columns["triton"][i][1] * 1e-6
        row = {"case": case.id, "pass": name, "dtype": "bfloat16", "dims": case.full}
        row |= {column: dict(zip(("p20", "p50", "p80"), times[i])) for column, times in columns.items()}
        row |= {"gb_per_s": num_bytes / seconds / 1e9, "tflop_per_s": flops / seconds / 1e12}
        row["share_of_roof"] = max(num_bytes / memory, flops / peak) / seconds if memory else None
        rows.append(row)
    return rows


def at_revision(revision: str, cases: list[str]) -> dict[tuple[str, str], float]:
    """Our medians at another commit, from a worktree of it: {(case, pass): microseconds}."""
    with tempfile.TemporaryDirectory() as folder:
        tree, out = Path(folder) / "tree", Path(folder) / "rows.json"
        git = ["git", "-C", str(Path(__file__).parent)]
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            command = [sys.executable, "-m", "bench.ops", "--ours-only", "--json", str(out), *cases]
            subprocess.run(command, cwd=tree, check=True)
            rows = json.loads(out.read_text())["rows"]
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
    return {(row["case"], row["pass"]): row["triton"]["p50"] for row in rows}


def main() -> None:
    parser = options("ops", __doc__)
    parser.add_argument("--base", metavar="REV", help="a commit whose kernels are timed beside these")
    parser.add_argument("--ours-only", action="store_true", help="leave eager and compiled out")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "bench.ops: no GPU here; `pytest bench --benchmark-only` runs on a CPU\n")
    base = at_revision(args.base, args.cases) if args.base else {}
    rows = [row for case in chosen(parser, args.cases) for row in measure(case, args.ours_only)]
    for row in rows:
        row["base_us"] = base.get((row["case"], row["pass"]))
    head = (
        "case",
        "pass",
        "eager us",
        "compiled us",
        "triton us",
        "p20",
        "p80",
        "GB/s",
        "TFLOP/s",
        "% roof",
        "base us",
    )
    lines = []
    for row in rows:
        medians = [row[c]["p50"] if c in row else None for c in ("eager", "compiled", "triton")]
        roof = row["share_of_roof"] and 100 * row["share_of_roof"]
        spread = (row["triton"]["p20"], row["triton"]["p80"])
        lines.append(
            (row["case"], row["pass"], *medians, *spread, row["gb_per_s"], row["tflop_per_s"], roof, row["base_us"])
        )
    print(table(head, lines))
    write(args.json, "ops", rows, bool(args.cases))


if __name__ == "__main__":
    main()
