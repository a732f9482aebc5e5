"""What tile tags are worth, the NVLM paper's tables 1 and 2 in miniature:
python -m bench.experiments.tile_tags [options]

NVLM-D with no tags, 1-D, 2-D grid and 2-D box tags, NVLM-X with none and 1-D, each from three seeds: the micro models'
sizes and vision encoder, trained on the same rendered documents of two and three tiles in one order, one a row (packed,
longer tags would leave room for fewer), then asked about new ones, exact answers counted. A run takes minutes; finished
ones are kept in the results, so the command goes on where it was stopped. A seed is of the weights, of the order of the
data and of nothing else.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.reports.chart import COLOURS, one_axis, picture_path
from bench.reports.report import RESULTS, setting, table
from nvlm_runtime import NVLM
from nvlm_runtime.micro.document import GRIDS
from nvlm_runtime.micro.evaluate import evaluate
from nvlm_runtime.micro.questions import KINDS
from nvlm_runtime.micro.train import Sizes, shared_documents, shared_vision_encoder, write_beginning
from nvlm_runtime.presets import PRESETS
from nvlm_runtime.training.recipe import Blend, Recipe, trained_parts
from nvlm_runtime.training.trainer import Trainer

FORMATS = {"d": ("none", "1d", "grid", "bbox"), "x": ("none", "1d")}
SHORT = tuple(grid for grid in GRIDS if grid[0] * grid[1] in (2, 3))
EVAL_SEED = 9001


def train(variant: str, tags: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run's row."""
    began = time.perf_counter()
    documents = shared_documents(args.work, 0, args.num_documents, print)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = replace(PRESETS[f"micro-{variant}"], tile_tags=tags)
        reading = shared_vision_encoder(args.work, 0, args.vision_steps, print)
        write_beginning(config, seed, folder / "beginning", documents, reading)
        recipe = Recipe(
            model=str(folder / "beginning"),
            out=str(folder / "run"),
            data=(Blend("short", str(documents / "short.jsonl")),),
            variant=variant,
            train=trained_parts(variant, "sft"),
            steps=args.steps,
            lr=2e-3,
            lr_min=0.0,
            warmup=min(200, args.steps - 1),
            muon_lr=4e-3,
            packed=False,
            rows=args.rows,
            seed=seed,
            checkpoint_every=args.steps,
            keep=1,
        )
        losses: list[float] = []
        Trainer(recipe, log=print).run(lambda step: losses.append(step.loss))
        found = evaluate(NVLM.load(folder / "run"), EVAL_SEED, args.samples, grids=SHORT)
    return {
        "variant": variant,
        "tags": tags,
        "seed": seed,
        "steps": args.steps,
        "rows": args.rows,
        "loss": statistics.mean(losses[-50:]),
        "accuracy": found["accuracy"],
        "kinds": found["kinds"],
        "seconds": time.perf_counter() - began,
    }


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["variant"], row["tags"], row["seed"], row["steps"], row["rows"]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a variant and format: mean, least and most over seeds; by kind, the share of all its questions."""
    found = []
    for variant, formats in FORMATS.items():
        for tags in formats:
            mine = [row for row in rows if (row["variant"], row["tags"]) == (variant, tags)]
            if not mine:
                continue
            shares = [row["accuracy"] for row in mine]
            kinds = {}
            for kind in KINDS:
                asked, right = (sum(row["kinds"].get(kind, (0, 0))[i] for row in mine) for i in (0, 1))
                kinds[kind] = right / asked if asked else None
            found.append(
                {
                    "variant": variant,
                    "tags": tags,
                    "seeds": len(mine),
                    "mean": statistics.mean(shares),
                    "least": min(shares),
                    "most": max(shares),
                    "loss": statistics.mean(row["loss"] for row in mine),
                    "kinds": kinds,
                }
            )
    return found


def show(rows: Sequence[dict[str, Any]]) -> str:
    head = ("", "tags", "seeds", "exact", "least", "most", "loss", *KINDS)
    cells = []
    for row in summary(rows):
        kinds = [None if share is None else f"{share:.1%}" for share in row["kinds"].values()]
        shares = [f"{row[name]:.1%}" for name in ("mean", "least", "most")]
        cells.append([f"NVLM-{row['variant'].upper()}", row["tags"], row["seeds"], *shares, row["loss"], *kinds])
    return table(head, cells)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Exact answers a format: bars of means, a dot a seed. ValueError without matplotlib."""
    found = summary(rows)
    with one_axis(path) as axis:
        for at, row in enumerate(found):
            axis.bar(at, 100 * row["mean"], 0.6, color=COLOURS[1 if row["variant"] == "d" else 3])
            mine = [100 * r["accuracy"] for r in rows if (r["variant"], r["tags"]) == (row["variant"], row["tags"])]
            axis.plot([at] * len(mine), mine, "o", color="black", ms=4)
        axis.set_xticks(range(len(found)), [f"NVLM-{row['variant'].upper()}\n{row['tags']}" for row in found])
        axis.set(ylabel="exact answers, %", title="Tile tags")
        axis.set_ylim(bottom=0)


def parser() -> argparse.ArgumentParser:
    sizes = Sizes()
    made = argparse.ArgumentParser(prog="python -m bench.experiments.tile_tags", description=__doc__.splitlines()[0])
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--steps", type=int, default=600)
    made.add_argument("--rows", type=int, default=8, help="documents a step (default: %(default)s)")
    made.add_argument("--samples", type=int, default=500, help="questions (default: %(default)s)")
    made.add_argument("--variants", nargs="+", choices=FORMATS, default=list(FORMATS))
    made.add_argument("--work", type=Path, default=Path("work"), help="of nvlm train micro: vision encoder, documents")
    made.add_argument("--num-documents", type=int, default=sizes.num_documents)
    made.add_argument("--vision-steps", type=int, default=0, help="as of nvlm train micro (default: %(default)s)")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--json", type=Path, default=RESULTS / "tile_tags.json", help="(default: %(default)s)")
    made.add_argument("--png", type=picture_path, help="exact answers as bars (needs matplotlib)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if min(args.steps, args.rows, args.samples, args.num_documents, args.threads) < 1 or args.vision_steps < 0:
        parser().error("--steps, --rows, --samples, --num-documents and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    rows = json.loads(args.json.read_text())["rows"] if args.json.is_file() else []
    done = {key(row) for row in rows}
    for seed in args.seeds:
        for variant in args.variants:
            for tags in FORMATS[variant]:
                if (variant, tags, seed, args.steps, args.rows) in done:
                    continue
                rows.append(train(variant, tags, seed, args) | {"commit": setting()["commit"]})
                _save(args.json, rows)
                print(f"NVLM-{variant.upper()} {tags} seed {seed}: {rows[-1]['accuracy']:.1%}", flush=True)
    now = [row for row in rows if (row["steps"], row["rows"]) == (args.steps, args.rows)]
    print(show(now))
    if args.png:
        draw(now, args.png)
    return 0


def _save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Whole or not at all: a run that is killed keeps the rows before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"bench": "tile_tags", "setting": setting(), "rows": rows}, indent=1) + "\n")
    partial.rename(path)


if __name__ == "__main__":
    main()
