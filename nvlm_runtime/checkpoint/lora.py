"""LoRA on any part of a model: added for training, merged, and kept in PEFT's files.

The linears of a model by the names they have in a checkpoint, which are PEFT's names for them too:

    vision      vision_model.encoder.layers.N.{attn.qkv, attn.proj, mlp.fc1, mlp.fc2}
    projector   mlp1.{1, 3}
    cross       language_model.model.layers.N.cross_attn.{q_proj, k_proj, v_proj, o_proj, ...}
    decoder     language_model.model.layers.N.{self_attn.{q,k,v,o}_proj, mlp.{gate,up,down}_proj}

In memory q, k and v are one weight, and gate and up: `AdaptedLinear` holds an adapter for each. The vision encoder's
qkv and proj are padded with dummy heads in a checkpoint, so their adapters are padded with zeros in the file.
Embeddings and the head are not adapted. An adapter of the decoder alone may also bear the names of the bare text model
(`model.layers.N...`): it then fits the Qwen2 or Llama the NVLM was built on. Both kinds are read.
Sources: LoRA (arXiv 2106.09685); PEFT's LoraConfig, save_and_load.py and tuners/lora/layer.py.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from nvlm_runtime.checkpoint.tensors import Entry, file_entries
from nvlm_runtime.checkpoint.weights import DTYPES, read_json, some
from nvlm_runtime.model.adapter import AdaptedLinear, LoraConfig, Rows
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.parts import PARTS, part_of

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, TEXT = "base_model.model.", "language_model."
# of adapter_config.json: what describes the file, chose the linears or drew the first weights, and changes no result
SILENT = set(
    "auto_mapping base_model_name_or_path revision task_type peft_version inference_mode exclude_modules "
    "layers_to_transform layers_pattern megatron_core qalora_group_size eva_config ensure_weight_tying "
    "runtime_config r lora_alpha lora_dropout use_rslora target_modules peft_type bias init_lora_weights".split()
)


@dataclass(frozen=True)
class _Place:
    """A linear of the checkpoint: `path` and `rows` are where it stands in memory, `part` one of `PARTS`."""

    part: str
    path: str
    rows: Rows
    entry: Entry

    @property
    def shape(self) -> tuple[int, int]:
        """Out and in features, as the checkpoint has them."""
        return self.entry.shape


def _places(model: NVLMModel) -> dict[str, _Place]:
    """Every linear that can be adapted, by its name in the checkpoint."""
    if model.group.size > 1:
        raise ValueError("lora: expected a whole model, got one rank's share of a group")
    entries = {name.removesuffix(".weight"): entry for name, entry in file_entries(model).items()}
    shares: dict[str, int] = {}
    for entry in entries.values():
        shares[entry.parameter] = shares.get(entry.parameter, 0) + 1
    modules, places = dict(model.named_modules()), {}
    for name, entry in entries.items():
        path, _, kind = entry.parameter.rpartition(".")
        module = modules[path]
        if kind != "weight" or not isinstance(module, nn.Linear) or name.endswith("lm_head"):
            continue
        rows = (0, module.out_features)
        if shares[entry.parameter] > 1:
            (piece,) = entry.pieces
            rows = (piece.at, piece.at + piece.size)
        places[name] = _Place(part_of(name), path, rows, entry)
    return places


def _is_adapted(model: NVLMModel) -> bool:
    return any(isinstance(module, AdaptedLinear) for module in model.modules())


def _adapt(
    model: NVLMModel,
    chosen: Mapping[str, _Place],
    config: LoraConfig,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    grouped: dict[str, dict[str, Rows]] = {}
    for name, place in chosen.items():
        grouped.setdefault(place.path, {})[name.rpartition(".")[2]] = place.rows
    made = {path: AdaptedLinear(model.get_submodule(path), parts, config, generator) for path, parts in grouped.items()}
    model.requires_grad_(False)
    parameters = []
    for path, layer in made.items():
        model.set_submodule(path, layer)
        parameters += [*layer.lora_A.values(), *layer.lora_B.values()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def add_lora(
    model: NVLMModel,
    targets: Sequence[str],
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    *,
    rslora: bool = False,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """Puts new adapters on a model, in place. They alone require a gradient afterwards.

    A new adapter changes no answer. One inside a gated layer whose gate is 0 gets no gradient.

    Args:
        model: the whole model, neither adapted nor quantised.
        targets: parts ("vision", "projector", "cross", "decoder"), or linears of one ("decoder.q_proj", "vision.fc1"),
            by the last word of their name in the checkpoint.
        rank: inner size of an adapter.
        alpha: the adapter's output is multiplied by alpha / rank.
        dropout: probability on the adapter's input, 0 by default.
        rslora: whether the factor is alpha / sqrt(rank) instead.
        generator: of the first weights, on the CPU; None is torch's own.

    Returns:
        The adapters' parameters.

    Raises:
        ValueError: an unknown target, an invalid size, a model that holds adapters or is quantised, or a rank of a
            group.

    Source: LoRA (arXiv 2106.09685), rsLoRA (arXiv 2312.03732).
    """
    config = LoraConfig(rank, alpha, dropout, rslora)
    if _is_adapted(model):
        raise ValueError("lora: the model holds adapters already: merge them first (merge_lora)")
    places = _places(model)
    known = {f"{place.part}.{name.rpartition('.')[2]}" for name, place in places.items()}
    parts = {word.split(".")[0] for word in known}
    if isinstance(targets, str) or not targets:
        raise ValueError(f"lora: targets must be a list of parts or linears, got {targets!r}")
    if unknown := [target for target in targets if target not in known | parts]:
        raise ValueError(
            f"lora: {unknown[0]!r} is no part of this model that can be adapted: "
            f"expected {', '.join(part for part in PARTS if part in parts)} or one of {', '.join(sorted(known))}"
        )
    chosen = {
        name: place
        for name, place in places.items()
        if {place.part, f"{place.part}.{name.rpartition('.')[2]}"} & set(targets)
    }
    return _adapt(model, chosen, config, generator)


def merge_lora(model: NVLMModel) -> None:
    """Adds the adapters to the weights, in place; rounded once to the weights' dtype.

    Args:
        model: a model with adapters.

    Raises:
        ValueError: the model holds no adapters.
    """
    adapted = {path: module for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    if not adapted:
        raise ValueError("lora: the model holds no adapters to merge")
    for path, module in adapted.items():
        model.set_submodule(path, module.merged())


def save_lora(model: NVLMModel, folder: str | Path, *, text_names: bool = False, base: str | None = None) -> None:
    """Writes the adapters as PEFT does: `CONFIG` and `TENSORS`, each under a temporary name first.

    Args:
        model: a model with adapters.
        folder: made where it does not exist.
        text_names: whether they are named as the bare text model has them.
        base: the checkpoint they belong to, for the file's reader.

    Raises:
        ValueError: the model holds no adapters, or `text_names` where one stands outside the decoder.
    """
    folder = Path(folder)
    if not _is_adapted(model):
        raise ValueError("lora: the model holds no adapters to save")
    tensors, names, config = {}, [], None
    for name, place in _places(model).items():
        layer, word = model.get_submodule(place.path), name.rpartition(".")[2]
        if not isinstance(layer, AdaptedLinear) or word not in layer.parts:
            continue
        if text_names and place.part != "decoder":
            raise ValueError(f"lora: {name} is no linear of the text model, which text_names asks for")
        shown = name.removeprefix(TEXT) if text_names else name
        config = layer.config
        names.append(shown)
        for side, tensor in (("lora_A", layer.lora_A[word]), ("lora_B", layer.lora_B[word])):
            tensors[f"{PREFIX}{shown}.{side}.weight"] = _to_file(tensor, place, side, config.rank)
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if text_names else None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": names,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{TENSORS}.partial", metadata={"format": "pt"})
    (folder / f"{TENSORS}.partial").rename(folder / TENSORS)
    (folder / f"{CONFIG}.partial").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    (folder / f"{CONFIG}.partial").rename(folder / CONFIG)


def _axis_of(place: _Place, side: str) -> bool:
    """Whether this side of the adapter runs along the axis that the file cuts or pads: B its rows, A its columns."""
    return place.entry.axis == (0 if side == "lora_B" else 1)


def _file_shape(place: _Place, side: str, rank: int) -> tuple[int, int]:
    return (rank, place.shape[1]) if side == "lora_A" else (place.shape[0], rank)


def _to_file(tensor: Tensor, place: _Place, side: str, rank: int) -> Tensor:
    tensor = tensor.detach().cpu()
    if not _axis_of(place, side):
        return tensor.clone()
    whole = tensor.new_zeros(_file_shape(place, side, rank))
    axis = place.entry.axis
    for piece in place.entry.pieces:
        part = tensor.narrow(axis, piece.at - (place.rows[0] if axis == 0 else 0), piece.size)
        whole.narrow(axis, piece.start, piece.size).copy_(part)
    return whole


def _from_file(tensor: Tensor, place: _Place, side: str, name: str) -> Tensor:
    """ValueError where B is not zero at a dummy head. A's columns there meet zeros only, whatever they are."""
    if not _axis_of(place, side):
        return tensor
    axis = place.entry.axis
    for start, end in place.entry.padding if side == "lora_B" else ():
        if tensor.narrow(axis, start, end - start).count_nonzero():
            raise ValueError(f"{name}: the rows of padding heads (from {start} to {end}) must be zero, and are not")
    return torch.cat([tensor.narrow(axis, piece.start, piece.size) for piece in place.entry.pieces], axis)


