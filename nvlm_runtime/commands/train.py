"""`nvlm train`: a recipe on a dataset, or a micro model from seeds."""

import argparse
import sys
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nvlm_runtime.analysis.devices import peak_flops
from nvlm_runtime.commands.loading import loading_bar
from nvlm_runtime.micro.train import Sizes, train_micro
from nvlm_runtime.parallel.ranks import in_group, join_mesh, wait_for_loading
from nvlm_runtime.training.plot import check_matplotlib, draw_metrics
from nvlm_runtime.training.recipe import Recipe, read_recipe
from nvlm_runtime.training.trainer import METRICS, Step, Trainer


def run(args: argparse.Namespace) -> int:
    """Runs a recipe, or trains a micro model (`nvlm train`).

    Args:
        args: the parsed command line.

    Returns:
        The exit code; not 0 where a signal ended the run before its last step.

    Raises:
        ValueError: the recipe, the data or the combination of options is invalid.
        OSError: a file cannot be read or written.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.recipe == "micro":
        if args.tp or args.fsdp or in_group():
            raise ValueError("nvlm train micro runs in one process: the models are too small to share out")
        return _micro(args)
    if wrong := [f"--{name.replace('_', '-')}" for name in MICRO_OPTIONS if getattr(args, name) is not None]:
        raise ValueError(f"{', '.join(wrong)}: for `nvlm train micro` alone; a recipe's values are changed with --set")
    recipe = read_recipe(args.recipe, args.set)
    if recipe.plot:
        check_matplotlib()
    mesh, device = join_mesh(args.device, args.tp, args.fsdp, args.tp_timeout)
    speaks = mesh.world.rank == 0
    writer = _tensorboard(recipe) if speaks else None
    console = Console(stderr=True, quiet=not speaks)
    log = partial(console.print, markup=False, highlight=False)
    with loading_bar() as progress:
        trainer = Trainer(recipe, args.resume, device, log, mesh, progress)
    wait_for_loading(mesh.world)
    peak = peak_flops(trainer.device, getattr(torch, recipe.precision))
    try:
        with _bar(console, recipe, trainer.next_step) as bar:
            code = trainer.run(_shower(recipe, console, bar, writer, peak))
    finally:
        metrics = Path(recipe.out) / METRICS
        if speaks and recipe.plot and metrics.is_file() and metrics.stat().st_size:
            draw_metrics(metrics, metrics.with_suffix(".png"))
        if writer is not None:
            writer.close()
    if code and speaks:
        print(f"nvlm: stopped after step {trainer.next_step}; --resume goes on from there", file=sys.stderr)
    return code


MEAN_OF = 20  # steps whose mean loss the log shows
MICRO_OPTIONS = ("variant", "seed", "out", "work", "steps", "vision_steps", "documents")


def _micro(args: argparse.Namespace) -> int:
    if args.variant is None or args.out is None:
        raise ValueError("train micro needs --variant and --out")
    if args.set:
        raise ValueError("--set changes a recipe; `nvlm train micro` takes --steps, --vision-steps and --documents")
    given = {"steps": args.steps, "vision_steps": args.vision_steps, "num_documents": args.documents}
    sizes = Sizes(**{name: value for name, value in given.items() if value is not None})
    out, work = Path(args.out), Path(args.work or "work")
    code = train_micro(
        args.variant, args.seed or 0, out, work, sizes, args.resume, lambda line: print(line, flush=True)
    )
    if code:
        print("nvlm: stopped; --resume goes on from there", file=sys.stderr)
    return code


def _bar(console: Console, recipe: Recipe, done: int) -> Progress:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    bar.add_task("starting", total=recipe.steps, completed=done)
    return bar


def _line(step: Step, losses: Sequence[float], peak: float) -> str:
    """losses: of the last steps. One step's alone says more about its documents than about the run."""
    return (
        f"loss {sum(losses) / len(losses):.4f} (mean of {len(losses)})  lr {step.lr:.2e}  norm {step.grad_norm:.2f}  "
        f"{step.tokens / step.seconds:,.0f} tokens/s  "
        f"{step.documents / step.seconds:.2f} documents/s  {step.flops / step.seconds / peak:.0%} of peak  "
        f"waiting {step.waited / step.seconds:.0%}"
    )


def _shower(recipe: Recipe, console: Console, bar: Progress, writer: Any, peak: float) -> Any:
    losses: deque[float] = deque(maxlen=MEAN_OF)

    def show(step: Step) -> None:
        losses.append(step.loss)
        line = _line(step, losses, peak)
        bar.update(bar.task_ids[0], completed=step.step, description=line)
        if not console.is_terminal and (step.step % recipe.log_every == 0 or step.step == recipe.steps):
            print(f"step {step.step}/{recipe.steps}  {line}", flush=True)
        if writer is not None:
            for name in ("loss", "lr", "grad_norm"):
                writer.add_scalar(name, getattr(step, name), step.step)

    return show


def _tensorboard(recipe: Recipe) -> Any:
    """A writer where the recipe asks for one. ValueError where it is not installed."""
    if not recipe.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "tensorboard = true needs the tensorboard package: pip install 'nvlm-runtime[train]'"
        ) from error
    return SummaryWriter(Path(recipe.out) / "tensorboard")
