"""What a CPU computes natively: attention of prompts and tiles, int8 tiles, and the decoder's step in one call, at
the memory's speed.

Weights are read where the model holds them; norms, biases and gates, which are small, are copied to fp32, so a decoder
whose weights change needs a new `NativeDecoder`. Activations stay in fp32 from the embedding to the logits: it rounds
less than the eager step does. int8 and int4 weights multiply 16-bit integers: activations are rounded to 1/65534 of the
largest of 512; where the model is fp32, two integers each, to 1/2^31 of it.
"""

import ctypes
import math
import threading

import torch
from torch import Tensor, nn

from nvlm_kernels import native
from nvlm_runtime.model.cache import CrossKV, KVCache
from nvlm_runtime.model.cross import GatedCrossAttention
from nvlm_runtime.model.decoder import Decoder, DecoderLayer
from nvlm_runtime.model.quantize import Int8DynamicLinear
from nvlm_runtime.model.vision import Attention
from nvlm_runtime.model.weight_only import Int4Linear, Int8Linear

KINDS = {torch.float32: native.KIND_F32, torch.bfloat16: native.KIND_BF16}
FFNS = {"none": 0, "swiglu": 1, "gelu4x": 2}


def use_library(model: nn.Module, library: native.NativeLibrary | None) -> None:
    """Lets prompts and tiles go through the library's attention where the CPU has it (`native_attention.takes`), and
    int8 products through its passes; of no library, through what they went before. model: or a vision encoder alone.
    """
    for module in model.modules():
        if isinstance(module, Attention | Int8DynamicLinear):
            module.native = library
        elif isinstance(module, Decoder) and (
            library is not None or isinstance(module.attention, native.NativeLibrary)
        ):
            module.attention = library or "sdpa"


