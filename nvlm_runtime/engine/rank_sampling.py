"""Drawing from logits that lie on several ranks: each has those of its vocabulary rows, and all draw the same token.

The largest logit, a temperature, min-p and the penalty need a few numbers a row from each rank, never its logits: the
largest of each, then each one's mass, then how much of it lies below the draw. For top-k and top-p every rank gives its
CANDIDATES likeliest tokens. They are enough where the least likely token that is kept is likelier than what any rank
held back; the host looks whether it is so, and a batch with another row has its logits gathered and drawn from as one
process does; so has every batch where the host may not look, in a CUDA graph. The token is one process's, but where a
draw falls within fp32's rounding of the boundary between two.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_runtime.engine.sampling import Draw, Sampling, draw, uniform
from nvlm_runtime.parallel.group import Group

CANDIDATES = 512  # of a rank


def draw_over_ranks(
    logits: Tensor,
    sampling: Sampling,
    positions: Tensor,
    kind: Draw,
    group: Group,
    vocab_size: int,
    may_look: bool = True,
) -> Tensor:
    """As `sampling.draw`, of this rank's logits [B, V / size]; vocab_size: the embedding's rows, without padding.
    may_look: whether the host may wait for a value.

    Collectives: one gather; two and a sum more where a row has a temperature or a penalty, or, with top-k or top-p, a
    sum and a gather, and one more where the candidates were not enough.
    """
    if group.size == 1:
        return draw(logits, sampling, positions, kind)
    if kind == Draw.SORTED and not may_look:
        return draw(group.gather(logits)[:, :vocab_size], sampling, positions, kind)
    first, known = group.rank * logits.shape[1], sampling.seen.shape[1]
    width = max(0, min(logits.shape[1], known - first))  # of the tokenizer's ids
    local = logits[:, :width].float()
    finite = local.isfinite().all(-1)
    seen = sampling.seen[:, first : first + width]
    if kind >= Draw.PLAIN:
        penalty = sampling.penalty[:, None]
        local = torch.where(seen, torch.where(local > 0, local / penalty, local * penalty), local)
    if not width:
        local = logits.new_full((len(logits), 1), -torch.inf, dtype=torch.float32)
    best, at = local.max(-1)
    mine = torch.stack([best.double(), (at + first).double(), finite.double()], dim=-1)
    table = torch.stack(group.all_gather(mine))  # [ranks, B, 3]
    winner = table[..., 0].argmax(0, keepdim=True)
    tokens = table[..., 1].gather(0, winner)[0].long()
    finite = table[..., 2].amin(0) > 0
    if kind == Draw.SORTED:
        drawn = _draw_candidates(local, first, logits.shape[1], table[..., 0].amax(0), sampling, positions, group)
        if drawn is None:
            return draw(group.gather(logits)[:, :vocab_size], sampling, positions, kind)
    elif kind == Draw.PLAIN:
        drawn = _draw_mass(local, table[..., 0].amax(0), sampling, positions, group)
    if kind >= Draw.PLAIN:
        tokens = torch.where(sampling.temperature > 0, drawn.clamp(max=known - 1), tokens)
    sampling.seen.scatter_(1, tokens[:, None], True)
    return torch.where(finite, tokens, -1)


def _draw_mass(local: Tensor, most: Tensor, sampling: Sampling, positions: Tensor, group: Group) -> Tensor:
    """Ids [B] at which the ranks' joint mass passes the draw; most: [B], the largest logit of all ranks, fp64."""
    temperature = torch.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    weights = ((local - most[:, None].float()) / temperature).exp()
    weights = weights.masked_fill(weights < sampling.min_p[:, None], 0)  # the likeliest token's is 1
    mass = weights.cumsum(-1, dtype=torch.float64)
    totals = torch.stack(group.all_gather(mass[:, -1].contiguous()))  # [ranks, B]
    before = totals[: group.rank].sum(0)[:, None]
    below = before + mass <= (uniform(sampling.seed, positions) * totals.sum(0))[:, None]
    return group.all_reduce(below.sum(-1))


def _draw_candidates(
    local: Tensor, first: int, rows: int, most: Tensor, sampling: Sampling, positions: Tensor, group: Group
) -> Tensor | None:
    """Ids [B] drawn from what top-k, top-p and min-p leave of all ranks' candidates; None where a row needs more.

    local: [B, <= rows], of ids from `first` on, after the penalty. rows: of any rank's vocabulary. most: as in
    `_draw_mass`.
    """
    num = min(CANDIDATES, rows)
    temperature = torch.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    local = (local - most[:, None].float()) / temperature
    masses = group.all_reduce(local.exp().sum(-1, dtype=torch.float64))
    ordered, order = local.sort(dim=-1, descending=True, stable=True)
    held_back = ordered[:, num] if ordered.shape[1] > num else ordered.new_full((len(local),), -torch.inf)
    ordered = F.pad(ordered[:, :num], (0, max(0, num - ordered.shape[1])), value=-torch.inf)
    order = F.pad(order[:, :num], (0, num - min(num, order.shape[1])))
    mine = torch.cat([held_back[:, None].double(), ordered.double(), (order + first).double()], dim=-1)
    held_back, ordered, ids = torch.stack(group.all_gather(mine), dim=1).split([1, num, num], dim=-1)  # [B, ranks, *]
    ordered, order = ordered.flatten(1).sort(dim=-1, descending=True, stable=True)  # equal ones by their ids
    ids = ids.flatten(1).gather(-1, order).long()
    weights = ordered.exp()  # the likeliest token's is 1
    by_k = (sampling.top_k > 0)[:, None]
    least_of_k = ordered.gather(-1, (sampling.top_k[:, None] - 1).clamp(0, ordered.shape[1] - 1))
    weights = weights.masked_fill(by_k & (ordered < least_of_k), 0)
    total = torch.where(by_k, weights.sum(-1, keepdim=True), masses[:, None])
    before = weights.cumsum(-1) - weights
    cut = (before >= sampling.top_p[:, None] * total) & (sampling.top_p < 1)[:, None]
    weights = weights.masked_fill(cut | (weights < sampling.min_p[:, None]), 0)
    kept = weights > 0
    least = ordered.masked_fill(~kept, torch.inf).amin(-1)
    enough = (least > held_back.amax((1, 2))) & (sampling.top_k <= ordered.shape[1]) | (sampling.temperature == 0)
    if not bool(enough.all()):
        return None
    ids, order = ids.masked_fill(~kept, sampling.seen.shape[1]).sort(dim=-1)
    mass = weights.gather(-1, order).cumsum(-1)
    below = (mass <= uniform(sampling.seed, positions)[:, None] * mass[:, -1:]).sum(-1, keepdim=True)
    last = kept.sum(-1, keepdim=True) - 1
    return ids.gather(-1, below.minimum(last))[:, 0]
