"""What decoding remembers: self-attention keys and values, written in place, and the image's, written once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvlm_runtime.config import TextConfig


class KVCache:
    """Preallocated self-attention keys and values. k, v: [layers, B, S, Hkv, D]; slot s of a row holds position s."""

    def __init__(self, config: TextConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype):
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)

    @property
    def capacity(self) -> int:
        return self.k.shape[2]


@dataclass(frozen=True)
class CrossKV:
    """Image keys and values of every gated layer, computed once: k, v [layers, B, S, Hkv, D]."""

    k: Tensor
    v: Tensor
