"""Small text models as their makers publish them: transformers' folders, and GGUF files written by the gguf package."""

from pathlib import Path

import numpy as np
import torch
import transformers

from tests.inputs.qwen import tiny_backend
from tests.small import randomise

IMAGE_SLOT = 3
SIZES = dict(
    vocab_size=317,  # as many as the tiny vocabulary
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    rms_norm_eps=1e-5,
)
FAMILIES = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}
GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MESSAGE = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
CHAT = (
    "{% for message in messages %}" + MESSAGE + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% endif %}"
)


def text_model(family: str, tied: bool = False, **sizes) -> transformers.PreTrainedModel:
    make_config, make_model = FAMILIES[family]
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    model = randomise(make_model(make_config(**{**SIZES, **sizes}, tie_word_embeddings=tied, rope_parameters=rope)))
    model.lm_head.weight.data[IMAGE_SLOT] = 0  # never drawn, as no trained model draws it
    return model


def save_text_model(model: transformers.PreTrainedModel, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    tiny_backend().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What convert_hf_to_gguf.py does to the rows of Llama's q and k."""
    return weight.reshape(num_heads, 2, len(weight) // num_heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def save_gguf(
    model: transformers.PreTrainedModel, path: Path, quantised: str = "F32", **fields
) -> dict[str, torch.Tensor]:
    """Writes the model. fields: override metadata, None leaves one out; `tensors=` what a function makes of the whole
    dict of arrays. Returns transformers' state dict with the numbers that the file really holds.
    """
    import gguf

    config = model.config
    name = config.model_type
    kind = gguf.GGMLQuantizationType[quantised]
    state, arrays = {}, {}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy().astype(np.float32)
        stem, _, end = key.removeprefix("model.").rpartition(".")
        if stem.startswith("layers."):
            _, layer, rest = stem.split(".", 2)
            target = f"blk.{layer}.{GGUF_NAMES[rest]}.{end}"
        else:
            target = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[stem] + f".{end}"
        if array.ndim > 1:
            array = gguf.quants.dequantize(gguf.quants.quantize(array, kind), kind).reshape(array.shape)
        state[key] = torch.from_numpy(array.copy())
        if name == "llama" and target.endswith(("attn_q.weight", "attn_k.weight")):
            heads = config.num_attention_heads if "attn_q" in target else config.num_key_value_heads
            array = interleaved(array, heads)
        arrays[target] = (gguf.quants.quantize(array, kind), kind) if array.ndim > 1 else (array, None)
    arrays = fields.pop("tensors", lambda found: found)(arrays)
    backend = tiny_backend()
    vocab = sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1])
    added = backend.get_added_tokens_decoder()
    metadata = {
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [token for token, _ in vocab],
        "tokenizer.ggml.token_type": [3 if number in added else 1 for _, number in vocab],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in _merges(backend)],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": CHAT,
    } | fields
    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", name))
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for target, (array, raw) in arrays.items():
        writer.add_tensor(target, array, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


def _merges(backend) -> list[tuple[str, str]]:
    import json

    merges = json.loads(backend.to_str())["model"]["merges"]
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
