"""The language model: a Qwen2 or Llama decoder, with gated cross-attention in the layers the config lists.

B requests, T query tokens, S cached tokens, H heads, Hkv kv heads, D head_dim, C hidden_size.
q, k, v share one weight, gate and up another; `weights` joins the checkpoint's. `prefill` runs a whole prompt,
`decode` a step of it; both return hidden states, and `logits` is asked only for the rows that need them.
Source: transformers' Qwen2 and Llama. Cross-attention placement: NVLM paper figure 3 ("inside": between a layer's
self-attention and its feed-forward) or Flamingo ("before" the layer).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_runtime.cache import CrossKV, KVCache
from nvlm_runtime.config import CrossConfig, TextConfig
from nvlm_runtime.cross import GatedCrossAttention
from nvlm_runtime.rotary import Rotary, rotate
from nvlm_runtime.vision import RMSNorm


@dataclass(frozen=True)
class CrossView:
    """What the rows of one call see of the images: intervals [B, T, 2] over the keys of `kv`."""

    kv: CrossKV
    intervals: Tensor


class SelfAttention(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.sizes = [n * config.head_dim for n in (config.num_attention_heads, *[config.num_key_value_heads] * 2)]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=config.qkv_bias)
        self.o_proj = nn.Linear(self.sizes[0], config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], past: "Past") -> Tensor:
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in self.qkv_proj(x).split(self.sizes, dim=-1))
        cos, sin = (t.to(x.dtype) for t in rotary)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = past.extend(k, v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, T, D], [B, Hkv, S, D]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=past.mask, is_causal=past.is_causal, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    def __init__(self, config: TextConfig, cross: CrossConfig | None):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.cross_before = cross is not None and cross.placement == "before"
        self.cross_attn = GatedCrossAttention(config, cross) if cross else None

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], past: "Past", image: tuple[Tensor, Tensor, Tensor] | None
    ) -> Tensor:
        """image: this layer's k, v and the intervals, or None where nothing is to be seen."""
        if image is not None and self.cross_before:
            x = self.cross_attn(x, *image)
        x = x + self.self_attn(self.input_layernorm(x), rotary, past)
        if image is not None and not self.cross_before:
            x = self.cross_attn(x, *image)
        return x + self.mlp(self.post_attention_layernorm(x))


class Past:
    """The keys and values a call attends to: its own, or a cache it writes to and reads from.

    mask: bool [B, 1, T, S] or None; a call without a cache is plainly causal.
    """

    def __init__(self, cache: KVCache | None, positions: Tensor, visible: int):
        self.cache = cache
        self.positions = positions
        self.visible = visible
        self.layer = 0
        length = positions.shape[1]
        self.is_causal = cache is None or (length > 1 and visible == length)
        self.mask = None
        if not self.is_causal and not (len(positions) == 1 and length == 1):
            slots = torch.arange(visible, device=positions.device)
            self.mask = (slots <= positions[..., None])[:, None]  # slot s holds position s

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.cache is None:
            return k, v
        self.cache.write(self.layer, self.positions, k, v)
        k, v = self.cache.k[self.layer, :, : self.visible], self.cache.v[self.layer, :, : self.visible]
        self.layer += 1
        return k, v


class Decoder(nn.Module):
    """Embeddings [B, T, C] and positions [B, T] to hidden states [B, T, C]."""

    def __init__(self, config: TextConfig, cross: CrossConfig | None):
        super().__init__()
        self.config = config
        self.cross_layers = cross.layers if cross else ()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Layer(config, cross if i in self.cross_layers else None) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config)
        if config.tie_word_embeddings:
            self.tie()

    def tie(self) -> None:
        """Makes the head share the embedding's weight; `to_empty` parts them."""
        self.lm_head.weight = self.embed_tokens.weight

    def cross_kv(self, embeds: Tensor) -> CrossKV:
        """Image keys and values of all gated layers from their inputs [B, S, C]."""
        pairs = [self.layers[i].cross_attn.keys_values(embeds) for i in self.cross_layers]
        k, v = (torch.stack(side) for side in zip(*pairs, strict=True))
        return CrossKV(k, v)

    def _run(self, x: Tensor, positions: Tensor, past: Past, view: CrossView | None) -> Tensor:
        rotary = self.rotary(positions)
        gated = 0
        for layer in self.layers:
            image = None
            if view is not None and layer.cross_attn is not None:
                image = view.kv.k[gated], view.kv.v[gated], view.intervals
                gated += 1
            x = layer(x, rotary, past, image)
        return self.norm(x)

    def prefill(self, x: Tensor, positions: Tensor, cache: KVCache | None, view: CrossView | None = None) -> Tensor:
        """A prompt from position 0: x [B, T, C], positions [B, T]. Rows may be padded on the right."""
        return self._run(x, positions, Past(cache, positions, x.shape[1]), view)

    def decode(
        self, x: Tensor, positions: Tensor, cache: KVCache, visible: int, view: CrossView | None = None
    ) -> Tensor:
        """A step behind a cache: x [B, T, C] at positions [B, T], all below `visible`, the slots that are read."""
        return self._run(x, positions, Past(cache, positions, visible), view)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)