def load_lora(model: NVLMModel, folder: str | Path) -> list[nn.Parameter]:
    """Puts the adapters of a folder on a model, in place, as `add_lora` does.

    Args:
        model: the whole model, neither adapted nor quantised.
        folder: holds `CONFIG` and `TENSORS`.

    Returns:
        The adapters' parameters, to train on.

    Raises:
        FileNotFoundError: the folder or a file does not exist.
        ValueError: a damaged file, a kind of adapter that this runtime does not know (DoRA, trained biases, ranks or
            alphas per linear, ...), a linear that the model lacks, another shape than the model's, or a linear that
            "target_modules" names and the file lacks. The model has not changed then.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter {str(folder)!r}: expected a folder with {CONFIG} and {TENSORS}")
    values = _read_config(folder)
    config = LoraConfig(values["r"], values["lora_alpha"], values["lora_dropout"], values["use_rslora"])
    if _is_adapted(model):
        raise ValueError("lora: the model holds adapters already: merge them first (merge_lora)")
    places = _places(model)
    tensors = _read_tensors(folder)
    chosen: dict[str, _Place] = {}
    for name, tensor in tensors.items():
        module, side = name
        known = module if module in places else TEXT + module
        if known not in places:
            raise ValueError(f"{folder} adapts {module}: that is no linear of this NVLM that can be adapted")
        if (module, "lora_B" if side == "lora_A" else "lora_A") not in tensors:
            raise ValueError(f"{folder}: {module} has a {side} and not the other of the two")
        want = _file_shape(places[known], side, config.rank)
        if tuple(tensor.shape) != want:
            raise ValueError(
                f"{folder}: {module}.{side} has shape {list(tensor.shape)}, expected {list(want)}: rank {config.rank} "
                f"on a weight of {list(places[known].shape)}"
            )
        chosen[known] = places[known]
    if len(chosen) * 2 != len(tensors):
        raise ValueError(f"{folder} names a linear twice, with and without {TEXT}")
    _check_targets(folder, values["target_modules"], {module for module, _ in tensors}, places, values)
    cut = {
        (name, side): _from_file(tensors[given, side], place, side, f"{folder}: {given}.{side}")
        for name, place in chosen.items()
        for given in ((name,) if (name, "lora_A") in tensors else (name.removeprefix(TEXT),))
        for side in ("lora_A", "lora_B")
    }
    parameters = _adapt(model, chosen, config)
    with torch.no_grad():
        for (name, side), tensor in cut.items():
            layer, word = model.get_submodule(chosen[name].path), name.rpartition(".")[2]
            getattr(layer, side)[word].copy_(tensor)
    return parameters


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    values = {"lora_dropout": 0.0, "use_rslora": False, **read_json(path)}
    if values.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type must be 'LORA', got {values.get('peft_type')!r}")
    for key in ("r", "lora_alpha", "target_modules"):
        if values.get(key) is None:
            raise ValueError(f"{path} has no {key!r}")
    if values.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias must be 'none', got {values['bias']!r}: trained biases are not supported")
    if values.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
        raise ValueError(
            f"{path}: init_lora_weights {values['init_lora_weights']!r} changes the base weights: not supported"
        )
    for key, value in values.items():
        if key not in SILENT and value not in (None, False, [], {}):
            raise ValueError(f"{path}: {key} is {value!r:.60}, which this runtime does not support")
    targets = values["target_modules"]
    if not isinstance(targets, str) and not (isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise ValueError(f"{path}: target_modules must be names or one pattern, got {targets!r:.60}")
    return values


def _read_tensors(folder: Path) -> dict[tuple[str, str], Tensor]:
    """(module, "lora_A" or "lora_B") to its tensor."""
    path = folder / TENSORS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {TENSORS}: an adapter has to be saved as safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    tensors = {}
    for name, tensor in found.items():
        match = re.fullmatch(rf"{re.escape(PREFIX)}(.+)\.(lora_[AB])\.weight", name)
        if match is None:
            raise ValueError(f"{path} holds {name}, which is no adapter's lora_A or lora_B")
        if tensor.dtype not in DTYPES.values() or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} must hold finite floating numbers, in one of {', '.join(DTYPES)}")
        tensors[match[1], match[2]] = tensor
    if not tensors:
        raise ValueError(f"{path} holds no adapters")
    return tensors


def _check_targets(
    folder: Path, targets: str | list[str], found: set[str], places: Mapping[str, _Place], values: Mapping[str, Any]
) -> None:
    """What PEFT would have adapted by these targets must be in the file; a cut or filtered file lacks some of it."""
    if values.get("layers_to_transform") is not None or values.get("exclude_modules"):
        return
    names = set(places)
    if not found & names:  # the bare text model's names
        names = {name.removeprefix(TEXT) for name, place in places.items() if place.part == "decoder"}
    if isinstance(targets, str):
        wanted = {name for name in names if re.fullmatch(targets, name)}
    else:
        wanted = {name for name in names if any(name == each or name.endswith(f".{each}") for each in targets)}
    if missing := wanted - found:
        raise ValueError(f"{folder} lacks {len(missing)} of the linears in its target_modules: {some(missing)}")
