"""Checkpoints in the published NVLM layout: sharded safetensors, an index, config.json, tokenizer files.

One table (`file_entries`) says what every tensor of a file is in memory. Three things differ between the two: the
decoder's q, k, v and gate, up are one weight each in memory; the file's `language_model.model.` is our
`language_model.`; and InternViT's attention is padded in the file with `num_dummy_heads` all-zero heads (25 to 32 in
the published model), inside each third of qkv, in the q/k norms and in the columns of proj. A rank of a
tensor-parallel group holds a slice of most tensors, and the table says which. Loading checks every name and shape
before it allocates, then streams slice by slice, so host memory holds the weights once.
Source: spec of nvidia/NVLM-D-72B (HF layout), Megatron-LM's converter for the padding.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nvlm_runtime.config import NVLMConfig, VisionConfig, from_hf, to_hf
from nvlm_runtime.model import NVLMModel, allocate, outline
from nvlm_runtime.parallel import SOLO, Group, TextShard, VisionShard, VisionSplit, held_rows
from nvlm_runtime.quantize import check_scheme, quantize, quantized_buffers, scheme_of

Told = Callable[[int, int], None]
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
STORED = {"I8": torch.int8, "I32": torch.int32}  # of quantised weights, beside DTYPES
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Piece:
    """Along one axis, [start, end) of a file's tensor, which stands from `at` in the parameter."""

    start: int
    end: int
    at: int

    @property
    def size(self) -> int:
        return self.end - self.start

    def among(self, first: int, num: int) -> "Piece":
        """What of it stands in `num` places of the parameter from `first` on, whose places are counted from there."""
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
    """File name of every tensor to its entry, in file order. A rank of a group has the same names and shapes.

    Adapters (`adapter`) are not the checkpoint's, and left out. Quantised linears are there as the model holds them.
    """
    entries: dict[str, Entry] = {}
    for parameter, tensor in model.named_parameters():
        if ".lora_A." in parameter or ".lora_B." in parameter:
            continue
        part = parameter.split(".")[0]
        entries_of = {"vision_model": _vision_entries, "mlp1": _projector_entries}.get(part, _decoder_entries)
        entries |= entries_of(model, parameter, tuple(tensor.shape))
    for name, buffer in quantized_buffers(model).items():
        entries[_file_name(name)] = Entry(name, tuple(buffer.shape))
    if model.group.size > 1:
        entries = {name: replace(entry, copies=_copies(model, name, entry)) for name, entry in entries.items()}
    return entries


def _copies(model: NVLMModel, name: str, entry: Entry) -> int:
    size = model.group.size
    is_whole_tower = name.startswith("vision_model.") and not isinstance(model.shard.vision, VisionShard)
    if entry.axis is None or is_whole_tower:
        return size
    is_of_kv_heads = name.split(".")[-2] in ("k_proj", "v_proj")
    return max(1, size // model.config.text.num_key_value_heads) if is_of_kv_heads else 1


def square_norm(model: NVLMModel, tensors: Mapping[str, Tensor], data: Group = SOLO) -> Tensor:
    """The sum of squares, fp64, of something that all ranks hold as they hold parameters of these names: of each number
    of the whole model once, on every rank. data: ranks that share out the rows of each.
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
    """Parameters of a checkpoint's parts and their total, dummy heads included, without allocating any."""
    entries = file_entries(outline(config))
    counts = dict.fromkeys(("vision", "projector", "decoder", "cross"), 0)
    for name, entry in entries.items():
        part = (
            "cross"
            if ".cross_attn." in name
            else {"vision_model": "vision", "mlp1": "projector"}.get(name.split(".")[0])
        )
        counts[part or "decoder"] += math.prod(entry.shape)
    return counts | {"total": sum(counts.values())}


def _file_name(parameter: str) -> str:
    if parameter.startswith("language_model.") and not parameter.startswith("language_model.lm_head."):
        return parameter.replace("language_model.", "language_model.model.", 1)
    return parameter


def _range(rank_of_tensor: int, axis: int, start: int, end: int) -> tuple[slice, ...]:
    return tuple(slice(start, end) if i == axis else slice(None) for i in range(rank_of_tensor))


def fill(parameter: Tensor, entry: Entry, stored: Any, name: str, is_checked: bool) -> None:
    """Reads of a file's slice (or of a tensor in its shape) what the entry takes, straight into what this rank holds of
    the parameter.

    Raises ValueError for padding not zero.
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. FileNotFoundError or ValueError naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}, which every checkpoint folder needs")
    try:
        values = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    return values


def _shards(folder: Path) -> list[Path]:
    """The shard files in order. FileNotFoundError where there are no weights, or a shard is missing."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{folder / INDEX} has no 'weight_map' of tensor names to files")
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{folder / INDEX}: 'weight_map' must name a file for every tensor")
        names = sorted(set(weight_map.values()))
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        raise FileNotFoundError(f"{folder} has no weights: expected {SINGLE} or {INDEX} with its shards")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {len(missing)} of {len(names)} shards: {', '.join(missing[:3])}")
    return [folder / name for name in names]


