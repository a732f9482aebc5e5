"""Logits to token ids: greedy, or temperature, top-k, top-p, min-p and a repetition penalty, seeded.

The order is the field's (transformers): penalty, temperature, top-k, top-p, min-p, one draw. Everything is tensor
arithmetic on fixed shapes, so that a captured decoding step can hold it. A draw depends on its row's seed and the
position the token will have, on nothing else: not on its batch, nor on how the prompt was cut into chunks.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class GenerationParams:
    """How to answer. Greedy at temperature 0; top_k 0, top_p 1 and min_p 0 are off.

    stop: texts that end the answer and are not part of it. ignore_eos: an end token is a token like any other.
    Raises ValueError for a value of another type or outside its range.
    """

    max_new_tokens: int = 512
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        self._number("max_new_tokens", Integral, 1, math.inf)
        self._number("temperature", Real, 0, math.inf)
        self._number("top_k", Integral, 0, math.inf)
        self._number("top_p", Real, 0, 1, above=True)
        self._number("min_p", Real, 0, 1)
        self._number("repetition_penalty", Real, 0, math.inf, above=True)
        if self.seed is not None:
            self._number("seed", Integral, -(2**63), 2**64 - 1)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos must be True or False, got {self.ignore_eos!r}")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if not isinstance(self.stop, Sequence) or not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be one or more non-empty strings, got {self.stop!r}")

    def _number(self, name: str, kind: Any, low: float, high: float, above: bool = False) -> None:
        value = getattr(self, name)
        fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
        if not fits or not low <= value <= high or (above and value == low):
            what = "a whole number" if kind is Integral else "a number"
            raise ValueError(f"{name} must be {what} {'above' if above else 'from'} {low} to {high}, got {value!r}")


class Draw(IntEnum):
    """What a step has to compute for its rows: each kind does all that the ones before it do."""

    GREEDY = 0  # the largest logit
    PLAIN = 1  # penalty, temperature, min-p
    SORTED = 2  # top-k and top-p too, which sort the vocabulary

    @staticmethod
    def of(params: GenerationParams) -> "Draw":
        if params.temperature and (params.top_k or params.top_p < 1):
            return Draw.SORTED
        return Draw.PLAIN if params.temperature or params.repetition_penalty != 1 else Draw.GREEDY


@dataclass(frozen=True)
class Sampling:
    """How each row draws: static tensors [B] and, of the tokenizer's ids, which a row has seen (for the penalty)."""

    temperature: Tensor  # fp32
    top_k: Tensor  # int64, 0 is off
    top_p: Tensor  # fp32
    min_p: Tensor  # fp32
    penalty: Tensor  # fp32
    seed: Tensor  # int64
    seen: Tensor  # bool [B, V]

    @staticmethod
    def empty(batch: int, vocab_size: int, device: torch.device) -> "Sampling":
        """Greedy rows. vocab_size: of the tokenizer; the embedding's padding rows are never drawn."""

        def full(value: float, dtype: torch.dtype) -> Tensor:
            return torch.full((batch,), value, dtype=dtype, device=device)

        return Sampling(
            temperature=full(0, torch.float32),
            top_k=full(0, torch.int64),
            top_p=full(1, torch.float32),
            min_p=full(0, torch.float32),
            penalty=full(1, torch.float32),
            seed=full(0, torch.int64),
            seen=torch.zeros(batch, vocab_size, dtype=torch.bool, device=device),
        )

    def rows(self, start: int, end: int) -> "Sampling":
        """Views of the rows from `start` to `end`."""
        return Sampling(*(tensor[start:end] for tensor in vars(self).values()))

    def repeated(self, row: int, count: int) -> "Sampling":
        """Copies of one row: `count` rows that draw as it does, and mark what they have seen apart from it."""
        return Sampling(
            *(tensor[row : row + 1].repeat(count, *[1] * (tensor.dim() - 1)) for tensor in vars(self).values())
        )

    def set(self, row: int, params: GenerationParams, prompt_ids: Sequence[int]) -> None:
        """A row's parameters, and the prompt's ids as seen. Without a seed it gets one from the system."""
        seed = int.from_bytes(os.urandom(8)) if params.seed is None else int(params.seed)
        self.temperature[row] = max(float(params.temperature), 1e-30) if params.temperature else 0.0
        self.top_k[row] = min(int(params.top_k), self.seen.shape[1])
        self.top_p[row] = float(params.top_p)
        self.min_p[row] = float(params.min_p)
        self.penalty[row] = float(params.repetition_penalty)
        self.seed[row] = (seed + 2**63) % 2**64 - 2**63
        ids = [i for i in prompt_ids if i < self.seen.shape[1]]
        self.seen[row] = False
        self.seen[row, torch.tensor(ids, dtype=torch.int64, device=self.seen.device)] = True


def draw(logits: Tensor, sampling: Sampling, positions: Tensor, kind: Draw) -> Tensor:
    """Token ids int64 [B] of logits [B, V'], V' at least the vocabulary; positions: int64 [B], where they will stand.

    A row whose logits are not finite draws -1. What was drawn counts as seen.
    """
    logits = logits[:, : sampling.seen.shape[1]].float()
    finite = logits.isfinite().all(-1)
    if kind >= Draw.PLAIN:
        penalty = sampling.penalty[:, None]
        logits = torch.where(sampling.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    tokens = logits.argmax(-1)
    if kind >= Draw.PLAIN:
        probs = filtered_probs(logits, sampling, kind)
        mass = probs.cumsum(-1, dtype=torch.float64)
        below = mass <= uniform(sampling.seed, positions)[:, None] * mass[:, -1:]
        drawn = below.sum(-1).clamp(max=logits.shape[-1] - 1)
        tokens = torch.where(sampling.temperature > 0, drawn, tokens)
    sampling.seen.scatter_(1, tokens[:, None], True)
    return torch.where(finite, tokens, -1)


def filtered_probs(logits: Tensor, sampling: Sampling, kind: Draw) -> Tensor:
    """Probabilities fp32 [B, V] after temperature and the filters, not brought back to a sum of 1. logits: [B, V].

    Of rows with temperature 0 they mean nothing.
    """
    temperature = torch.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    if kind == Draw.SORTED:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        k = torch.where(sampling.top_k > 0, sampling.top_k, logits.shape[-1])[:, None]
        logits = logits.masked_fill(logits < ordered.gather(-1, k - 1), -math.inf)
    probs = logits.softmax(-1)
    if kind == Draw.SORTED:
        ordered = probs.gather(-1, order)
        before = ordered.cumsum(-1) - ordered  # the mass of likelier tokens: the first token always stays
        cut = (before >= sampling.top_p[:, None]) & (sampling.top_p < 1)[:, None]
        probs = probs.masked_fill(torch.zeros_like(cut).scatter(-1, order, cut), 0)
    return probs.masked_fill(probs < sampling.min_p[:, None] * probs.amax(-1, keepdim=True), 0)


def uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """fp64 in [0, 1) of int64 seeds and counters: 53 bits of splitmix64 (Steele, Lea and Flood 2014), twice."""
    bits = _mix(_mix(seed) + counter)
    return (bits >> 11 & (1 << 53) - 1).double() * 2.0**-53


def _mix(x: Tensor) -> Tensor:
    """splitmix64's step and finalizer on int64, whose product wraps around as the original's does."""
    x = x - 0x61C8864680B583EB
    x = (x ^ _shift(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _shift(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: torch's repeats the sign."""
    return x >> bits & (1 << 64 - bits) - 1
