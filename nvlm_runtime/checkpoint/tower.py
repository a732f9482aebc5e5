"""A vision tower to build an NVLM on: one that was trained, or a random one of given sizes.

InternViT's weights bear the same names everywhere: under `vision_model.` in NVLM's and InternVL's checkpoints, bare in
a checkpoint of the tower alone.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nvlm_runtime.checkpoint.weights import open_tensors, read_json, with_dummy_heads
from nvlm_runtime.config import VisionConfig, vision_from_hf
from nvlm_runtime.presets import INTERNVIT_6B, INTERNVIT_300M, MICRO_VISION

RANDOM = "random:"
SIZES = {"micro": MICRO_VISION, "300m": INTERNVIT_300M, "6b": replace(INTERNVIT_6B, num_dummy_heads=0)}


@dataclass(frozen=True)
class Tower:
    """tensors: slices by their names in an NVLM checkpoint, None for a tower that is still to be drawn."""

    name: str
    config: VisionConfig
    ps_version: str
    tensors: Mapping[str, Any] | None


def open_tower(source: str | Path, stack: ExitStack) -> Tower:
    """A checkpoint folder (NVLM's, InternVL's or InternViT's), or "random:" and sizes.

    "random:micro", "random:300m" and "random:6b" are published sizes; "random:hidden_size=64,image_size=64" is micro's
    with other fields of `VisionConfig`. Files stay open as long as the stack. Raises FileNotFoundError or ValueError
    naming what is absent, damaged or not understood.
    """
    if str(source).startswith(RANDOM):
        return Tower(str(source), _sizes(str(source).removeprefix(RANDOM)), "v2", None)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"no vision tower {str(source)!r}: expected a checkpoint folder, or {RANDOM}SIZES")
    values = read_json(folder / "config.json")
    alone = "vision_config" not in values
    if values.get("select_layer", -1) != -1:
        raise ValueError(f"{folder}: select_layer must be -1, the last layer, got {values['select_layer']!r}")
    tensors = open_tensors(folder, stack)
    prefix = "" if alone else "vision_model."
    found = {f"vision_model.{name.removeprefix(prefix)}": t for name, t in tensors.items() if name.startswith(prefix)}
    if "vision_model.embeddings.class_embedding" not in found:
        raise ValueError(f"{folder} holds no InternViT: {prefix}embeddings.class_embedding is not among its tensors")
    vision = values if alone else values["vision_config"]
    config = vision_from_hf(vision)
    if "num_dummy_heads" not in vision:
        config = with_dummy_heads(config, {name: tuple(tensor.get_shape()) for name, tensor in found.items()})
    version = values.get("ps_version", "v2")
    if version not in ("v1", "v2"):
        raise ValueError(f"{folder}: ps_version must be v1 or v2, got {version!r}")
    return Tower(folder.name, config, version, found)


def _sizes(words: str) -> VisionConfig:
    if words in SIZES:
        return SIZES[words]
    kinds = {field.name: type(getattr(MICRO_VISION, field.name)) for field in fields(VisionConfig)}
    given = {}
    for word in words.split(","):
        name, _, value = word.partition("=")
        if kinds.get(name) is not int or not value.isdecimal() or int(value) < (name != "num_dummy_heads"):
            known = ", ".join(name for name, kind in kinds.items() if kind is int)
            raise ValueError(f"--vision {RANDOM} takes {', '.join(SIZES)}, or NAME=SIZE of {known}; got {word!r}")
        given[name] = int(value)
    return replace(MICRO_VISION, **given)
