"""Rows that decode together on static buffers, joining and leaving between steps.

`admit` gives a request a slot; each `advance` reads a chunk of one waiting prompt and decodes a token of every row that
is past its own. A row's answer does not depend on its neighbours. What a slot's cache holds stays when its row leaves:
a request whose prompt begins alike, text and images, starts from there while the weights are the same.
"""

import itertools
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from nvlm_runtime.engine.images import ImageEncoder
from nvlm_runtime.engine.in_flight import Flight
from nvlm_runtime.engine.request import Request
from nvlm_runtime.engine.sampling import Draw
from nvlm_runtime.engine.slots import Slots
from nvlm_runtime.engine.stages import Stages, write_cross


class Batch:
    """slots: the buffers. chunk: tokens of a prompt that are read at a time. reuse: whether to start from a prefix.
    speculate: the most tokens that a row which decodes alone drafts a step, 0 for none.
    """

    def __init__(
        self, stages: Stages, slots: Slots, encoder: ImageEncoder, chunk: int, reuse: bool, speculate: int = 0
    ):
        self.speculate = speculate
        self.stages, self.slots, self.encoder = stages, slots, encoder
        self.chunk, self.reuse = chunk, reuse
        self.rows: list[Request | None] = [None] * slots.num
        self._cached = [np.zeros((0, 4), np.int64)] * slots.num  # the keys of what each slot's cache holds
        self._versions = [-1] * slots.num  # of the weights that each slot's cache was computed with
        self._filling: list[tuple[int, Iterator[None]]] = []
        self._positions = [0] * slots.num  # of slots.position, as far as the host has read
        self._flight: Flight | None = None  # the step whose tokens the host has not read yet
        self._landed = 0.0  # when it last read some

    @property
    def num_free(self) -> int:
        return self.rows.count(None)

    @property
    def is_idle(self) -> bool:
        return self.num_free == len(self.rows)

    @property
    def is_reading(self) -> bool:
        """Whether a prompt is not read to its end yet."""
        return bool(self._filling)

    def fits(self, row: Request) -> bool:
        """Whether the buffers are long enough for a request."""
        return (
            row.num_positions <= self.slots.capacity and row.prepared.layout.cross_length <= self.slots.cross_capacity
        )

    def admit(self, row: Request) -> None:
        """Takes a request into the free slot that holds most of its prompt. ValueError where there is none, or it does
        not fit.
        """
        free = [i for i, taken in enumerate(self.rows) if taken is None]
        if not free:
            raise ValueError(f"all {len(self.rows)} rows of the batch are taken")
        if not self.fits(row):
            raise ValueError(
                f"the request needs {row.num_positions} slots and {row.prepared.layout.cross_length} image keys, "
                f"the batch has {self.slots.capacity} and {self.slots.cross_capacity} a row"
            )
        version = self.stages.model.version
        shared = {i: self.num_shared(i, row) if self._versions[i] == version else 0 for i in free}
        slot = max(free, key=lambda i: (shared[i], -len(self._cached[i]), -i))
        row.num_reused = shared[slot]
        self.rows[slot], self._positions[slot], self._versions[slot] = row, 0, version
        self._filling.append((slot, self._fill(slot, row)))

    def num_shared(self, slot: int, row: Request) -> int:
        """Tokens at the beginning of a prompt that a slot's cache holds; the last one is always read anew."""
        if not self.reuse:
            return 0
        held, asked = self._cached[slot], row.prepared.keys
        length = min(len(held), len(asked) - 1)
        differs = (held[:length] != asked[:length]).any(-1)
        return int(differs.argmax()) if differs.any() else length

    def advance(self) -> list[tuple[Request, str]]:
        """One chunk of the prompt that waits longest and one step of every decoding row.

        Returns the rows that drew a token, with their new text, and those that failed, with "".
        """
        progress = []
        if self._filling:
            slot, steps = self._filling[0]
            row = self.rows[slot]
            try:
                next(steps)
            except StopIteration:
                self._filling.pop(0)
                progress.append(self._accept(slot, int(self.slots.drawn[slot])))
            except Exception as error:  # the row's own: its neighbours go on
                self._filling.pop(0)
                row.error = error
                self._leave(slot)
                progress.append((row, ""))
        if any(self._decoding(slot) for slot in range(len(self.rows))):
            progress += self._step()
        return progress

    def cancel(self, row: Request) -> None:
        """Frees a row's slot at once, whatever it was doing. A row that has left already is left alone."""
        for slot, taken in enumerate(self.rows):
            if taken is row:
                self._filling = [(s, steps) for s, steps in self._filling if s != slot]
                row.finish("cancelled")
                self._leave(slot)

    @torch.inference_mode()
    def warmup(self) -> dict[str, float]:
        """Runs every stage that a request in these buffers can need. Returns seconds a phase: prefill, first, step.

        What the slots held is forgotten. Raises ValueError while a row is in the batch.
        """
        if not self.is_idle:
            raise ValueError("a batch cannot be warmed up while it has rows")
        self._versions = [-1] * self.slots.num
        stages, slots = self.stages, self.slots
        width, device = stages.model.config.text.hidden_size, slots.token.device
        sees = (False, True) if slots.cross_capacity else (False,)
        began = [time.perf_counter()]
        with slots.at_rest():
            for length in stages.lengths(min(self.chunk, slots.capacity)):
                x = torch.zeros(1, length, width, device=device, dtype=slots.cache.k.dtype)
                hidden = stages.prefill(slots, 0, x, 0, torch.zeros(length, 2, dtype=torch.int64, device=device))
            began.append(time.perf_counter())
            for kind in Draw:
                stages.first(slots, 0, hidden[:, -1], kind)
            slots.active.zero_()
            began.append(time.perf_counter())
            for num_rows, sees_images, kind in itertools.product(stages.buckets(slots.num), sees, Draw):
                stages.step(slots, num_rows, slots.capacity, sees_images, kind)
            began.append(time.perf_counter())
        return {phase: end - start for phase, start, end in zip(("prefill", "first", "step"), began, began[1:])}

    def close(self) -> None:
        """Lets go of what was captured of the buffers."""
        self.stages.forget(self.slots)

    def _decoding(self, slot: int) -> bool:
        return self.rows[slot] is not None and all(slot != filling for filling, _ in self._filling)

    def _fill(self, slot: int, row: Request) -> Iterator[None]:
        """Reads a row's prompt from `num_reused` on; stops after each image and each chunk. Then the first draw."""
        self.stages.refresh()
        slots, prepared, device = self.slots, row.prepared, self.slots.token.device
        ids = torch.tensor(prepared.input_ids, device=device)
        start = row.num_reused
        self._cached[slot] = prepared.keys[:start]
        where: list[int] = []
        tokens: list[Tensor] = []
        for image, picture in zip(prepared.layout.images, prepared.images, strict=True):
            if image.span[1] <= start:
                continue  # its slots and keys are where they were
            with torch.inference_mode():
                handle = self.encoder.handle(picture, image, row.timings)
                if image.keys[1] > image.keys[0]:
                    write_cross(slots, slot, image.keys[0], self.encoder.keys_values(handle, image))
            where += image.placeholders
            if image.placeholders:
                tokens.append(handle.tokens[list(image.placeholder_tiles)].flatten(0, 1))
            yield
        began = time.perf_counter()
        positions = torch.tensor(where, dtype=torch.int64, device=device)
        values = torch.cat(tokens) if tokens else positions
        intervals = prepared.layout.intervals.to(device)
        bounds = np.array(where)
        spent = 0.0
        for first, end in self.stages.chunks(len(ids), start, self.chunk):
            a, b = np.searchsorted(bounds, (first, end))
            with torch.inference_mode():
                x = self.stages.embed(ids[first:end], positions[a:b] - first, values[a:b])
                hidden = self.stages.prefill(slots, slot, x, first, intervals[first:end])
            self._cached[slot] = prepared.keys[:end]
            spent += time.perf_counter() - began
            row.timings["prefill"] = spent
            if end < len(ids):
                yield
                began = time.perf_counter()
        began = time.perf_counter()
        with torch.inference_mode():
            slots.position[slot] = len(ids)
            slots.interval[slot, 0] = torch.tensor(prepared.layout.after)
            slots.sampling.set(slot, row.params, prepared.input_ids)
            self.stages.first(slots, slot, hidden[:, -1], Draw.of(row.params))
        self._positions[slot] = len(ids)
        row.timings["prefill"] += time.perf_counter() - began

    def _step(self) -> list[tuple[Request, str]]:
        """Launches a step of all rows that may draw one more token, and takes in what it drew; where the stages run
        ahead, what the step before it drew, so that the device never waits for the host. What a row draws behind its
        own end is dropped.
        """
        began = time.perf_counter()
        decoding = [(slot, row) for slot, row in enumerate(self.rows) if self._decoding(slot)]
        if self.speculate and len(decoding) == 1 and (draft := decoding[0][1].draft(self.speculate)):
            return self._speculate(decoding[0][0], draft, began)
        before = self._flight
        under_way = {id(row) for _, row in before.rows} if before else set()
        due = [(slot, row) for slot, row in decoding if row.limit > len(row.token_ids) + (id(row) in under_way)]
        flight = self._launch(tuple(due), began) if due else None
        if self.stages.ahead:
            self._flight, flight = flight, before
        return self._land(flight) if flight else []

    def _launch(self, due: tuple[tuple[int, Request], ...], began: float) -> Flight:
        with torch.inference_mode():
            self.stages.step(
                self.slots,
                due[-1][0] + 1,
                max(self._positions[slot] for slot, _ in due) + (2 if self.stages.ahead else 1),
                any(row.prepared.layout.cross_length for _, row in due),
                max(Draw.of(row.params) for _, row in due),
            )
            return Flight.of(due, began, self.slots.drawn)

    def _land(self, flight: Flight) -> list[tuple[Request, str]]:
        drawn = flight.tokens()
        began, self._landed = max(flight.began, self._landed), time.perf_counter()
        seconds = self._landed - began
        progress = []
        for slot, row in flight.rows:
            if self.rows[slot] is not row:
                continue  # it has left since
            self._positions[slot] += 1
            row.token_seconds.append(seconds)
            row.timings["decode"] += seconds
            progress.append(self._accept(slot, drawn[slot]))
        return progress

    def _speculate(self, slot: int, draft: list[int], began: float) -> list[tuple[Request, str]]:
        """A step of a lone row that draws behind every token of its draft, and keeps them up to the first other one."""
        row, slots = self.rows[slot], self.slots
        with torch.inference_mode():
            sees = bool(row.prepared.layout.cross_length)
            drawn = self.stages.verify(slots, slot, draft, sees, Draw.of(row.params))
            right = next((i for i, token in enumerate(draft) if drawn[i] != token), len(draft))
            drawn = drawn[: right + 1]
            slots.token[slot] = max(drawn[-1], 0)
            slots.position[slot] += len(drawn)
        seconds = (time.perf_counter() - began) / len(drawn)
        progress = []
        for token in drawn:
            self._positions[slot] += 1
            row.token_seconds.append(seconds)
            row.timings["decode"] += seconds
            progress.append(self._accept(slot, token))
            if row.done:
                break
        return progress

    def _accept(self, slot: int, token: int) -> tuple[Request, str]:
        row = self.rows[slot]
        row.timings.setdefault("decode", 0.0)
        if token < 0:
            row.error = ValueError("the model's logits are not finite: its weights or their dtype are wrong")
            self._leave(slot)
            return row, ""
        piece = row.accept(token)
        if row.done:
            self._leave(slot)
        return row, piece

    def _leave(self, slot: int) -> None:
        row = self.rows[slot]
        if self._positions[slot] > len(row.prepared.input_ids):
            fed = self._positions[slot] - len(row.prepared.input_ids)
            answer = np.zeros((fed, 4), np.int64)
            answer[:, 0] = row.token_ids[:fed]
            answer[:, 1:3] = row.prepared.layout.after
            self._cached[slot] = np.concatenate([row.prepared.keys, answer])
        if row.error is not None:
            self._cached[slot] = self._cached[slot][:0]
        self.slots.rest(slot)
        self.rows[slot] = None
