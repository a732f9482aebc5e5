"""What every tensor of a published checkpoint is in memory: one table, `file_entries`, which loading and saving follow.

Three things differ between the two: the decoder's q, k, v and gate, up are one weight each in memory; the file's
`language_model.model.` is our `language_model.`; and InternViT's attention is padded in the file with `num_dummy_heads`
all-zero heads (25 to 32 in the published model), inside each third of qkv, in the q/k norms and in the columns of proj.
A rank of a tensor-parallel group holds a slice of most tensors, a data-parallel one some rows of that.
Source: spec of nvidia/NVLM-D-72B (HF layout), Megatron-LM's converter for the padding.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.model.model import NVLMModel, outline
from nvlm_runtime.model.parts import part_of
from nvlm_runtime.model.quantize import quantized_buffers
from nvlm_runtime.parallel.group import SOLO, Group
from nvlm_runtime.parallel.shard import TextShard, VisionShard, held_rows


@dataclass(frozen=True)
class Piece:
    """Along one axis, [start, end) of a file's tensor, at position `at` of the parameter."""

    start: int
    end: int
    at: int

    @property
    def size(self) -> int:
        """Length along the axis."""
        return self.end - self.start

    def among(self, first: int, num: int) -> "Piece":
        """Cuts the piece to a run of positions of the parameter.

        Args:
            first: the first position of the run.
            num: positions of the run.

        Returns:
            What of the piece is in the run, `at` counted from `first`. Its size is 0 where that is nothing.
        """
        begin, end = max(self.at, first), min(self.at + self.size, first + num)
        start = self.start + begin - self.at
        return Piece(start, start + max(0, end - begin), begin - first)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file and what this rank holds of it.

    shape: in the file. axis: the one that is cut; None where the parameter is the tensor. pieces: of that axis; what of
    the parameter no entry fills is zero. padding: [start, end) of the axis that must be zero in the file. copies: ranks
    that hold the same, one after the other.
    """

    parameter: str
    shape: tuple[int, ...]
    axis: int | None = None
    pieces: tuple[Piece, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    copies: int = 1


Span = tuple[int, int]


def _share(start: int, end: int, rank: int, each: int) -> tuple[int, int]:
    """Rank's part of [start, end) in parts of `each`, cut off at the end."""
    return min(start + rank * each, end), min(start + (rank + 1) * each, end)


# decoder weights whose inner columns are shared out: out features of the first, in features of the second
ROW_PARTS = ("gate_proj", "up_proj", "fc1")
COLUMN_PARTS = ("down_proj", "fc2")


def file_entries(model: NVLMModel) -> dict[str, Entry]:
    """Lists every tensor of a checkpoint's files. A rank of a group has the same names and shapes.

    Adapters (`model.adapter`) are not the checkpoint's, and left out. Quantised linears are there as the model holds
    them.

    Args:
        model: the model, also one without memory (`outline`).

    Returns:
        File names to entries, in file order.
    """
    entries: dict[str, Entry] = {}
    for parameter, tensor in model.named_parameters():
        if ".lora_A." in parameter or ".lora_B." in parameter:
            continue
        entries_of = {"vision": _vision_entries, "projector": _projector_entries}.get(
            part_of(parameter), _decoder_entries
        )
        entries |= entries_of(model, parameter, tuple(tensor.shape))
    for name, buffer in quantized_buffers(model).items():
        entries[_file_name(name)] = Entry(name, tuple(buffer.shape))
    if model.group.size > 1:
        entries = {name: replace(entry, copies=_copies(model, name, entry)) for name, entry in entries.items()}
    return entries


