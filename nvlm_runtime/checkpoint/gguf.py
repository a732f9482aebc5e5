"""A GGUF file: config, weights and tokenizer of a Llama or Qwen2, by the `gguf` package (extra "gguf").

llama.cpp's converter interleaves the two halves of every head's rotary pairs in the rows of Llama's q and k
(`permute` in convert_hf_to_gguf.py); `GGUFTensor.read` puts them back. Qwen2's stand as they are.
Only byte-level BPE vocabularies ("gpt2") are read; what cuts text before the merges is named by
`tokenizer.ggml.pre`, as llama.cpp's llm_tokenizer_bpe has it.
Sources: the GGUF specification (ggml/docs/gguf.md), llama.cpp's convert_hf_to_gguf.py and llama-vocab.cpp.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from nvlm_runtime.config import TextConfig
from nvlm_runtime.inputs.template import ChatTemplate
from nvlm_runtime.inputs.tokenizer import QWEN2_PATTERN, Tokenizer

if TYPE_CHECKING:
    import gguf

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
NAMES = {  # of a layer, llama.cpp's to transformers'
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4  # token types; 1 is an ordinary token


@dataclass(frozen=True)
class GGUFFile:
    """An open file: `fields` by key, decoded; `tensors` by llama.cpp's names, mapped from the disk."""

    path: Path
    fields: dict[str, Any]
    tensors: "dict[str, gguf.ReaderTensor]"

    def need(self, key: str, kind: type) -> Any:
        """Returns a field of the header.

        Args:
            key: its name.
            kind: the type it must have. An int is taken where a float is expected.

        Raises:
            ValueError: it is absent or of another type.
        """
        value = self.fields.get(key)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ValueError(f"{self.path}: {key} must be {kind.__name__}, got {value!r:.60}")
        return value


@dataclass(frozen=True)
class GGUFTensor:
    """shape: as torch has it. num_heads: of the rows to be put back, 0 where they stand as they are."""

    name: str
    stored: "gguf.ReaderTensor"
    shape: tuple[int, ...]
    num_heads: int

    def read(self) -> Tensor:
        """Dequantised, float32, on the CPU."""
        from gguf.quants import dequantize

        values = np.ascontiguousarray(dequantize(self.stored.data, self.stored.tensor_type), dtype=np.float32)
        tensor = torch.from_numpy(values.reshape(self.shape).copy())
        if self.num_heads:
            pairs = tensor.unflatten(0, (self.num_heads, -1, 2))  # [H, D / 2, 2, ...]
            tensor = pairs.transpose(1, 2).reshape(self.shape)
        return tensor


def open_gguf(path: Path) -> GGUFFile:
    """Reads the header of a GGUF file and maps its tensors.

    Args:
        path: the file.

    Returns:
        The file's fields and tensors.

    Raises:
        ValueError: the file is truncated or no GGUF file, or the package gguf is missing.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError('a GGUF file needs the package gguf: pip install "nvlm-runtime[gguf]"') from error
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file: it does not begin with GGUF")
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except Exception as error:  # the reader indexes a map of the file: what it runs into is of any kind
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    return GGUFFile(path, fields, tensors)


def gguf_config(file: GGUFFile) -> TextConfig:
    """Reads the configuration of the text model in a GGUF file.

    Args:
        file: from `open_gguf`.

    Returns:
        The configuration.

    Raises:
        ValueError: another architecture, scaled rotary positions, or absent keys.
    """
    name = file.need("general.architecture", str)
    if name not in ARCHITECTURES:
        raise ValueError(f"{file.path}: architecture must be {' or '.join(ARCHITECTURES)}, got {name!r}")
    scaling = file.fields.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        raise ValueError(f"{file.path}: scaled rotary positions ({scaling}, rope_freqs) are not read from a GGUF")
    if file.fields.get(f"{name}.expert_count", 0):
        raise ValueError(f"{file.path}: a mixture of experts is no architecture this runtime runs")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError(f"{file.path} misses token_embd.weight")
    heads = file.need(f"{name}.attention.head_count", int)
    hidden = file.need(f"{name}.embedding_length", int)
    kv_heads = file.fields.get(f"{name}.attention.head_count_kv", heads)
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if (size := file.fields.get(f"{name}.{key}", hidden // heads)) != hidden // heads:
            raise ValueError(f"{file.path}: {name}.{key} must be {hidden // heads}, the width of a head, got {size}")
    if not isinstance(kv_heads, int):
        raise ValueError(f"{file.path}: key/value heads must be as many in every layer, got {kv_heads!r:.60}")
    return TextConfig(
        architecture=ARCHITECTURES[name],
        vocab_size=int(embedding.shape[1]),
        hidden_size=hidden,
        intermediate_size=file.need(f"{name}.feed_forward_length", int),
        num_hidden_layers=file.need(f"{name}.block_count", int),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=_decimal(file.need(f"{name}.attention.layer_norm_rms_epsilon", float)),
        rope_theta=_decimal(file.fields.get(f"{name}.rope.freq_base", 10000.0)),
        max_position_embeddings=file.need(f"{name}.context_length", int),
        tie_word_embeddings="output.weight" not in file.tensors,
    )


def _decimal(value: float) -> float:
    """The shortest number that is this float32: 1e-05 and not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def gguf_tensors(file: GGUFFile, config: TextConfig) -> dict[str, GGUFTensor]:
    """Lists the tensors of a GGUF file under transformers' names.

    Args:
        file: from `open_gguf`.
        config: from `gguf_config`.

    Returns:
        Names to tensors, which are dequantised when they are read.

    Raises:
        ValueError: a quantisation that the package gguf cannot undo, or an unknown tensor.
    """
    import gguf

    can: dict[gguf.GGMLQuantizationType, bool] = {}
    found = {}
    for name, stored in file.tensors.items():
        kind = stored.tensor_type
        if kind not in can:
            can[kind] = _is_readable(kind)
        if not can[kind]:
            raise ValueError(f"{file.path}: {name} is quantised as {kind.name}, which the gguf package cannot undo")
        permuted = 0
        if config.architecture == "LlamaForCausalLM" and name.endswith((".attn_q.weight", ".attn_k.weight")):
            permuted = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        shape = tuple(int(size) for size in reversed(stored.shape))
        found[_hf_name(file.path, name)] = GGUFTensor(name, stored, shape, permuted)
    return found


