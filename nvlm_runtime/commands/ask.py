"""`nvlm ask`: one question about pictures."""

import argparse
import json

import torch
from rich.console import Console
from rich.table import Table

from nvlm_runtime.analysis.devices import read_bandwidth
from nvlm_runtime.commands.answers import output_values, print_plan, show_stream
from nvlm_runtime.commands.loading import load_model, sampling_params
from nvlm_runtime.engine.request import Output


def _print_timings(console: Console, output: Output, device: torch.device) -> None:
    table = Table("stage", "ms", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    total = output.timings["total"]
    for stage, seconds in output.timings.items():
        table.add_row(stage, f"{1e3 * seconds:.1f}", f"{seconds / max(total, 1e-9):.0%}")
    per_token = output.timings["decode"] / max(1, len(output.token_ids))
    console.print(table)
    console.print(
        f"{output.num_prompt_tokens} prompt tokens, {len(output.token_ids)} new, {1e3 * per_token:.1f} ms each",
        highlight=False,
    )
    if rate := output.read_rate():
        limit = read_bandwidth(device)
        console.print(
            f"a step reads {output.step_bytes / 1e6:,.1f} MB, {rate / 1e9:.1f} GB/s: {rate / limit:.0%} of the "
            f"{limit / 1e9:.1f} GB/s that memory gives",
            highlight=False,
        )


def run(args: argparse.Namespace) -> int:
    """Answers one question about images (`nvlm ask`).

    Args:
        args: the parsed command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: an argument, an image or the checkpoint is invalid.
        FileNotFoundError: a file does not exist.
    """
    *images, prompt = args.words
    params = sampling_params(args)
    model, console = load_model(args), Console()
    prepared = model.prepare(prompt, images, style=args.style)
    stream = model.stream(prepared, params=params)
    if args.json:
        for _ in stream:
            pass
        print(json.dumps(output_values(stream.output, model.config)))
        return 0
    if args.plan:
        for plan in prepared.plans:
            print_plan(console, plan, model.config)
    show_stream(stream)
    if args.timings:
        _print_timings(console, stream.output, model.device)
    return 0
