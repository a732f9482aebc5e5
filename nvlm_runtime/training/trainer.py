"""A recipe from its first step to a checkpoint that `nvlm ask` runs; stopped anywhere, it goes on as if it had not.

A step is `accumulate` micro-batches, whose loss is the mean over all learnt tokens of the step: as one large batch.
The place in the data, the optimizer and the random numbers are part of a checkpoint, so a run that is continued has
the bits of one that was never stopped. Of a tensor-parallel group every rank reads the same rows, learns what it holds,
and writes that into the run's checkpoints; rank 0 writes everything else.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nvlm_runtime.engine import checkpoint_folder
from nvlm_runtime.lora import add_lora, merge_lora, save_lora
from nvlm_runtime.model import NVLMModel
from nvlm_runtime.parallel import SOLO, Group
from nvlm_runtime.quantize import scheme_of
from nvlm_runtime.tokenizer import Tokenizer
from nvlm_runtime.training.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from nvlm_runtime.training.documents import IGNORE
from nvlm_runtime.training.flops import step_flops
from nvlm_runtime.training.loss import token_loss
from nvlm_runtime.training.optimizer import Optimizer
from nvlm_runtime.training.packing import Packed
from nvlm_runtime.training.recipe import Recipe
from nvlm_runtime.training.rows import JsonLines
from nvlm_runtime.training.source import Dataset, Source
from nvlm_runtime.weights import load, save, square_norm, write_json

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Step:
    """What a step was: loss a learnt token, rate, gradient norm before clipping, what it read, flops of the model
    (`step_flops`), and its seconds, some of them `waited` for data. memory: the most the process held so far, bytes of
    the device on CUDA, resident on a CPU.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    documents: int
    tokens: int
    learnt: int
    tiles: int
    flops: int
    seconds: float
    waited: float
    memory: int


def part_of(parameter: str) -> str:
    """The recipe's name of the part a parameter belongs to."""
    if parameter.startswith("vision_model."):
        return "vision"
    if parameter.startswith("mlp1."):
        return "projector"
    return "cross" if ".cross_attn." in parameter else "decoder"


