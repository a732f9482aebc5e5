"""Stages with static buffers only, captured into CUDA graphs where there is a GPU.

A stage reads and writes tensors that live as long as it does, so a replay needs no work from the host but a launch.
Image encoding has one stage a tile count, nothing padded; a prompt is read in chunks whose lengths are powers of two,
the last one padded by less than 32 tokens; a step has one stage a batch bucket. All share one memory pool.
Of a tensor-parallel group every rank builds the same stages in the same order, and their collectives are captured too.
Without a GPU a stage simply runs: the same code, the same buffers, and `replay.check` holds it to the rules.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from nvlm_kernels import row_statistics
from nvlm_runtime.engine.sampling import Draw
from nvlm_runtime.engine.slots import Slots
from nvlm_runtime.engine.stages import Stages
from nvlm_runtime.model.cache import CrossKV
from nvlm_runtime.model.decoder import CrossView
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import FlatPast

SMALLEST_CHUNK = 32


@dataclass
class Stage:
    """fn reads and writes the buffers, and keeps nothing else. A call replays its graph, or runs it."""

    name: str
    fn: Callable[[], None]
    buffers: dict[str, Tensor]
    graph: "torch.cuda.CUDAGraph | None" = None

    def __call__(self) -> None:
        if self.graph is None:
            self.fn()
        else:
            self.graph.replay()

    def capture(self, pool: tuple[int, int], mode: str) -> None:
        """Runs fn, so that every kernel is compiled, then captures it. Buffers hold what fn left in them. mode: which
        threads may not call CUDA meanwhile, as torch.cuda.graph's capture_error_mode.
        """
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.fn()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, capture_error_mode=mode):
            self.fn()


def _write(buffers: Features, made: Features) -> None:
    buffers.patches.copy_(made.patches)
    buffers.statistics.copy_(row_statistics(made.patches) if made.statistics is None else made.statistics)


class GraphStages(Stages):
    """Stages built when they are first needed, which `NVLM.warmup` does for all. num_built counts them."""

    spare = SMALLEST_CHUNK  # a padded chunk ends so far behind a row's slots
    may_look = False
    ahead = True

    def __init__(self, model: NVLMModel, deterministic: bool = False):
        super().__init__(model, deterministic)
        weight = model.language_model.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        model.language_model.rotary.frequencies(self.device)  # made on the host, once
        self.stages: dict[tuple, Stage] = {}
        self._features: dict[int, Features] = {}  # by tile count: what encoding writes and projecting reads

    def encode(self, pixel_values: Tensor) -> Features:
        """Features in buffers that the next picture of as many tiles writes over."""
        stage = self._stage(("encode", len(pixel_values)), partial(self._encode_stage, len(pixel_values)))
        stage.buffers["pixel_values"].copy_(pixel_values)
        stage()
        return self._features_of(len(pixel_values))

    def project(self, features: Features) -> Tensor:
        """What `encode` has returned lies where it is read; other features are written over it."""
        num_tiles = len(features.patches)
        if features is not self._features_of(num_tiles):
            _write(self._features_of(num_tiles), features)
        stage = self._stage(("project", num_tiles), partial(self._project_stage, num_tiles))
        stage()
        return stage.buffers["tokens"].clone()

    def prefill(self, slots: Slots, row: int, x: Tensor, start: int, intervals: Tensor) -> Tensor:
        length = x.shape[1]
        bucket = max(SMALLEST_CHUNK, 1 << (length - 1).bit_length())
        stage = self._stage(("prefill", slots, bucket), partial(self._prefill_stage, slots, bucket))
        buffers, per_row, cross_per_row = stage.buffers, slots.cache.capacity, slots.cross_capacity
        at = torch.arange(start, start + bucket, device=self.device)
        buffers["x"].zero_()[:, :length] = x
        buffers["positions"].copy_(at[None])
        buffers["slots"].copy_(at[None] + row * per_row)
        buffers["spans"].zero_()[0, :length, 0] = row * per_row
        buffers["spans"][0, :length, 1] = at[:length] + 1 + row * per_row
        if cross_per_row:
            buffers["intervals"].zero_()[0, :length] = intervals + row * cross_per_row
        stage()
        return buffers["hidden"][:, :length]

    def step(self, slots: Slots, num_rows: int, visible: int, sees: bool, kind: Draw) -> None:
        if self.deterministic:
            spans = [(row, row + 1) for row in range(num_rows)]
        else:
            spans = [(0, bucket_of(num_rows, slots.num))]
        for start, end in spans:
            build = partial(self._step_stage, slots, start, end, sees, kind)
            self._stage(("step", slots, start, end, sees, kind), build)()

    def chunks(self, length: int, start: int, size: int) -> Sequence[tuple[int, int]]:
        return chunks_of_buckets(length, start, size)

    def lengths(self, size: int) -> tuple[int, ...]:
        return tuple(1 << n for n in range(SMALLEST_CHUNK.bit_length() - 1, max(size, SMALLEST_CHUNK).bit_length()))

    def buckets(self, most: int) -> tuple[int, ...]:
        if self.deterministic:
            return tuple(range(1, most + 1))
        return tuple(sorted({bucket_of(n, most) for n in range(1, most + 1)}))

    def forget(self, slots: Slots) -> None:
        """Drops the stages of buffers that are no longer used."""
        self.stages = {name: stage for name, stage in self.stages.items() if name[1] != id(slots)}

    def _stage(self, key: tuple, build: Callable[[], Stage]) -> Stage:
        # a stage keeps its slots alive, so their id is theirs alone
        name = tuple(id(part) if isinstance(part, Slots) else part for part in key)
        if name not in self.stages:
            stage = build()
            if self.device.type == "cuda":
                with key[1].at_rest() if isinstance(key[1], Slots) else nullcontext():
                    # a group's watchdog asks CUDA for its events from a thread of its own
                    stage.capture(self.pool, "global" if self.model.group.size == 1 else "thread_local")
            self.stages[name] = stage
            self.built(stage.name)
        return self.stages[name]

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

    def _encode_stage(self, num_tiles: int) -> Stage:
        size, features = self.model.config.vision.image_size, self._features_of(num_tiles)
        pixel_values = self._empty(num_tiles, 3, size, size)

        def fn() -> None:
            _write(features, self.model.encode(pixel_values))

        return Stage(f"encode {num_tiles}", fn, {"pixel_values": pixel_values, **vars(features)})

    def _project_stage(self, num_tiles: int) -> Stage:
        config, features = self.model.config, self._features_of(num_tiles)
        tokens = self._empty(num_tiles, config.tokens_per_tile, config.text.hidden_size)

        def fn() -> None:
            tokens.copy_(self.model.project(features))

        return Stage(f"project {num_tiles}", fn, {"tokens": tokens, **vars(features)})

    def _prefill_stage(self, slots: Slots, length: int) -> Stage:
        width = self.model.config.text.hidden_size
        x, hidden = self._empty(1, length, width), self._empty(1, length, width)
        positions, places = (self._empty(1, length, dtype=torch.int64) for _ in range(2))
        spans, intervals = (self._empty(1, length, 2, dtype=torch.int64) for _ in range(2))
        places.copy_(torch.arange(length, device=self.device)[None] + slots.capacity)
        cross = None
        if slots.cross_capacity:
            cross = CrossKV(*(side.flatten(1, 2)[:, None] for side in (slots.cross.k, slots.cross.v)))

        def fn() -> None:
            view = CrossView(cross, intervals) if cross else None
            hidden.copy_(self.model.language_model(x, positions, FlatPast(slots.cache, places, spans), view))

        buffers = {
            "x": x,
            "positions": positions,
            "slots": places,
            "spans": spans,
            "intervals": intervals,
            "hidden": hidden,
            "k": slots.cache.k,
            "v": slots.cache.v,
        }
        return Stage(f"prefill {length}", fn, buffers)

    def _step_stage(self, slots: Slots, start: int, end: int, sees: bool, kind: Draw) -> Stage:
        rows = slots.rows(start, end)
        visible = slots.cache.capacity

        def fn() -> None:
            self._step(rows, visible, sees, kind)

        tensors = {name: value for name, value in vars(slots).items() if isinstance(value, Tensor)}
        buffers = tensors | vars(slots.sampling) | {"k": slots.cache.k, "v": slots.cache.v}
        if slots.cross:
            buffers |= {"cross k": slots.cross.k, "cross v": slots.cross.v}
        return Stage(f"step {end - start} {kind.name}{' sees' if sees else ''}", fn, buffers)


def bucket_of(num_rows: int, most: int) -> int:
    """The batch that a step of `num_rows` rows is run as: the next power of two, `most` at the most."""
    return min(1 << (num_rows - 1).bit_length(), most)


def chunks_of_buckets(length: int, start: int, size: int) -> list[tuple[int, int]]:
    """[start, end) of chunks that are powers of two from 32 to `size` long, but for a shorter last one."""
    found = []
    while start < length:
        rest = min(length - start, size)
        step = min(1 << rest.bit_length() - 1, size) if rest >= SMALLEST_CHUNK else rest
        found.append((start, start + step))
        start += step
    return found
