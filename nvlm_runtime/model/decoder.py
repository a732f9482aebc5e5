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
from torch.utils.checkpoint import checkpoint

from nvlm_kernels import swiglu
from nvlm_runtime.config import CrossConfig, TextConfig
from nvlm_runtime.model.attention import Attention, FlatPast, PackedPast, Past
from nvlm_runtime.model.cache import CrossKV, KVCache
from nvlm_runtime.model.cross import GatedCrossAttention
from nvlm_runtime.model.rotary import Rotary
from nvlm_runtime.model.vision import RMSNorm
from nvlm_runtime.parallel.group import SOLO, Group, TextShard, VocabularyEmbedding


@dataclass(frozen=True)
class CrossView:
    """What the rows of one call see of the images: intervals [B, T, 2] over the keys of `kv`."""

    kv: CrossKV
    intervals: Tensor


class SelfAttention(nn.Module):
    """Of a rank's heads; one all-reduce."""

    def __init__(self, config: TextConfig, group: Group):
        super().__init__()
        self.group, self.config = group, config
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        size = self.num_heads * config.head_dim
        self.qkv_proj = nn.Linear(
            config.hidden_size, size + 2 * self.num_kv_heads * config.head_dim, bias=config.qkv_bias
        )
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], past: Past | FlatPast | PackedPast) -> Tensor:
        out = past.attend(self._qkv(self.group.spread(x)), angles, self.num_heads, self.num_kv_heads)  # [B, T, H, D]
        return self.group.reduce(self.o_proj(out.flatten(2)))

    def _qkv(self, x: Tensor) -> Tensor:
        """[B, T, (H + 2 Hkv) * D]. Where ranks share a kv head, its gradient is the sum of theirs."""
        config, linear = self.config, self.qkv_proj
        shared = isinstance(config, TextShard) and config.whole.num_key_value_heads < self.group.size
        if not (shared and torch.is_grad_enabled()):
            return linear(x)
        at, num = config.first_kv_head, config.whole.num_key_value_heads
        size = self.num_heads * config.head_dim
        weight, bias = (
            t if t is None else torch.cat([t[:size], self.group.share_gradient(t[size:], at, num)])
            for t in (linear.weight, linear.bias)
        )
        return F.linear(x, weight, bias)


class MLP(nn.Module):
    """Of a rank's inner columns; one all-reduce."""

    def __init__(self, config: TextConfig, group: Group):
        super().__init__()
        self.group = group
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.group.reduce(self.down_proj(swiglu(self.gate_up_proj(self.group.spread(x)))))


class Layer(nn.Module):
    def __init__(self, config: TextConfig, cross: CrossConfig | None, group: Group):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, group)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config, group)
        self.cross_before = cross is not None and cross.placement == "before"
        self.cross_attn = GatedCrossAttention(config, cross, group) if cross else None

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        angles: tuple[Tensor, Tensor],
        past: Past | FlatPast | PackedPast,
        image: tuple[Tensor, Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """The residual stream is x + branch, the last block's output not yet added; returns the next such pair.

        image: this layer's k, v and the intervals, or None where nothing is to be seen.
        """
        if image is not None and self.cross_before:
            x, branch = self.cross_attn(x, branch, *image), None
        x, normed = self.input_layernorm.join(x, branch)
        branch = self.self_attn(normed, angles, past)
        if image is not None and not self.cross_before:
            x, branch = self.cross_attn(x, branch, *image), None
        x, normed = self.post_attention_layernorm.join(x, branch)
        return x, self.mlp(normed)


class Decoder(nn.Module):
    """Embeddings [B, T, C] and positions [B, T] to hidden states [B, T, C].

    config: a rank's own share in a group of several, which all hold the same hidden states. Collectives: two
    all-reduces a layer, one more for a gated layer's attention and one for its feed-forward; one for the embedding; a
    gather in `logits` alone. In training, as many on the way back.
    """

    def __init__(self, config: TextConfig, cross: CrossConfig | None, group: Group = SOLO):
        super().__init__()
        self.config, self.group = config, group
        self.cross_layers = cross.layers if cross else ()
        self.embed_tokens = VocabularyEmbedding(config, group)
        self.layers = nn.ModuleList(
            Layer(config, cross if i in self.cross_layers else None, group) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config)
        self.attention: Attention = "sdpa"
        self.recompute = False  # in training, for the projector too: activations are made again on the way back
        if config.tie_word_embeddings:
            self.tie()

    def tie(self) -> None:
        """Makes the head share the embedding's weight; `to_empty` parts them."""
        self.lm_head.weight = self.embed_tokens.weight

    def cross_kv(self, embeds: Tensor, places: Tensor) -> CrossKV:
        """Image keys and values of all gated layers from their inputs [B, S, C] at places [S] or [B, S]."""
        pairs = [self.layers[i].cross_attn.keys_values(embeds, places) for i in self.cross_layers]
        k, v = (torch.stack(side) for side in zip(*pairs, strict=True))
        return CrossKV(k, v)

    def run(self, x: Tensor, positions: Tensor, past: Past | FlatPast | PackedPast, view: CrossView | None) -> Tensor:
        """x: [B, T, C] at positions [B, T]; past: what self-attention sees; view: what the gated layers see."""
        angles = self.rotary(positions, x.dtype)
        branch, gated = None, 0
        for layer in self.layers:
            image = None
            if view is not None and layer.cross_attn is not None:
                image = view.kv.k[gated], view.kv.v[gated], view.intervals
                gated += 1
            if self.recompute and torch.is_grad_enabled():
                x, branch = checkpoint(layer, x, branch, angles, past, image, use_reentrant=False)
            else:
                x, branch = layer(x, branch, angles, past, image)
        return self.norm.join(x, branch)[1]

    def prefill(self, x: Tensor, positions: Tensor, cache: KVCache | None, view: CrossView | None = None) -> Tensor:
        """A prompt from position 0: x [B, T, C], positions [B, T]. Rows may be padded on the right."""
        return self.run(x, positions, Past(cache, positions, x.shape[1], self.attention), view)

    def decode(
        self, x: Tensor, positions: Tensor, cache: KVCache, visible: int, view: CrossView | None = None
    ) -> Tensor:
        """A step behind a cache: x [B, T, C] at positions [B, T], all below `visible`, the slots that are read."""
        return self.run(x, positions, Past(cache, positions, visible, self.attention), view)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [*, C]. Returns [*, vocab]: of all ranks, gathered."""
        if self.group.size == 1:
            return self.lm_head(hidden)
        return self.group.gather(self.local_logits(hidden))[..., : self.config.whole.vocab_size]

    def local_logits(self, hidden: Tensor) -> Tensor:
        """[*, vocab rows of this rank], the last rank's padded with rows of zeros."""
        return self.lm_head(self.group.spread(hidden))
