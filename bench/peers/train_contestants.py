"""The contestants of `bench.train_step`: the trainer and a plain loop, each in a process of its own."""

import hashlib
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from bench.setup.resident import peak_bytes, resident_bytes
from nvlm_runtime.training.documents import IGNORE
from nvlm_runtime.training.packing import PackedBatch
from nvlm_runtime.training.recipe import Blend, Recipe, trained_parts
from nvlm_runtime.training.source import AHEAD, Source
from nvlm_runtime.training.trainer import Trainer

SEQ_LEN, PLANNED_ROWS = 1024, 4
STOCK = AHEAD + 1  # batches that are ready before a step: those of the queue, and one that waits for room in it

Figures = dict[str, Any]


class Seen(Source):
    """A source that keeps its last batch, to be asked what was in it."""

    last: PackedBatch | None = None

    def __next__(self) -> PackedBatch:
        self.last = super().__next__()
        return self.last


def digests(batch: PackedBatch) -> dict[str, str]:
    """Of a batch's documents, however they lie in rows: `texts` of tokens and what is learnt, `pictures` of tiles."""
    texts, pictures = [], []
    for row, spans in enumerate(batch.documents):
        for start, end in spans:
            pair = torch.stack((batch.input_ids[row, start:end], batch.labels[row, start:end]))
            texts.append(hashlib.sha256(pair.numpy().tobytes()).digest())
        counts = [image.num_tiles for image in batch.layouts[row].images]
        for tiles in batch.pixel_values[row].split(counts):
            pictures.append(hashlib.sha256(tiles.numpy().tobytes()).digest())
    found = {"texts": texts, "pictures": pictures}
    return {name: hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:16] for name, parts in found.items()}


def trainer_of(variant: str, folder: Path, rows: Path, documents: int | None, packed: bool, recompute: bool) -> Trainer:
    """A trainer whose every step is the next `documents` rows of the file, in one micro-batch. None: PLANNED_ROWS full
    rows of tokens.
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
        decay_norms_and_gates=True,  # as torch's AdamW does, so that the plain loop's steps are the same
        recompute=recompute,
    )
    trainer = Trainer(recipe, log=lambda line: None)
    if documents is None:
        return trainer
    old = trainer.source
    old.close()
    trainer.source = Seen(
        old.datasets,
        old.tokenizer,
        old.config,
        rows=documents,
        seq_len=SEQ_LEN,
        packed=packed,
        window=documents,
    )
    return trainer


def plain_loop(trainer: Trainer) -> Callable[[], Figures]:
    """A step as tutorials write it, on the trainer's model and data."""
    model, learns = trainer.model, list(trainer.learns.values())
    adam = torch.optim.AdamW(learns, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05)

    def step() -> Figures:
        began, waited = time.perf_counter(), trainer.source.waited
        batch = next(trainer.source)
        features = [trainer.objective.features(tiles) for tiles in batch.pixel_values]
        hidden = model(batch.input_ids, batch.layouts, features)
        logits = model.language_model.logits(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learns, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        value = loss.item()
        seconds, waited = time.perf_counter() - began, trainer.source.waited - waited
        return {
            "seconds": seconds,
            "documents": batch.num_documents,
            "tokens": batch.num_tokens,
            "learnt": int((batch.labels != IGNORE).sum()),
            "loss": value,
            "waited": waited,
        }

    return step


def packed_loop(trainer: Trainer) -> Callable[[], Figures]:
    def step() -> Figures:
        done = trainer.step()
        return {name: getattr(done, name) for name in ("seconds", "documents", "tokens", "learnt", "loss", "waited")}

    return step


def with_digests(step: Callable[[], Figures], source: Source) -> Figures:
    found = step()
    if isinstance(source, Seen):
        found |= digests(source.last)
        source.last = None
    return found


def with_peak(step: Callable[[], Figures], start: int | None) -> Figures:
    """`memory`: bytes above what was resident before this step, at the most; `memory_of_run`: above `start`."""
    found: Figures = {}
    before = resident_bytes()
    memory = peak_bytes(lambda: found.update(step()))
    return found | {"memory": memory, "memory_of_run": None if memory is None else before + memory - start}


def without_pause(step: Callable[[], Figures], num: int) -> Figures:
    """`num` steps one after the other, behind those whose batches were ready: nobody else's turn hides what is waited
    for.
    """
    for _ in range(STOCK):
        step()
    steps = [step() for _ in range(num)]
    return {name: sum(done[name] for done in steps) for name in ("seconds", "waited")}


def serve(
    pipe: Connection,
    variant: str,
    folder: Path,
    rows: Path,
    documents: int | None,
    packed: bool,
    recompute: bool,
    threads: int,
) -> None:
    """A contestant's process: "step", "peak" and a number, of steps without a pause, are each answered with figures;
    anything else ends it.
    """
    torch.set_num_threads(threads)
    trainer = trainer_of(variant, folder, rows, documents, packed, recompute)
    step = packed_loop(trainer) if packed else plain_loop(trainer)
    start = resident_bytes()
    while (order := pipe.recv()) in ("step", "peak") or isinstance(order, int):
        if order == "step":
            pipe.send(with_digests(step, trainer.source))
        else:
            pipe.send(with_peak(step, start) if order == "peak" else without_pause(step, order))
    trainer.source.close()


class Contestant:
    """A process that trains when it is told to."""

    def __init__(self, *args: Any):
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, order: str | int) -> Figures:
        self.pipe.send(order)
        return self.pipe.recv()

    def end(self) -> None:
        self.pipe.send("end")
        self.process.join()