class NativeDecoder:
    """A decoder's weights as the native step wants them. library: as `nvlm_kernels.native.library` loads it.

    Raises ValueError for a decoder that is not on a CPU or whose dtype is neither fp32 nor bf16.
    """

    def __init__(self, decoder: Decoder, library: native.NativeLibrary):
        self._dll = library.dll
        self._kept: list[Tensor] = []  # what the pointers below point to
        self._scratch: dict[int, Tensor] = {}
        self._lock = threading.Lock()  # of the scratch: batches may step in several threads
        self._parts = 2 if decoder.embed_tokens.weight.dtype == torch.float32 else 1
        config = decoder.config
        freqs, scale = decoder.rotary.frequencies(torch.device("cpu"))
        self._layers = (native.NativeLayer * config.num_hidden_layers)(
            *(self._layer(layer, decoder, i) for i, layer in enumerate(decoder.layers))
        )
        self._model = native.NativeModel(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            eps=config.rms_norm_eps,
            rope_scale=scale,
            norm=self._vector(decoder.norm.weight),
            inv_freq=self._vector(freqs),
            embed=self._matrix("embed_tokens", decoder.embed_tokens.weight),
            head=self._linear("lm_head", decoder.lm_head),
            layers=self._layers,
        )
        self.vocab_size = config.vocab_size

    def step(
        self,
        token: Tensor,
        position: Tensor,
        active: Tensor,
        cache: KVCache,
        cross: CrossKV | None,
        intervals: Tensor | None,
        logits: Tensor,
    ) -> None:
        """Computes the logits of every row's token and writes its keys and values into the cache.

        All tensors are contiguous (the caches in their last two dimensions) and on the CPU. Positions and intervals
        must be inside the caches: nothing checks them here.

        Args:
            token: int64 [B] or [B, 1].
            position: int64, shaped as token.
            active: bool [B]. An inactive row writes nothing but logits that mean nothing.
            cache: keys and values of self-attention.
            cross: image keys and values.
            intervals: int64 [B, 1, 2], the image keys that each row sees; None where no row sees an image.
            logits: fp32 [B, V], overwritten.
        """
        rows = len(token)
        with self._lock:
            step = native.NativeStep(
                rows=rows,
                token=token.data_ptr(),
                position=position.data_ptr(),
                intervals=intervals.data_ptr() if intervals is not None else None,
                active=active.data_ptr(),
                cache=_cache(cache.k, cache.v),
                cross=_cache(cross.k, cross.v) if intervals is not None else native.NativeCache(),
                logits=logits.data_ptr(),
                scratch=self._room(rows, max(cache.capacity, cross.k.shape[2] if intervals is not None else 0)),
            )
            self._dll.nvlm_step(ctypes.byref(self._model), ctypes.byref(step), torch.get_num_threads())

    def _room(self, rows: int, longest: int) -> int:
        """Scratch for a batch size."""
        size = self._dll.nvlm_scratch(ctypes.byref(self._model), rows, longest)
        if rows not in self._scratch or len(self._scratch[rows]) < size:
            self._scratch[rows] = torch.empty(size)
        return self._scratch[rows].data_ptr()

    def _layer(self, layer: DecoderLayer, decoder: Decoder, index: int) -> native.NativeLayer:
        name = f"layers.{index}"
        found = native.NativeLayer(
            input_norm=self._vector(layer.input_layernorm.weight),
            post_norm=self._vector(layer.post_attention_layernorm.weight),
            qkv=self._linear(f"{name}.qkv_proj", layer.self_attn.qkv_proj),
            o=self._linear(f"{name}.o_proj", layer.self_attn.o_proj),
            gate_up=self._linear(f"{name}.gate_up_proj", layer.mlp.gate_up_proj),
            down=self._linear(f"{name}.down_proj", layer.mlp.down_proj),
            cross=-1,
        )
        if layer.cross_attn is not None:
            found.cross = decoder.cross_layers.index(index)
            found.before = layer.cross_before
            self._gated(found, layer.cross_attn, f"{name}.cross_attn")
        return found

    def _gated(self, found: native.NativeLayer, cross: GatedCrossAttention, name: str) -> None:
        found.ffn = FFNS[cross.ffn]
        found.cross_norm = self._vector(cross.norm.weight)
        found.cross_q = self._linear(f"{name}.q_proj", cross.q_proj)
        found.cross_o = self._linear(f"{name}.o_proj", cross.o_proj)
        found.gate = math.tanh(cross.gate.item())
        if cross.ffn == "none":
            return
        found.ffn_norm = self._vector(cross.ffn_norm.weight)
        found.ffn_gate = math.tanh(cross.ffn_gate.item())
        if cross.ffn == "swiglu":
            found.ffn_in = self._linear(f"{name}.gate_proj", cross.gate_proj)
            found.ffn_up = self._linear(f"{name}.up_proj", cross.up_proj)
            found.ffn_out = self._linear(f"{name}.down_proj", cross.down_proj)
        else:
            found.ffn_in = self._linear(f"{name}.fc1", cross.fc1)
            found.ffn_out = self._linear(f"{name}.fc2", cross.fc2)

    def _linear(self, name: str, linear: nn.Module) -> native.NativeMatrix:
        if not isinstance(linear, Int8Linear | Int4Linear):
            return self._matrix(name, linear.weight, linear.bias)
        data, kind = (
            (linear.weight, native.KIND_INT8) if isinstance(linear, Int8Linear) else (linear.nibbles, native.KIND_INT4)
        )
        self._kept += [data, linear.scale]
        bias = self._vector(linear.bias) if linear.bias is not None else None
        return native.NativeMatrix(
            data.data_ptr(), linear.scale.data_ptr(), bias, linear.out_features, linear.in_features, kind, self._parts
        )

    def _matrix(self, name: str, weight: Tensor, bias: Tensor | None = None) -> native.NativeMatrix:
        if weight.device.type != "cpu" or weight.dtype not in KINDS:
            raise ValueError(
                f"native decoding takes float32 and bfloat16 on a CPU, {name} is {weight.dtype} on {weight.device}"
            )
        if not weight.is_contiguous():
            raise ValueError(f"native decoding reads whole rows, {name} is not contiguous")
        self._kept.append(weight)
        rows, cols = weight.shape
        at = self._vector(bias) if bias is not None else None
        return native.NativeMatrix(weight.data_ptr(), None, at, rows, cols, KINDS[weight.dtype], 0)

    def _vector(self, vector: Tensor) -> int:
        self._kept.append(vector.detach().to("cpu", torch.float32, copy=True).contiguous())
        return self._kept[-1].data_ptr()


def _cache(k: Tensor, v: Tensor) -> native.NativeCache:
    """Of k, v [layers, B, S, Hkv, D], whose last two dimensions are dense."""
    return native.NativeCache(k.data_ptr(), v.data_ptr(), *k.stride()[:3], KINDS[k.dtype])
