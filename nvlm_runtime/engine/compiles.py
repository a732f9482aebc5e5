"""Counts what is compiled while a model runs, so that none of it comes as a surprise in the middle of a request."""

import warnings
from typing import Any

from triton import knobs


class CompileWatch:
    """What was made since `start`: Triton's kernels of this process, and what `saw` was told of. Each is a warning.

    Inductor is not watched: nothing here goes through it.
    """

    def __init__(self):
        self._started = False
        self._names: list[str] = []

    def start(self) -> None:
        """Counts from here. A hook that another program gave Triton is called as before."""
        self._names.clear()
        if self._started:
            return
        self._started = True
        earlier = knobs.runtime.jit_post_compile_hook

        def hook(**given: Any) -> Any:
            self.saw(f"Triton compiled {given['fn'].name}")
            return earlier(**given) if earlier is not None else None

        knobs.runtime.jit_post_compile_hook = hook

    def saw(self, what: str) -> None:
        if self._started:
            self._names.append(what)
            warnings.warn(f"{what} after warm-up", RuntimeWarning, stacklevel=2)

    @property
    def count(self) -> int:
        """Since `start`; 0 before it."""
        return len(self._names)
