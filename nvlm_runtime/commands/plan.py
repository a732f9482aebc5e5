"""`nvlm plan`: bytes a rank, and predicted times, without the weights or the GPUs."""

import argparse
import json

import torch
from rich.console import Console
from rich.table import Table

from nvlm_runtime.analysis.plan import Workload, find_device, plan_model, suggestions
from nvlm_runtime.checkpoint.bundled import checkpoint_folder
from nvlm_runtime.checkpoint.weights import read_json
from nvlm_runtime.config import from_hf
from nvlm_runtime.presets import PRESETS
from nvlm_runtime.training.recipe import trained_parts


def run(args: argparse.Namespace) -> int:
    """Prints what memory a model needs on a device, and predicted times (`nvlm plan`).

    Args:
        args: the parsed command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: an unknown model or device, or a workload that the model or the ranks cannot take.
    """
    if args.name in PRESETS:
        config = PRESETS[args.name]
    else:
        config = from_hf(read_json(checkpoint_folder(args.name) / "config.json"))
    device, dtype = find_device(args.device), getattr(torch, args.dtype)
    trains = trained_parts(config.variant, args.train) if args.train else ()
    workload = Workload(args.batch, args.context, args.tiles)
    plan = plan_model(config, workload, device, args.size, args.vision_split, dtype, trains, args.data)
    words = suggestions(config, workload, plan, args.vision_split, dtype, trains, args.data)
    if args.json:
        values = {"name": args.name, "device": device.name, "memory": device.memory, "tp": args.size, "fsdp": args.data}
        values |= {"batch": args.batch, "context": args.context, "tiles": args.tiles, "dtype": args.dtype}
        values |= {"trains": list(trains), "bytes": plan.bytes, "total": plan.total, "fits": plan.fits}
        print(json.dumps(values | {"predicted_seconds": plan.seconds, "suggestions": words}))
        return 0
    console = Console()
    title = f"{args.name} on {args.size * args.data} x {device.name}, {args.dtype}"
    table = Table("bytes of a rank", "GB", "share", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, count in plan.bytes.items():
        table.add_row(name, f"{count / 1e9:,.3g}", f"{count / device.memory:.1%}")
    table.add_row("together", f"{plan.total / 1e9:,.3g}", f"{plan.total / device.memory:.1%}")
    console.print(table)
    verdict = "fits" if plan.fits else "does not fit"
    console.print(f"It {verdict} into {device.memory / 1e9:.0f} GB, of which 8 % are kept free.", highlight=False)
    for line in words:
        console.print(line, highlight=False)
    for name, seconds in plan.seconds.items():
        console.print(f"roofline prediction, not measured: {name} {1e3 * seconds:,.1f} ms", highlight=False)
    return 0
