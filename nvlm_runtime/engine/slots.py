"""The static buffers that rows decode in: caches, the last token of each row, where it goes, how the next is drawn.

B rows, S slots of self-attention, Sx image keys. Nothing here changes its address, shape or dtype while it lives, so a
captured step may hold any of it. A row at rest writes to a spare slot behind `capacity`, which nobody reads.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.engine.sampling import Sampling
from nvlm_runtime.model.cache import CrossKV, KVCache


@dataclass(frozen=True)
class Slots:
    """token: [B] drawn but not yet in the cache. position: [B] the slot it goes to. drawn: [B] what the last step drew,
    -1 where the logits were not finite. active: bool [B], False at rest.
    interval: [B, 1, 2] what the rows see of the image keys. cross: None where the model has no gated layers.
    """

    cache: KVCache
    cross: CrossKV | None
    token: Tensor
    position: Tensor
    drawn: Tensor
    active: Tensor
    interval: Tensor
    sampling: Sampling
    capacity: int

    @staticmethod
    @torch.inference_mode(False)
    def allocate(
        config: NVLMConfig,
        batch: int,
        capacity: int,
        cross_capacity: int,
        vocab_size: int,
        device: torch.device,
        dtype: torch.dtype,
        spare: int = 1,
    ) -> "Slots":
        """spare: slots behind `capacity`, at least 1.

        Raises ValueError, before anything is allocated, where the caches are larger than the memory that is free.
        """
        check_memory(cache_bytes(config, batch, capacity + spare, cross_capacity, dtype), batch, device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        cross = None
        if config.cross is not None:
            shape = cross_shape(config, batch, cross_capacity)
            cross = CrossKV(zeros(*shape, dtype=dtype), zeros(*shape, dtype=dtype))
        return Slots(
            cache=KVCache.allocate(config.text, batch, capacity + spare, device, dtype),
            cross=cross,
            token=zeros(batch),
            position=torch.full((batch,), capacity, device=device),
            drawn=zeros(batch),
            active=zeros(batch, dtype=torch.bool),
            interval=zeros(batch, 1, 2),
            sampling=Sampling.empty(batch, vocab_size, device),
            capacity=capacity,
        )

    @property
    def num(self) -> int:
        return len(self.token)

    @property
    def cross_capacity(self) -> int:
        return self.cross.k.shape[2] if self.cross else 0

    def rest(self, row: int) -> None:
        """A row draws no more; what its cache holds stays."""
        self.active[row] = False
        self.position[row] = self.capacity

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """For trial runs: no row draws, and what the rows are doing is put back afterwards."""
        state = [self.token, self.position, self.drawn, self.active, self.sampling.seen]
        kept = [tensor.clone() for tensor in state]
        self.active.zero_()
        self.position.fill_(self.capacity)
        try:
            yield
        finally:
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)

    def rows(self, start: int, end: int) -> "Slots":
        """Views of the rows from `start` to `end`."""
        return Slots(
            cache=self.cache.rows(start, end),
            cross=CrossKV(self.cross.k[:, start:end], self.cross.v[:, start:end]) if self.cross else None,
            token=self.token[start:end],
            position=self.position[start:end],
            drawn=self.drawn[start:end],
            active=self.active[start:end],
            interval=self.interval[start:end],
            sampling=self.sampling.rows(start, end),
            capacity=self.capacity,
        )


def cross_shape(config: NVLMConfig, batch: int, length: int) -> tuple[int, ...]:
    return len(config.cross.layers), batch, length, config.text.num_key_value_heads, config.text.head_dim


def cache_bytes(config: NVLMConfig, batch: int, num_slots: int, cross_capacity: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of `Slots`, which are nearly all it holds."""
    text = config.text
    slots = text.num_hidden_layers * num_slots + (len(config.cross.layers) if config.cross else 0) * cross_capacity
    return 2 * batch * slots * text.num_key_value_heads * text.head_dim * dtype.itemsize


def check_memory(num_bytes: int, batch: int, device: torch.device) -> None:
    free = free_bytes(device)
    if num_bytes > free:
        raise ValueError(
            f"a batch of {batch} needs {num_bytes:,} bytes of caches, and {device} has {free:,} bytes free: "
            "ask for fewer rows, a shorter context or fewer images"
        )


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: the driver's figure, or Linux's estimate; sys.maxsize where neither is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    estimate = Path("/proc/meminfo")
    if not estimate.exists():
        return sys.maxsize
    line = next(line for line in estimate.read_text().splitlines() if line.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])
