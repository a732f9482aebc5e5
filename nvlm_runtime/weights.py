"""Checkpoints in the published NVLM layout: sharded safetensors, an index, config.json, tokenizer files.

One table (`_entries`) says what every tensor of a file is in memory. Three things differ between the two: the
decoder's q, k, v and gate, up are one weight each in memory; the file's `language_model.model.` is our
`language_model.`; and InternViT's attention is padded in the file with `num_dummy_heads` all-zero heads (25 to 32 in
the published model), inside each third of qkv, in the q/k norms and in the columns of proj. Loading checks every
name and shape before it allocates, then streams tensor by tensor, so host memory holds the weights once.
Source: spec of nvidia/NVLM-D-72B (HF layout), Megatron-LM's converter for the padding.
"""

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nvlm_runtime.config import NVLMConfig, from_hf, to_hf
from nvlm_runtime.model import NVLMModel

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its place in a parameter.

    rows: the part [start, end) of the parameter's first axis it fills, None for all of it. padded: the axis that
    carries dummy heads in the file (None where there are none), cut into `thirds` parts that are padded one by one.
    """

    parameter: str
    shape: tuple[int, ...]
    rows: tuple[int, int] | None = None
    padded: int | None = None
    thirds: int = 1


def _entries(model: NVLMModel) -> dict[str, Entry]:
    """File name of every tensor to its entry, in file order."""
    config = model.config
    text, vision = config.text, config.vision
    dummy = vision.num_dummy_heads * vision.head_dim
    entries: dict[str, Entry] = {}

    def split(parameter: str, shape: tuple[int, ...], joined: str, parts: Mapping[str, int]) -> None:
        at = 0
        for part, rows in parts.items():
            name = _file_name(parameter.replace(joined, part))
            entries[name] = Entry(parameter, (rows, *shape[1:]), (at, at + rows))
            at += rows

    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    for parameter, tensor in model.named_parameters():
        shape = tuple(tensor.shape)
        if ".qkv_proj." in parameter:
            split(parameter, shape, "qkv_proj", {"q_proj": q, "k_proj": kv, "v_proj": kv})
        elif ".mlp.gate_up_proj." in parameter:
            split(parameter, shape, "gate_up_proj", dict.fromkeys(("gate_proj", "up_proj"), shape[0] // 2))
        elif ".attn.qkv." in parameter:
            padded = (shape[0] + 3 * dummy, *shape[1:])
            entries[parameter] = Entry(parameter, padded, padded=0, thirds=3)
        elif ".attn.q_norm." in parameter or ".attn.k_norm." in parameter:
            entries[parameter] = Entry(parameter, (shape[0] + dummy,), padded=0)
        elif parameter.endswith(".attn.proj.weight"):
            entries[parameter] = Entry(parameter, (shape[0], shape[1] + dummy), padded=1)
        else:
            entries[_file_name(parameter)] = Entry(parameter, shape)
    return entries


def parameter_counts(config: NVLMConfig) -> dict[str, int]:
    """Parameters of a checkpoint's parts and their total, dummy heads included, without allocating any."""
    with torch.device("meta"):
        entries = _entries(NVLMModel(config))
    counts = dict.fromkeys(("vision", "projector", "decoder", "cross"), 0)
    for name, entry in entries.items():
        part = (
            "cross"
            if ".cross_attn." in name
            else {"vision_model": "vision", "mlp1": "projector"}.get(name.split(".")[0])
        )
        counts[part or "decoder"] += math.prod(entry.shape)
    return counts | {"total": sum(counts.values())}


def _place(parameter: Tensor, entry: Entry) -> Tensor:
    return parameter if entry.rows is None else parameter[slice(*entry.rows)]


def _file_name(parameter: str) -> str:
    if parameter.startswith("language_model.") and not parameter.startswith("language_model.lm_head."):
        return parameter.replace("language_model.", "language_model.model.", 1)
    return parameter


def _crop(tensor: Tensor, entry: Entry, size: int, name: str) -> Tensor:
    """Cuts the dummy heads off: `size` is the parameter's own length of the padded axis. ValueError if not zero."""
    axis, part = entry.padded, tensor.shape[entry.padded] // entry.thirds
    pieces = tensor.split(part, dim=axis)
    real = size // entry.thirds
    for piece in pieces:
        if piece.narrow(axis, real, part - real).count_nonzero():
            raise ValueError(f"{name}: the padding heads (from {real} of {part}) must be zero, and are not")
    return torch.cat([piece.narrow(axis, 0, real) for piece in pieces], dim=axis)


def _pad(tensor: Tensor, entry: Entry) -> Tensor:
    axis = entry.padded
    extra = (entry.shape[axis] - tensor.shape[axis]) // entry.thirds
    pieces = []
    for piece in tensor.chunk(entry.thirds, dim=axis):
        shape = list(piece.shape)
        shape[axis] = extra
        pieces += [piece, piece.new_zeros(shape)]
    return torch.cat(pieces, dim=axis)


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


