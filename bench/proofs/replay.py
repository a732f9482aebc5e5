"""Whether a captured step keeps the rules of CUDA graphs, checked without a GPU.

A graph is replayed with the addresses and shapes it was captured with, and without its host code. So a step must read
and write the same static buffers each time, must never ask the device for a value, and must leave nothing but what it
wrote into its buffers. `check` runs a step and watches every call that goes through torch.
"""

import gc
import sys
import time
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nvlm_runtime.engine.graphs import CapturedStep

# what waits for the device, or makes a shape of its values
ASKING = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "equal", "allclose", "argwhere"}
ASKING |= {"__bool__", "__int__", "__float__", "__index__", "bincount", "unique_consecutive"}
FROM_HOST = {"tensor", "as_tensor", "from_numpy", "asarray"}
PATIENCE = 100  # hundredths of a second in which a collective's own thread lets go of its tensors
ASKING_OPS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "unique_dim"}


class ReplayError(Exception):
    """A step that a CUDA graph would replay wrongly, or could not capture."""


def check(step: CapturedStep) -> None:
    """Runs a step twice.

    Raises:
        ReplayError: The step broke a rule; the message names the step and the first rule.
    """
    before = _identity(step)
    for run in ("first", "second"):
        watch = _Watch(step.name)
        with _Calls(step.name), watch:
            step.fn()
        if left := watch.left():
            raise ReplayError(f"step {step.name!r} keeps a tensor {list(left[0])} that its {run} run made")
        after = _identity(step)
        for name, (address, shape, dtype) in after.items():
            for what, old, new in zip(("address", "shape", "dtype"), before[name], (address, shape, dtype)):
                if old != new:
                    raise ReplayError(f"step {step.name!r} changed the {what} of {name}: {old} became {new}")


def _identity(step: CapturedStep) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
    return {name: (t.data_ptr(), tuple(t.shape), t.dtype) for name, t in step.buffers.items()}


def _inside_triton() -> bool:
    """Whether triton called, whose interpreter does on the host what a GPU's driver does not."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("triton."):
            return True
        if name.startswith(("nvlm_kernels.", "nvlm_runtime.")) and not name.endswith(".replay"):
            return False
        frame = frame.f_back
    return False


class _Calls(TorchFunctionMode):
    """Python's calls: some, like `.cpu()` of a CPU tensor, never reach an operator here."""

    def __init__(self, step: str):
        super().__init__()
        self.step = step

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not _inside_triton():
            if name in ASKING:
                raise ReplayError(f"step {self.step!r} asks the device for a value: {name}()")
            if name in FROM_HOST:
                raise ReplayError(f"step {self.step!r} copies from the host: torch.{name}()")
            if name == "to" and any(_is_cpu(value) for value in (*args[1:], *kwargs.values())):
                raise ReplayError(f"step {self.step!r} asks the device for a value: to('cpu')")
            if name == "__getitem__" and any(_is_mask(part) for part in tree_leaves(args[1])):
                raise ReplayError(f"step {self.step!r} makes a shape of a mask's values: tensor[mask]")
        return func(*args, **kwargs)


def _is_cpu(value: Any) -> bool:
    return value == "cpu" or (isinstance(value, torch.device) and value.type == "cpu")


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.bool and part.dim() > 0


class _Watch(TorchDispatchMode):
    """Operators: which ask for values, and which tensors they make."""

    def __init__(self, step: str):
        super().__init__()
        self.step = step
        self.made: list[tuple[weakref.ref, tuple[int, ...]]] = []

    def left(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors that were made and are still there."""
        gc.collect()
        for _ in range(PATIENCE):
            if not (left := [shape for tensor, shape in self.made if tensor() is not None]):
                break
            time.sleep(0.01)
        return left

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ASKING_OPS and not _inside_triton():
            raise ReplayError(f"step {self.step!r} asks the device for a value: {name}")
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.made.append((weakref.ref(tensor), tuple(tensor.shape)))
        return out