def _open(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def open_tensors(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Every tensor of a folder of safetensors, sharded or not: its name to its slice, read when it is indexed.

    The files stay open as long as the stack. Raises FileNotFoundError for absent files, ValueError for a damaged one,
    an index that does not fit its shards, and numbers that are not floating.
    """
    files = {path: _open(path, stack) for path in _shards(folder)}
    where = {name: path for path, file in files.items() for name in file.keys()}
    _check_index(folder, where)
    tensors = {name: files[path].get_slice(name) for name, path in where.items()}
    for name, tensor in tensors.items():
        if tensor.get_dtype() not in DTYPES:
            raise ValueError(f"{name} is stored as {tensor.get_dtype()}, expected one of {', '.join(DTYPES)}")
    return tensors


def some(names: Iterator[str] | set[str]) -> str:
    """The first few names, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_index(folder: Path, where: Mapping[str, Path]) -> None:
    if not (folder / INDEX).is_file():
        return
    weight_map = read_json(folder / INDEX)["weight_map"]
    wrong = {name for name, file in weight_map.items() if name not in where or where[name].name != file}
    if wrong:
        raise ValueError(f"{INDEX} names tensors its shards do not hold: {some(wrong)}")
    if unlisted := set(where) - set(weight_map):
        raise ValueError(f"{INDEX} does not list tensors of its shards: {some(unlisted)}")


def with_dummy_heads(vision: VisionConfig, shapes: Mapping[str, tuple[int, ...]]) -> VisionConfig:
    """The number of dummy heads, which config.json does not give, from the rows of the first qkv weight."""
    rows = (*shapes.get("vision_model.encoder.layers.0.attn.qkv.weight", ()), 3 * vision.hidden_size)[0]
    dummy = rows // (3 * vision.head_dim) - vision.num_attention_heads
    if rows % (3 * vision.head_dim) or dummy < 0:
        raise ValueError(
            f"vision_model.encoder.layers.0.attn.qkv.weight has {rows} rows, "
            f"expected 3 x {vision.head_dim} x the heads, of which {vision.num_attention_heads} are real"
        )
    return replace(vision, num_dummy_heads=dummy)


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 of config.json and of the shards' headers, which name every tensor, its dtype, shape and place."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in _shards(folder):
        with path.open("rb") as file:
            size = file.read(8)
            digest.update(path.name.encode() + size + file.read(min(int.from_bytes(size, "little"), 1 << 26)))
            digest.update(path.stat().st_size.to_bytes(8, "little"))
    return digest.hexdigest()


def load(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    group: Group = SOLO,
    vision_split: VisionSplit = "tiles",
    allocate: Callable[[NVLMModel, torch.dtype, torch.device | str], Any] = allocate,
    told: Told = lambda read, total: None,
) -> tuple[NVLMModel, dict[str, Any]]:
    """A model in eval mode and its config.json, from a checkpoint folder.

    A rank of a group reads its own slices alone, each file once and in order, straight to their places: host memory
    holds its share and one tensor. dtype: None takes config.json's "torch_dtype", or the file's own where it has none.
    allocate: makes the memory of an outline, of which a rank may hold some rows alone (`held_rows`). told: of the bytes
    of the files that are behind, and of all, whenever a tensor has been read.
    Raises FileNotFoundError for absent files; ValueError for missing, unexpected or wrongly shaped tensors, non-zero
    padding heads, a damaged file, a config this runtime does not know or a group that cannot share the model out, each
    by name, before memory is allocated (padding: while it streams).
    """
    values = read_json(folder / "config.json")
    config, scheme = from_hf(values), _scheme(values)
    if scheme and group.size > 1:
        raise ValueError(f"{folder} is quantised: it is held by one process, not shared out over {group.size}")
    with ExitStack() as stack:
        files = {path: _open(path, stack) for path in _shards(folder)}
        where = {name: path for path, file in files.items() for name in file.keys()}
        shapes = {name: tuple(files[path].get_slice(name).get_shape()) for name, path in where.items()}
        _check_index(folder, where)
        if "num_dummy_heads" not in values["vision_config"]:
            config = replace(config, vision=with_dummy_heads(config.vision, shapes))
        model = outline(config, group, vision_split)
        quantize(model, scheme, filled=False)
        entries, buffers = file_entries(model), quantized_buffers(model)
        if missing := set(entries) - set(where):
            raise ValueError(f"{folder} misses {len(missing)} tensors: {some(missing)}")
        if unexpected := set(where) - set(entries):
            raise ValueError(f"{folder} holds {len(unexpected)} unexpected tensors: {some(unexpected)}")
        for name, entry in entries.items():
            if shapes[name] != entry.shape:
                raise ValueError(f"{name} has shape {list(shapes[name])}, expected {list(entry.shape)}")
            stored = files[where[name]].get_slice(name).get_dtype()
            kept = buffers[entry.parameter].dtype if entry.parameter in buffers else None
            wanted = [kind for kind, known in STORED.items() if known == kept] or list(DTYPES)
            if stored not in wanted:
                raise ValueError(f"{name} is stored as {stored}, expected one of {', '.join(wanted)}")
        first = next(iter(entries))
        dtype = dtype or _dtype(values, files[where[first]].get_slice(first).get_dtype())
        allocate(model, dtype, device)
        if config.text.tie_word_embeddings and isinstance(model.language_model.lm_head, nn.Linear):
            model.language_model.tie()
        parameters = dict(model.named_parameters()) | quantized_buffers(model)
        with torch.no_grad():
            for name in _zeros(entries, parameters):
                parameters[name].zero_()
            total, read = sum(path.stat().st_size for path in files), 0
            for name in sorted(entries, key=lambda name: (str(where[name]), name)):
                entry = entries[name]
                stored = files[where[name]].get_slice(name)
                fill(parameters[entry.parameter], entry, stored, name, is_checked=group.rank == 0)
                read += math.prod(entry.shape) * (DTYPES | STORED)[stored.get_dtype()].itemsize
                told(read, total)
    return model.eval(), values


def _zeros(entries: Mapping[str, Entry], parameters: Mapping[str, Tensor]) -> list[str]:
    """Parameters that their entries do not fill: a rank's zero heads, and vocabulary rows behind the last id."""
    filled = dict.fromkeys(parameters, 0)
    for entry in entries.values():
        if entry.axis is not None:
            filled[entry.parameter] += sum(piece.size for piece in entry.pieces)
    axes = {entry.parameter: entry.axis for entry in entries.values()}
    return [name for name, axis in axes.items() if axis is not None and filled[name] < parameters[name].shape[axis]]


def _scheme(values: Mapping[str, Any]) -> dict[str, str]:
    scheme = values.get("quantization", {})
    if not isinstance(scheme, dict) or not all(isinstance(method, str) for method in scheme.values()):
        raise ValueError(f"config: 'quantization' must be an object of parts and methods, got {scheme!r:.60}")
    check_scheme(scheme)
    return scheme


def _dtype(values: Mapping[str, Any], stored: str) -> torch.dtype:
    given = values.get("torch_dtype", values.get("dtype"))
    if given is None:
        return DTYPES[stored]
    known = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    if given not in known:
        raise ValueError(f"config: torch_dtype must be one of {', '.join(known)}, got {given!r}")
    return known[given]


def save(
    model: NVLMModel,
    folder: Path,
    dtype: torch.dtype | None = None,
    run_dtype: torch.dtype | None = None,
    shard_bytes: int = 4 << 30,
    data: Group = SOLO,
) -> None:
    """Writes config.json and the weights in the published layout, dummy heads put back.

    dtype: of the files, the parameters' own when None. run_dtype: what config.json asks a loader to compute in, the
    files' when None. Every file is written under a temporary name first. An index and shards that stood in the
    folder and are not written anew are deleted at the end, so that no loader mixes two checkpoints. Of a group, and of
    the group `data` that shares out its rows, every rank calls this, and rank 0 writes. What is quantised is written as
    it is held, under "quantization" in config.json.
    Raises ValueError for a model with adapters: the layout has no place for them.
    """
    if any(".lora_A." in name for name, _ in model.named_parameters()):
        raise ValueError("save: the model holds adapters: merge them first, or save them alone (save_lora)")
    writes = model.group.rank == data.rank == 0
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    dtype = dtype or next(iter(parameters.values())).dtype
    buffers, entries = quantized_buffers(model), file_entries(model)
    parameters |= buffers
    shards: list[list[str]] = [[]]
    used = 0
    for name, entry in entries.items():
        kept = buffers[entry.parameter].dtype if entry.parameter in buffers else dtype
        size = math.prod(entry.shape) * kept.itemsize
        if used and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    total = 0
    for file, shard in zip(names, shards, strict=True):
        tensors = {}
        for name in shard:
            held = parameters[entries[name].parameter]
            kept = held.dtype if entries[name].parameter in buffers else dtype
            if data.size > 1:
                held = held.full_tensor()
            tensor = _to_file(held, entries[name], kept, model.group)
            if writes:
                tensors[name] = tensor.cpu()
        if not writes:
            continue
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / f"{file}.partial", metadata={"format": "pt"})
        (folder / f"{file}.partial").rename(folder / file)
    model.group.wait()
    data.wait()
    if not writes:
        return
    run_dtype = str(run_dtype or dtype).removeprefix("torch.")
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for stale in set(folder.glob("model*.safetensors")) - {folder / name for name in names}:
        stale.unlink()
    values = to_hf(model.config, run_dtype)
    write_json(folder / "config.json", values | ({"quantization": scheme} if (scheme := scheme_of(model)) else {}))


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Under a temporary name first."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.rename(path)


def _to_file(parameter: Tensor, entry: Entry, dtype: torch.dtype, group: Group) -> Tensor:
    """The file's tensor, what is padding zero: on rank 0, from all ranks."""
    tensor = parameter.detach().to(dtype)
    if entry.axis is None:
        return tensor.contiguous().clone()
    whole = tensor.new_zeros(entry.shape)
    num = len(entry.shape)
    for piece in entry.pieces if group.rank % entry.copies == 0 else ():
        part = tensor[_range(num, entry.axis, piece.at, piece.at + piece.size)]
        whole[_range(num, entry.axis, piece.start, piece.end)] = part
    return group.collect(whole) if entry.copies < group.size else whole
