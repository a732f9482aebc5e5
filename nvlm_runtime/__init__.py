"""The NVLM runtime: NVLM-D, -X and -H from images and a prompt to text. `from nvlm_runtime import NVLM`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nvlm_runtime.engine.images import ImageHandle
    from nvlm_runtime.engine.nvlm import NVLM
    from nvlm_runtime.engine.request import Output, PreparedPrompt
    from nvlm_runtime.engine.sampling import GenerationParams
    from nvlm_runtime.engine.serving import Engine, EngineStopped, QueueFull

__all__ = [
    "NVLM",
    "Engine",
    "EngineStopped",
    "GenerationParams",
    "ImageHandle",
    "Output",
    "PreparedPrompt",
    "QueueFull",
]

_MODULES = {
    "NVLM": "nvlm",
    "Engine": "serving",
    "EngineStopped": "serving",
    "GenerationParams": "sampling",
    "ImageHandle": "images",
    "Output": "request",
    "PreparedPrompt": "request",
    "QueueFull": "serving",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `nvlm --help` needs no torch."""
    if name in _MODULES:
        return getattr(import_module(f"nvlm_runtime.engine.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'nvlm_runtime' has no attribute {name!r}")
