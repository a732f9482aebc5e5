"""How an `NVLM` computes: its options, and the checks of what excludes what."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nvlm_kernels import MAX_DECODE_TOKENS
from nvlm_kernels.native import NativeLibrary, is_available, load_library
from nvlm_runtime.checkpoint.weights import DTYPES
from nvlm_runtime.model.adapter import AdaptedLinear
from nvlm_runtime.model.model import NVLMModel

NativeOption = bool | Literal["auto"]
GraphsOption = bool | Literal["auto"] | None
DtypeOption = torch.dtype | Literal["auto", "float32", "bfloat16", "float16", "float64"]
NATIVE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """The options of `NVLM`, which describes them.

    Raises:
        ValueError: A value is out of its range, or two options exclude each other.
    """

    chunk: int
    image_cache_bytes: int
    reuse: bool
    deterministic: bool
    graphs: GraphsOption
    native: NativeOption
    cache_folder: str | Path | None
    quantize: Mapping[str, str] | None
    check: bool
    speculate: int

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, got {self.chunk}")
        if self.image_cache_bytes < 0:
            raise ValueError(f"image_cache_bytes must be at least 0, got {self.image_cache_bytes}")
        if not 0 <= self.speculate <= MAX_DECODE_TOKENS - 1:
            raise ValueError(f"speculate must be from 0 to {MAX_DECODE_TOKENS - 1} tokens, got {self.speculate}")
        if not isinstance(self.native, bool) and self.native != "auto":
            raise ValueError(f'native must be True, False or "auto", got {self.native!r}')
        if self.graphs is not None and not isinstance(self.graphs, bool) and self.graphs != "auto":
            raise ValueError(f'graphs must be True, False or "auto", got {self.graphs!r}')
        if self.graphs is True and self.native is True:
            raise ValueError("graphs and native exclude each other: CUDA graphs capture PyTorch's kernels")
        if self.check and (self.graphs is True or self.native is True):
            raise ValueError("check reads the output of every layer in PyTorch: it excludes graphs and native")

    def uses_graphs(self, device: torch.device) -> bool:
        """Whether steps are captured: as `graphs` says; "auto" on a CUDA device, unless check or speculate is on."""
        if isinstance(self.graphs, bool):
            return self.graphs
        return device.type == "cuda" and not self.check and not self.speculate

    def library_for(self, model: NVLMModel) -> NativeLibrary | None:
        """Loads the native library if these options and the model ask for it, and builds it at its first use.

        Args:
            model: The model that the options are for.

        Returns:
            The library, or None where everything runs in PyTorch.

        Raises:
            ValueError: The options and the model exclude each other.
            BuildError: Native decoding is needed and its compiler is missing or fails.
        """
        adapted = any(isinstance(module, AdaptedLinear) for module in model.modules())
        if adapted and (self.native is True or self.quantize):
            raise ValueError(
                "native decoding and quantised weights do not support adapters: merge them first (merge_lora)"
            )
        if self.native is True and model.group.size > 1:
            raise ValueError("native decoding runs in one process: it excludes a tensor-parallel group")
        native, graphs = self.native, self.uses_graphs(next(model.parameters()).device)
        if graphs or self.check or adapted:
            native = False
        elif native == "auto":
            weight = next(model.parameters())
            fits = weight.device.type == "cpu" and weight.dtype in NATIVE_DTYPES
            native = fits and model.group.size == 1 and is_available()
        found = load_library(None if self.cache_folder is None else Path(self.cache_folder)) if native else None
        if self.speculate and (graphs or (self.deterministic and found is None)):
            raise ValueError(
                "speculate draws several tokens per step: it excludes graphs, and deterministic in PyTorch"
            )
        return found


def device_of(device: torch.device | str) -> torch.device:
    """Reads a device: "auto" is CUDA where it is available, and else the CPU.

    Raises:
        ValueError: Tensors cannot be allocated on this device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device {str(device)!r} is not available: {str(error).splitlines()[0]}") from error


def dtype_of(dtype: DtypeOption) -> torch.dtype | None:
    """Reads a dtype: a torch.dtype or its name; None for "auto", the checkpoint's own.

    Raises:
        ValueError: The dtype is none that weights can have.
    """
    known = {str(value).removeprefix("torch."): value for value in DTYPES.values()}
    if isinstance(dtype, str) and dtype == "auto":
        return None
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if found not in known.values():
        raise ValueError(f"dtype must be auto, {', '.join(known)} or a torch.dtype of these, got {dtype!r}")
    return found
