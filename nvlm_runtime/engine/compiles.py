"""Counts what is compiled while a model runs, so that nobody waits for it unnoticed in the middle of a request."""

import warnings
from typing import Any

from triton import knobs


class CompileWatch:
    """What was compiled since `start`: Triton kernels of this process and captured steps. Each is a warning.

    Inductor is not watched: nothing here goes through it.
    """

    def __init__(self):
        self._started = False
        self._names: list[str] = []

    def start(self) -> None:
        """Counts from here on. A hook that somebody else has set in Triton is called as before."""
        self._names.clear()
        if self._started:
            return
        self._started = True
        earlier = knobs.runtime.jit_post_compile_hook

        def hook(**given: Any) -> Any:
            self.saw(f"Triton compiled {given['fn'].name}")
            return earlier(**given) if earlier is not None else None

        knobs.runtime.jit_post_compile_hook = hook

    def built(self, name: str) -> None:
        """Takes note of a captured step that was built."""
        self.saw(f"the step {name!r} was built")

    def saw(self, what: str) -> None:
        """Takes note of something that was compiled. After `start` it is counted, and a warning."""
        if self._started:
            self._names.append(what)
            warnings.warn(f"{what} after warm-up", RuntimeWarning, stacklevel=2)

    @property
    def count(self) -> int:
        """How much was compiled since `start`; 0 before it."""
        return len(self._names)
