"""In the interpreter every kernel test also proves that no lane leaves the tensors it was given."""

import pytest

from nvlm_kernels._backend import INTERPRET


@pytest.fixture(autouse=True)
def memory():
    """The trace of a test's launches, None where kernels do not run in the interpreter."""
    if not INTERPRET:
        yield None
        return
    from bench.proofs.interpreter import MemoryTrace

    with MemoryTrace() as trace:
        yield trace
