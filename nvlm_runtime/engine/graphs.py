"""A runner whose work is done by captured steps: functions of static buffers that a CUDA graph can hold.

A captured step reads and writes tensors that live as long as it does, so the host replays it with one launch. There is
one step for each tile count of an image, with nothing padded; one for each chunk length, a power of two, the last chunk
padded by less than 32 tokens; and one for each batch size of a decode step, rounded up to a power of two. Those of
images share one memory pool and the others another, because images are encoded while rows decode. In a tensor-parallel
group every rank builds the same steps in the same order, and their collectives are captured too.
Without a GPU a step runs uncaptured: the same code on the same buffers, with the same dry runs.
`bench.proofs.replay.check` then checks that it keeps the rules of CUDA graphs.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nvlm_kernels import row_statistics
from nvlm_runtime.engine.runner import PromptChunk, Runner
from nvlm_runtime.engine.sampling import Draw
from nvlm_runtime.engine.slots import BatchSlots
from nvlm_runtime.model.cache import CrossKV
from nvlm_runtime.model.decoder import CrossView
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.past import FlatPast

SMALLEST_CHUNK = 32


@dataclass
class CapturedStep:
    """A function of static buffers. A call replays its graph, or runs the function where there is none.

    Attributes:
        name: what it does, for messages.
        fn: reads and writes the buffers and keeps nothing else.
        buffers: the tensors, by name.
        graph: the captured graph; None before `build`, and without a GPU.
    """

    name: str
    fn: Callable[[], None]
    buffers: dict[str, Tensor]
    graph: "torch.cuda.CUDAGraph | None" = None

    def __call__(self) -> None:
        if self.graph is None:
            self.fn()
        else:
            self.graph.replay()

    def build(self, pool: tuple[int, int] | None) -> None:
        """Makes the dry runs, which compile every kernel, and captures the function where there is a pool.

        A CPU makes the same dry runs, so what they touch is the same everywhere. The buffers keep what they wrote.
        Other threads may call CUDA meanwhile.

        Args:
            pool: memory pool of the graph; None without a GPU.
        """
        if pool is None:
            self._dry_run()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._dry_run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
            self.fn()

    def _dry_run(self) -> None:
        for _ in range(2):
            self.fn()


class CapturedRunner:
    """A `Runner` whose phases are captured steps. A step is built when it is first needed; `NVLM.warmup` builds all.

    Args:
        runner: what the steps are made of. It must not allow the host to wait for the device.
        on_build: is called with the name of every step that is built.

    Attributes:
        steps: the steps that were built, by what they are for.

    Raises:
        ValueError: The runner allows the host to wait for the device.
    """

    def __init__(self, runner: Runner, on_build: Callable[[str], None] = lambda name: None):
        if runner.allow_host_sync:
            raise ValueError("a captured step cannot wait for the device: pass a Runner with allow_host_sync=False")
        self._runner, self._on_build = runner, on_build
        self.model = runner.model
        weight = self.model.language_model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        on_cuda = self.device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if on_cuda else None
        self._image_pool = torch.cuda.graph_pool_handle() if on_cuda else None
        self.model.language_model.rotary.frequencies(self.device)  # made on the host, once
        self.steps: dict[tuple, CapturedStep] = {}
        self._features: dict[int, Features] = {}  # by tile count: what encoding writes and projecting reads

    def allocate(self, num_rows: int, capacity: int, cross_capacity: int, vocab_size: int) -> BatchSlots:
        """As `Runner.allocate`. The last chunk of a prompt is padded, so it ends up to 32 positions after capacity."""
        return self._runner.allocate(num_rows, capacity, cross_capacity, vocab_size, padding=SMALLEST_CHUNK)

    def release(self, slots: BatchSlots) -> None:
        """Drops the steps of slots that are no longer used."""
        self.steps = {key: step for key, step in tuple(self.steps.items()) if key[1] != id(slots)}

    def refresh(self) -> None:
        """As `Runner.refresh`."""
        self._runner.refresh()

    def chunks(self, length: int, start: int, size: int) -> Sequence[tuple[int, int]]:
        """As `Runner.chunks`, with lengths that are powers of two except the last (`chunks_of_buckets`)."""
        return chunks_of_buckets(length, start, size)

    def chunk_lengths(self, size: int) -> tuple[int, ...]:
        """As `Runner.chunk_lengths`."""
        return tuple(1 << n for n in range(SMALLEST_CHUNK.bit_length() - 1, max(size, SMALLEST_CHUNK).bit_length()))

    def batch_sizes(self, max_rows: int) -> tuple[int, ...]:
        """As `Runner.batch_sizes`."""
        return tuple(sorted({self._bucket(n, max_rows) for n in range(1, max_rows + 1)}))

    def encode(self, pixel_values: Tensor) -> Features:
        """As `Runner.encode`. The next image with as many tiles overwrites the features."""
        num_tiles = len(pixel_values)
        step = self._step(("encode", num_tiles), partial(self._encode_step, num_tiles))
        step.buffers["pixel_values"].copy_(pixel_values)
        step()
        return self._features_of(num_tiles)

    def project(self, features: Features) -> Tensor:
        """As `Runner.project`. Features that are not in the static buffers are copied there first."""
        num_tiles = len(features.patches)
        if features is not self._features_of(num_tiles):
            _write(self._features_of(num_tiles), features)
        step = self._step(("project", num_tiles), partial(self._project_step, num_tiles))
        step()
        return step.buffers["tokens"].clone()

    def prefill(self, slots: BatchSlots, row: int, chunk: PromptChunk) -> Tensor:
        """As `Runner.prefill`."""
        x = self._runner.embed(chunk)
        length, start = x.shape[1], chunk.start
        bucket = max(SMALLEST_CHUNK, 1 << (length - 1).bit_length())
        step = self._step(("prefill", slots, bucket), partial(self._prefill_step, slots, bucket))
        buffers, positions_per_row, keys_per_row = step.buffers, slots.cache.capacity, slots.cross_capacity
        positions = torch.arange(start, start + bucket, device=self.device)
        buffers["x"].zero_()[:, :length] = x
        buffers["positions"].copy_(positions[None])
        buffers["places"].copy_(positions[None] + row * positions_per_row)
        buffers["spans"].zero_()[0, :length, 0] = row * positions_per_row
        buffers["spans"][0, :length, 1] = positions[:length] + 1 + row * positions_per_row
        if keys_per_row:
            buffers["intervals"].zero_()[0, :length] = chunk.intervals + row * keys_per_row
        step()
        return buffers["hidden"][:, :length]

    def draw_first(self, slots: BatchSlots, row: int, hidden: Tensor, kind: Draw) -> None:
        """As `Runner.draw_first`, not captured."""
        self._runner.draw_first(slots, row, hidden, kind)

    def step(self, slots: BatchSlots, num_rows: int, num_visible: int, sees_images: bool, kind: Draw) -> None:
        """As `Runner.step`. The kernels skip what is not visible, so that one step serves every `num_visible`."""
        for start, end in self._runner.spans(self._bucket(num_rows, len(slots))):
            build = partial(self._decode_step, slots, start, end, sees_images, kind)
            self._step(("step", slots, start, end, sees_images, kind), build)()

    def verify(
        self, slots: BatchSlots, row: int, draft: Sequence[int], num_visible: int, sees_images: bool, kind: Draw
    ) -> list[int]:
        """Is not captured.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a draft is not verified in a captured step: use speculate without graphs")

    def _bucket(self, num_rows: int, max_rows: int) -> int:
        return num_rows if self._runner.row_by_row else bucket_of(num_rows, max_rows)

    def _step(self, key: tuple, build: Callable[[], CapturedStep]) -> CapturedStep:
        # a step keeps its slots alive, so their id is theirs alone
        name = tuple(id(part) if isinstance(part, BatchSlots) else part for part in key)
        if name not in self.steps:
            step = build()
            with key[1].all_inactive() if isinstance(key[1], BatchSlots) else nullcontext():
                step.build(self._image_pool if key[0] in ("encode", "project") else self._pool)
            self.steps[name] = step
            self._on_build(step.name)
        return self.steps[name]

    @torch.inference_mode(False)
    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def _features_of(self, num_tiles: int) -> Features:
        if num_tiles not in self._features:
            vision = self.model.config.vision
            patches = self._empty(num_tiles, vision.num_patches, vision.hidden_size)
            statistics = self._empty(num_tiles, vision.num_patches, 2, dtype=torch.float32)
            self._features[num_tiles] = Features(patches, statistics)
        return self._features[num_tiles]

    def _encode_step(self, num_tiles: int) -> CapturedStep:
        size, features = self.model.config.vision.image_size, self._features_of(num_tiles)
        pixel_values = self._empty(num_tiles, 3, size, size)

        def fn() -> None:
            _write(features, self.model.encode(pixel_values))

        return CapturedStep(f"encode {num_tiles}", fn, {"pixel_values": pixel_values, **vars(features)})

    def _project_step(self, num_tiles: int) -> CapturedStep:
        config, features = self.model.config, self._features_of(num_tiles)
        tokens = self._empty(num_tiles, config.tokens_per_tile, config.text.hidden_size)

        def fn() -> None:
            tokens.copy_(self.model.project(features))

        return CapturedStep(f"project {num_tiles}", fn, {"tokens": tokens, **vars(features)})

    def _prefill_step(self, slots: BatchSlots, length: int) -> CapturedStep:
        width = self.model.config.text.hidden_size
        x, hidden = self._empty(1, length, width), self._empty(1, length, width)
        positions, places = (self._empty(1, length, dtype=torch.int64) for _ in range(2))
        spans, intervals = (self._empty(1, length, 2, dtype=torch.int64) for _ in range(2))
        # until the first prompt: after the last row's end, where nothing is written
        places.copy_(torch.arange(length, device=self.device)[None] + len(slots) * slots.cache.capacity)
        cross = None
        if slots.cross is not None and slots.cross_capacity:
            cross = CrossKV(*(side.flatten(1, 2)[:, None] for side in (slots.cross.k, slots.cross.v)))

        def fn() -> None:
            view = CrossView(cross, intervals) if cross else None
            hidden.copy_(self.model.language_model(x, positions, FlatPast(slots.cache, places, spans), view))

        buffers = {"x": x, "positions": positions, "places": places, "spans": spans, "intervals": intervals}
        caches = {"k": slots.cache.k, "v": slots.cache.v}
        return CapturedStep(f"prefill {length}", fn, {**buffers, "hidden": hidden, **caches})

    def _decode_step(self, slots: BatchSlots, start: int, end: int, sees_images: bool, kind: Draw) -> CapturedStep:
        rows, num_visible = slots.rows(start, end), slots.cache.capacity

        def fn() -> None:
            self._runner.step_rows(rows, num_visible, sees_images, kind)

        tensors = {name: value for name, value in vars(slots).items() if isinstance(value, Tensor)}
        buffers = tensors | vars(slots.sampling) | {"k": slots.cache.k, "v": slots.cache.v}
        if slots.cross:
            buffers |= {"cross k": slots.cross.k, "cross v": slots.cross.v}
        return CapturedStep(f"step {end - start} {kind.name}{' sees' if sees_images else ''}", fn, buffers)


def _write(buffers: Features, made: Features) -> None:
    assert buffers.statistics is not None
    buffers.patches.copy_(made.patches)
    buffers.statistics.copy_(row_statistics(made.patches) if made.statistics is None else made.statistics)


def bucket_of(num_rows: int, max_rows: int) -> int:
    """The batch size that a step of `num_rows` rows runs with: the next power of two, at most `max_rows`."""
    return min(1 << (num_rows - 1).bit_length(), max_rows)


def chunks_of_buckets(length: int, start: int, size: int) -> list[tuple[int, int]]:
    """[start, end) of chunks whose lengths are powers of two from 32 to `size`, except a shorter last one."""
    found = []
    while start < length:
        rest = min(length - start, size)
        step = min(1 << rest.bit_length() - 1, size) if rest >= SMALLEST_CHUNK else rest
        found.append((start, start + step))
        start += step
    return found
