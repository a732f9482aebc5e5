"""Everything that one visit to a GPU must bring home: `python -m bench.gpu [--budget SECONDS] [--out FOLDER]`.

Steps run in order of value, each in a process of its own with a time limit. Results are written after every step, and
one that fails, hangs or dies does not stop the next. The files: gpu.json, gpu.md, roofline.png, gaps.png and
trace.json.gz; with --sanitize and --ncu two more.
`--device cpu --quick` runs the same in Triton's interpreter, to try the script; its times say nothing.
"""

import argparse
import sys
from pathlib import Path

import torch

from bench.gpu.processes import Outcome, run_steps
from bench.gpu.step import STEPS, Visit
from bench.gpu.summary import is_right, write_results
from bench.reports.report import RESULTS


def main(argv: list[str] | None = None) -> int:
    """Returns 0 where every step was done and right, else 1; 2 for arguments that cannot be meant."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="for all steps (default: 480)")
    parser.add_argument("--out", type=Path, default=RESULTS / "gpu", help="folder of the results (bench/results/gpu)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes and few of them")
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="these alone, in this order")
    parser.add_argument("--sanitize", action="store_true", help="small cases under compute-sanitizer as well")
    parser.add_argument("--ncu", action="store_true", help="small cases under Nsight Compute as well")
    args = parser.parse_args(argv)
    if not args.budget > 0:
        parser.error(f"--budget must be more than 0 seconds, got {args.budget:g}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; `--device cpu --quick` tries the script on a CPU")
    if args.device == "cpu" and not args.quick:
        parser.error("--device cpu needs --quick: in the interpreter the full shapes take days")
    asked = {name for name in ("sanitize", "ncu") if getattr(args, name)}
    chosen = args.steps or [step.name for step in STEPS if not step.optional or step.name in asked]
    steps = [next(step for step in STEPS if step.name == name) for name in chosen]
    args.out.mkdir(parents=True, exist_ok=True)
    visit = Visit(args.device, args.quick, args.out)

    def after(outcomes: list[Outcome]) -> None:
        last = outcomes[-1]
        wrong = sum(not is_right(row) for row in last.rows)
        print(f"{last.name}: {last.status} in {last.seconds:.0f} s, {len(last.rows)} rows, {wrong} wrong", flush=True)
        write_results(visit, outcomes)

    outcomes = run_steps(steps, visit, args.budget, after)
    print(f"results in {args.out}")
    return 0 if all(each.status == "done" and all(map(is_right, each.rows)) for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