def freeze(model: NVLMModel, parts: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Leaves gradients to the named parts alone; returns what learns. ValueError for a part the model does not have."""
    learns = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in parts)
        if parameter.requires_grad:
            learns[name] = parameter
    if missing := set(parts) - {part_of(name) for name in learns}:
        raise ValueError(f"recipe: this model has no {', '.join(sorted(missing))} to train")
    return learns


class Trainer:
    """A run of a recipe. `resume`: from its newest whole checkpoint; without one in its folder, that is an error.

    group: of ranks that share the model; a tower that learns is cut by heads, one that does not takes shares of tiles.
    Raises ValueError or OSError, before anything is written, for a model of another variant, for data that is not there
    and for a folder that holds another run; in a group also for adapters and for ranks of other recipes.
    """

    def __init__(
        self,
        recipe: Recipe,
        resume: bool = False,
        device: str = "cpu",
        log: Callable[[str], None] = print,
        group: Group = SOLO,
    ):
        self.recipe, self.out, self.log, self.group = recipe, Path(recipe.out), log, group
        group.check_same("the recipe", asdict(recipe))
        if group.size > 1 and recipe.lora:
            raise ValueError("recipe: adapters (lora) learn in one process; with --tp whole parts do")
        self.folder = self.out / "checkpoints"
        found = checkpoints(self.folder)
        if resume and not found:
            raise ValueError(f"{self.folder} holds no checkpoint to go on from")
        if found and not resume:
            raise ValueError(f"{self.folder} holds a run already: --resume goes on with it, or name another folder")
        base = checkpoint_folder(recipe.model)
        self.tokenizer = Tokenizer.load(base)
        dtype = getattr(torch, recipe.precision)
        split = "heads" if "vision" in recipe.train else "tiles"
        self.model, self.values = load(base, device, dtype, group, split)
        if scheme_of(self.model):
            raise ValueError(f"{base} is quantised: it answers, and does not learn")
        if self.model.config.variant != recipe.variant:
            raise ValueError(
                f"the recipe is for variant {recipe.variant}, {base} is NVLM-{self.model.config.variant.upper()}"
            )
        torch.manual_seed(recipe.seed)
        self.learns = self._learners()
        self.model.language_model.recompute = recipe.recompute
        datasets = [
            Dataset(blend.task, JsonLines(Path(blend.file), Path(blend.images) if blend.images else None), weight)
            for blend, weight in zip(recipe.data, recipe.weights, strict=True)
        ]
        norm = None if group.size == 1 else lambda gradients: square_norm(self.model, gradients)
        self.optimizer = Optimizer(self.learns, recipe, norm)
        self.next_step, state = 0, None
        if resume:
            state = self._restore(read_checkpoint(found[-1], group))
            log(f"goes on from {found[-1].name}")
        config = self.model.config
        if recipe.max_tiles is not None:
            config = replace(config, max_tiles=recipe.max_tiles, min_tiles=min(config.min_tiles, recipe.max_tiles))
        self.source = Source(
            datasets,
            self.tokenizer,
            config,
            rows=recipe.rows,
            seq_len=recipe.seq_len,
            seed=recipe.seed,
            style=recipe.style,
            packed=recipe.packed,
            shuffled_tiles=recipe.shuffled_tiles,
            skip_bad=recipe.skip_bad,
            log=log,
            state=state,
        )
        self._place = self.source.state()  # behind the last whole step
        self._signal: int | None = None

    def _learners(self) -> dict[str, nn.Parameter]:
        """What learns, by name: whole parts, and new adapters."""
        recipe = self.recipe
        whole = freeze(self.model, recipe.train)
        if not recipe.lora:
            return whole
        add_lora(self.model, recipe.lora, recipe.lora_rank, recipe.lora_alpha, recipe.lora_dropout)
        for parameter in whole.values():
            parameter.requires_grad_(True)
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    @property
    def _tower_learns(self) -> bool:
        return any(name.startswith("vision_model.") for name in self.learns)

    def run(self, show: Callable[[Step], None] = lambda step: None) -> int:
        """All steps that are left, then the model into the run's folder. Returns 0, or 128 + the signal that stopped
        it: SIGTERM and Ctrl-C end the run after the step they came in, with a checkpoint.

        show: told of every step. Raises ValueError where loss or gradients are not finite, and BadRow; the
        steps before are in a checkpoint then. RuntimeError where another rank is gone: the last checkpoint is the one
        before.
        """
        recipe, saved, stopped = self.recipe, self.next_step, 0
        if self.group.rank == 0:
            self.out.mkdir(parents=True, exist_ok=True)
            write_json(self.out / "recipe.json", asdict(recipe))
        try:
            with self._signals(), self._metrics() as metrics:
                while self.next_step < recipe.steps and not (stopped := self._stopped()):
                    step = self.step()
                    if metrics:
                        metrics.write(json.dumps(asdict(step)) + "\n")
                        metrics.flush()
                    show(step)
                    if self.next_step % recipe.checkpoint_every == 0:
                        saved = self.checkpoint()
        except RuntimeError:
            if self.group.size > 1:
                saved = self.next_step  # all ranks write a checkpoint, or none
            raise
        finally:  # also behind a bad row or a loss that is not finite: the steps before it are kept
            self.source.close()
            if saved < self.next_step:
                self.checkpoint()
        if stopped and self.next_step < recipe.steps:
            return 128 + stopped
        self.export()
        return 0

    def _metrics(self) -> Any:
        return (self.out / METRICS).open("a", encoding="utf-8") if self.group.rank == 0 else nullcontext()

    def _stopped(self) -> int:
        """The signal that ends the run, whichever rank it came to; 0 before."""
        return int(self.group.largest(torch.tensor(self._signal or 0, device=self.device)))

    def step(self) -> Step:
        """One step of the optimizer. Raises ValueError, with nothing moved, for a loss or gradients not finite."""
        began, waited = time.perf_counter(), self.source.waited
        batches = [next(self.source) for _ in range(self.recipe.accumulate)]
        learnt = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        total = 0.0
        self.model.train()
        for batch in batches:
            loss = self.loss(batch) / max(1, learnt)
            if loss.requires_grad:  # text alone teaches nothing where the decoder is frozen
                loss.backward()
            total += loss.item()
        if not math.isfinite(total):
            raise ValueError(
                f"step {self.next_step + 1}: the loss is {total}: a smaller lr, or data that is not broken"
            )
        rate, norm = self.optimizer.step(self.next_step)
        self.next_step += 1
        self._place = self.source.state()
        return Step(
            step=self.next_step,
            loss=total,
            lr=rate,
            grad_norm=norm,
            documents=sum(batch.num_documents for batch in batches),
            tokens=sum(batch.num_tokens for batch in batches),
            learnt=learnt,
            tiles=sum(len(tiles) for batch in batches for tiles in batch.pixel_values),
            flops=sum(step_flops(self.model, batch) for batch in batches),
            seconds=time.perf_counter() - began,
            waited=self.source.waited - waited,
            memory=peak_memory(self.device),
        )

    @property
    def device(self) -> torch.device:
        return self.model.language_model.embed_tokens.weight.device

    def loss(self, batch: Packed) -> Tensor:
        """The sum of a micro-batch's cross-entropies."""
        weight = self.model.language_model.embed_tokens.weight
        with torch.set_grad_enabled(self._tower_learns):
            features = [self._features(tiles.to(weight.device, weight.dtype)) for tiles in batch.pixel_values]
        ids, labels = batch.input_ids.to(weight.device), batch.labels.to(weight.device)
        hidden = self.model(ids, batch.layouts, features, batch.documents)
        return token_loss(self.model.language_model, hidden, labels, self.recipe.loss_rows)

    def _features(self, tiles: Tensor) -> Tensor:
        if len(tiles):
            return self.model.encode(tiles)
        vision = self.model.config.vision
        return tiles.new_zeros(0, vision.num_patches, vision.hidden_size)

    def checkpoint(self) -> int:
        """Writes one; returns the number of steps it stands behind."""
        state = {
            "step": self.next_step,
            "recipe": json.dumps(asdict(self.recipe)),
            "optimizer": self.optimizer.state_dict(),
            "source": json.dumps(self._place),
            "random": torch.get_rng_state(),
        }
        write_checkpoint(self.folder, self.next_step, state, self.recipe.keep, self.group)
        return self.next_step

    def _restore(self, state: dict[str, Any]) -> dict[str, Any]:
        then, now = json.loads(state["recipe"]), json.loads(json.dumps(asdict(self.recipe)))
        free = ("checkpoint_every", "keep", "log_every", "tensorboard", "plot", "out")
        if changed := [name for name in now if name not in free and now[name] != then.get(name)]:
            raise ValueError(f"the checkpoint is of another recipe: {', '.join(changed)} differ")
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.next_step = state["step"]
        self._cut_metrics()
        return json.loads(state["source"])

    def _cut_metrics(self) -> None:
        """Lines of steps that will be made again."""
        path = self.out / METRICS
        if self.group.rank == 0 and path.is_file():
            lines = [line for line in path.read_text("utf-8").splitlines() if _number(line) <= self.next_step]
            partial = path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in lines))
            partial.rename(path)

    def export(self) -> None:
        """The model as a checkpoint of the published layout, with its tokenizer, in the run's folder.

        Adapters go into the folder "adapter" in PEFT's form, and into the checkpoint's weights.
        """
        if self.recipe.lora:
            save_lora(self.model, self.out / "adapter", base=self.recipe.model)
            merge_lora(self.model)
        self.model.eval()
        if self.group.rank == 0:
            self.tokenizer.save(self.out)  # the model last: its config.json says that all is there
        save(self.model, self.out, run_dtype=getattr(torch, self.values.get("torch_dtype", self.recipe.precision)))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C are noted, and taken up after the step."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number: int, frame: Any) -> None:
            self._signal = number

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _number(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a killed run did not end


def peak_memory(device: torch.device) -> int:
    """Bytes: the most allocated on a CUDA device, else the most this process was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
