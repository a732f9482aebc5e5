"""What decoding remembers: the keys and values of self-attention, written in place, and the image's, written once.

B requests, S positions (or image keys), Hkv kv heads, D head_dim.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvlm_runtime.config import TextConfig


@dataclass(frozen=True)
class KVCache:
    """Preallocated keys and values of self-attention.

    Attributes:
        k: [layers, B, S, Hkv, D]; index p of S holds position p.
        v: as k.
    """

    k: Tensor
    v: Tensor

    @staticmethod
    def allocate(config: TextConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> "KVCache":
        """Zeros for `batch` requests of `capacity` positions."""
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        return KVCache(*(torch.zeros(shape, device=device, dtype=dtype) for _ in range(2)))

    @property
    def capacity(self) -> int:
        """S."""
        return self.k.shape[2]

    def rows(self, start: int, end: int) -> "KVCache":
        """Views of the requests [start, end)."""
        return KVCache(self.k[:, start:end], self.v[:, start:end])

    def shared(self, row: int, count: int) -> "KVCache":
        """One request's cache as that of `count` rows, all of the same memory."""
        return KVCache(*(side[:, row : row + 1].expand(-1, count, -1, -1, -1) for side in (self.k, self.v)))


@dataclass(frozen=True)
class CrossKV:
    """Image keys and values of every gated layer, computed once for an image.

    Attributes:
        k: [gated layers, B, S, Hkv, D].
        v: as k.
    """

    k: Tensor
    v: Tensor

    def rows(self, start: int, end: int) -> "CrossKV":
        """Views of the requests [start, end)."""
        return CrossKV(self.k[:, start:end], self.v[:, start:end])

    def shared(self, row: int, count: int) -> "CrossKV":
        """One request's keys and values as those of `count` rows, all of the same memory."""
        return CrossKV(*(side[:, row : row + 1].expand(-1, count, -1, -1, -1) for side in (self.k, self.v)))
