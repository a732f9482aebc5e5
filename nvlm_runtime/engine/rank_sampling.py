"""Drawing from logits that lie on several ranks: each has those of its vocabulary rows, and all draw the same token.

A largest logit, a temperature, min-p and the penalty need a few numbers per row from each rank, never its logits: the
largest of each, then the mass of each, then how much of it lies below the draw. For top-k and top-p every rank gives
its CANDIDATES likeliest tokens. They are enough if the least likely token that is kept is likelier than every token
that a rank held back. The host checks that; a batch with a row for which it is not so has its logits gathered and drawn
from as one process draws. So has every batch where the host may not wait for the device, in a CUDA graph. The token is
the one that a single process draws, unless a draw falls within fp32's rounding of the boundary between two tokens.
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
    allow_host_sync: bool = True,
) -> Tensor:
    """As `sampling.draw`, of this rank's logits.

    Collectives: one gather; with a temperature or a penalty two gathers and a sum more; with top-k or top-p a sum and a
    gather more, and one more gather where the candidates were not enough.

    Args:
        logits: [B, V / size], of this rank's vocabulary rows.
        sampling: how each row draws, the same on every rank.
        positions: int64 [B], where the tokens will stand.
        kind: what the draw has to compute.
        group: the ranks.
        vocab_size: rows of the embedding, without padding.
        allow_host_sync: whether the host may wait for a value of the device.

    Returns:
        int64 [B], the same on every rank; -1 where a row's logits are not finite.
    """
    if group.size == 1:
        return draw(logits, sampling, positions, kind)
    if kind == Draw.SORTED and not allow_host_sync:
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

    local: [B, <= rows], of ids from `first` on, after the penalty. rows: vocabulary rows of any rank. most: as in
    `_draw_mass`.
    """
    temperature = torch.where(sampling.temperature > 0, sampling.temperature, 1.0)[:, None]
    local = (local - most[:, None].float()) / temperature
    masses = group.all_reduce(local.exp().sum(-1, dtype=torch.float64))
    ordered, ids, held_back = _gather_candidates(local, first, rows, group)
    weights = _filter_candidates(ordered, masses, sampling)
    least = ordered.masked_fill(~(weights > 0), torch.inf).amin(-1)
    enough = (least > held_back) & (sampling.top_k <= ordered.shape[1]) | (sampling.temperature == 0)
    if not bool(enough.all()):
        return None
    return _draw_by_id(weights, ids, sampling, positions)


def _gather_candidates(local: Tensor, first: int, rows: int, group: Group) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest tokens of every rank.

    Returns:
        Logits fp64 [B, ranks * CANDIDATES] from the largest on, equal ones by their ids; their ids; and [B], the
        largest logit that no rank gave.
    """
    num = min(CANDIDATES, rows)
    ordered, order = local.sort(dim=-1, descending=True, stable=True)
    held_back = ordered[:, num] if ordered.shape[1] > num else ordered.new_full((len(local),), -torch.inf)
    ordered = F.pad(ordered[:, :num], (0, max(0, num - ordered.shape[1])), value=-torch.inf)
    order = F.pad(order[:, :num], (0, num - min(num, order.shape[1])))
    mine = torch.cat([held_back[:, None].double(), ordered.double(), (order + first).double()], dim=-1)
    # each [B, ranks, *]
    all_held_back, all_ordered, all_ids = torch.stack(group.all_gather(mine), dim=1).split([1, num, num], dim=-1)
    ordered, order = all_ordered.flatten(1).sort(dim=-1, descending=True, stable=True)
    return ordered, all_ids.flatten(1).gather(-1, order).long(), all_held_back.amax((1, 2))


def _filter_candidates(ordered: Tensor, masses: Tensor, sampling: Sampling) -> Tensor:
    """Weights fp64 of candidates after top-k, top-p and min-p, 0 where they are cut; that of the likeliest token is 1.

    ordered: logits [B, candidates], from the largest on. masses: [B], the sum of all tokens' weights.
    """
    weights = ordered.exp()
    by_k = (sampling.top_k > 0)[:, None]
    least_of_k = ordered.gather(-1, (sampling.top_k[:, None] - 1).clamp(0, ordered.shape[1] - 1))
    weights = weights.masked_fill(by_k & (ordered < least_of_k), 0)
    total = torch.where(by_k, weights.sum(-1, keepdim=True), masses[:, None])
    before = weights.cumsum(-1) - weights
    cut = (before >= sampling.top_p[:, None] * total) & (sampling.top_p < 1)[:, None]
    return weights.masked_fill(cut | (weights < sampling.min_p[:, None]), 0)


def _draw_by_id(weights: Tensor, ids: Tensor, sampling: Sampling, positions: Tensor) -> Tensor:
    """Ids [B] drawn by weights [B, candidates], taken in the order of the ids as one process takes them."""
    kept = weights > 0
    ids, order = ids.masked_fill(~kept, sampling.seen.shape[1]).sort(dim=-1)
    mass = weights.gather(-1, order).cumsum(-1)
    below = (mass <= uniform(sampling.seed, positions)[:, None] * mass[:, -1:]).sum(-1, keepdim=True)
    last = kept.sum(-1, keepdim=True) - 1
    return ids.gather(-1, below.minimum(last))[:, 0]
