"""`nvlm profile`: one request stage by stage, beside plain PyTorch."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nvlm_runtime.analysis.profile import StageTime, check_matplotlib, draw_stages, profile_request
from nvlm_runtime.commands.answers import output_values
from nvlm_runtime.commands.loading import load_model
from nvlm_runtime.engine.sampling import GenerationParams


def _print_stages(console: Console, stages: tuple[StageTime, ...]) -> None:
    table = Table("stage", "ms", "share", "eager's ms", "times faster", "most of it in")
    for column in table.columns[1:5]:
        column.justify = "right"
    for stage in stages:
        table.add_row(
            stage.stage,
            f"{1e3 * stage.seconds:.1f}",
            f"{stage.share:.0%}",
            f"{1e3 * stage.plain_seconds:.1f}",
            f"{stage.ratio:.2f}" if stage.ratio else "-",
            ", ".join(f"{name} {share:.0%}" for name, share in stage.ops[:2]),
        )
    ours, plain = (sum(getattr(stage, name) for stage in stages) for name in ("seconds", "plain_seconds"))
    table.add_row("total", f"{1e3 * ours:.1f}", "100%", f"{1e3 * plain:.1f}", f"{plain / ours:.2f}", "")
    console.print(table)


def run(args: argparse.Namespace) -> int:
    *images, prompt = args.words
    params = GenerationParams(max_new_tokens=args.max_new_tokens)
    if args.png:
        check_matplotlib()
    model = load_model(args, reuse=False, image_cache_bytes=0)
    result = profile_request(model, prompt, images, params, args.rounds)
    if args.trace:
        result.trace.export_chrome_trace(args.trace)
    if args.png:
        draw_stages(result.stages, f"{args.model}, {args.rounds} rounds", Path(args.png))
    if args.json:
        values = output_values(result.output, model.config)
        values["stages"] = [asdict(stage) | {"ratio": stage.ratio} for stage in result.stages]
        print(json.dumps(values))
        return 0
    _print_stages(Console(), result.stages)
    return 0
