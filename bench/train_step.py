"""A training step against a plain loop, and NVLM-D against -X and -H: python -m bench.train_step [--only PART]

`loop`: the trainer (documents packed into rows of 1,024 tokens, the loss in chunks) beside a plain PyTorch loop (a
document a row, padded to the longest, all logits at once, torch's AdamW): one model, the same documents in every step.
Conversations of 30 to 1,000 tokens, six in ten about a picture of one to six tiles. `variants`: the trainer on D, X and
H over one decoder and the same pictures of six tiles and a thumbnail, as the NVLM paper's table 3 compares them.
`plan`: the three with recomputed activations in four rows of 1,024 tokens, their memory beside what `nvlm plan` says.

Every contestant is a process of its own, so that memory is its own; they take turns in each round. Documents a second,
and MB resident at the most: of a step, above what was before it (gradients and activations), and of the run, above what
was before its first step (with the optimizer). Medians with 20th and 80th percentile; ratios are of a round's turns,
which are of the same documents. Waiting for data is counted over steps without a pause, for batches are made during
others' turns too. A small vision encoder of 128-pixel tiles (64 tokens each), a decoder of 8 layers with a vocabulary
of 32,768; random weights, fp32.
"""

import argparse
import json
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.peers.train_contestants import PLANNED_ROWS, SEQ_LEN, Contestant, Figures
from bench.reports.chart import COLOURS, one_axis
from bench.reports.report import RESULTS, table, write
from bench.setup.synthetic import full_tokenizer, random_model
from nvlm_runtime.analysis.plan import Workload, find_device, plan_model
from nvlm_runtime.analysis.profile import check_matplotlib
from nvlm_runtime.checkpoint.weights import save
from nvlm_runtime.config import VARIANTS, CrossConfig, NVLMConfig
from nvlm_runtime.micro.document import GRIDS, WORDS
from nvlm_runtime.presets import MICRO_TEXT, MICRO_VISION
from nvlm_runtime.training.recipe import trained_parts

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
# of the trainer's against the loop's
TARGETS = {"documents_per_s": ("at least", 1.5), "memory_mb": ("at most", 0.6), "memory_of_run_mb": ("at most", 0.6)}


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


def write_records(folder: Path, num: int, all_pictures: bool, seed: int = 0) -> Path:
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


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    found = statistics.quantiles(values, n=10, method="inclusive")
    return found[1], found[4], found[7]


