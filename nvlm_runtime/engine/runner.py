"""Runs one model over batch slots: encodes images, reads chunks of prompts, takes decode steps.

The logits of a decode step come from a backend: PyTorch or the native library (`logits`). No step reads a value of the
device on the host, so each can be captured into a CUDA graph (`graphs.CapturedRunner`).
A profiler sees every phase as a range, "nvlm.encode" and so on, with the name of its time in `Output.timings`.

B rows, T tokens, C hidden_size of the decoder, N tiles, P image tokens of a tile.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import record_function

from nvlm_runtime.engine.logits import LogitsBackend
from nvlm_runtime.engine.rank_sampling import draw_over_ranks
from nvlm_runtime.engine.sampling import Draw, Sampling
from nvlm_runtime.engine.slots import BatchSlots
from nvlm_runtime.model.decoder import CrossView
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import make_past

CACHED = 1 << 20  # activations of the tiles that a CPU encodes together


@dataclass(frozen=True)
class PromptChunk:
    """Consecutive tokens of one prompt.

    Attributes:
        input_ids: int64 [T].
        start: position of the first token.
        intervals: int64 [T, 2], the image keys [start, end) that each token sees.
        placeholders: int64 [n], the tokens of the chunk, counted from its first, that image tokens take the place of.
        image_tokens: [n, C].
    """

    input_ids: Tensor
    start: int
    intervals: Tensor
    placeholders: Tensor
    image_tokens: Tensor


class Runner:
    """Runs a model eagerly.

    Args:
        model: the model.
        backend: what computes the logits of decode steps.
        row_by_row: whether a decode step runs one row after the other, so that each has the bits it would have alone.
            A backend whose rows do not depend on each other anyway does not need it.
        allow_host_sync: whether the host may wait for a value of the device in the middle of a step.
    """

    def __init__(
        self, model: NVLMModel, backend: LogitsBackend, *, row_by_row: bool = False, allow_host_sync: bool = True
    ):
        self.model, self.backend = model, backend
        self.row_by_row, self.allow_host_sync = row_by_row, allow_host_sync

    def allocate(
        self, num_rows: int, capacity: int, cross_capacity: int, vocab_size: int, padding: int = 1
    ) -> BatchSlots:
        """Allocates batch slots on the model's device, in its dtype.

        Args:
            num_rows: how many slots.
            capacity: cache positions of each.
            cross_capacity: image keys of each.
            vocab_size: of the tokenizer.
            padding: cache positions after `capacity` that nobody reads.

        Raises:
            ValueError: The caches are larger than the free memory.
        """
        weight = self.model.language_model.embed_tokens.weight
        return BatchSlots.allocate(
            self.model.shard, num_rows, capacity, cross_capacity, vocab_size, weight.device, weight.dtype, padding
        )

    def release(self, slots: BatchSlots) -> None:
        """Drops what was made for these slots: here nothing."""

    def refresh(self) -> None:
        """Takes changed weights into account. A batch calls it before it reads a prompt."""
        self.backend.refresh()

    def chunks(self, length: int, start: int, size: int) -> Sequence[tuple[int, int]]:
        """[start, end) of the chunks of a prompt of `length` tokens from `start` on, at most `size` tokens each."""
        return [(first, min(first + size, length)) for first in range(start, length, size)]

    def chunk_lengths(self, size: int) -> tuple[int, ...]:
        """Lengths of chunks that together compile everything that chunks of up to `size` tokens need."""
        return tuple(sorted({min(length, size) for length in (1, 2, 9, 16, 33, size)}))

    def batch_sizes(self, max_rows: int) -> tuple[int, ...]:
        """Numbers of rows that decode steps of up to `max_rows` rows run with."""
        # rows one by one: Triton compiles anew for every second row, whose int64 buffers are not aligned to 16 bytes
        return tuple(range(1, min(max_rows, 2 if self.row_by_row else max_rows) + 1))

    def spans(self, num_rows: int) -> Sequence[tuple[int, int]]:
        """[start, end) of the rows that run together in a decode step of `num_rows` rows."""
        return [(i, i + 1) for i in range(num_rows)] if self.row_by_row else [(0, num_rows)]

    def encode(self, pixel_values: Tensor) -> Features:
        """Encodes the tiles of one image.

        A CPU takes large tiles one by one, so that they stay in its cache. The bits of a tile do not depend on its
        neighbours.

        Args:
            pixel_values: [N, 3, S, S] in the model's dtype.
        """
        with record_function("nvlm.encode"):
            parts = pixel_values.split(self._tiles_at_once(pixel_values))
            return Features.cat([self.model.encode(some) for some in parts])

    def project(self, features: Features) -> Tensor:
        """Projects features to image tokens [N, P, C]. A CPU takes them as in `encode`."""
        with record_function("nvlm.project"):
            tokens = [self.model.project(some) for some in features.split(self._tiles_at_once(features.patches))]
            return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def embed(self, chunk: PromptChunk) -> Tensor:
        """A chunk's inputs [1, T, C], with the image tokens in place."""
        rows = torch.zeros_like(chunk.placeholders)
        return self.model.language_model.embed(chunk.input_ids[None], rows, chunk.placeholders, chunk.image_tokens)

    def prefill(self, slots: BatchSlots, row: int, chunk: PromptChunk) -> Tensor:
        """Reads a chunk of a row's prompt into its cache. Returns hidden states [1, T, C]."""
        one, decoder = slots.rows(row, row + 1), self.model.language_model
        x = self.embed(chunk)
        end = chunk.start + x.shape[1]
        positions = torch.arange(chunk.start, end, device=x.device)[None]
        view = None
        if one.cross is not None and one.cross_capacity:
            view = CrossView(one.cross, chunk.intervals[None])
        with record_function("nvlm.prefill"):
            return decoder(x, positions, make_past(positions, decoder.attention, one.cache, end), view)

    def draw_first(self, slots: BatchSlots, row: int, hidden: Tensor, kind: Draw) -> None:
        """Draws a row's first token and makes the row active. Its position is set already.

        Args:
            hidden: [1, C], the last hidden state of the row's prompt.
            kind: what the draw has to compute.
        """
        one = slots.rows(row, row + 1)
        with record_function("nvlm.prefill"):
            logits = self.model.language_model.local_logits(hidden)
            one.store(self._draw(logits, one.sampling, one.position, kind))
        one.active.fill_(True)

    def step(self, slots: BatchSlots, num_rows: int, num_visible: int, sees_images: bool, kind: Draw) -> None:
        """Takes a decode step: every active row among the first `num_rows` draws its next token.

        Args:
            num_visible: how many cache positions are read, more than any active row's position.
            sees_images: whether a row may see an image key.
            kind: what the draw has to compute.
        """
        with record_function("nvlm.decode"):
            for start, end in self.spans(num_rows):
                self.step_rows(slots.rows(start, end), num_visible, sees_images, kind)

    def step_rows(self, slots: BatchSlots, num_visible: int, sees_images: bool, kind: Draw) -> None:
        """Takes a decode step of all these slots at once, for `step`."""
        tokens, positions = slots.token[:, None], slots.position[:, None]
        logits = self.backend.logits(slots, tokens, positions, num_visible, sees_images)
        slots.position.add_(slots.active)
        slots.store(self._draw(logits, slots.sampling, slots.position, kind))

    def verify(
        self, slots: BatchSlots, row: int, draft: Sequence[int], num_visible: int, sees_images: bool, kind: Draw
    ) -> list[int]:
        """Draws what follows an active row's last token and what follows each token of a draft.

        The cache takes in the row's last token and the draft. The row's token and position do not change.

        Args:
            num_visible: how many cache positions are read, the draft's included.
            sees_images: whether the row may see an image key.
            kind: what the draw has to compute.

        Returns:
            1 + len(draft) tokens.
        """
        one, count, device = slots.rows(row, row + 1), 1 + len(draft), slots.token.device
        tokens = torch.cat([one.token, torch.tensor(draft, dtype=torch.int64, device=device)])[None]
        positions = one.position + torch.arange(count, device=device)[None]
        with record_function("nvlm.decode"):
            logits = self.backend.logits(one, tokens, positions, num_visible, sees_images)
            return self._draw(logits, one.sampling.repeated(0, count), positions[0] + 1, kind).tolist()

    def _draw(self, logits: Tensor, sampling: Sampling, positions: Tensor, kind: Draw) -> Tensor:
        """Tokens [B] of this rank's logits, the same on every rank. positions: [B], where they will stand."""
        vocab_size, group = self.model.config.text.vocab_size, self.model.group
        return draw_over_ranks(logits, sampling, positions, kind, group, vocab_size, self.allow_host_sync)

    def _tiles_at_once(self, tiles: Tensor) -> int:
        """How many tiles run together."""
        if tiles.device.type != "cpu" or self.model.group.size > 1:
            return len(tiles)
        vision = self.model.config.vision
        return max(1, CACHED // ((vision.num_patches + 1) * vision.hidden_size))
