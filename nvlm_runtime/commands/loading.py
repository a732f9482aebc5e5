"""The model and the sampling that the arguments ask for."""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from nvlm_runtime.checkpoint.weights import Progress
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.parallel.group import SOLO
from nvlm_runtime.parallel.ranks import in_group, join, wait_for_loading

LARGE = 1 << 30  # bytes of a checkpoint that is seen to be read


@contextmanager
def loading_bar() -> Iterator[Progress]:
    """The progress callback of `weights.load` that shows a large checkpoint being read: on rank 0's terminal."""
    if not sys.stderr.isatty() or int(os.environ.get("RANK", "0")):
        yield lambda read, total: None
        return
    from rich import progress
    from rich.console import Console

    sizes = progress.BarColumn(), progress.DownloadColumn()
    rates = progress.TransferSpeedColumn(), progress.TimeRemainingColumn()
    with progress.Progress("loading", *sizes, *rates, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", visible=False)
        yield lambda read, total: bar.update(task, completed=read, total=total, visible=total >= LARGE)


def load_model(args: argparse.Namespace, **options: Any) -> NVLM:
    """Loads the model that a command names, with a progress bar, over the ranks that torchrun started.

    Args:
        args: the parsed command line, with the options that all commands on a model have.
        **options: more options of `NVLM.load`.

    Returns:
        The model, when all ranks have loaded theirs.

    Raises:
        ValueError: a command that runs in one process was started in several, or as `NVLM.load` raises it.
        FileNotFoundError: as `NVLM.load` raises it.
    """
    if hasattr(args, "tp"):
        group, device = join(args.device, args.tp, args.tp_timeout)
    elif in_group():
        raise ValueError(f"nvlm {args.command} runs in one process, and torchrun started several")
    else:
        group, device = SOLO, args.device
    with loading_bar() as progress:
        model = NVLM.load(
            args.model,
            device=device,
            dtype=args.dtype or "auto",
            group=group,
            vision_split=getattr(args, "vision_split", "tiles"),
            native="auto" if args.native is None else args.native,
            graphs=args.graphs,
            check=args.check,
            speculate=args.speculate,
            quantize=scheme_of_words(args.quantize),
            lora=args.lora,
            progress=progress,
            **options,
        )
    wait_for_loading(group)
    return model


def scheme_of_words(entries: Sequence[str]) -> dict[str, str]:
    """Parses `--quantize PART=METHOD ...`.

    Args:
        entries: one text per option.

    Returns:
        Parts to methods, as `model.quantize.quantize` takes them.

    Raises:
        ValueError: an entry is not PART=METHOD, or a part stands twice.
    """
    if wrong := [entry for entry in entries if entry.count("=") != 1]:
        raise ValueError(f"--quantize takes PART=METHOD, got {wrong[0]!r}")
    pairs = [entry.split("=") for entry in entries]
    if len({part for part, _ in pairs}) < len(pairs):
        raise ValueError(f"--quantize takes a part once, got {' '.join(entries)}")
    return dict(pairs)


def sampling_params(args: argparse.Namespace) -> GenerationParams:
    """Collects the sampling options of a command.

    Args:
        args: the parsed command line.

    Returns:
        Parameters of generation.

    Raises:
        ValueError: a value is out of its range.
    """
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    return GenerationParams(**{name: getattr(args, name) for name in names})
