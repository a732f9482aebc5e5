"""The loss of learnt tokens, whose logits never exist all at once.

N learnt tokens, C hidden_size, V vocabulary. Through torch's `linear_cross_entropy` where this torch has it (2.13 on):
chunks of rows, [chunk, V] logits at a time, gradients made on the way; plain logits otherwise. Under tensor parallelism
a rank has the logits of its vocabulary rows alone, a chunk at a time, and three numbers a token cross the wire: the
largest logit, the sum of exponentials, the label's logit (Megatron-LM's vocabulary-parallel cross-entropy).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nvlm_runtime.model.decoder import Decoder
from nvlm_runtime.training.documents import IGNORE

ROWS = 512  # of a chunk: 300 MB of fp32 logits at 150,000 tokens


def token_loss(decoder: Decoder, hidden: Tensor, labels: Tensor, rows: int | None = ROWS) -> Tensor:
    """Sums the cross-entropies of the tokens that are learnt.

    Args:
        decoder: computes logits.
        hidden: [B, T, C].
        labels: int64 [B, T], IGNORE where nothing is learnt.
        rows: tokens whose logits are in memory at a time; None is all.

    Returns:
        The sum, an fp32 scalar; 0 where nothing is learnt.
    """
    learnt = labels != IGNORE
    hidden, labels = hidden[learnt], labels[learnt]
    if not len(labels):
        return hidden.sum().float()
    if decoder.group.size > 1:
        chunks = zip(hidden.split(rows or len(labels)), labels.split(rows or len(labels)), strict=True)
        return torch.stack([checkpoint(_shared_loss, decoder, *chunk, use_reentrant=False) for chunk in chunks]).sum()
    if rows is None or not hasattr(F, "linear_cross_entropy"):
        return F.cross_entropy(decoder.logits(hidden).float(), labels, reduction="sum")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    weight = decoder.lm_head.weight
    return F.linear_cross_entropy(hidden.to(weight.dtype), weight, labels, reduction="sum", options=options).float()


def _shared_loss(decoder: Decoder, hidden: Tensor, labels: Tensor) -> Tensor:
    """The sum over tokens [N], from every rank's vocabulary rows."""
    group, first = decoder.group, decoder.config.first_id
    num = min(decoder.config.vocab_size, decoder.config.whole.vocab_size - first)  # the last rank's end is padding
    logits = decoder.local_logits(hidden).float()[:, :num]
    largest = group.largest(logits.detach().amax(-1))
    total = group.reduce((logits - largest[:, None]).exp().sum(-1))
    here = (labels >= first) & (labels < first + num)
    wanted = logits.gather(-1, torch.where(here, labels - first, 0)[:, None])[:, 0]
    return (total.log() + largest - group.reduce(torch.where(here, wanted, 0))).sum()
