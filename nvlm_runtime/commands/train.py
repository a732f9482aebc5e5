"""`nvlm train`."""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from nvlm_runtime.micro.train import Recipe, train_micro


def run(args: argparse.Namespace) -> int:
    given = {"steps": args.steps, "tower_steps": args.tower_steps, "num_documents": args.documents}
    recipe = replace(Recipe(), **{name: value for name, value in given.items() if value is not None})
    if args.threads:
        torch.set_num_threads(args.threads)
    train_micro(args.variant, args.seed, Path(args.out), Path(args.work), recipe, lambda line: print(line, flush=True))
    return 0
