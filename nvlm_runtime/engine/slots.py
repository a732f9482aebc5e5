"""Batch slots: the static buffers that requests decode in.

B batch slots, S cache positions of each, Sx image keys of each. A slot's place among the B is its row.
No tensor changes its address, shape or dtype while it lives, so a captured step may hold any of them. An inactive slot
writes its keys and values to the positions after `capacity`, which nobody reads.
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
class BatchSlots:
    """The state of B batch slots.

    Attributes:
        cache: keys and values of self-attention.
        cross: image keys and values; None where the model has no gated layers.
        token: int64 [B], drawn last and not yet in the cache.
        position: int64 [B], the cache position that the token goes to.
        drawn: int64 [B], what the last step drew; -1 where the logits were not finite.
        active: bool [B]. An inactive slot draws nothing.
        interval: int64 [B, 1, 2], the image keys [start, end) that each slot's next tokens see.
        sampling: how each slot draws.
        capacity: cache positions that a request may use.
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
        padding: int = 1,
    ) -> "BatchSlots":
        """Allocates B = `batch` inactive slots.

        Args:
            config: sizes of the model; in a group of several ranks, of this rank's share.
            batch: B.
            capacity: cache positions of each slot.
            cross_capacity: image keys of each slot.
            vocab_size: of the tokenizer.
            device: where the buffers lie.
            dtype: of the caches.
            padding: cache positions after `capacity`, at least 1.

        Raises:
            ValueError: The caches are larger than the free memory. Nothing has been allocated then.
        """
        check_memory(cache_bytes(config, batch, capacity + padding, cross_capacity, dtype), batch, device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        cross = None
        if config.cross is not None:
            heads = config.text.num_key_value_heads, config.text.head_dim
            shape = len(config.cross.layers), batch, cross_capacity, *heads
            cross = CrossKV(zeros(*shape, dtype=dtype), zeros(*shape, dtype=dtype))
        return BatchSlots(
            cache=KVCache.allocate(config.text, batch, capacity + padding, device, dtype),
            cross=cross,
            token=zeros(batch),
            position=torch.full((batch,), capacity, device=device),
            drawn=zeros(batch),
            active=zeros(batch, dtype=torch.bool),
            interval=zeros(batch, 1, 2),
            sampling=Sampling.empty(batch, vocab_size, device),
            capacity=capacity,
        )

    def __len__(self) -> int:
        return len(self.token)

    @property
    def cross_capacity(self) -> int:
        """Image keys of each slot; 0 where the model has no gated layers."""
        return self.cross.k.shape[2] if self.cross else 0

    def rows(self, start: int, end: int) -> "BatchSlots":
        """Views of the slots [start, end)."""
        return BatchSlots(
            cache=self.cache.rows(start, end),
            cross=self.cross.rows(start, end) if self.cross else None,
            token=self.token[start:end],
            position=self.position[start:end],
            drawn=self.drawn[start:end],
            active=self.active[start:end],
            interval=self.interval[start:end],
            sampling=self.sampling.rows(start, end),
            capacity=self.capacity,
        )

    def store(self, drawn: Tensor) -> None:
        """Takes in what a step drew, int64 [B]. A slot with -1 feeds token 0 until it is deactivated."""
        self.drawn.copy_(drawn)
        self.token.copy_(drawn.clamp(min=0))

    def write_cross(self, row: int, start: int, kv: CrossKV) -> None:
        """Copies an image's keys and values [gated layers, 1, S, Hkv, D] into a slot, from image key `start` on."""
        assert self.cross is not None
        end = start + kv.k.shape[2]
        self.cross.k[:, row, start:end] = kv.k[:, 0]
        self.cross.v[:, row, start:end] = kv.v[:, 0]

    def deactivate(self, row: int) -> None:
        """Stops a slot from drawing. Its cache keeps what it holds."""
        self.active[row] = False
        self.position[row] = self.capacity

    @contextmanager
    def all_inactive(self) -> Iterator[None]:
        """For trial runs: no slot draws inside, and afterwards every slot continues where it was."""
        state = [self.token, self.position, self.drawn, self.active, self.sampling.seen]
        kept = [tensor.clone() for tensor in state]
        self.active.zero_()
        self.position.fill_(self.capacity)
        try:
            yield
        finally:
            for tensor, value in zip(state, kept, strict=True):
                tensor.copy_(value)


def cache_bytes(config: NVLMConfig, batch: int, num_positions: int, cross_capacity: int, dtype: torch.dtype) -> int:
    """Bytes of the caches of batch slots, which are nearly all that the slots hold.

    Args:
        config: sizes of the model; in a group of several ranks, of this rank's share.
        batch: number of slots.
        num_positions: cache positions of each slot, the padding included.
        cross_capacity: image keys of each slot.
        dtype: of the caches.
    """
    text, num_gated = config.text, len(config.cross.layers) if config.cross else 0
    vectors = text.num_hidden_layers * num_positions + num_gated * cross_capacity
    return 2 * batch * vectors * text.num_key_value_heads * text.head_dim * dtype.itemsize


def check_memory(num_bytes: int, batch: int, device: torch.device) -> None:
    """Checks that the caches of `batch` slots fit into the free memory of a device.

    Raises:
        ValueError: They do not.
    """
    free = free_bytes(device)
    if num_bytes > free:
        raise ValueError(
            f"a batch of {batch} needs {num_bytes:,} bytes of caches, and {device} has {free:,} bytes free: "
            "ask for fewer rows, a shorter context or fewer images"
        )


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: the driver's figure and what torch's allocator holds and does not use, or
    Linux's estimate; sys.maxsize where there is none.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    estimate = Path("/proc/meminfo")
    if not estimate.exists():
        return sys.maxsize
    line = next(line for line in estimate.read_text().splitlines() if line.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])
