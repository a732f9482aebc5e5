"""Drawing from logits that lie on several ranks: each has those of its vocabulary rows, and all draw the same token.

The largest logit, a temperature, min-p and the penalty need a few numbers a row from each rank, never its logits: the
largest of each, then each one's mass, then how much of it lies below the draw. top-k and top-p sort the whole
vocabulary; for a batch that asks for them the logits are gathered and drawn from as one process does.
The token is one process's, but where a draw falls within fp32's rounding of the boundary between two.
"""

import torch
from torch import Tensor

from nvlm_runtime.parallel import Group
from nvlm_runtime.sampling import Draw, Sampling, draw, uniform


def draw_over_ranks(
    logits: Tensor, sampling: Sampling, positions: Tensor, kind: Draw, group: Group, vocab_size: int
) -> Tensor:
    """As `sampling.draw`, of this rank's logits [B, V / size]; vocab_size: the embedding's rows, without padding.

    Collectives: one gather; two and a sum more where a row has a temperature or a penalty.
    """
    if group.size == 1:
        return draw(logits, sampling, positions, kind)
    if kind == Draw.SORTED:
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
    if kind >= Draw.PLAIN:
        drawn = _draw_mass(local, table[..., 0].amax(0), sampling, positions, group)
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
