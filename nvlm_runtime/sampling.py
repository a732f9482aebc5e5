"""Logits to token ids: greedy, or temperature, top-k, top-p, min-p and a repetition penalty, seeded.

The order is the field's (transformers): penalty, temperature, top-k, top-p, min-p, one draw.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
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


class Sampler:
    """Draws for one request: its seed's generator, and which ids it has seen (for the penalty)."""

    def __init__(self, params: GenerationParams, vocab_size: int, prompt_ids: list[int], device: torch.device):
        self.params = params
        self.vocab_size = vocab_size  # of the tokenizer: the embedding's padding rows are never drawn
        self.generator = torch.Generator(device)
        if params.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(params.seed)
        self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self.seen[torch.tensor([i for i in prompt_ids if i < vocab_size], dtype=torch.long, device=device)] = True

    def draw(self, logits: Tensor) -> int:
        """logits: [V], V at least vocab_size."""
        params = self.params
        logits = logits[: self.vocab_size].float()
        if params.repetition_penalty != 1.0:
            penalised = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
            logits = torch.where(self.seen, penalised, logits)
        if params.temperature == 0:
            token = logits.argmax()
        else:
            probs = filtered_probs(logits, params)
            token = torch.multinomial(probs, 1, generator=self.generator)[0]
        self.seen[token] = True
        return int(token)


def filtered_probs(logits: Tensor, params: GenerationParams) -> Tensor:
    """Probabilities [V] after temperature and the filters; they sum to 1. logits: fp32 [V]."""
    logits = (logits - logits.max()) / params.temperature
    if 0 < params.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(params.top_k).values[-1], -math.inf)
    probs = logits.softmax(-1)
    if params.top_p < 1:
        ordered, order = probs.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the mass of likelier tokens: the first token always stays
        probs = probs.masked_fill(
            torch.zeros_like(before, dtype=torch.bool).scatter(0, order, before >= params.top_p), 0
        )
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0)
    return probs / probs.sum()