def _some(names: Iterator[str] | set[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _check_index(folder: Path, where: Mapping[str, Path]) -> None:
    if not (folder / INDEX).is_file():
        return
    weight_map = read_json(folder / INDEX)["weight_map"]
    wrong = {name for name, file in weight_map.items() if name not in where or where[name].name != file}
    if wrong:
        raise ValueError(f"{INDEX} names tensors its shards do not hold: {_some(wrong)}")
    if unlisted := set(where) - set(weight_map):
        raise ValueError(f"{INDEX} does not list tensors of its shards: {_some(unlisted)}")


def _dummy_heads(config: NVLMConfig, shapes: Mapping[str, tuple[int, ...]]) -> NVLMConfig:
    """The number of dummy heads, which config.json does not give, from the rows of the first qkv weight."""
    vision = config.vision
    rows = (*shapes.get("vision_model.encoder.layers.0.attn.qkv.weight", ()), 3 * vision.hidden_size)[0]
    dummy = rows // (3 * vision.head_dim) - vision.num_attention_heads
    if rows % (3 * vision.head_dim) or dummy < 0:
        raise ValueError(
            f"vision_model.encoder.layers.0.attn.qkv.weight has {rows} rows, "
            f"expected 3 x {vision.head_dim} x the heads, of which {vision.num_attention_heads} are real"
        )
    return replace(config, vision=replace(vision, num_dummy_heads=dummy))


def load(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[NVLMModel, dict[str, Any]]:
    """A model in eval mode and its config.json, from a checkpoint folder.

    dtype: None takes config.json's "torch_dtype", or the file's own where it has none. Raises FileNotFoundError
    for absent files; ValueError for missing, unexpected or wrongly shaped tensors, non-zero padding heads, a damaged
    file or a config this runtime does not know, each by name, before memory is allocated (padding: while it streams).
    """
    values = read_json(folder / "config.json")
    config = from_hf(values)
    with ExitStack() as stack:
        files = {path: _open(path, stack) for path in _shards(folder)}
        where = {name: path for path, file in files.items() for name in file.keys()}
        shapes = {name: tuple(files[path].get_slice(name).get_shape()) for name, path in where.items()}
        _check_index(folder, where)
        if "num_dummy_heads" not in values["vision_config"]:
            config = _dummy_heads(config, shapes)
        with torch.device("meta"):
            model = NVLMModel(config)
        entries = _entries(model)
        if missing := set(entries) - set(where):
            raise ValueError(f"{folder} misses {len(missing)} tensors: {_some(missing)}")
        if unexpected := set(where) - set(entries):
            raise ValueError(f"{folder} holds {len(unexpected)} unexpected tensors: {_some(unexpected)}")
        for name, entry in entries.items():
            if shapes[name] != entry.shape:
                raise ValueError(f"{name} has shape {list(shapes[name])}, expected {list(entry.shape)}")
            stored = files[where[name]].get_slice(name).get_dtype()
            if stored not in DTYPES:
                raise ValueError(f"{name} is stored as {stored}, expected one of {', '.join(DTYPES)}")
        first = next(iter(entries))
        dtype = dtype or _dtype(values, files[where[first]].get_slice(first).get_dtype())
        model = model.to(dtype).to_empty(device=device)
        if config.text.tie_word_embeddings:
            model.language_model.tie()
        parameters = dict(model.named_parameters())
        for name in sorted(entries, key=lambda name: (str(where[name]), name)):
            entry, target = entries[name], parameters[entries[name].parameter]
            tensor = files[where[name]].get_tensor(name)
            if entry.padded is not None:
                tensor = _crop(tensor, entry, target.shape[entry.padded], name)
            with torch.no_grad():
                _place(target, entry).copy_(tensor)
    return model.eval(), values


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
) -> None:
    """Writes config.json and the weights in the published layout, dummy heads put back.

    dtype: of the files, the parameters' own when None. run_dtype: what config.json asks a loader to compute in, the
    files' when None. Every file is written under a temporary name first. An index and shards that stood in the
    folder and are not written anew are deleted at the end, so that no loader mixes two checkpoints. Raises ValueError
    for a quantised model: the layout has no place for it.
    """
    if any(buffer.dtype == torch.int8 for buffer in model.buffers()):
        raise ValueError("save: expected floating weights, got a quantised model: save it before quantize_vision")
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(model.named_parameters())
    entries = _entries(model)
    dtype = dtype or next(iter(parameters.values())).dtype
    shards: list[list[str]] = [[]]
    used = 0
    for name, entry in entries.items():
        size = math.prod(entry.shape) * dtype.itemsize
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
        tensors = {name: _to_file(parameters[entries[name].parameter], entries[name], dtype) for name in shard}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / f"{file}.partial", metadata={"format": "pt"})
        (folder / f"{file}.partial").rename(folder / file)
    run_dtype = str(run_dtype or dtype).removeprefix("torch.")
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        (folder / INDEX).unlink(missing_ok=True)
    for stale in set(folder.glob("model*.safetensors")) - {folder / name for name in names}:
        stale.unlink()
    _write_json(folder / "config.json", to_hf(model.config, run_dtype))


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    partial.rename(path)


def _to_file(parameter: Tensor, entry: Entry, dtype: torch.dtype) -> Tensor:
    tensor = _place(parameter.detach(), entry).to("cpu", dtype)
    return (_pad(tensor, entry) if entry.padded is not None else tensor).contiguous().clone()
