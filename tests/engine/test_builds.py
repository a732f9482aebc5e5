"""Building a captured step while other rows are active changes nothing that any row reads."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from nvlm_runtime.engine.graphs import CapturedRunner
from nvlm_runtime.engine.sampling import Draw, GenerationParams
from nvlm_runtime.engine.slots import BatchSlots
from tests.engine.test_batch import LARGE, SMALL, fresh

VARIANTS = ("d", "x", "h")


def state(slots: BatchSlots) -> dict[str, torch.Tensor]:
    """Everything that a row may read: not the padding after the capacity."""
    tensors = {name: value for name, value in vars(slots).items() if isinstance(value, torch.Tensor)}
    tensors |= {f"sampling {name}": value for name, value in vars(slots.sampling).items()}
    tensors |= {side: getattr(slots.cache, side)[:, :, : slots.capacity] for side in "kv"}
    if slots.cross is not None:
        tensors |= {f"image {side}": getattr(slots.cross, side) for side in "kv"}
    return tensors


@contextmanager
def nothing_changes(slots: BatchSlots) -> Iterator[None]:
    before = {name: tensor.clone() for name, tensor in state(slots).items()}
    yield
    for name, tensor in state(slots).items():
        assert torch.equal(tensor, before[name]), f"{name} changed"


def active_rows(runner: CapturedRunner, rows: int = 3) -> BatchSlots:
    """Rows in the middle of an answer, with random contents."""
    generator = torch.Generator().manual_seed(0)
    cross_capacity = 20 if runner.model.config.cross else 0
    slots = runner.allocate(rows, 150, cross_capacity, 300)
    caches = [slots.cache.k, slots.cache.v, *((slots.cross.k, slots.cross.v) if slots.cross is not None else ())]
    for tensor in caches:
        tensor.normal_(generator=generator)
    for tensor in (slots.token, slots.drawn, slots.position, slots.sampling.seed, slots.sampling.top_k):
        tensor.random_(0, 140, generator=generator)
    slots.interval[..., 1] = cross_capacity
    slots.active.fill_(True)
    slots.sampling.seen.random_(0, 2, generator=generator)
    slots.sampling.temperature.fill_(0.5)
    return slots


def build_all(runner: CapturedRunner, slots: BatchSlots) -> None:
    """Builds every kind of step."""
    for tiles in (1, 3):
        runner._step(("encode", tiles), partial(runner._encode_step, tiles))
        runner._step(("project", tiles), partial(runner._project_step, tiles))
    for length in (32, 64, 128, 256):
        runner._step(("prefill", slots, length), partial(runner._prefill_step, slots, length))
    sees = (False, True) if slots.cross_capacity else (False,)
    for end, sees_images, kind in itertools.product((1, 2, 3), sees, Draw):
        build = partial(runner._decode_step, slots, 0, end, sees_images, kind)
        runner._step(("step", slots, 0, end, sees_images, kind), build)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.inference_mode()
def test_building_a_step_changes_nothing_that_a_row_reads(variant):
    runner = fresh(variant, graphs=True).runner
    slots = active_rows(runner)
    with nothing_changes(slots):
        build_all(runner, slots)
    assert len(runner.steps) > 12


@torch.inference_mode()
def test_the_checker_finds_a_planted_overlap(monkeypatch):
    """The places of a dry run as they once were: after the first row's capacity, and so in the second row."""
    runner = fresh("d", graphs=True).runner
    slots = active_rows(runner)
    original = runner._prefill_step

    def planted(slots, length):
        step = original(slots, length)
        step.buffers["places"].copy_(torch.arange(length)[None] + slots.capacity)
        return step

    monkeypatch.setattr(runner, "_prefill_step", planted)
    with pytest.raises(AssertionError, match="^k changed"), nothing_changes(slots):
        build_all(runner, slots)


def test_a_prompt_whose_steps_are_built_late_leaves_the_other_rows_alone():
    """The first prompt is short, the second builds longer steps while the first decodes in the row after it."""
    params = {"max_new_tokens": 12, "ignore_eos": True}
    long = " ".join(["word"] * 60)
    want = [fresh("d").generate(text, [image], **params).token_ids for text, image in ((long, LARGE), ("Hi", SMALL))]
    model = fresh("d", graphs=True, chunk=128)
    made = [
        model.request(model.prepare(text, [image]), GenerationParams(**params))
        for text, image in ((long, LARGE), ("Hi", SMALL))
    ]
    batch = model.batch(2, max(each.num_positions for each in made), 0)
    filler = model.request(model.prepare("Hi"), GenerationParams(max_new_tokens=2, ignore_eos=True))
    batch.admit(filler)
    batch.admit(made[1])
    while len(made[1].token_ids) < 3:
        batch.advance()
    batch.admit(made[0])
    while not batch.is_idle:
        batch.advance()
    assert [each.token_ids for each in made] == want
