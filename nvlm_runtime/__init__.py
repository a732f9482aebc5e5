"""The NVLM runtime: NVLM-D, -X and -H from a picture and a prompt to text. `from nvlm_runtime import NVLM`."""

from typing import Any

__all__ = ["NVLM"]


def __getattr__(name: str) -> Any:
    """NVLM is imported when it is asked for, so that `nvlm --help` needs no torch."""
    if name == "NVLM":
        from nvlm_runtime.engine.nvlm import NVLM

        return NVLM
    raise AttributeError(f"module 'nvlm_runtime' has no attribute {name!r}")
