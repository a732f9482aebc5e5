"""The stages of a request as functions of static buffers: encode an image, a chunk of prompt, a decoding step.

Each has one shape for what it is given: an image's tile count, a chunk's length, a batch's rows. None looks at a value
on the device, so that each can be captured. A profiler sees each as a range, "nvlm.encode" and so on, named as its time
in `Output.timings`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.profiler import record_function

from nvlm_kernels.native import NativeLibrary
from nvlm_runtime.engine.native import NativeDecoder
from nvlm_runtime.engine.rank_sampling import draw_over_ranks
from nvlm_runtime.engine.sampling import Draw, Sampling
from nvlm_runtime.engine.slots import Slots
from nvlm_runtime.model.cache import CrossKV
from nvlm_runtime.model.decoder import CrossView
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import make_past

CACHED = 1 << 20  # activations of tiles that a CPU encodes together


class Stages:
    """Eager stages of a model, whose steps may be native.

    deterministic: rows of a step are decoded one by one, as each would be alone. native: the library that decodes on a
    CPU, where every row has the bits it would have alone anyway.
    """

    spare = 1  # slots that its buffers need behind their capacity
    may_look = True  # at a value on the device, in the middle of a step
    ahead = False  # whether a step is launched before the host has read what the last one drew

    def __init__(self, model: NVLMModel, deterministic: bool = False, native: NativeLibrary | None = None):
        self.model = model
        self.deterministic = deterministic
        self._library = native
        self._native = NativeDecoder(model.language_model, native) if native else None
        self._version = model.version
        self.built: Callable[[str], None] = lambda name: None  # told of every stage made for one shape; here none is

    def chunks(self, length: int, start: int, size: int) -> Sequence[tuple[int, int]]:
        """[start, end) of the chunks that a prompt's rest is read in, at most `size` tokens long."""
        return [(first, min(first + size, length)) for first in range(start, length, size)]

    def lengths(self, size: int) -> tuple[int, ...]:
        """Lengths of chunks that between them compile all that chunks of up to `size` tokens need."""
        return tuple(sorted({min(length, size) for length in (1, 2, 9, 16, 33, size)}))

    def buckets(self, most: int) -> tuple[int, ...]:
        """Batches that a step is run as, with up to `most` rows."""
        return (1,) if self.deterministic else tuple(range(1, most + 1))

    def forget(self, slots: Slots) -> None:
        """Lets go of buffers that are no longer used."""

    def encode(self, pixel_values: Tensor) -> Features:
        """Tiles of one image [N, 3, S, S] to their features. A CPU takes large tiles one by one: they stay in its
        cache, and a tile's bits do not depend on its neighbours.
        """
        with record_function("nvlm.encode"):
            parts = pixel_values.split(self._together(pixel_values))
            return Features.cat([self.model.encode(some) for some in parts])

    def project(self, features: Features) -> Tensor:
        """Features to image tokens [N, P, C], a CPU's as `encode` takes them."""
        with record_function("nvlm.project"):
            tokens = [self.model.project(some) for some in features.split(self._together(features.patches))]
            return tokens[0] if len(tokens) == 1 else torch.cat(tokens)

    def _together(self, tiles: Tensor) -> int:
        """How many tiles run at once."""
        if tiles.device.type != "cpu" or self.model.group.size > 1:
            return len(tiles)
        vision = self.model.config.vision
        return max(1, CACHED // ((vision.num_patches + 1) * vision.hidden_size))

    def embed(self, input_ids: Tensor, where: Tensor, tokens: Tensor) -> Tensor:
        """A chunk's inputs [1, T, C]: token ids [T], with image tokens [n, C] at the places `where` [n]."""
        decoder = self.model.language_model
        if not len(where):
            return decoder.embed_tokens(input_ids)[None]
        return decoder.embed(input_ids[None], torch.zeros_like(where), where, tokens)

    def prefill(self, slots: Slots, row: int, x: Tensor, start: int, intervals: Tensor) -> Tensor:
        """A chunk of a row's prompt, x [1, T, C] from position `start`; intervals [T, 2]. Returns hidden [1, T, C]."""
        one = slots.rows(row, row + 1)
        end = start + x.shape[1]
        positions = torch.arange(start, end, device=x.device)[None]
        view = None
        if one.cross is not None and one.cross.k.shape[2]:
            view = CrossView(one.cross, intervals[None])
        with record_function("nvlm.prefill"):
            decoder = self.model.language_model
            return decoder(x, positions, make_past(positions, decoder.attention, one.cache, end), view)

    def first(self, slots: Slots, row: int, hidden: Tensor, kind: Draw) -> None:
        """Draws a row's first token from the last hidden state of its prompt [1, C]; its position is set."""
        one = slots.rows(row, row + 1)
        with record_function("nvlm.prefill"):
            self._draw(one, self.model.language_model.local_logits(hidden), one.position, kind)
        one.active.fill_(True)

    def step(self, slots: Slots, num_rows: int, visible: int, sees: bool, kind: Draw) -> None:
        """Every active row among the first `num_rows` draws its next token.

        visible: the slots that are looked at, more than any row's position. sees: whether a row may see an image key.
        """
        alone = self.deterministic and self._native is None
        spans = [(i, i + 1) for i in range(num_rows)] if alone else [(0, num_rows)]
        with record_function("nvlm.decode"):
            for start, end in spans:
                self._step(slots.rows(start, end), visible, sees, kind)

    def _step(self, slots: Slots, visible: int, sees: bool, kind: Draw) -> None:
        logits = self._logits(slots, visible, sees)
        slots.position.add_(slots.active)
        self._draw(slots, logits, slots.position, kind)

    def _logits(self, slots: Slots, visible: int, sees: bool) -> Tensor:
        decoder = self.model.language_model
        if self._native is not None:
            return self._native_logits(slots, sees)
        view = CrossView(slots.cross, slots.interval) if sees else None
        x = decoder.embed_tokens(slots.token[:, None])
        past = make_past(slots.position[:, None], decoder.attention, slots.cache, visible)
        return decoder.local_logits(decoder(x, slots.position[:, None], past, view)[:, 0])

    def verify(self, slots: Slots, row: int, draft: Sequence[int], sees: bool, kind: Draw) -> list[int]:
        """What an active row draws next, and what it would draw behind each token of a draft: 1 + len(draft) tokens.

        The cache takes in the row's next token and the draft; the row itself is not moved. Natively each token has the
        bits a step would give it. In PyTorch the products are those of several rows, whose rounding may differ.
        """
        count, device = 1 + len(draft), slots.token.device
        token = torch.cat([slots.token[row : row + 1], torch.tensor(draft, dtype=torch.int64, device=device)])
        positions = slots.position[row] + torch.arange(count, device=device)
        cache, cross = slots.cache.shared(row, count), slots.cross.shared(row, count) if sees else None
        intervals = slots.interval[row : row + 1].repeat(count, 1, 1)  # [count, 1, 2]
        with record_function("nvlm.decode"):
            if self._native is not None:
                logits = torch.empty(count, self.model.config.text.vocab_size)
                active = torch.ones(count, dtype=torch.bool)
                given = intervals if sees else None
                self._native.step(token, positions, active, cache, cross, given, logits)
            else:
                one = slots.rows(row, row + 1)
                view = CrossView(one.cross, intervals.transpose(0, 1)) if sees else None
                decoder, visible = self.model.language_model, int(slots.position[row]) + count
                x = decoder.embed_tokens(token[None])
                past = make_past(positions[None], decoder.attention, one.cache, visible)
                logits = decoder.local_logits(decoder(x, positions[None], past, view)[0])
            return self._pick(logits, slots.sampling.repeated(row, count), positions + 1, kind).tolist()

    def refresh(self) -> None:
        """Before a request: takes anew what was copied of weights that have changed since."""
        if self._native is not None and self.model.version != self._version:
            self._native = NativeDecoder(self.model.language_model, self._library)
            self._version = self.model.version

    def _native_logits(self, slots: Slots, sees: bool) -> Tensor:
        logits = torch.empty(slots.num, self.model.config.text.vocab_size)
        intervals = slots.interval if sees else None
        self._native.step(slots.token, slots.position, slots.active, slots.cache, slots.cross, intervals, logits)
        return logits

    def _draw(self, slots: Slots, logits: Tensor, positions: Tensor, kind: Draw) -> None:
        drawn = self._pick(logits, slots.sampling, positions, kind)
        slots.drawn.copy_(drawn)
        slots.token.copy_(drawn.clamp(min=0))

    def _pick(self, logits: Tensor, sampling: Sampling, positions: Tensor, kind: Draw) -> Tensor:
        """Tokens [B] of this rank's logits, the same on every rank."""
        vocab_size = self.model.config.text.vocab_size
        return draw_over_ranks(logits, sampling, positions, kind, self.model.group, vocab_size, self.may_look)


def write_cross(slots: Slots, row: int, start: int, kv: CrossKV) -> None:
    """Puts an image's keys and values [gated layers, 1, S, Hkv, D] into a row's, from key `start`."""
    end = start + kv.k.shape[2]
    slots.cross.k[:, row, start:end] = kv.k[:, 0]
    slots.cross.v[:, row, start:end] = kv.v[:, 0]
