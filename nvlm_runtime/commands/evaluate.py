"""`nvlm eval`."""

import argparse
import json

from rich.console import Console
from rich.table import Table

from nvlm_runtime.engine import NVLM
from nvlm_runtime.micro.evaluate import evaluate


def run(args: argparse.Namespace) -> int:
    model = NVLM.load(args.model or f"micro-{args.variant}")
    if model.config.variant != args.variant:
        raise ValueError(f"{args.model} is NVLM-{model.config.variant.upper()}, not -{args.variant.upper()}")
    report = evaluate(model, args.seed, args.samples, open_mask=args.open_mask, blank_tiles=args.blank_tiles)
    if args.json:
        print(json.dumps(report))
        return 0
    table = Table("kind", "asked", "exact")
    for kind, (asked, right) in report["kinds"].items():
        table.add_row(kind, str(asked), f"{right / asked:.1%}")
    table.add_row("all", str(report["samples"]), f"{report['accuracy']:.1%}")
    Console().print(table)
    return 0