def measure(
    part: str, rounds: int, documents: int, threads: int, variant: str, recompute: bool = False
) -> list[dict[str, Any]]:
    """A row a contestant. rounds: of times, after steps without a pause, and half as many again, two at least, of
    memory. recompute: the trainer's activations are made again, as they always are in the part plan.
    """
    packed = {"trainer": True, "plain loop": False} if part == "loop" else dict.fromkeys(VARIANTS, True)
    times: dict[str, list[Figures]] = {name: [] for name in packed}
    peaks: dict[str, list[Figures]] = {name: [] for name in packed}
    pauseless: dict[str, Figures] = {}
    few = max(2, (rounds + 1) // 2)
    again = {name: ours and (recompute or part == "plan") for name, ours in packed.items()}
    load = os.getloadavg()[0]  # of a minute before: who else was at work
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_records(folder, 4 * documents, all_pictures=part != "loop")
        contestants = {}
        for name in packed:
            made = variant if part == "loop" else name
            model = folder / name.replace(" ", "-")
            save(random_model(model_config(made), torch.float32), model)
            full_tokenizer(TEXT.vocab_size).save(model)
            num = None if part == "plan" else documents
            contestants[name] = Contestant(made, model, rows, num, packed[name], again[name], threads)
        for name, contestant in contestants.items():
            pauseless[name] = contestant.ask("step" if part == "plan" else few)
        for found, order, num in ((times, "step", rounds), (peaks, "peak", few)):
            for _ in range(num):
                for name, contestant in contestants.items():
                    found[name].append(contestant.ask(order))
        for contestant in contestants.values():
            contestant.end()
    rows = [
        {"part": part, "contestant": name, "load": load, "recompute": again[name]}
        | _row(times[name], peaks[name], pauseless[name])
        for name in packed
    ]
    for row in rows:
        row["ratio"] = _ratio(row, rows[-1] if part == "loop" else rows[0])
        if part == "loop":
            pairs = zip(row["losses"], rows[-1]["losses"], strict=True)
            row["loss_difference"] = max(abs(ours / theirs - 1) for ours, theirs in pairs)
        if part == "variants":
            row["paper_ratio"] = PAPER[row["contestant"]] / PAPER["d"]
        if part == "plan":
            row |= {"planned_mb": planned_mb(row["contestant"]), "waited": None}
    return rows


def planned_mb(variant: str) -> float:
    """What `nvlm plan` says a step needs above weights and optimizer."""
    request, trains = Workload(PLANNED_ROWS, SEQ_LEN, 7), trained_parts(variant, "sft")
    plan = plan_model(model_config(variant), request, find_device("cpu"), dtype=torch.float32, trains=trains)
    return sum(count for name, count in plan.bytes.items() if name not in ("weights", "optimizer")) / 1e6


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return dict.fromkeys(("p20", "p50", "p80"))
    return dict(zip(("p20", "p50", "p80"), percentiles(values) if len(values) > 1 else 3 * [*values]))


def _row(steps: list[Figures], peaks: list[Figures], pauseless: Figures) -> dict[str, Any]:
    documents = sum(step["documents"] for step in steps)
    turns = {
        "documents_per_s": [step["documents"] / step["seconds"] for step in steps],
        "memory_mb": [peak["memory"] / 1e6 for peak in peaks if peak["memory"] is not None],
        "memory_of_run_mb": [peak["memory_of_run"] / 1e6 for peak in peaks if peak["memory"] is not None],
        "tokens_a_document": [step["tokens"] / step["documents"] for step in steps],
    }
    kept = {name: [step[name] for step in steps if name in step] for name in ("learnt", "texts", "pictures")}
    return {
        "rounds": len(steps),
        "documents": documents,
        "losses": [step["loss"] for step in steps],
        **kept,
        "mean_tokens": sum(step["tokens"] for step in steps) / documents,
        **{name: _spread(values) for name, values in turns.items()},
        "turns": turns,
        "waited": pauseless["waited"] / pauseless["seconds"],
    }


def _ratio(row: dict[str, Any], base: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """A contestant's against another's in the same turn."""
    pairs = {name: zip(values, base["turns"][name], strict=True) for name, values in row["turns"].items()}
    return {name: _spread([ours / theirs for ours, theirs in found]) for name, found in pairs.items()}


def _cell(values: dict[str, float | None], times: str = "") -> str | None:
    if values["p50"] is None:
        return None
    p20, p50, p80 = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values.values())
    return f"{p50}{times} ({p20}-{p80})"


def show(rows: list[dict[str, Any]]) -> str:
    """The rows of a part."""
    columns = {
        "documents/s": "documents_per_s",
        "MB a step": "memory_mb",
        "MB of the run": "memory_of_run_mb",
        "tokens a document": "tokens_a_document",
    }
    compared = {"speed": "documents_per_s", "memory": "memory_mb", "of the run": "memory_of_run_mb"}
    cells = []
    for row in rows:
        cells.append(
            [
                row["contestant"],
                *(_cell(row[key]) for key in columns.values()),
                None if row["waited"] is None else f"{row['waited']:.2%}",
                *(_cell(row["ratio"][key], "x") for key in compared.values()),
                f"{row['paper_ratio']:.2f}x" if "paper_ratio" in row else None,
                row.get("planned_mb"),
            ]
        )
    found = table(("", *columns, "waiting", *compared, "paper's speed", "planned"), cells)
    return "\n".join((found, *(targets(rows[0]) if rows[0]["part"] == "loop" else ())))


def targets(row: dict[str, Any]) -> list[str]:
    """How far the trainer's losses were from the loop's; its ratios, each beside what was wanted of it."""
    lines = [f"losses: {row['loss_difference']:.1g} apart at the most, as a share of the loop's"]
    for key, (side, wanted) in TARGETS.items():
        ratio = row["ratio"][key]
        if ratio["p50"] is None:
            lines.append(f"{key}: not measured, wanted {side} {wanted}x")
            continue
        met = ratio["p50"] >= wanted if side == "at least" else ratio["p50"] <= wanted
        lines.append(f"{key}: {_cell(ratio, 'x')}, wanted {side} {wanted}x: {'met' if met else 'missed'}")
    return lines


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Speeds of the variants, NVLM-D's being 1, beside the paper's. ValueError without matplotlib."""
    by_name = {row["contestant"]: row["ratio"]["documents_per_s"] for row in rows if row["part"] == "variants"}
    with one_axis(path, 5.5) as axis:
        for at, name in enumerate(by_name):
            ours = by_name[name]
            spread = [[ours["p50"] - ours["p20"]], [ours["p80"] - ours["p50"]]]
            first = {"label": "this bench"} if not at else {}
            second = {"label": "paper, table 3"} if not at else {}
            axis.bar(at - 0.2, ours["p50"], 0.38, yerr=spread, capsize=4, color=COLOURS[1], **first)
            axis.bar(at + 0.2, PAPER[name] / PAPER["d"], 0.38, color=COLOURS[0], **second)
        axis.set_xticks(range(len(by_name)), [f"NVLM-{name.upper()}" for name in by_name])
        axis.set(ylabel="documents/s, NVLM-D's = 1", title="Training speed")
        axis.legend(frameon=False)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.train_step", description=__doc__.splitlines()[0])
    made.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    made.add_argument("--variant", choices=VARIANTS, default="d", help="of the part loop (default: %(default)s)")
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--documents", type=int, default=16, help="of a step (default: %(default)s)")
    made.add_argument("--recompute", action="store_true", help="the trainer's activations are made again, in all parts")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--json", type=Path, help="default: bench/results/train_step.json, where all parts are run")
    made.add_argument("--png", type=Path, help="the variants' speeds as bars (needs matplotlib); default: as --json")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.rounds < 2 or args.documents < 2 or args.threads < 1:
        parser().error("--rounds and --documents must be at least 2, --threads at least 1")
    if args.png and "variants" not in args.only:
        parser().error("--png draws the part variants, which --only leaves out")
    some = len(set(args.only)) < len(PARTS)
    if not args.json and not some:
        args.png = args.png or RESULTS / "train_step.png"
    if args.png:
        try:
            check_matplotlib()
        except ValueError as error:
            parser().error(str(error))
    rows = []
    for part in dict.fromkeys(args.only):
        rows += (found := measure(part, args.rounds, args.documents, args.threads, args.variant, args.recompute))
        print(f"{part}, load {found[0]['load']:.1f} before\n{show(found)}\n", flush=True)
    write(args.json, "train_step", rows, some)
    if args.png:
        draw(rows, args.png)
    return 0


if __name__ == "__main__":
    main()
