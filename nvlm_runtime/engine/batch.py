"""Requests that decode together on static buffers. They join and leave between steps.

`admit` gives a request a batch slot. Each `advance` reads a chunk of one waiting prompt and decodes a token of every
request whose prompt has been read. An answer does not depend on the other requests. A slot's cache keeps what it holds
when its request leaves: a request whose prompt begins with the same text and images starts from there, as long as the
weights are the same.
"""

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nvlm_runtime.engine.graphs import CapturedRunner
from nvlm_runtime.engine.images import ImageEncoder
from nvlm_runtime.engine.in_flight import InFlightStep
from nvlm_runtime.engine.request import Request
from nvlm_runtime.engine.runner import PromptChunk, Runner
from nvlm_runtime.engine.sampling import Draw
from nvlm_runtime.engine.slots import BatchSlots


def _no_keys() -> np.ndarray:
    return np.zeros((0, 4), np.int64)


@dataclass(eq=False)
class _Slot:
    """What the host knows of one batch slot."""

    row: int  # its place in the batch
    request: Request | None = None
    reading: Iterator[None] | None = None  # the rest of the prompt, until it has been read
    position: int = 0  # of the next token, as far as the host has read what steps drew
    keys: np.ndarray = field(default_factory=_no_keys)  # [T, 4], of what the cache holds (`PreparedPrompt.keys`)
    version: int = -1  # of the weights that computed it

    @property
    def is_decoding(self) -> bool:
        return self.request is not None and self.reading is None

    def num_shared(self, request: Request) -> int:
        """Tokens at the beginning of a prompt that the cache holds. The last token of a prompt is always read anew."""
        held, asked = self.keys, request.prepared.keys
        length = min(len(held), len(asked) - 1)
        differs = (held[:length] != asked[:length]).any(-1)
        return int(differs.argmax()) if differs.any() else length


