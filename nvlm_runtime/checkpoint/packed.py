"""Linears of a file in 8 or 4 bits, which become dense weights when the file is read.

A packed file is smaller; the model that is loaded from it computes in the usual dtype. A linear `name.weight` of shape
[L, K] is stored as

    int8    name.weight int8 [L, K], name.scale fp32 [L]
    int4    name.nibbles int32 [L, blocks, 16], name.scale bf16 [L, 4 blocks]

in the layouts of `model.weight_only`. Linears of a gated feed-forward, which are most of what NVLM-X and NVLM-H add to
a text model, take int4; all others take int8. Embeddings, norms, biases and gates stay as they are.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nvlm_runtime.model.weight_only import WEIGHT_ONLY, Int4Linear, Int8Linear

INT4_ENDS = tuple(f".cross_attn.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2"))


def pack(tensors: Mapping[str, Tensor], linears: Iterable[str]) -> dict[str, Tensor]:
    """Packs the weights of linears.

    Args:
        tensors: the tensors of a file, by name.
        linears: names of those that are weights [L, K] of linears.

    Raises:
        ValueError: A weight is not finite.
    """
    packed = dict(tensors)
    for name in linears:
        weight = packed.pop(name)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.float(), requires_grad=False)
        layer = WEIGHT_ONLY["int4" if name.endswith(INT4_ENDS) else "int8"].of(linear)
        packed |= {f"{name.removesuffix('.weight')}.{key}": buffer for key, buffer in layer.named_buffers()}
    return packed


def is_packed(path: Path) -> bool:
    """Returns whether a safetensors file holds packed linears; False for a file that cannot be read.

    Args:
        path: the file.
    """
    try:
        with safe_open(path, "pt") as file:
            return any(name.endswith(".scale") for name in file.keys())
    except (SafetensorError, OSError):
        return False


def unpack_file(source: Path, target: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Writes a packed file's tensors as dense ones.

    Args:
        source: the packed file.
        target: the new file.
        shapes: of the dense tensors that the file must hold, by name.
        dtype: of weights that were packed.

    Raises:
        ValueError: The file lacks a tensor or holds another one, or one has another shape or dtype.
    """
    stored, expected = load_file(source), set[str]()
    for name in shapes:
        stem = name.removesuffix(".weight")
        if f"{stem}.scale" in stored:
            expected |= {f"{stem}.scale", f"{stem}.nibbles" if f"{stem}.nibbles" in stored else name}
        else:
            expected.add(name)
    if wrong := sorted(expected ^ set(stored)):
        raise ValueError(f"{source} misses or should not hold {len(wrong)} tensors: {', '.join(wrong[:4])}")
    dense = {name: unpack(stored, name, shape, dtype).contiguous() for name, shape in shapes.items()}
    save_file(dense, target, metadata={"format": "pt"})


def unpack(stored: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Reads a tensor that may be packed.

    Args:
        stored: tensors of a file, by name; only those of this one are looked at.
        name: the tensor's name.
        shape: its shape when it is dense.
        dtype: of a packed weight when it is dense. A tensor that is not packed keeps its own.

    Raises:
        ValueError: A stored tensor has another shape or dtype than the format says.
    """
    stem = name.removesuffix(".weight")
    if f"{stem}.scale" not in stored:
        if tuple(stored[name].shape) != shape:
            raise ValueError(f"{name} has shape {list(stored[name].shape)}, expected {list(shape)}")
        return stored[name]
    with torch.device("meta"):
        linear = nn.Linear(shape[1], shape[0], bias=False)
    layer = (Int4Linear if f"{stem}.nibbles" in stored else Int8Linear)(linear)
    for key, buffer in list(layer.named_buffers()):
        given = stored[f"{stem}.{key}"]
        if given.shape != buffer.shape or given.dtype != buffer.dtype:
            raise ValueError(
                f"{stem}.{key} is {given.dtype} {list(given.shape)}, expected {buffer.dtype} {list(buffer.shape)}"
            )
        setattr(layer, key, given)
    return layer.dense(dtype)
