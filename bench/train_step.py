"""A training step against a plain loop, and NVLM-D against -X and -H: python -m bench.train_step [--only PART]

`loop`: the trainer (documents packed into rows of 1,024 tokens, the loss in chunks) beside a plain PyTorch loop (a
document a row, padded to the longest, all logits at once, torch's AdamW): one model, the same documents in every step.
Conversations of 30 to 1,000 tokens, six in ten about a picture of one to six tiles. `variants`: the trainer on D, X and
H over one decoder and the same pictures of six tiles and a thumbnail, as the NVLM paper's table 3 compares them.
`plan`: the three with recomputed activations in four rows of 1,024 tokens, their memory beside what `nvlm plan` says.

Every contestant is a process of its own, so that memory is its own; they take turns in each round. Documents a second,
and MB resident above what was before the step, at the most; medians with 20th and 80th percentile. A small tower of
128-pixel tiles (64 tokens each), a decoder of 8 layers with a vocabulary of 32,768; random weights, fp32.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from bench.report import table, write
from bench.resident import peak_bytes
from bench.synthetic import full_tokenizer, random_model
from nvlm_runtime.config import VARIANTS, CrossConfig, NVLMConfig
from nvlm_runtime.micro.document import GRIDS, WORDS
from nvlm_runtime.plan import Request, find_device, plan_model
from nvlm_runtime.presets import MICRO_TEXT, MICRO_VISION
from nvlm_runtime.training.documents import IGNORE
from nvlm_runtime.training.recipe import Blend, Recipe, trained_parts
from nvlm_runtime.training.source import Source
from nvlm_runtime.training.trainer import Trainer
from nvlm_runtime.weights import save

PARTS = ("loop", "variants", "plan")
PAPER = {"d": 28.8, "x": 50.6, "h": 36.2}  # samples/s, NVLM paper table 3
VISION = replace(MICRO_VISION, image_size=128)
TEXT = replace(
    MICRO_TEXT,
    vocab_size=32_768,
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
SEQ_LEN, PLANNED_ROWS = 1024, 4
TARGETS = {"documents_per_s": 1.5, "memory_mb": 0.6}  # of the trainer's against the loop's


def model_config(variant: str) -> NVLMConfig:
    cross = CrossConfig(tuple(range(0, TEXT.num_hidden_layers, 2)), positions="sinusoidal")
    return NVLMConfig(variant, VISION, TEXT, None if variant == "d" else cross)


def _picture(rng: random.Random, cols: int, rows: int, path: Path) -> None:
    noise = np.random.default_rng(rng.getrandbits(63)).integers(0, 256, (16 * rows, 16 * cols, 3), np.uint8)
    Image.fromarray(noise).resize((VISION.image_size * cols, VISION.image_size * rows)).save(path)


def _words(rng: random.Random, num: int) -> str:
    """About `num` tokens, as a glyph is one."""
    text = ""
    while len(text) < num:
        text += rng.choice(WORDS) + " "
    return text[:num].strip()


def write_rows(folder: Path, num: int, all_pictures: bool, seed: int = 0) -> Path:
    """`num` conversations of log-normal length; pictures of six tiles to all, or of one to six to six in ten."""
    rng, lines = random.Random(seed), []
    for number in range(num):
        length = min(430, max(20, round(rng.lognormvariate(4.8, 0.9))))
        split = rng.uniform(0.3, 0.7)
        asked, answer = _words(rng, round(length * split)), _words(rng, round(length * (1 - split)))
        row: dict[str, Any] = {}
        if all_pictures or rng.random() < 0.6:
            row["image"] = f"{number}.png"
            _picture(rng, *((3, 2) if all_pictures else rng.choice(GRIDS)), folder / row["image"])
            asked = f"<image>\n{asked}"
        row["conversations"] = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps(row) + "\n")
    path = folder / "rows.jsonl"
    path.write_text("".join(lines))
    return path


def trainer_of(variant: str, folder: Path, rows: Path, documents: int | None, packed: bool) -> Trainer:
    """A trainer whose every step is the next `documents` rows of the file, in one micro-batch. None: PLANNED_ROWS full
    rows of tokens, activations made again.
    """
    recipe = Recipe(
        model=str(folder),
        out=str(folder / "run"),
        data=(Blend("rows", str(rows)),),
        variant=variant,
        train=trained_parts(variant, "sft"),
        steps=10_000,
        lr=1e-4,
        lr_min=0.0,
        warmup=1,
        rows=documents or PLANNED_ROWS,
        seq_len=SEQ_LEN,
        recompute=documents is None,
        decay_norms_and_gates=True,  # as the plain loop's AdamW does
    )
    trainer = Trainer(recipe, log=lambda line: None)
    if documents is None:
        return trainer
    old = trainer.source
    old.close()
    trainer.source = Source(
        old.datasets,
        old.tokenizer,
        old.config,
        rows=documents,
        seq_len=SEQ_LEN,
        packed=packed,
        window=documents,
    )
    return trainer


def plain_loop(trainer: Trainer) -> Callable[[], dict[str, float]]:
    """A step as tutorials write it, on the trainer's model and data."""
    model, learns = trainer.model, list(trainer.learns.values())
    adam = torch.optim.AdamW(learns, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05)

    def step() -> dict[str, float]:
        began = time.perf_counter()
        batch = next(trainer.source)
        with torch.no_grad():
            features = [trainer._features(tiles) for tiles in batch.pixel_values]
        hidden = model(batch.input_ids, batch.layouts, features)
        logits = model.language_model.logits(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return {
            "seconds": time.perf_counter() - began,
            "documents": batch.num_documents,
            "tokens": batch.num_tokens,
            "loss": loss.item(),
        }

    return step


def packed_loop(trainer: Trainer) -> Callable[[], dict[str, float]]:
    def step() -> dict[str, float]:
        done = trainer.step()
        return {name: getattr(done, name) for name in ("seconds", "documents", "tokens", "loss")}

    return step


def with_peak(step: Callable[[], dict[str, float]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    memory = peak_bytes(lambda: found.update(step()))
    return found | {"memory": memory}


def serve(
    pipe: Connection, variant: str, folder: Path, rows: Path, documents: int | None, packed: bool, threads: int
) -> None:
    """A contestant's process: "step" and "peak" are each answered with a step's figures; anything else ends it."""
    torch.set_num_threads(threads)
    trainer = trainer_of(variant, folder, rows, documents, packed)
    step = packed_loop(trainer) if packed else plain_loop(trainer)
    while (order := pipe.recv()) in ("step", "peak"):
        pipe.send(step() if order == "step" else with_peak(step))
    trainer.source.close()


class Contestant:
    """A process that trains when it is told to."""

    def __init__(self, *args: Any):
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, order: str) -> dict[str, float]:
        self.pipe.send(order)
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send("end")
        self.process.join()


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    found = statistics.quantiles(values, n=10, method="inclusive")
    return found[1], found[4], found[7]


def measure(part: str, rounds: int, documents: int, threads: int, variant: str) -> list[dict[str, Any]]:
    """A row a contestant. rounds: of times, after one that is not counted, and half as many again of memory."""
    packed = {"trainer": True, "plain loop": False} if part == "loop" else dict.fromkeys(VARIANTS, True)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in packed}
    peaks: dict[str, list[float]] = {name: [] for name in packed}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_rows(folder, 4 * documents, all_pictures=part != "loop")
        contestants = {}
        for name in packed:
            made = variant if part == "loop" else name
            model = folder / name.replace(" ", "-")
            save(random_model(model_config(made), torch.float32), model)
            full_tokenizer(TEXT.vocab_size).save(model)
            num = None if part == "plan" else documents
            contestants[name] = Contestant(made, model, rows, num, packed[name], threads)
        for turn in range(1 + rounds + (rounds + 1) // 2):
            for name, contestant in contestants.items():
                found = contestant.ask("step" if turn <= rounds else "peak")
                if 1 <= turn <= rounds:
                    times[name].append(found)
                elif turn and found["memory"] is not None:
                    peaks[name].append(found["memory"] / 1e6)
        for contestant in contestants.values():
            contestant.end()
    found = [_row(part, name, made, peaks[name]) for name, made in times.items()]
    return [row | {"planned_mb": planned_mb(row["contestant"])} for row in found] if part == "plan" else found


def planned_mb(variant: str) -> float:
    """What `nvlm plan` says a step needs above weights and optimizer."""
    request, trains = Request(PLANNED_ROWS, SEQ_LEN, 7), trained_parts(variant, "sft")
    plan = plan_model(model_config(variant), request, find_device("cpu"), dtype=torch.float32, trains=trains)
    return sum(count for name, count in plan.bytes.items() if name not in ("weights", "optimizer")) / 1e6


def _row(part: str, name: str, steps: list[dict[str, float]], peaks: list[float]) -> dict[str, Any]:
    speeds = percentiles([step["documents"] / step["seconds"] for step in steps])
    memory = percentiles(peaks) if len(peaks) > 1 else (peaks * 3 if peaks else (None,) * 3)
    documents = sum(step["documents"] for step in steps)
    return {
        "part": part,
        "contestant": name,
        "rounds": len(steps),
        "documents": documents,
        "losses": [step["loss"] for step in steps],
        "mean_tokens": sum(step["tokens"] for step in steps) / documents,
        "documents_per_s": dict(zip(("p20", "p50", "p80"), speeds)),
        "memory_mb": dict(zip(("p20", "p50", "p80"), memory)),
    }


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of medians: the trainer's over the loop's, each variant's over NVLM-D's, and the paper's speeds so."""
    by_name = {row["contestant"]: row for row in rows}
    base = by_name["plain loop" if "plain loop" in by_name else "d"]
    found = {}
    for name, row in by_name.items():
        if row is base:
            continue
        found[name] = {
            key: row[key]["p50"] / base[key]["p50"] for key in TARGETS if row[key]["p50"] and base[key]["p50"]
        }
        if name in PAPER:
            found[name]["paper_documents_per_s"] = PAPER[name] / PAPER["d"]
    return found


def show(rows: list[dict[str, Any]]) -> str:
    def spread(values: dict[str, float | None]) -> str:
        return "-" if values["p50"] is None else "{p50:.3g} ({p20:.3g}-{p80:.3g})".format(**values)

    head = (
        "",
        "documents/s",
        "MB a step",
        "tokens a document",
        "speed",
        "memory",
        "paper's speed",
        "planned",
    )
    found, cells = ratios(rows), []
    for row in rows:
        ratio = found.get(row["contestant"], {})
        cells.append(
            [
                row["contestant"],
                spread(row["documents_per_s"]),
                spread(row["memory_mb"]),
                round(row["mean_tokens"]),
                *(f"{ratio[key]:.2f}x" if key in ratio else None for key in (*TARGETS, "paper_documents_per_s")),
                row.get("planned_mb"),
            ]
        )
    return table(head, cells)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speeds of the variants, NVLM-D's being 1, beside the paper's. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bench.chart import COLOURS

    by_name = {row["contestant"]: row["documents_per_s"] for row in rows if row["part"] == "variants"}
    base = by_name["d"]["p50"]
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for at, name in enumerate(by_name):
        ours = {key: value / base for key, value in by_name[name].items()}
        spread = [[ours["p50"] - ours["p20"]], [ours["p80"] - ours["p50"]]]
        first = {"label": "this bench"} if not at else {}
        second = {"label": "paper, table 3"} if not at else {}
        axis.bar(at - 0.2, ours["p50"], 0.38, yerr=spread, capsize=4, color=COLOURS[1], **first)
        axis.bar(at + 0.2, PAPER[name] / PAPER["d"], 0.38, color=COLOURS[0], **second)
    axis.set_xticks(range(len(by_name)), [f"NVLM-{name.upper()}" for name in by_name])
    axis.set(ylabel="documents/s, NVLM-D's = 1", title="Training speed")
    axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__.splitlines()[0])
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--variant", choices=VARIANTS, default="d", help="of the part loop (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--documents", type=int, default=16, help="of a step (default: %(default)s)")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--json", type=Path, help="default: bench/results/train_step.json, where all parts are run")
    made.add_argument("--png", type=Path, help="the variants' speeds as bars (needs matplotlib)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.rounds < 2 or args.documents < 2 or args.threads < 1:
        parser().error("--rounds and --documents must be at least 2, --threads at least 1")
    rows = []
    for part in args.only:
        rows += (found := measure(part, args.rounds, args.documents, args.threads, args.variant))
        print(f"{part}\n{show(found)}\n", flush=True)
    if args.png and "variants" in args.only:
        draw(rows, args.png)
    write(args.json, "train_step", rows, some=len(args.only) < len(PARTS))
    return 0


if __name__ == "__main__":
    main()
