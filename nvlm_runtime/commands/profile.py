"""`nvlm profile`: one request phase by phase, next to the eager reference."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nvlm_runtime.analysis.profile import PhaseTime, check_matplotlib, draw_phases, profile_request
from nvlm_runtime.commands.answers import output_values
from nvlm_runtime.commands.loading import load_model
from nvlm_runtime.engine.sampling import GenerationParams


def _print_phases(console: Console, phases: tuple[PhaseTime, ...]) -> None:
    table = Table("phase", "ms", "share", "eager ms", "speed-up", "mostly in")
    for column in table.columns[1:5]:
        column.justify = "right"
    for phase in phases:
        table.add_row(
            phase.phase,
            f"{1e3 * phase.seconds:.1f}",
            f"{phase.share:.0%}",
            f"{1e3 * phase.eager_seconds:.1f}",
            f"{phase.ratio:.2f}" if phase.ratio else "-",
            ", ".join(f"{name} {share:.0%}" for name, share in phase.ops[:2]),
        )
    ours, eager = (sum(getattr(phase, name) for phase in phases) for name in ("seconds", "eager_seconds"))
    table.add_row("total", f"{1e3 * ours:.1f}", "100%", f"{1e3 * eager:.1f}", f"{eager / ours:.2f}", "")
    console.print(table)


def run(args: argparse.Namespace) -> int:
    """Times one request phase by phase, beside plain PyTorch (`nvlm profile`).

    Args:
        args: the parsed command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: an argument, an image or the checkpoint is invalid.
        FileNotFoundError: a file does not exist.
    """
    *images, prompt = args.words
    params = GenerationParams(max_new_tokens=args.max_new_tokens)
    if args.png:
        check_matplotlib()
    model = load_model(args, reuse=False, image_cache_bytes=0)
    result = profile_request(model, prompt, images, params, args.rounds)
    if args.trace:
        result.trace.export_chrome_trace(args.trace)
    if args.png:
        draw_phases(result.phases, f"{args.model}, {args.rounds} rounds", Path(args.png))
    if args.json:
        values = output_values(result.output, model.config)
        values["phases"] = [asdict(phase) | {"ratio": phase.ratio} for phase in result.phases]
        print(json.dumps(values))
        return 0
    _print_phases(Console(), result.phases)
    return 0
