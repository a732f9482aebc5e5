"""`nvlm eval`: a benchmark on local files, or the micro models' documents."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from nvlm_runtime.commands.loading import load_model
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.evaluation.predictions import Record, append, append_to, kept, read, rewrite, scored
from nvlm_runtime.evaluation.report import report
from nvlm_runtime.evaluation.run import answers
from nvlm_runtime.evaluation.samples import Sample, check_pictures
from nvlm_runtime.evaluation.tasks import TASKS, Task, read_samples
from nvlm_runtime.micro.evaluate import evaluate

MICRO_SEED, MICRO_SAMPLES = 12345, 500
ONLY_MICRO = ("variant", "samples", "open_mask", "blank_tiles")
ONLY_TASKS = ("data", "answers", "images", "limit", "batch", "max_new_tokens", "predictions", "resume", "rescore")


def run(args: argparse.Namespace) -> int:
    """Scores a benchmark, or a micro model on drawn documents (`nvlm evaluate`).

    Args:
        args: the parsed command line.

    Returns:
        The exit code.

    Raises:
        ValueError: an unknown task, an option of the other kind of task, or invalid data.
        FileNotFoundError: a file does not exist.
    """
    if args.task != "micro" and args.task not in TASKS:
        raise ValueError(f"unknown task {args.task!r}: expected micro or one of {', '.join(TASKS)}")
    others = ONLY_TASKS if args.task == "micro" else ONLY_MICRO
    strange = [name for name in others if getattr(args, name) is not None and getattr(args, name) is not False]
    if strange:
        raise ValueError(f"--{strange[0].replace('_', '-')} is of no use to {args.task}")
    return _micro(args) if args.task == "micro" else _benchmark(args)


def _micro(args: argparse.Namespace) -> int:
    if args.variant is None:
        raise ValueError("eval micro needs --variant d, x or h")
    args.model = args.model or f"micro-{args.variant}"
    model = load_model(args)
    if model.config.variant != args.variant:
        raise ValueError(f"{args.model} is NVLM-{model.config.variant.upper()}, not -{args.variant.upper()}")
    seed = MICRO_SEED if args.seed is None else args.seed
    samples = MICRO_SAMPLES if args.samples is None else args.samples
    values = evaluate(model, seed, samples, open_mask=args.open_mask, blank_tiles=args.blank_tiles)
    if args.json:
        print(json.dumps(values))
        return 0
    table = Table("kind", "asked", "exact")
    for kind, (asked, right) in values["kinds"].items():
        table.add_row(kind, str(asked), f"{right / asked:.1%}")
    table.add_row("all", str(values["samples"]), f"{values['accuracy']:.1%}")
    Console().print(table)
    return 0


def _benchmark(args: argparse.Namespace) -> int:
    task = TASKS[args.task]
    samples = _samples(args, task)
    path = Path(args.predictions or f"{args.task}-{Path(args.model or '').name}.jsonl")
    if args.rescore:
        records = [
            {**record, **scored(sample, record["answer"])}
            for record, sample in zip(read(path, samples, {"task": args.task}, complete=True), samples)
        ]
        rewrite(path, records)
    else:
        check_pictures(samples)
        records = _answered(args, task, samples, path)
    values = {
        **report(args.task, task, samples, [record["score"] for record in records]),
        "unread": sum(record["parsed"] is None for record in records),
        "predictions": str(path),
    }
    if args.json:
        print(json.dumps(values))
    else:
        _print(values)
    return 0


def _samples(args: argparse.Namespace, task: Task) -> list[Sample]:
    """The questions that are asked for; everything that their files can have wrong is found here."""
    if not args.data:
        raise ValueError(f"eval {args.task} needs --data: {task.files}")
    if not args.model and not args.rescore:
        raise ValueError(f"eval {args.task} needs --model, or --rescore with --predictions")
    if args.rescore and (args.resume or args.tp or not args.predictions):
        raise ValueError("--rescore needs --predictions FILE, and excludes --resume and --tp")
    for name in ("limit", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.seed is not None and args.limit is None:
        raise ValueError("--seed draws the rows of --limit: give that too")
    answers_file, images = (Path(name) if name else None for name in (args.answers, args.images))
    samples = read_samples(task, [Path(name) for name in args.data], answers_file, images)
    if args.limit is None or args.limit >= len(samples):
        return samples
    if args.seed is None:
        return samples[: args.limit]
    return [samples[i] for i in sorted(Random(args.seed).sample(range(len(samples)), args.limit))]


def _answered(args: argparse.Namespace, task: Task, samples: Sequence[Sample], path: Path) -> list[Record]:
    """A line for every question: those that the file has, and the model's."""
    given = args.max_new_tokens
    params = GenerationParams(max_new_tokens=task.max_new_tokens if given is None else given)
    names = ("task", "model", "lora", "style", "dtype", "quantize")
    settings = {**{name: getattr(args, name) for name in names}, "max_new_tokens": params.max_new_tokens}
    records = kept(path, settings, samples, args.resume)
    if len(records) == len(samples):
        return records
    model = load_model(args)
    writes = model.model.group.rank == 0
    stream = answers(
        model, samples[len(records) :], batch=args.batch or 8, max_new_tokens=params.max_new_tokens, style=args.style
    )
    console = Console(stderr=True)
    now = TextColumn("{task.fields[now]}")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), now)
    try:
        with (
            append_to(path, settings) if writes else nullcontext() as file,
            Progress(
                *columns, console=console, transient=True, disable=not (console.is_terminal and writes)
            ) as progress,
        ):
            bar = progress.add_task("", total=len(samples), completed=len(records), now="")
            total = sum(record["score"] for record in records)
            for sample, output in stream:
                record = scored(
                    sample, output.text, finish_reason=output.finish_reason, num_tokens=len(output.token_ids)
                )
                if file:
                    append(file, record)
                records.append(record)
                total += record["score"]
                progress.update(bar, advance=1, now=f"{total / len(records):.1%} {task.metric}")
    except (ValueError, OSError) as error:
        raise ValueError(f"{error} ({len(records)} of {len(samples)} predictions are kept in {path})") from error
    except KeyboardInterrupt:
        if writes:
            print(f"\n{len(records)} of {len(samples)} predictions are in {path}: --resume goes on", file=sys.stderr)
        raise
    finally:
        stream.close()
    return records


def _print(values: dict[str, Any]) -> None:
    table = Table("", "", "rows", "score", "95 %", title=f"{values['task']}: {values['metric']}")
    for column in table.columns[2:]:
        column.justify = "right"
    rows = [
        (division, part, of_part) for division, parts in values["categories"].items() for part, of_part in parts.items()
    ]
    for division, part, of_part in [*rows, ("all", "", values)]:
        low, high = of_part["interval"]
        table.add_row(division, part, str(of_part["rows"]), f"{of_part['score']:.1%}", f"{low:.1%} to {high:.1%}")
    console = Console()
    console.print(table)
    if "points" in values:
        console.print(f"{values['points']} points of {values['rows']}", highlight=False)
    if values["unread"]:
        console.print(f"{values['unread']} answers in which nothing could be read count as wrong", highlight=False)
    console.print(
        f"{values['interval_method']}; predictions in {values['predictions']}", highlight=False, soft_wrap=True
    )
