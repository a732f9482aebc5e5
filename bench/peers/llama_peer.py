"""The same decoder in llama.cpp: our weights written as GGUF in bf16, q8_0 and q4_0, each read by llama-cpp-python.

Every matrix is of the one type, the head's too, so a step reads as many bytes as ours does, but for q8_0, 6 % more (8.5
bits a weight); its cache is fp16. Built from source, llama-cpp-python takes what this machine's processor has:
CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python. Steps are single rows.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from nvlm_runtime.model.model import NVLMModel

KINDS = ("bf16", "q8_0", "q4_0")


def write_gguf(model: NVLMModel, kind: str, path: Path) -> int:
    """Returns the bytes of weights that a step reads. Raises ValueError for what llama.cpp has no architecture for."""
    text, decoder = model.config.text, model.language_model
    if not text.qkv_bias or text.rope_scaling or model.config.cross:
        raise ValueError("llama.cpp is compared on NVLM-D over Qwen2: a plain decoder with biases, no scaled rotary")
    import gguf

    quant = gguf.GGMLQuantizationType[kind.upper()]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(text.context)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_rope_freq_base(text.rope_theta)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_vocab_size(text.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def vector(name: str, value: Tensor) -> int:
        writer.add_tensor(name, value.detach().float().numpy())
        return 4 * value.numel()

    def matrix(name: str, value: Tensor) -> int:
        packed = gguf.quants.quantize(value.detach().float().numpy(), quant)
        writer.add_tensor(name, packed, raw_dtype=quant)
        return packed.nbytes

    read = matrix("token_embd.weight", decoder.embed_tokens.weight)
    if decoder.lm_head.weight is not decoder.embed_tokens.weight:
        read = matrix("output.weight", decoder.lm_head.weight)
    read += vector("output_norm.weight", decoder.norm.weight)
    sizes = [heads * text.head_dim for heads in (text.num_attention_heads, *[text.num_key_value_heads] * 2)]
    for i, layer in enumerate(decoder.layers):
        at, qkv = f"blk.{i}.", layer.self_attn.qkv_proj
        read += vector(at + "attn_norm.weight", layer.input_layernorm.weight)
        read += vector(at + "ffn_norm.weight", layer.post_attention_layernorm.weight)
        for name, weight, bias in zip("qkv", qkv.weight.split(sizes), qkv.bias.split(sizes), strict=True):
            read += matrix(f"{at}attn_{name}.weight", weight)
            read += vector(f"{at}attn_{name}.bias", bias)
        read += matrix(at + "attn_output.weight", layer.self_attn.o_proj.weight)
        for name, weight in zip(("gate", "up"), layer.mlp.gate_up_proj.weight.chunk(2), strict=True):
            read += matrix(f"{at}ffn_{name}.weight", weight)
        read += matrix(at + "ffn_down.weight", layer.mlp.down_proj.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read


@cache
def _silent():
    """Where llama.cpp's log, which tells of every tensor, goes: nowhere."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


class LlamaRow:
    """One row of a GGUF file's model, up to `capacity` tokens. Raises ImportError without llama-cpp-python."""

    def __init__(self, path: Path, capacity: int):
        import llama_cpp

        self.api, self.length = llama_cpp, 0
        self.api.llama_log_set(_silent(), None)
        params = self.api.llama_model_default_params()
        model = self.api.llama_model_load_from_file(str(path).encode(), params)
        if not model:
            raise ValueError(f"llama.cpp could not load {path}")
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_threads, params.n_threads_batch = capacity, *[torch.get_num_threads()] * 2
        self.context = self.api.llama_init_from_model(model, params)
        if not self.context:
            raise ValueError(f"llama.cpp could not make room for {capacity} tokens of {path}")
        self.vocab_size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(model))
        self.memory = self.api.llama_get_memory(self.context)

    def step(self, context: int) -> Callable[[], None]:
        """A step behind context - 1 tokens, any: what it costs does not depend on them. Leaves the cache as it was."""
        if self.length > context - 1:
            self.api.llama_memory_seq_rm(self.memory, 0, context - 1, -1)
            self.length = context - 1
        while self.length < context - 1:
            self._decode(min(512, context - 1 - self.length))

        def step() -> None:
            self._decode(1)
            self.api.llama_memory_seq_rm(self.memory, 0, context - 1, -1)
            self.length -= 1

        return step

    def _decode(self, num: int) -> None:
        batch = self.api.llama_batch_init(num, 0, 1)
        batch.n_tokens = num
        for i in range(num):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = (5 + i) % self.vocab_size, self.length + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == num - 1
        failed = self.api.llama_decode(self.context, batch)
        self.api.llama_synchronize(self.context)
        self.api.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama.cpp could not decode {num} tokens behind {self.length}: {failed}")
        self.length += num
