"""Logits to token ids: greedy, or temperature, top-k, top-p, min-p and a repetition penalty, seeded.

The order is the field's (transformers): penalty, temperature, top-k, top-p, min-p, one draw.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off. Raises ValueError outside its ranges."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_k", 0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, math.inf),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
                raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")
            if not math.isfinite(value) or (value == 0 and name in ("top_p", "repetition_penalty")):
                raise ValueError(f"{name} must be finite and above 0, got {value!r}")


class Sampler:
    """Draws for one request: its seed's generator, and which ids it has seen (for the penalty)."""

    def __init__(self, params: SamplingParams, vocab_size: int, prompt_ids: list[int], device: torch.device):
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


def filtered_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities [V] after temperature and the filters; they sum to 1. logits: fp32 [V]."""
    logits = logits / params.temperature
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
