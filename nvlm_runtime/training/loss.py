"""The loss of learnt tokens, whose logits never exist all at once.

N learnt tokens, C hidden_size, V vocabulary. Through torch's `linear_cross_entropy` where this torch has it (2.13 on):
chunks of rows, [chunk, V] logits at a time, gradients made on the way; plain logits otherwise, and under tensor
parallelism, which gathers them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_runtime.decoder import Decoder
from nvlm_runtime.training.documents import IGNORE

ROWS = 512  # of a chunk: 300 MB of fp32 logits at 150,000 tokens


def token_loss(decoder: Decoder, hidden: Tensor, labels: Tensor, rows: int | None = ROWS) -> Tensor:
    """The sum of the learnt tokens' cross-entropies, fp32 scalar; 0 where nothing is learnt.

    hidden: [B, T, C]. labels: int64 [B, T], IGNORE where nothing is learnt. rows: of a chunk, None for plain logits.
    """
    learnt = labels != IGNORE
    hidden, labels = hidden[learnt], labels[learnt]
    if not len(labels):
        return hidden.sum().float()
    if rows is None or not hasattr(F, "linear_cross_entropy") or decoder.group.size > 1:
        return F.cross_entropy(decoder.logits(hidden).float(), labels, reduction="sum")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=rows)
    weight = decoder.lm_head.weight
    return F.linear_cross_entropy(hidden.to(weight.dtype), weight, labels, reduction="sum", options=options).float()
