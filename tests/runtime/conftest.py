import fcntl
import os

import pytest

from nvlm_kernels import native


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The native library, built once for all of a run's workers."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / "native.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return native.library(base / "native")
