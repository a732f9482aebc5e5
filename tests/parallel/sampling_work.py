"""What the ranks of a sampling test do."""

from typing import Any

import torch

from nvlm_runtime.engine.rank_sampling import CANDIDATES, draw_over_ranks
from nvlm_runtime.engine.sampling import Draw, GenerationParams, Sampling
from nvlm_runtime.parallel.group import Group

KNOWN, PADDED = 12 * CANDIDATES + 7, 12 * CANDIDATES + 24  # ids of the tokenizer, rows of the embedding
SMALL = 200
WAYS = {
    "top-k": {"top_k": 40},
    "top-k 1": {"top_k": 1},
    "top-k and top-p": {"top_k": 50, "top_p": 0.8},
    "top-p": {"top_p": 0.7},
    "all": {"top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3},
    "greedy": {"temperature": 0.0},
}


def rows(known: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits whose likeliest tokens are far above the rest, equal ones among them."""
    logits = 4 * torch.randn(len(WAYS), known, generator=torch.Generator().manual_seed(1))
    logits[:, 11] = logits[:, known - 5] = logits.amax(-1)
    return logits.bfloat16().to(kind)


def sampling_of(ways: list[dict[str, Any]], known: int) -> Sampling:
    sampling = Sampling.empty(len(ways), known, torch.device("cpu"))
    for row, way in enumerate(ways):
        sampling.set(row, GenerationParams(seed=row, **({"temperature": 0.9} | way)), [11, 3])
    return sampling


def shared_draws(group: Group, draws: int) -> dict[str, Any]:
    """Tokens of every way at `draws` positions, and how often the logits were gathered."""
    gathers: list[int] = []

    class Watched(Group):
        def gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
            gathers.append(x.shape[-1])
            return super().gather(x, dim)

    group, found = Watched(group.rank, group.size, group.handle), {}
    cases = {"large": (KNOWN, PADDED, 1.0), "small": (SMALL, SMALL + 4, 1.0), "flat": (KNOWN, PADDED, 0.001)}
    for name, (known, padded, scale) in cases.items():
        each = -(-padded // group.size)
        whole = torch.full((len(WAYS), each * group.size), 50.0)  # of rows that are never drawn
        whole[:, :known] = scale * rows(known)
        mine = whole[:, group.rank * each : (group.rank + 1) * each]
        tokens = []
        gathers.clear()
        for position in range(draws):
            sampling, positions = sampling_of(list(WAYS.values()), known), torch.full((len(WAYS),), position)
            tokens.append(draw_over_ranks(mine, sampling, positions, Draw.SORTED, group, padded))
        found[name] = torch.stack(tokens), len(gathers)
    broken = rows(KNOWN)
    broken[1, 5] = torch.nan
    each = -(-KNOWN // group.size)
    broken = torch.nn.functional.pad(broken, (0, each * group.size - KNOWN))
    mine = broken[:, group.rank * each : (group.rank + 1) * each]
    sampling = sampling_of(list(WAYS.values()), KNOWN)
    found["broken"] = draw_over_ranks(mine, sampling, torch.zeros(len(WAYS)).long(), Draw.SORTED, group, KNOWN)
    return found