def _is_readable(kind: "gguf.GGMLQuantizationType") -> bool:
    from gguf.constants import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    if kind.name in ("I8", "I16", "I32", "I64"):
        return False
    try:
        plain = {"F32": np.float32, "F16": np.float16, "F64": np.float64}.get(kind.name)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1] if plain is None else 1), plain or np.uint8), kind)
    except (NotImplementedError, KeyError):
        return False
    return True


def _hf_name(path: Path, name: str) -> str:
    *place, kind = name.split(".")
    if len(place) == 1 and place[0] in TOP_NAMES and kind == "weight":
        return f"{TOP_NAMES[place[0]]}.{kind}"
    if len(place) == 3 and place[0] == "blk" and place[2] in NAMES and kind in ("weight", "bias"):
        return f"model.layers.{place[1]}.{NAMES[place[2]]}.{kind}"
    raise ValueError(f"{path} holds {name}, which no Llama or Qwen2 this runtime knows has")


def gguf_tokenizer(file: GGUFFile) -> tuple[Tokenizer, str | None]:
    """Makes the tokenizer of a GGUF file.

    Args:
        file: from `open_gguf`.

    Returns:
        The tokenizer, and the name of the token that begins every prompt or None.

    Raises:
        ValueError: the vocabulary is no byte-level BPE, or its way of cutting text is unknown.
    """
    kind = file.need("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise ValueError(f"{file.path}: only byte-level BPE ('gpt2') tokenizers are read from a GGUF, got {kind!r}")
    tokens = file.need("tokenizer.ggml.tokens", list)
    types = file.fields.get("tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [tuple(merge.split(" ")) for merge in file.need("tokenizer.ggml.merges", list)]
    cut = file.fields.get("tokenizer.ggml.pre", "default")
    if len(types) != len(tokens) or any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{file.path}: {len(tokens)} tokens, {len(types)} types, or a merge of other than two parts")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{file.path}: two tokens of the vocabulary have one name")
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut == "llama-bpe"))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{file.path}: the merges do not fit the vocabulary: {error}") from error
    backend.pre_tokenizer = _pre_tokenizer(file.path, cut)
    if cut == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    for i, (token, each) in enumerate(zip(tokens, types, strict=True)):
        if each in (CONTROL, USER_DEFINED) and not (token.startswith("[PAD") and token.endswith(f"{i}]")):
            backend.add_tokens([AddedToken(token, special=each == CONTROL, normalized=False)])
    begins = file.fields.get("tokenizer.ggml.add_bos_token", cut == "llama-bpe")
    return Tokenizer(backend), _token(file, tokens, "bos") if begins else None


def _pre_tokenizer(path: Path, cut: str) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if cut in ("default", "gpt-2"):
        return gpt2
    if cut == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if cut not in ("qwen2", "llama-bpe"):
        raise ValueError(f"{path}: tokenizer.ggml.pre must be default, gpt-2, smollm, qwen2 or llama-bpe, got {cut!r}")
    pattern = Regex(QWEN2_PATTERN if cut == "qwen2" else LLAMA3_PATTERN)
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), letters])


def _token(file: GGUFFile, tokens: list[str], role: str) -> str | None:
    """The token that "bos" or "eos" stands for. ValueError where its id is none of the vocabulary's."""
    key = f"tokenizer.ggml.{role}_token_id"
    if key not in file.fields:
        return None
    number = file.need(key, int)
    if not 0 <= number < len(tokens):
        raise ValueError(f"{file.path}: {key} must be one of {len(tokens)} tokens, got {number}")
    return tokens[number]


def gguf_template(file: GGUFFile) -> ChatTemplate | None:
    """Reads the chat template of a GGUF file.

    Args:
        file: from `open_gguf`.

    Returns:
        The template, with the tokens it may name; None without one.

    Raises:
        ValueError: it does not compile.
    """
    source = file.fields.get("tokenizer.chat_template")
    if source is None:
        return None
    tokens = file.need("tokenizer.ggml.tokens", list)
    named = {f"{role}_token": _token(file, tokens, role) for role in ("bos", "eos")}
    return ChatTemplate(source, {name: token for name, token in named.items() if token is not None})
