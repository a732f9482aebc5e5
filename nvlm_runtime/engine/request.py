"""One request on its way to tokens: what `prepare` makes of prompt and images, and what decoding makes of that."""

import operator
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from torch import Tensor

from nvlm_runtime.engine.images import ImageInput
from nvlm_runtime.engine.ngram import NgramIndex
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.engine.step_bytes import StepBytes
from nvlm_runtime.inputs.image import TilePlan
from nvlm_runtime.inputs.layout import Layout
from nvlm_runtime.inputs.tokenizer import Detokenizer

PHASES = ("tile", "encode", "project", "prefill")  # what a row times itself, before it decodes


@dataclass(frozen=True)
class PreparedPrompt:
    """Token ids, where the image tokens go, and every image. timings: seconds a stage."""

    input_ids: tuple[int, ...]
    layout: Layout
    images: tuple[ImageInput, ...]
    timings: dict[str, float]

    @property
    def plans(self) -> tuple[TilePlan, ...]:
        return tuple(image.plan for image in self.images)

    @property
    def pixel_values(self) -> tuple[Tensor, ...]:
        return tuple(image.pixel_values for image in self.images)

    @cached_property
    def keys(self) -> np.ndarray:
        """int64 [T, 4]: what makes a cached position what it is, given the ones before it.

        The token, the interval it sees and, where an image begins, which. Two prompts with the same first n rows have
        the same first n slots of the cache; the same text with another image has not.
        """
        keys = np.zeros((len(self.input_ids), 4), np.int64)
        keys[:, 0] = self.input_ids
        keys[:, 1:3] = self.layout.intervals.numpy()
        for image, picture in zip(self.layout.images, self.images, strict=True):
            keys[image.span[0], 3] = int(picture.key[:16], 16) - 2**63
        return keys


@dataclass
class Output:
    """An answer. token_ids: as drawn, without the token that ended it.

    finish_reason: "stop" (an end token or a stop string), "length", "cancelled", or None while the answer goes on.
    timings: seconds a stage (queue, open, tile, encode, project, prefill, decode, and their total); tiles are cut in a
    thread, so "tile" is what had to be waited for. Tokens decoded in a batch take the batch's time.
    first_token: seconds from the first stage to the first token. token_seconds: of every later one; tokens that one
    step gave share its time.
    num_reused: prompt tokens whose keys and values were still in the cache.
    step_bytes: what a decoding step of this answer alone has to read, on the average: weights, keys and values.
    """

    text: str
    token_ids: list[int]
    finish_reason: str | None
    timings: dict[str, float]
    num_prompt_tokens: int
    plans: tuple[TilePlan, ...]
    first_token: float | None
    token_seconds: list[float]
    num_reused: int
    step_bytes: int

    def percentile(self, percent: int) -> float | None:
        """Seconds a token, of the tokens after the first; percent from 1 to 99. None with fewer than two of them."""
        if len(self.token_seconds) < 2:
            return None
        return statistics.quantiles(self.token_seconds, n=100, method="inclusive")[percent - 1]

    def read_rate(self) -> float | None:
        """Bytes a second that decoding read, by the median token; None before a second token."""
        return self.step_bytes / statistics.median(self.token_seconds) if self.token_seconds else None


@dataclass
class Request:
    """A request while it decodes. limit: the most tokens it may draw. reads: of the model's steps."""

    prepared: PreparedPrompt
    params: GenerationParams
    stream: Detokenizer
    eos_id: int | None  # None: an end token is a token like any other
    limit: int
    reads: StepBytes
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    error: Exception | None = None
    num_shown: int = 0
    num_reused: int = 0
    timings: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    token_seconds: list[float] = field(default_factory=list)
    _ngrams: NgramIndex | None = None

    @property
    def num_positions(self) -> int:
        """Of the cache: the last token drawn is never fed back."""
        return len(self.prepared.input_ids) + self.limit - 1

    @property
    def done(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def draft(self, count: int) -> list[int]:
        """A guess at the next tokens, at most `count` and one less than may still be drawn; [] where there is none.

        A row with a repetition penalty never guesses: how it draws a token depends on the ones before it.
        """
        count = min(count, self.limit - len(self.token_ids) - 1)
        if count < 1 or self.params.repetition_penalty != 1:
            return []
        if self._ngrams is None:
            self._ngrams = NgramIndex([*self.prepared.input_ids, *self.token_ids])
        return self._ngrams.draft(count)

    def accept(self, token: int) -> str:
        """Takes a drawn token; returns the text that is now certain: no half character, no part of a stop string."""
        if token == self.eos_id:
            return self.finish("stop")
        self.token_ids.append(token)
        if self._ngrams is not None:
            self._ngrams.add(token)
        since = max(0, len(self.text) - self._longest_stop)
        self.text += self.stream.push(token)
        ends = [at for at in (self.text.find(text, since) for text in self.params.stop) if at >= 0]
        if ends:
            self.text = self.text[: min(ends)]
            return self.finish("stop", flush=False)
        if len(self.token_ids) == self.limit:
            return self.finish("length")
        return self._show(len(self.text) - self._held())

    def finish(self, reason: str, flush: bool = True) -> str:
        """Ends the answer; returns the text that was held back until now."""
        self.finish_reason = reason
        if flush:
            self.text += self.stream.flush()
        return self._show(len(self.text))

    @property
    def output(self) -> Output:
        """The answer so far, final once the row is done."""
        timings = {**self.prepared.timings, **self.timings}
        before = [seconds for stage, seconds in timings.items() if stage != "decode"]
        timings["total"] = sum(timings.values())
        num_prompt, keys = len(self.prepared.input_ids), self.prepared.layout.cross_length
        return Output(
            text=self.text[: self.num_shown],
            token_ids=list(self.token_ids),
            finish_reason=self.finish_reason,
            timings=timings,
            num_prompt_tokens=num_prompt,
            plans=self.prepared.plans,
            first_token=sum(before) if "decode" in timings else None,
            token_seconds=list(self.token_seconds),
            num_reused=self.num_reused,
            step_bytes=self.reads.total(num_prompt + len(self.token_ids) // 2, keys),
        )

    @property
    def _longest_stop(self) -> int:
        return max((len(text) for text in self.params.stop), default=1)

    def _held(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        sizes = range(min(self._longest_stop - 1, len(self.text)), 0, -1)
        return next((n for n in sizes if any(text.startswith(self.text[-n:]) for text in self.params.stop)), 0)

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
