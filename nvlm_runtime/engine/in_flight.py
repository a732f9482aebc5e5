"""A decoding step that was launched: its tokens come to the host by themselves, and are waited for only when needed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvlm_runtime.engine.request import Request


@dataclass(frozen=True)
class Flight:
    """rows: who draws, with their slots. began: time.perf_counter() at the launch."""

    rows: tuple[tuple[int, Request], ...]
    began: float
    _drawn: Tensor  # [B], on the host once `_arrived`
    _arrived: "torch.cuda.Event | None"

    @staticmethod
    def of(rows: tuple[tuple[int, Request], ...], began: float, drawn: Tensor) -> "Flight":
        """drawn: what the step leaves on its device, int64 [B]; later steps may write over it."""
        if drawn.device.type != "cuda":
            return Flight(rows, began, drawn.clone(), None)
        host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
        host.copy_(drawn, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return Flight(rows, began, host, arrived)

    def tokens(self) -> list[int]:
        """Waits for the step, but for none behind it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._drawn.tolist()