class Batch:
    """The requests of a number of batch slots.

    Args:
        runner: what runs the model.
        slots: the buffers, allocated by the runner.
        encoder: makes the handles of images.
        chunk: the most prompt tokens that are read at a time.
        reuse: whether a prompt may start from what a slot's cache holds.
        speculate: the most tokens that a request which decodes alone drafts for each step; 0 for none.
        async_scheduling: whether a step is launched before the host has read what the step before it drew.
    """

    def __init__(
        self,
        runner: Runner | CapturedRunner,
        slots: BatchSlots,
        encoder: ImageEncoder,
        chunk: int,
        reuse: bool,
        speculate: int = 0,
        async_scheduling: bool = False,
    ):
        self.runner, self.slots, self.encoder = runner, slots, encoder
        self.chunk, self.reuse, self.speculate = chunk, reuse, speculate
        self.async_scheduling = async_scheduling
        self._slots = [_Slot(row) for row in range(len(slots))]
        self._waiting: list[_Slot] = []  # whose prompts have not been read, first come first
        self._in_flight: InFlightStep | None = None  # the step whose tokens the host has not read yet
        self._read_at = 0.0  # when the host last read some

    @property
    def requests(self) -> list[Request | None]:
        """The request of every slot; None for a free one."""
        return [slot.request for slot in self._slots]

    @property
    def num_free(self) -> int:
        """How many slots are free."""
        return self.requests.count(None)

    @property
    def is_idle(self) -> bool:
        """Whether all slots are free."""
        return self.num_free == len(self._slots)

    @property
    def is_reading(self) -> bool:
        """Whether a prompt has not been read to its end yet."""
        return bool(self._waiting)

    def fits(self, request: Request) -> bool:
        """Whether the buffers are long enough for a request."""
        num_keys = request.prepared.layout.cross_length
        return request.num_positions <= self.slots.capacity and num_keys <= self.slots.cross_capacity

    def admit(self, request: Request) -> None:
        """Takes a request into the free slot whose cache holds most of its prompt.

        Raises:
            ValueError: No slot is free, or the request does not fit.
        """
        free = [slot for slot in self._slots if slot.request is None]
        if not free:
            raise ValueError(f"all {len(self._slots)} rows of the batch are taken")
        if not self.fits(request):
            raise ValueError(
                f"the request needs {request.num_positions} positions and {request.prepared.layout.cross_length} image "
                f"keys, the batch has {self.slots.capacity} and {self.slots.cross_capacity} a row"
            )
        version = self.runner.model.version
        usable = [slot for slot in free if self.reuse and slot.version == version]
        shared = {slot.row: slot.num_shared(request) if slot in usable else 0 for slot in free}
        slot = max(free, key=lambda slot: (shared[slot.row], -len(slot.keys), -slot.row))
        request.num_reused = shared[slot.row]
        slot.request, slot.position, slot.version = request, 0, version
        slot.reading = self._read_prompt(slot, request)
        self._waiting.append(slot)

    def advance(self) -> list[tuple[Request, str]]:
        """Reads one chunk of the prompt that has waited longest and takes one step of every decoding request.

        Returns:
            The requests that drew a token, each with its new text, and those that failed, with "".
        """
        progress = []
        if self._waiting:
            slot = self._waiting[0]
            request, reading = slot.request, slot.reading
            assert request is not None and reading is not None
            try:
                next(reading)
            except StopIteration:
                self._stop_reading(slot)
                progress.append(self._accept(slot, request, int(self.slots.drawn[slot.row])))
            except Exception as error:  # the request's own: the others go on
                self._stop_reading(slot)
                request.error = error
                self._leave(slot)
                progress.append((request, ""))
        if any(slot.is_decoding for slot in self._slots):
            progress += self._step()
        return progress

    def cancel(self, request: Request) -> None:
        """Frees a request's slot at once, whatever it was doing. Does nothing if the request has left already."""
        for slot in self._slots:
            if slot.request is request:
                self._stop_reading(slot)
                request.finish("cancelled")
                self._leave(slot)

    @torch.inference_mode()
    def warmup(self) -> dict[str, float]:
        """Runs everything that a request in these buffers can need. What the caches held is forgotten.

        Returns:
            Seconds of each phase: prefill, first, step.

        Raises:
            ValueError: A request is in the batch.
        """
        if not self.is_idle:
            raise ValueError("a batch cannot be warmed up while it has requests")
        for slot in self._slots:
            slot.version = -1
        runner, slots = self.runner, self.slots
        sees = (False, True) if slots.cross_capacity else (False,)
        began = [time.perf_counter()]
        with slots.all_inactive():
            for length in runner.chunk_lengths(min(self.chunk, slots.capacity)):
                hidden = runner.prefill(slots, 0, self._blank_chunk(length))
            began.append(time.perf_counter())
            for kind in Draw:
                runner.draw_first(slots, 0, hidden[:, -1], kind)
            slots.active.zero_()
            began.append(time.perf_counter())
            for num_rows, sees_images, kind in itertools.product(runner.batch_sizes(len(slots)), sees, Draw):
                runner.step(slots, num_rows, slots.capacity, sees_images, kind)
            began.append(time.perf_counter())
        return {phase: end - start for phase, start, end in zip(("prefill", "first", "step"), began, began[1:])}

    def close(self) -> None:
        """Drops what the runner captured of the buffers."""
        self.runner.release(self.slots)

    def _blank_chunk(self, length: int) -> PromptChunk:
        device = self.slots.token.device
        ids, intervals = (torch.zeros(length, *more, dtype=torch.int64, device=device) for more in ((), (2,)))
        return PromptChunk(ids, 0, intervals, ids[:0], self._image_tokens([]))

    def _image_tokens(self, parts: list[Tensor]) -> Tensor:
        """[n, C], of the parts end to end."""
        cache, width = self.slots.cache, self.runner.model.config.text.hidden_size
        return torch.cat(parts) if parts else cache.k.new_zeros(0, width)

    def _read_prompt(self, slot: _Slot, request: Request) -> Iterator[None]:
        """Reads a prompt from `num_reused` on and draws the first token. Stops after each image and each chunk."""
        self.runner.refresh()
        slots, prepared, device = self.slots, request.prepared, self.slots.token.device
        start = request.num_reused
        slot.keys = prepared.keys[:start]
        where: list[int] = []
        parts: list[Tensor] = []
        for image, source in zip(prepared.layout.images, prepared.images, strict=True):
            if image.span[1] <= start:
                continue  # the cache holds its tokens and its keys
            encoding = self.encoder.start(source, image, request.timings)
            while not encoding.done() and any(other.is_decoding for other in self._slots):
                yield
            handle = encoding.result()
            with torch.inference_mode():
                if image.keys[1] > image.keys[0]:
                    slots.write_cross(slot.row, image.keys[0], self.encoder.keys_values(handle, image))
            if image.placeholders:
                where += image.placeholders
                parts.append(handle.tokens[list(image.placeholder_tiles)].flatten(0, 1))
            yield
        began = time.perf_counter()
        ids = torch.tensor(prepared.input_ids, device=device)
        placeholders = torch.tensor(where, dtype=torch.int64, device=device)
        image_tokens = self._image_tokens(parts)
        intervals = prepared.layout.intervals.to(device)
        bounds = np.array(where)
        spent = 0.0
        for first, end in self.runner.chunks(len(ids), start, self.chunk):
            a, b = np.searchsorted(bounds, (first, end))
            with torch.inference_mode():
                chunk = PromptChunk(
                    ids[first:end], first, intervals[first:end], placeholders[a:b] - first, image_tokens[a:b]
                )
                hidden = self.runner.prefill(slots, slot.row, chunk)
            slot.keys = prepared.keys[:end]
            spent += time.perf_counter() - began
            request.timings["prefill"] = spent
            if end < len(ids):
                yield
                began = time.perf_counter()
        began = time.perf_counter()
        with torch.inference_mode():
            slots.position[slot.row] = len(ids)
            slots.interval[slot.row, 0] = torch.tensor(prepared.layout.after)
            slots.sampling.set(slot.row, request.params, prepared.input_ids)
            self.runner.draw_first(slots, slot.row, hidden[:, -1], Draw.of(request.params))
        slot.position = len(ids)
        request.timings["prefill"] += time.perf_counter() - began

    def _stop_reading(self, slot: _Slot) -> None:
        slot.reading = None
        if slot in self._waiting:
            self._waiting.remove(slot)

    def _step(self) -> list[tuple[Request, str]]:
        """Launches a step of all requests that may draw one more token, and takes in what it drew.

        With async scheduling it takes in what the step before drew, so that the device never waits for the host. What
        a request draws after its own end is dropped.
        """
        began = time.perf_counter()
        decoding = [(slot, slot.request) for slot in self._slots if slot.is_decoding and slot.request is not None]
        if self.speculate and len(decoding) == 1 and (draft := decoding[0][1].draft(self.speculate)):
            return self._speculate(*decoding[0], draft, began)
        before = self._in_flight
        drawing = {id(request) for _, request in before.requests} if before else set()
        due = [
            (slot.row, request)
            for slot, request in decoding
            if request.limit > len(request.token_ids) + (id(request) in drawing)
        ]
        step = self._launch(tuple(due), began) if due else None
        if self.async_scheduling:
            self._in_flight, step = step, before
        return self._land(step) if step else []

    def _launch(self, due: tuple[tuple[int, Request], ...], began: float) -> InFlightStep:
        with torch.inference_mode():
            self.runner.step(
                self.slots,
                due[-1][0] + 1,
                max(self._slots[row].position for row, _ in due) + (2 if self.async_scheduling else 1),
                any(request.prepared.layout.cross_length for _, request in due),
                max(Draw.of(request.params) for _, request in due),
            )
            return InFlightStep.of(due, began, self.slots.drawn)

    def _land(self, step: InFlightStep) -> list[tuple[Request, str]]:
        drawn = step.tokens()
        began, self._read_at = max(step.began, self._read_at), time.perf_counter()
        seconds = self._read_at - began
        progress = []
        for row, request in step.requests:
            slot = self._slots[row]
            if slot.request is not request:
                continue  # it has left since
            progress.append(self._accept_step(slot, request, drawn[row], seconds))
        return progress

    def _speculate(self, slot: _Slot, request: Request, draft: list[int], began: float) -> list[tuple[Request, str]]:
        """A step of a lone request that draws after every token of its draft. Keeps them up to the first difference."""
        slots = self.slots
        with torch.inference_mode():
            num_visible = slot.position + 1 + len(draft)
            sees_images = bool(request.prepared.layout.cross_length)
            drawn = self.runner.verify(slots, slot.row, draft, num_visible, sees_images, Draw.of(request.params))
            right = next((i for i, token in enumerate(draft) if drawn[i] != token), len(draft))
            drawn = drawn[: right + 1]
            slots.token[slot.row] = max(drawn[-1], 0)
            slots.position[slot.row] += len(drawn)
        seconds = (time.perf_counter() - began) / len(drawn)
        progress = []
        for token in drawn:
            progress.append(self._accept_step(slot, request, token, seconds))
            if request.done:
                break
        return progress

    def _accept_step(self, slot: _Slot, request: Request, token: int, seconds: float) -> tuple[Request, str]:
        """Takes in a token that a decode step drew in so many seconds."""
        slot.position += 1
        request.token_seconds.append(seconds)
        request.timings["decode"] += seconds
        return self._accept(slot, request, token)

    def _accept(self, slot: _Slot, request: Request, token: int) -> tuple[Request, str]:
        request.timings.setdefault("decode", 0.0)
        if token < 0:
            request.error = ValueError("the model's logits are not finite: its weights or their dtype are wrong")
            self._leave(slot)
            return request, ""
        piece = request.accept(token)
        if request.done:
            self._leave(slot)
        return request, piece

    def _leave(self, slot: _Slot) -> None:
        request = slot.request
        assert request is not None
        prepared = request.prepared
        num_fed = slot.position - len(prepared.input_ids)
        if num_fed > 0:
            answer = np.zeros((num_fed, 4), np.int64)
            answer[:, 0] = request.token_ids[:num_fed]
            answer[:, 1:3] = prepared.layout.after
            slot.keys = np.concatenate([prepared.keys, answer])
        if request.error is not None:
            slot.keys = slot.keys[:0]
        self.slots.deactivate(slot.row)
        slot.request = None
