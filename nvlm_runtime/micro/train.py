"""A micro NVLM from seeds: a shared vision encoder and shared documents, then the paper's two stages by the trainer.

Everything is drawn from seeds. A work folder holds what the variants share, under names that say what it was made from,
and is reused. Pretraining reads short documents and transcribes them, fine-tuning answers questions about all; in both
the vision encoder is frozen, and the decoder, which begins at random, learns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvlm_runtime.checkpoint.bundled import checkpoint_folder
from nvlm_runtime.checkpoint.weights import load, save
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.inputs.image import open_image, plan_tiles, tile_pixels
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.micro.dataset import documents_hash, write_dataset
from nvlm_runtime.micro.document import SIDE
from nvlm_runtime.micro.vision_encoder import DenseHeads, fit_heads, pretrain
from nvlm_runtime.micro.vocabulary import make_tokenizer
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.parts import part_of
from nvlm_runtime.presets import MICRO_VISION, PRESETS
from nvlm_runtime.training.checkpoint import checkpoints
from nvlm_runtime.training.recipe import Blend, Recipe, trained_parts
from nvlm_runtime.training.trainer import Step, Trainer

Log = Callable[[str], None]
BEGINNING, STAGES = "beginning", ("pretraining", "fine-tuning")
PRETRAINING = 0.25  # of the steps
ROWS = {"d": 4, "x": 2, "h": 2}  # a step: about as many documents, whose image tokens fill the rows of NVLM-D
COMPILED_STEPS = 200  # of the vision encoder; compiling it takes longer than fewer of them


@dataclass(frozen=True)
class Sizes:
    """How large a run is.

    Attributes:
        steps: of the decoder, both stages together.
        vision_steps: of the vision encoder; 0 takes the shipped models' vision encoder.
        num_documents: rendered documents to train on.
        rows: sequences of 1,024 tokens per step; None is `ROWS` of the variant.
    """

    steps: int = 4500
    vision_steps: int = 3000
    num_documents: int = 20000
    rows: int | None = None

    def __post_init__(self):
        rows = 1 if self.rows is None else self.rows
        if min(self.num_documents, rows) < 1 or self.steps < 2 or self.vision_steps < 0:
            raise ValueError(f"a micro model takes two steps or more, a document and a row at least, got {self}")


def init_weights(model: NVLMModel) -> None:
    """Draws the weights of projector and decoder: unit-variance linears, smaller where they end a residual branch.

    Gates are open: there is no text model whose answers they would have to keep.

    Args:
        model: written in place. The vision encoder's linears are left as they are.
    """
    depth = (2 * len(model.language_model.layers)) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and part_of(name) != "vision":
            scale = depth if name.endswith(("o_proj", "down_proj")) else 1.0
            nn.init.normal_(module.weight, std=scale * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)
    for name, parameter in model.named_parameters():
        if name.endswith(".gate"):
            nn.init.ones_(parameter)


def shared_vision_encoder(work: Path, seed: int, steps: int, log: Log) -> dict[str, Any]:
    """Reads the vision encoder of the work folder and the heads that read it, pretrained first where there are none.

    Args:
        work: the work folder.
        seed: of weights and documents.
        steps: of pretraining; 0 takes the shipped models' vision encoder and fits heads to it.
        log: called with a line now and then.

    Returns:
        State dicts under "tower" and "heads".
    """
    path = work / f"tower-{seed}-{steps}-{documents_hash(seed)}.pt"
    if not path.exists():
        partial = path.with_suffix(".partial")
        if steps:
            encoder, heads = pretrain(MICRO_VISION, seed, log, steps, compile=steps >= COMPILED_STEPS)
        else:
            encoder = load(checkpoint_folder("micro-d"), dtype=torch.float32)[0].vision_model.eval()
            heads = fit_heads(encoder, seed, log)
        # "tower": as work folders of earlier versions have it
        torch.save({"tower": encoder.state_dict(), "heads": heads.state_dict()}, partial)
        partial.rename(path)
    return torch.load(path, weights_only=True)


def shared_documents(work: Path, seed: int, num_documents: int, log: Log) -> Path:
    """Finds the documents of the work folder, drawn first where there are none.

    Args:
        work: the work folder.
        seed: of the documents.
        num_documents: how many.
        log: called with a line now and then.

    Returns:
        Their folder.
    """
    folder = work / f"documents-{seed}-{num_documents}-{documents_hash(seed)}"
    if not folder.exists():
        write_dataset(folder, seed, num_documents, log)
    return folder


@torch.no_grad()
def init_projector(model: NVLMModel, heads: DenseHeads, features: Features) -> None:
    """Lets the projector's first linear begin with what the heads read from each of a token's four patches.

    A layer too narrow for all of it (NVLM-X's) takes random mixtures. The last linear is scaled so that image tokens of
    these features have the embeddings' standard deviation: cross-attention does not norm its keys, and larger ones
    saturate it before it has learned anything.

    Args:
        model: written in place.
        heads: from `pretrain` or `fit_heads`.
        features: of some tiles, as `model.encode` returns them.
    """
    first, last = model.mlp1[1], model.mlp1[-1]
    readout = torch.block_diag(*[heads.readout()] * 4)  # [4 * targets, 4 * width]
    if len(readout) <= len(first.weight):
        first.weight[: len(readout)] = readout
    else:
        mixture = torch.randn(len(first.weight), len(readout)) * len(readout) ** -0.5
        first.weight.copy_(mixture @ readout)
    last.weight *= model.language_model.embed_tokens.weight.std() / model.project(features).std()


def first_tiles(documents: Path, num: int = 50) -> Tensor:
    """Reads the tiles of the first images of a dataset.

    Args:
        documents: folder of the dataset.
        num: number of images, 50 by default.

    Returns:
        Pixels, fp32 [N, 3, SIDE, SIDE].
    """
    pictures = (open_image(path) for path in sorted(documents.glob("pictures/*/*.png"))[:num])
    return torch.cat([tile_pixels(picture, plan_tiles(*picture.size, SIDE)) for picture in pictures])


def write_beginning(config: NVLMConfig, seed: int, folder: Path, documents: Path, reading: Mapping[str, Any]) -> None:
    """Writes the model before its first step, as a checkpoint.

    Args:
        config: of a micro model, its tile tags any.
        seed: of the new weights.
        folder: made where it does not exist.
        documents: folder of the dataset, whose first images scale the projector.
        reading: state dicts as `shared_vision_encoder` returns them.
    """
    model, tokenizer = NVLMModel(config), make_tokenizer(config.text.vocab_size)
    heads = DenseHeads(MICRO_VISION.hidden_size)
    heads.load_state_dict(reading["heads"])
    torch.manual_seed(seed)
    init_weights(model)
    model.vision_model.load_state_dict(reading["tower"])
    model.eval()
    with torch.no_grad():
        features = model.encode(first_tiles(documents))
    init_projector(model, heads, features)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    save(model, folder)


def stage(name: str, variant: str, seed: int, model: Path, out: Path, documents: Path, sizes: Sizes) -> Recipe:
    """Makes the recipe of a stage.

    Args:
        name: one of `STAGES`.
        variant: "d", "x" or "h".
        seed: of the run.
        model: checkpoint before the stage.
        out: folder of the stage.
        documents: folder of the dataset.
        sizes: steps, rows and documents of the run.

    Returns:
        The recipe.
    """
    is_first = name == STAGES[0]
    first = max(1, round(PRETRAINING * sizes.steps))
    steps = first if is_first else sizes.steps - first
    weights = {"short": 0.5, "transcribed": 0.5} if is_first else {"transcribed": 0.25, "asked": 0.75}
    return Recipe(
        model=str(model),
        out=str(out),
        data=tuple(Blend(task, str(documents / f"{task}.jsonl"), weight=weight) for task, weight in weights.items()),
        variant=variant,
        train=trained_parts(variant, "sft"),
        steps=steps,
        lr=2e-3,
        lr_min=1e-3 if is_first else 0.0,
        muon_lr=4e-3,
        warmup=min(200 if is_first else 50, steps - 1),
        rows=sizes.rows or ROWS[variant],
        shuffled_tiles=0.0 if is_first else 0.25,  # a transcription does not ask which tile is which
        seed=seed,
        checkpoint_every=250,
        keep=1,
        log_every=25,
        plot=False,
    )


def train_micro(variant: str, seed: int, out: Path, work: Path, sizes: Sizes, resume: bool, log: Log) -> int:
    """Trains a micro model and writes its checkpoint, weights in bfloat16.

    Args:
        variant: "d", "x" or "h".
        seed: of the run.
        out: folder of the checkpoint, with a folder per stage in it.
        work: folder of what runs share.
        sizes: of the run.
        resume: whether to continue with the first stage that is not done.
        log: called with lines of progress.

    Returns:
        What `Trainer.run` does.

    Raises:
        ValueError: `out` holds a run and `resume` is not given.
    """
    if out.exists() and any(out.iterdir()) and not resume:
        raise ValueError(f"{out} is there already and not empty: --resume goes on with it, or name another folder")
    work.mkdir(parents=True, exist_ok=True)
    documents = shared_documents(work, seed, sizes.num_documents, log)
    if not (out / BEGINNING / "config.json").is_file():
        config = PRESETS[f"micro-{variant}"]
        reading = shared_vision_encoder(work, seed, sizes.vision_steps, log)
        write_beginning(config, seed, out / BEGINNING, documents, reading)
    code = run_stages(out, lambda name, *folders: stage(name, variant, seed, *folders, documents, sizes), log)
    if not code:
        _finish(out / STAGES[-1], out)
    return code


def run_stages(out: Path, recipe_of: Callable[[str, Path, Path], Recipe], log: Log) -> int:
    """Runs what is left of the stages, each in a folder of its own, from the model in the folder "beginning" of `out`.

    Args:
        out: folder of the run.
        recipe_of: makes the recipe, of a stage's name, the folder of the model before it and the stage's folder.
        log: called with lines of progress.

    Returns:
        What `Trainer.run` does.
    """
    model = out / BEGINNING
    for name in STAGES:
        folder = out / name
        if not (folder / "config.json").is_file():
            recipe = recipe_of(name, model, folder)
            trainer = Trainer(recipe, resume=bool(checkpoints(folder / "checkpoints")), log=log)
            if code := trainer.run(_teller(name, recipe, log)):
                return code
        model = folder
    return 0


def _teller(name: str, recipe: Recipe, log: Log) -> Callable[[Step], None]:
    def tell(step: Step) -> None:
        if step.step % recipe.log_every == 0 or step.step == recipe.steps:
            log(f"{name}: step {step.step}/{recipe.steps} loss {step.loss:.3f} {step.seconds:.2f} s")

    return tell


def _finish(trained: Path, out: Path) -> None:
    model, _ = load(trained)
    Tokenizer.load(trained).save(out)
    save(model, out, dtype=torch.bfloat16, run_dtype=torch.float32)
