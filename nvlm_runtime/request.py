"""One request on its way to tokens: what `prepare` makes of prompt and pictures, and what decoding makes of that."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from nvlm_runtime.image import TilePlan
from nvlm_runtime.layout import Layout
from nvlm_runtime.sampling import Sampler
from nvlm_runtime.tokenizer import TextStream


@dataclass(frozen=True)
class Prepared:
    """Token ids, where the image tokens go, and the tiles of every image: fp32 [N, 3, S, S], one tensor an image."""

    input_ids: tuple[int, ...]
    layout: Layout
    plans: tuple[TilePlan, ...]
    pixel_values: tuple[Tensor, ...]
    timings: dict[str, float]


@dataclass
class Output:
    """An answer. token_ids: as drawn, without the token that ended it.

    finish_reason: "stop" (an end token or a stop string), "length", or None while the answer goes on.
    timings: seconds a stage (open, tile, encode, prefill, decode, and their total).
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    timings: dict[str, float]
    num_prompt_tokens: int
    plans: tuple[TilePlan, ...]


@dataclass
class Row:
    """A request while it decodes. `limit`: the most tokens it may draw."""

    prepared: Prepared
    sampler: Sampler
    stream: TextStream
    eos_id: int | None  # None: an end token is a token like any other
    stop: Sequence[str]
    limit: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    num_shown: int = 0

    def accept(self, token: int) -> str:
        """Takes a drawn token; returns the text that is now certain: no half character, no part of a stop string."""
        if token == self.eos_id:
            return self._finish("stop")
        self.token_ids.append(token)
        since = max(0, len(self.text) - self._longest_stop)
        self.text += self.stream.push(token)
        ends = [at for at in (self.text.find(text, since) for text in self.stop) if at >= 0]
        if ends:
            self.text = self.text[: min(ends)]
            return self._finish("stop", flush=False)
        if len(self.token_ids) == self.limit:
            return self._finish("length")
        return self._show(len(self.text) - self._held())

    @property
    def _longest_stop(self) -> int:
        return max((len(text) for text in self.stop), default=1)

    def _held(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        sizes = range(min(self._longest_stop - 1, len(self.text)), 0, -1)
        return next((n for n in sizes if any(text.startswith(self.text[-n:]) for text in self.stop)), 0)

    def _finish(self, reason: str, flush: bool = True) -> str:
        self.finish_reason = reason
        if flush:
            self.text += self.stream.flush()
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        piece = self.text[self.num_shown : end]
        self.num_shown = max(self.num_shown, end)
        return piece


def check_ids(input_ids: Sequence[int], num_rows: int) -> tuple[int, ...]:
    """Token ids as plain ints. ValueError where one is no whole number or no row of the embedding, or there is none."""
    try:
        if any(isinstance(i, bool) for i in input_ids):
            raise TypeError("a bool")
        ids = tuple(operator.index(i) for i in input_ids)
    except TypeError as error:
        raise ValueError(f"input_ids must be one list of whole numbers, got {input_ids!r:.60}") from error
    if not ids:
        raise ValueError("input_ids is empty: expected at least one token")
    if wrong := [i for i in ids if not 0 <= i < num_rows]:
        raise ValueError(f"input_ids must be from 0 to {num_rows - 1} (the embedding's rows), got {wrong[0]}")
    return ids
