"""A recipe from its first step to a checkpoint that `nvlm ask` runs; stopped anywhere, it goes on as if it had not.

A step is `accumulate` micro-batches, whose loss is the mean over all learnt tokens of the step: as one large batch.
The place in the data, the optimizer and the random numbers are part of a checkpoint, so a run that is continued has
the bits of one that was never stopped. Of a tensor-parallel group every rank reads the same rows, learns what it holds,
and writes that into the run's checkpoints; rank 0 writes everything else. Data-parallel ranks (FSDP) share the step's
micro-batches out: a step is the same one over any number of them.
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
from torch import nn

from nvlm_runtime.checkpoint.composite import whole_folder
from nvlm_runtime.checkpoint.lora import add_lora, merge_lora, save_lora
from nvlm_runtime.checkpoint.tensors import square_norm
from nvlm_runtime.checkpoint.weights import Progress, load, save, write_json
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.parts import part_of
from nvlm_runtime.model.quantize import scheme_of
from nvlm_runtime.parallel.group import Mesh
from nvlm_runtime.training.checkpoint import checkpoints, read_checkpoint, write_checkpoint
from nvlm_runtime.training.documents import IGNORE
from nvlm_runtime.training.flops import step_flops
from nvlm_runtime.training.objective import Objective
from nvlm_runtime.training.optimizer import Optimizer
from nvlm_runtime.training.packing import PackedBatch
from nvlm_runtime.training.recipe import Recipe
from nvlm_runtime.training.records import JsonLines
from nvlm_runtime.training.source import Dataset, Source

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


def freeze(model: NVLMModel, parts: tuple[str, ...]) -> dict[str, nn.Parameter]:
    """Lets the named parts learn and no others, in place.

    Args:
        model: the model.
        parts: of `model.parts.PARTS`.

    Returns:
        The parameters that learn, by name.

    Raises:
        ValueError: the model does not have one of the parts.
    """
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

    mesh: of ranks that share the model; a vision encoder that learns is cut by heads, one that does not takes shares of
    tiles, or is cut too where the model's rows are shared out. progress: as in `weights.load`. Raises ValueError or
    OSError, before anything is written, for a model of another variant, for data that is not there and for a folder
    that holds another run; over ranks also for adapters, for ranks of other recipes, and for micro-batches that cannot
    be shared out evenly.
    """

    def __init__(
        self,
        recipe: Recipe,
        resume: bool = False,
        device: str = "cpu",
        log: Callable[[str], None] = print,
        mesh: Mesh | None = None,
        progress: Progress = lambda read, total: None,
    ):
        self.recipe, self.out, self.log = recipe, Path(recipe.out), log
        self.mesh = mesh = mesh or Mesh()
        mesh.world.check_same("the recipe", asdict(recipe))
        if mesh.world.size > 1 and recipe.lora:
            raise ValueError("recipe: adapters (lora) learn in one process; over ranks whole parts do")
        if mesh.world.size > 1 and recipe.muon_lr is not None:
            raise ValueError("recipe: Muon needs whole matrices, and ranks hold parts of them: leave muon_lr out")
        if recipe.accumulate % mesh.data.size:
            raise ValueError(
                f"recipe: accumulate, the micro-batches of a step, must be a multiple of the {mesh.data.size} "
                f"data-parallel ranks that share them out, got {recipe.accumulate}"
            )
        self.folder = self.out / "checkpoints"
        found = checkpoints(self.folder)
        if resume and not found:
            raise ValueError(f"{self.folder} holds no checkpoint to go on from")
        if found and not resume:
            raise ValueError(f"{self.folder} holds a run already: --resume goes on with it, or name another folder")
        base = whole_folder(recipe.model, group=mesh.world)
        self.tokenizer = Tokenizer.load(base)
        dtype = getattr(torch, recipe.precision)
        if mesh.data.size == 1:
            split = "heads" if "vision" in recipe.train else "tiles"
            self.model, self.values = load(base, device, dtype, mesh.tensor, split, progress=progress)
            self.objective = Objective(self.model)
        else:
            self.model, self.values = load(base, device, dtype, mesh.tensor, "heads", self._allocate_shares, progress)
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
        norm = None if mesh.world.size == 1 else lambda gradients: square_norm(self.model, gradients, mesh.data)
        self.optimizer = Optimizer(self.learns, recipe, norm)
        self.next_step, self._place, state = 0, None, None
        if resume:
            state = self._restore(read_checkpoint(found[-1], self._state(), mesh))
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
            share=(mesh.data.rank, mesh.data.size),
        )
        self._place = self.source.state()  # behind the last whole step
        self._signal: int | None = None

    def _allocate_shares(self, model: NVLMModel, dtype: torch.dtype, device: torch.device | str) -> None:
        from nvlm_runtime.training.fsdp import shard  # torch's takes a second to load

        self.objective = shard(model, self.mesh.data, dtype, device)

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

    def run(self, show: Callable[[Step], None] = lambda step: None) -> int:
        """Runs all remaining steps, then saves the model in the run's folder.

        SIGTERM and Ctrl-C end the run after the current step, with a checkpoint.

        Args:
            show: called with every step's figures.

        Returns:
            0, or 128 + the number of the signal that stopped the run.

        Raises:
            ValueError: The loss or a gradient is not finite. The steps before are in a checkpoint.
            BadRecord: A record cannot be learnt from and `skip_bad` is off. The steps before are in a checkpoint.
            RuntimeError: Another rank is gone. The run resumes from the last checkpoint before.
        """
        recipe, saved, stopped = self.recipe, self.next_step, 0
        if self.mesh.world.rank == 0:
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
            if self.mesh.world.size > 1:
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
        return (self.out / METRICS).open("a", encoding="utf-8") if self.mesh.world.rank == 0 else nullcontext()

    def _stopped(self) -> int:
        """The signal that ends the run, whichever rank it came to; 0 before."""
        return int(self.mesh.world.largest(torch.tensor(self._signal or 0, device=self.device)))

    def step(self) -> Step:
        """One step of the optimizer. Raises ValueError, with nothing moved, for a loss or gradients not finite."""
        began, waited, data = time.perf_counter(), self.source.waited, self.mesh.data
        batches = [next(self.source) for _ in range(self.recipe.accumulate // data.size)]
        counts = data.all_reduce(torch.tensor([_counts(batch) for batch in batches], device=self.device).sum(0))
        learnt, documents, tokens, tiles = counts.tolist()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        self.model.train()
        for batch in batches:
            loss = self.objective(batch, self.recipe.loss_rows) / max(1, learnt)
            if loss.requires_grad:  # text alone teaches nothing where the decoder is frozen
                loss.backward()
            total += loss.detach()
        total = data.all_reduce(total).item()
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
            documents=documents,
            tokens=tokens,
            learnt=learnt,
            tiles=tiles,
            flops=sum(step_flops(self.model, batch) for batch in batches),
            seconds=time.perf_counter() - began,
            waited=self.source.waited - waited,
            memory=peak_memory(self.device),
        )

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.language_model.embed_tokens.weight.device

    def checkpoint(self) -> int:
        """Writes one; returns the number of steps it stands behind."""
        write_checkpoint(self.folder, self.next_step, self._state(), self.recipe.keep, self.mesh)
        return self.next_step

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.next_step,
            "recipe": json.dumps(asdict(self.recipe)),
            "optimizer": self.optimizer.state_dict(),
            "source": json.dumps(self._place),
            "random": torch.get_rng_state(),
        }

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
        if self.mesh.world.rank == 0 and path.is_file():
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
        if self.mesh.world.rank == 0:
            self.tokenizer.save(self.out)  # the model last: its config.json says that all is there
        dtype = getattr(torch, self.recipe.precision)
        run_dtype = getattr(torch, self.values.get("torch_dtype", self.recipe.precision))
        save(self.model, self.out, dtype, run_dtype, data=self.mesh.data)

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


def _counts(batch: PackedBatch) -> tuple[int, int, int, int]:
    """Learnt tokens, documents, tokens, tiles."""
    tiles = sum(map(len, batch.pixel_values))
    return int((batch.labels != IGNORE).sum()), batch.num_documents, batch.num_tokens, tiles


def _number(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line that a killed run did not end


def peak_memory(device: torch.device) -> int:
    """Measures the most memory used so far.

    Args:
        device: where the model is.

    Returns:
        Bytes: the most allocated on a CUDA device, else the most this process was resident.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
