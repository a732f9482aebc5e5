"""Building a captured step while other rows are active changes nothing that any row reads."""

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from nvlm_runtime.engine.graphs import CapturedRunner, CapturedStep
from nvlm_runtime.engine.images import fingerprint
from nvlm_runtime.engine.runner import Runner
from nvlm_runtime.engine.sampling import Draw, GenerationParams
from nvlm_runtime.engine.slots import BatchSlots, free_bytes
from nvlm_runtime.model import cross, past
from tests.engine.test_batch import LARGE, SMALL, fresh
from tests.model.test_model import picture

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


def active_rows(runner: Runner | CapturedRunner, rows: int = 3) -> BatchSlots:
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


@torch.inference_mode()
def test_other_threads_work_while_steps_are_built(monkeypatch):
    """CUDA calls of other threads must not break a capture: it is thread_local, and here they come while it lasts."""
    model = fresh("x", graphs=True)
    slots, done, errors = active_rows(model.runner), [], []
    names, original = iter(range(1000)), CapturedStep.build

    def others() -> None:
        try:
            done.append(model.encode_image(picture((32 * (1 + next(names) % 3), 32), next(names))).fingerprint)
            done.append(len(model.prepare("What is it?", [SMALL]).input_ids))
            done.append(fingerprint(model.model))
        except Exception as error:
            errors.append(error)

    def build(step, pool):
        if not step.name.startswith("prefill"):
            return original(step, pool)
        thread = threading.Thread(target=others)
        fn = step.fn

        def inside() -> None:
            if thread.ident is None:
                thread.start()
                thread.join(60)
            fn()

        step.fn = inside
        original(step, pool)
        step.fn = fn

    monkeypatch.setattr(CapturedStep, "build", build)
    with nothing_changes(slots):
        build_all(model.runner, slots)
    assert not errors and len(done) == 12 and done[0] == done[2]


def test_a_capture_lets_other_threads_call_cuda(monkeypatch):
    """With a stubbed CUDA: two dry runs on a stream of their own, then a thread_local capture."""
    events = []

    class Stream:
        def wait_stream(self, other):
            events.append("wait")

    @contextmanager
    def inside(name, *args, **options):
        events.append((name, options.get("capture_error_mode")))
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "stream", partial(inside, "stream"))
    monkeypatch.setattr(torch.cuda, "graph", partial(inside, "graph"))
    CapturedStep("a step", lambda: events.append("run"), {}).build((0, 0))
    want = ["wait", ("stream", None), "run", "run", "wait", ("graph", "thread_local"), "run"]
    assert events == want


def test_free_memory_counts_what_the_allocator_holds(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 250)
    assert free_bytes(torch.device("cuda", 0)) == 550


def test_rows_one_by_one_are_warmed_up_at_both_alignments():
    assert fresh("d", deterministic=True, native=False).runner.batch_sizes(5) == (1, 2)
    assert fresh("d", deterministic=True, native=False).runner.batch_sizes(1) == (1,)
    assert fresh("d", native=False).runner.batch_sizes(3) == (1, 2, 3)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@torch.inference_mode()
def test_inactive_rows_read_nothing(graphs, monkeypatch):
    """Their lengths in self-attention are 0 and their image intervals empty: what their caches hold does not matter."""
    runner = fresh("x", graphs=graphs, native=False).runner
    slots = active_rows(runner)
    for row in (0, 2):
        slots.deactivate(row)
    lengths, intervals = [], []
    decode, tile = past.decode_attention, cross.tile_attention

    def watch_decode(q, k, v, given):
        lengths.append(given.tolist())
        return decode(q, k, v, given)

    def watch_tile(q, k, v, given, *rest):
        intervals.append((given[..., 1] - given[..., 0]).flatten().tolist())
        return tile(q, k, v, given, *rest)

    monkeypatch.setattr(past, "decode_attention", watch_decode)
    monkeypatch.setattr(cross, "tile_attention", watch_tile)
    position = int(slots.position[1])
    runner.step(slots, 3, 151, True, Draw.GREEDY)
    layers = runner.model.config.text.num_hidden_layers
    assert lengths[-layers:] == [[0, position + 1, 0]] * layers
    assert intervals and all(seen == [0, 20, 0] for seen in intervals[-1:])