def _copies(model: NVLMModel, name: str, entry: Entry) -> int:
    size = model.group.size
    is_whole_encoder = part_of(name) == "vision" and not isinstance(model.shard.vision, VisionShard)
    if entry.axis is None or is_whole_encoder:
        return size
    is_of_kv_heads = name.split(".")[-2] in ("k_proj", "v_proj")
    return max(1, size // model.config.text.num_key_value_heads) if is_of_kv_heads else 1


def square_norm(model: NVLMModel, tensors: Mapping[str, Tensor], data: Group = SOLO) -> Tensor:
    """Sums the squares of something that all ranks hold as they hold parameters: each number of the whole model once.

    Args:
        model: the model whose parameters name the tensors.
        tensors: parameters' names to tensors of the parameters' shapes, gradients for example.
        data: ranks that share out the rows of each.

    Returns:
        The sum, an fp64 scalar, the same on every rank.
    """
    total = torch.zeros((), dtype=torch.float64)
    for entry in file_entries(model).values():
        if entry.parameter not in tensors:
            continue
        held, first = held_rows(tensors[entry.parameter])
        total = total.to(held.device)
        pieces = [p.among(first, len(held)) if entry.axis == 0 else p for p in entry.pieces]
        parts = [held] if entry.axis is None else [held.narrow(entry.axis, p.at, p.size) for p in pieces if p.size]
        for part in parts:
            total += part.square().sum(dtype=torch.float64) / entry.copies
    return data.all_reduce(model.group.all_reduce(total))


def _cut(parameter: str, shape: tuple[int, ...], axis: int, length: int, start: int, end: int) -> Entry:
    """A parameter that is [start, end) of `length` along an axis of the file's tensor."""
    whole = shape[:axis] + (length,) + shape[axis + 1 :]
    return Entry(parameter, whole, axis, (Piece(start, end, 0),))


def _decoder_entries(model: NVLMModel, parameter: str, shape: tuple[int, ...]) -> dict[str, Entry]:
    text, part, rank = model.config.text, model.shard.text, model.group.rank
    dim, name = text.head_dim, _file_name(parameter)
    q = (rank * part.num_attention_heads * dim, (rank + 1) * part.num_attention_heads * dim)
    first = part.first_kv_head if isinstance(part, TextShard) else 0
    kv = (first * dim, (first + part.num_key_value_heads) * dim)
    heads = {"q_proj": (text.num_attention_heads * dim, q)}
    heads |= dict.fromkeys(("k_proj", "v_proj"), (text.num_key_value_heads * dim, kv))

    def joined(place: str, parts: Mapping[str, tuple[int, Span]], each: int | None = None) -> dict[str, Entry]:
        found, at = {}, 0
        for word, (length, (start, end)) in parts.items():
            piece = Piece(start, end, at)
            found[name.replace(place, word)] = Entry(parameter, (length, *shape[1:]), 0, (piece,))
            at += each or piece.size
        return found

    if ".qkv_proj." in parameter:
        return joined("qkv_proj", heads)
    if ".mlp.gate_up_proj." in parameter:
        inner = (text.intermediate_size, _share(0, text.intermediate_size, rank, shape[0] // 2))
        return joined("gate_up_proj", dict.fromkeys(("gate_proj", "up_proj"), inner), shape[0] // 2)
    if "embed_tokens" in parameter or "lm_head" in parameter:
        return {name: _cut(parameter, shape, 0, text.vocab_size, *_share(0, text.vocab_size, rank, shape[0]))}
    word = parameter.split(".")[-2]
    if word in heads:
        length, (start, end) = heads[word]
        return {name: _cut(parameter, shape, 0, length, start, end)}
    if parameter.endswith(".o_proj.weight"):
        return {name: _cut(parameter, shape, 1, text.num_attention_heads * dim, *q)}
    inner = 4 * text.hidden_size if word in ("fc1", "fc2") else text.intermediate_size
    axis = 0 if word in ROW_PARTS else 1 if word in COLUMN_PARTS else None
    if axis is None:
        return {name: Entry(parameter, shape)}
    return {name: _cut(parameter, shape, axis, inner, *_share(0, inner, rank, shape[axis]))}


def _projector_entries(model: NVLMModel, parameter: str, shape: tuple[int, ...]) -> dict[str, Entry]:
    axis = {"mlp1.1.weight": 0, "mlp1.3.weight": 1}.get(parameter)
    if axis is None or len(model.mlp1) == 2:
        return {parameter: Entry(parameter, shape)}
    inner = model.config.text.intermediate_size
    return {parameter: _cut(parameter, shape, axis, inner, *_share(0, inner, model.group.rank, shape[axis]))}


def _vision_entries(model: NVLMModel, parameter: str, shape: tuple[int, ...]) -> dict[str, Entry]:
    vision, part = model.config.vision, model.shard.vision
    rank = model.group.rank if isinstance(part, VisionShard) else 0
    if ".mlp.fc1." in parameter or parameter.endswith(".mlp.fc2.weight"):
        axis, inner = int(".fc2." in parameter), vision.intermediate_size
        return {parameter: _cut(parameter, shape, axis, inner, *_share(0, inner, rank, shape[axis]))}
    thirds = 3 if ".attn.qkv." in parameter else 1
    if thirds == 1 and not (".q_norm." in parameter or ".k_norm." in parameter or parameter.endswith(".proj.weight")):
        return {parameter: Entry(parameter, shape)}
    axis = 1 if parameter.endswith(".proj.weight") else 0
    real, each = vision.num_attention_heads * vision.head_dim, part.num_attention_heads * vision.head_dim
    padded = real + vision.num_dummy_heads * vision.head_dim
    pieces = []
    for third in range(thirds):
        start, end = _share(third * padded, third * padded + real, rank, each)
        pieces.append(Piece(start, end, third * each))
    padding = tuple((third * padded + real, (third + 1) * padded) for third in range(thirds) if padded > real)
    whole = shape[:axis] + (thirds * padded,) + shape[axis + 1 :]
    return {parameter: Entry(parameter, whole, axis, tuple(pieces), padding)}


def parameter_counts(config: NVLMConfig) -> dict[str, int]:
    """Counts the parameters of a checkpoint, dummy heads included, without allocating any.

    Args:
        config: the model's configuration.

    Returns:
        Numbers for "vision", "projector", "decoder", "cross" and their "total".
    """
    entries = file_entries(outline(config))
    counts = dict.fromkeys(("vision", "projector", "decoder", "cross"), 0)
    for name, entry in entries.items():
        counts[part_of(name)] += math.prod(entry.shape)
    return counts | {"total": sum(counts.values())}


def _file_name(parameter: str) -> str:
    if parameter.startswith("language_model.") and not parameter.startswith("language_model.lm_head."):
        return parameter.replace("language_model.", "language_model.model.", 1)
    return parameter


def _range(rank_of_tensor: int, axis: int, start: int, end: int) -> tuple[slice, ...]:
    return tuple(slice(start, end) if i == axis else slice(None) for i in range(rank_of_tensor))


def fill(parameter: Tensor, entry: Entry, stored: Any, name: str, is_checked: bool) -> None:
    """Reads what an entry takes of a file's tensor, straight into what this rank holds of the parameter.

    Args:
        parameter: of the model; it is written.
        entry: what of the file's tensor goes where.
        stored: a safetensors slice, or a tensor of `entry.shape`.
        name: the tensor's name in the file, for messages.
        is_checked: whether the padding is checked.

    Raises:
        ValueError: padding is not zero.
    """
    held, first = held_rows(parameter)
    num, rows = len(entry.shape), slice(first, first + len(held)) if entry.shape else ...
    if entry.axis is None:
        if held.numel():
            held.copy_(stored[rows])
        return
    for start, end in entry.padding if is_checked else ():
        if stored[_range(num, entry.axis, start, end)].count_nonzero():
            raise ValueError(f"{name}: the padding heads (from {start} to {end}) must be zero, and are not")
    for piece in entry.pieces:
        if entry.axis == 0:
            piece = piece.among(first, len(held))
        if piece.size and held.numel():
            where = _range(num, entry.axis, piece.start, piece.end)
            part = stored[where if entry.axis == 0 else (rows, *where[1:])]
            held[_range(num, entry.axis, piece.at, piece.at + piece.size)].copy_(part)


def unfilled(entries: Mapping[str, Entry], parameters: Mapping[str, Tensor]) -> list[str]:
    """Lists the parameters that their entries do not fill: zero heads of a rank, vocabulary rows after the last id.

    Args:
        entries: from `file_entries`.
        parameters: the model's parameters by name.

    Returns:
        Names of parameters.
    """
    filled = dict.fromkeys(parameters, 0)
    for entry in entries.values():
        if entry.axis is not None:
            filled[entry.parameter] += sum(piece.size for piece in entry.pieces)
    axes = {entry.parameter: entry.axis for entry in entries.values()}
    return [name for name, axis in axes.items() if axis is not None and filled[name] < parameters[name].shape[axis]]


def to_file(parameter: Tensor, entry: Entry, dtype: torch.dtype, group: Group) -> Tensor:
    """Makes the tensor of a file from what the ranks hold, padding zero.

    Args:
        parameter: this rank's part.
        entry: what of it goes where.
        dtype: of the result.
        group: the tensor-parallel ranks. All have to call this.

    Returns:
        The file's tensor of `entry.shape` on rank 0; on other ranks it is not to be used.
    """
    tensor = parameter.detach().to(dtype)
    if entry.axis is None:
        return tensor.contiguous().clone()
    whole = tensor.new_zeros(entry.shape)
    num = len(entry.shape)
    for piece in entry.pieces if group.rank % entry.copies == 0 else ():
        part = tensor[_range(num, entry.axis, piece.at, piece.at + piece.size)]
        whole[_range(num, entry.axis, piece.start, piece.end)] = part
    return group.collect(whole) if entry.copies < group.size else whole
