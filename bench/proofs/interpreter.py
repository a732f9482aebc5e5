"""What a Triton kernel really reads and writes, seen through the interpreter (TRITON_INTERPRET=1).

    with MemoryTrace() as trace:
        op(x)
    trace.access["_fwd_kernel", "x_ptr"].loaded

Every unmasked lane of every load and store is checked: an address that belongs to no element of any tensor the
kernel was given raises OutOfBounds, so a guard zone or a stride's gap can never be touched unseen. Two programs of one
launch that touch one element, one of them writing, raise Race, because a GPU runs them in any order; so do two lanes of
one store. Masked lanes without `other=` read NaN (a large number in integers), as a GPU may leave anything there; the
bare interpreter reads 0.
A launch puts the interpreter's functions into the language once for every function on the device, not for every call.
Works on triton 3.6 to 3.9, whose interpreters share these entry points.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

NOBODY, MANY = -1, -2  # instead of a program's number: who touched an element


class OutOfBounds(AssertionError):
    """A kernel touched memory that none of its tensor arguments holds."""


class Race(AssertionError):
    """What a kernel leaves in memory depends on the order in which its programs or lanes run."""


@dataclass
class Access:
    """Bytes one argument of one kernel moved. An address that several lanes of one instruction name counts once.

    unique_loaded, unique_stored: bytes touched at least once in a launch, summed over launches: what a cache that
    never evicts leaves for the memory.
    """

    loaded: int = 0
    stored: int = 0
    unique_loaded: int = 0
    unique_stored: int = 0


class _Array:
    """The addresses of one tensor argument."""

    def __init__(self, kernel: str, name: str, tensor: torch.Tensor):
        self.key = (kernel, name)
        self.item = tensor.element_size()
        self.base = tensor.data_ptr()
        index = np.zeros(1, dtype=np.int64)
        for size, stride in zip(tensor.shape, tensor.stride()):
            index = (index[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
        self.live = np.zeros(int(index.max()) + 1 if index.size else 0, dtype=bool)
        self.live[index] = True
        self.seen = {kind: np.zeros_like(self.live) for kind in ("loaded", "stored")}
        self.reader, self.writer = (np.full(len(self.live), NOBODY, np.int64) for _ in range(2))

    def holds(self, addresses: np.ndarray) -> np.ndarray:
        at, offset = np.divmod(addresses - self.base, self.item)
        inside = (offset == 0) & (at >= 0) & (at < len(self.live))
        inside[inside] = self.live[at[inside]]
        return inside

    def mark(self, addresses: np.ndarray, kind: str, program: int) -> None:
        at = (addresses - self.base) // self.item
        self.seen[kind][at] = True
        others = [self.writer[at]] + ([self.reader[at]] if kind == "stored" else [])
        for who in others:
            clash = (who != NOBODY) & (who != program)
            if clash.any():
                kernel, name = self.key
                how, whom = "written" if who is others[0] else "read", "several" if who[clash][0] == MANY else "another"
                raise Race(
                    f"{kernel}: element {at[clash][0]} of {name} is {kind} by program {program} and {how} by {whom}"
                )
        if kind == "stored":
            self.writer[at] = program
        else:
            first = self.reader[at]
            self.reader[at] = np.where((first == NOBODY) | (first == program), program, MANY)


def _program() -> int:
    """The number of the program that runs, in its launch."""
    (x, y, z), (_, ny, nz) = interpreter.interpreter_builder.grid_idx, interpreter.interpreter_builder.grid_dim
    return (x * ny + y) * nz + z


@dataclass
class MemoryTrace:
    """A context; `launches` counts kernels started within it."""

    access: dict[tuple[str, str], Access] = field(default_factory=lambda: defaultdict(Access))
    launches: list[str] = field(default_factory=list)

    def __enter__(self) -> "MemoryTrace":
        self._arrays: list[_Array] = []
        self._saved = (
            GridExecutor.__call__,
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
            interpreter._patch_lang,
        )
        call, load, store, patch = self._saved
        trace, patched = self, set()

        def patch_once(fn):
            if fn in patched:
                return None  # which a call on the device does not look at
            patched.add(fn)
            return patch(fn)

        def traced_call(executor, *args, **kwargs):
            patched.clear()
            named = dict(zip(executor.arg_names, args)) | kwargs
            kernel = executor.fn.__name__
            trace.launches.append(kernel)
            outer = trace._arrays
            trace._arrays = [_Array(kernel, n, t) for n, t in named.items() if isinstance(t, torch.Tensor)]
            try:
                with _disable_current_modes():  # the interpreter's own tensor work is no one's traffic
                    call(executor, *args, **kwargs)
                for array in trace._arrays:
                    access = trace.access[array.key]
                    access.unique_loaded += int(array.seen["loaded"].sum()) * array.item
                    access.unique_stored += int(array.seen["stored"].sum()) * array.item
            except interpreter.InterpreterError as error:
                if isinstance(error.__cause__, (OutOfBounds, Race)):
                    raise error.__cause__ from None
                raise
            finally:
                trace._arrays = outer

        def traced_load(builder, ptrs, mask, other, *rest):
            trace._touch(ptrs.data, mask.data, "loaded")
            if other is None:
                dtype = interpreter._get_np_dtype(ptrs.get_element_ty())
                garbage = np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max // 2
                other = TensorHandle(np.full(ptrs.data.shape, garbage, dtype=dtype), ptrs.get_element_ty())
            return load(builder, ptrs, mask, other, *rest)

        def traced_store(builder, ptrs, value, mask, *rest):
            trace._touch(ptrs.data, mask.data, "stored")
            return store(builder, ptrs, value, mask, *rest)

        GridExecutor.__call__ = traced_call
        InterpreterBuilder.create_masked_load = traced_load
        InterpreterBuilder.create_masked_store = traced_store
        interpreter._patch_lang = patch_once
        return self

    def __exit__(self, *_) -> None:
        (
            GridExecutor.__call__,
            InterpreterBuilder.create_masked_load,
            InterpreterBuilder.create_masked_store,
            interpreter._patch_lang,
        ) = self._saved

    def _touch(self, pointers: np.ndarray, mask: np.ndarray, kind: str) -> None:
        pointers, mask = np.broadcast_arrays(pointers, mask.astype(bool))  # a mask of `&` may come as int32
        touched = pointers[mask].astype(np.int64)
        left = np.unique(touched)
        if kind == "stored" and len(left) < len(touched):
            raise Race(
                f"{len(touched) - len(left)} lanes of one store have the address of another, from {left[0]:#x} on"
            )
        program = _program()
        for array in self._arrays:
            if not len(left):
                return
            mine = array.holds(left)
            if mine.any():
                access = self.access[array.key]
                setattr(access, kind, getattr(access, kind) + int(mine.sum()) * array.item)
                array.mark(left[mine], kind, program)
                left = left[~mine]
        if len(left):
            names = ", ".join(
                f"{key[1]} [{array.base:#x} + {len(array.live) * array.item}]"
                for array in self._arrays
                for key in [array.key]
            )
            raise OutOfBounds(f"{len(left)} lanes {kind} outside every tensor, first at {left[0]:#x}; tensors: {names}")

    def total(self) -> Access:
        """All arguments of all kernels together."""
        fields = ("loaded", "stored", "unique_loaded", "unique_stored")
        return Access(*(sum(getattr(access, name) for access in self.access.values()) for name in fields))
