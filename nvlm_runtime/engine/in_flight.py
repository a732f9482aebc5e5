"""A decode step that was launched. Its tokens come to the host on their own, and the host waits only to read them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nvlm_runtime.engine.request import Request


@dataclass(frozen=True)
class InFlightStep:
    """A decode step between its launch and the moment the host reads what it drew.

    Attributes:
        requests: the requests that draw, each with its row of the batch.
        began: time.perf_counter() at the launch.
    """

    requests: tuple[tuple[int, Request], ...]
    began: float
    _drawn: Tensor  # [B], on the host once `_arrived`
    _arrived: "torch.cuda.Event | None"

    @staticmethod
    def of(requests: tuple[tuple[int, Request], ...], began: float, drawn: Tensor) -> "InFlightStep":
        """Starts the copy of what a step drew, int64 [B]. Later steps may overwrite `drawn`."""
        if drawn.device.type != "cuda":
            return InFlightStep(requests, began, drawn.clone(), None)
        host = torch.empty(drawn.shape, dtype=drawn.dtype, pin_memory=True)
        host.copy_(drawn, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return InFlightStep(requests, began, host, arrived)

    def tokens(self) -> list[int]:
        """Waits for the step, but for none after it, and returns the tokens of all B rows."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._drawn.tolist()
