"""The language model: a Qwen2 or Llama decoder, with gated cross-attention in the layers that the config lists.

B requests, T query tokens, S cached positions, H query heads, Hkv kv heads, D head_dim, C hidden_size.
q, k and v share one weight, gate and up another; `checkpoint.weights` joins those of a checkpoint.
A call returns hidden states. `logits` is a call of its own, for the tokens that need it.
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
from nvlm_runtime.model.cache import CrossKV
from nvlm_runtime.model.cross import GatedCrossAttention
from nvlm_runtime.model.past import Angles, AttentionBackend, Past
from nvlm_runtime.model.rotary import Rotary
from nvlm_runtime.model.vision import RMSNorm
from nvlm_runtime.parallel.group import SOLO, Group
from nvlm_runtime.parallel.shard import TextShard, VocabularyEmbedding


@dataclass(frozen=True)
class CrossView:
    """What the tokens of one call see of the images.

    Attributes:
        kv: the keys and values of the gated layers.
        intervals: int64 [B, T, 2], the image keys [start, end) that each token sees.
    """

    kv: CrossKV
    intervals: Tensor


class SelfAttention(nn.Module):
    """Self-attention of a rank's heads. It costs one all-reduce."""

    def __init__(self, config: TextConfig, group: Group):
        super().__init__()
        self.group, self.config = group, config
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        size = self.num_heads * config.head_dim
        self.qkv_proj = nn.Linear(
            config.hidden_size, size + 2 * self.num_kv_heads * config.head_dim, bias=config.qkv_bias
        )
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, angles: Angles, past: Past) -> Tensor:
        """x [B, T, C] to [B, T, C]; angles: cos and sin of the positions; past: what the tokens see."""
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


class DecoderMLP(nn.Module):
    """The feed-forward (SwiGLU) of a rank's inner columns. It costs one all-reduce."""

    def __init__(self, config: TextConfig, group: Group):
        super().__init__()
        self.group = group
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, C] to [B, T, C]."""
        return self.group.reduce(self.down_proj(swiglu(self.gate_up_proj(self.group.spread(x)))))


class DecoderLayer(nn.Module):
    """One layer: self-attention, the feed-forward and, where the config lists the layer, gated cross-attention."""

    def __init__(self, config: TextConfig, cross: CrossConfig | None, group: Group):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, group)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DecoderMLP(config, group)
        self.cross_before = cross is not None and cross.placement == "before"
        self.cross_attn = GatedCrossAttention(config, cross, group) if cross else None

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        angles: Angles,
        past: Past,
        image: tuple[Tensor, Tensor, Tensor] | None,
    ) -> tuple[Tensor, Tensor]:
        """Takes the residual stream as two terms, x + branch, and returns the next two.

        Args:
            x: [B, T, C], the stream without the output of the block before.
            branch: [B, T, C], that output; None before the first layer.
            angles: cos and sin of the positions.
            past: what self-attention sees.
            image: this layer's image keys and values and the intervals; None where no token sees an image.
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

    Collectives of a group of several ranks: two all-reduces for each layer, one more for the attention of a gated layer
    and one for its feed-forward, one for the embedding, and a gather in `logits` alone. Training has as many in the
    backward pass. All ranks hold the same hidden states.

    Args:
        config: sizes of the decoder; in a group of several ranks, of this rank's share.
        cross: the gated cross-attention; None in NVLM-D.
        group: the ranks that share the decoder.

    Attributes:
        attention: what computes whole prompts and chunks.
        recompute: whether training computes activations again in the backward pass, the projector's too.
    """

    def __init__(self, config: TextConfig, cross: CrossConfig | None, group: Group = SOLO):
        super().__init__()
        self.config, self.group = config, group
        self.cross_layers = cross.layers if cross else ()
        self.embed_tokens = VocabularyEmbedding(config, group)
        self.layers = nn.ModuleList(
            DecoderLayer(config, cross if i in self.cross_layers else None, group)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config)
        self.attention: AttentionBackend = "sdpa"
        self.recompute = False
        if config.tie_word_embeddings:
            self.tie()

    def tie(self) -> None:
        """Makes the head share the weight of the embedding. `to_empty` separates the two again."""
        self.lm_head.weight = self.embed_tokens.weight

    def cross_kv(self, embeds: Tensor, places: Tensor) -> CrossKV:
        """Computes the image keys and values of all gated layers.

        Args:
            embeds: [B, S, C], their inputs.
            places: int64 [S] or [B, S], the position of each key among those of its prompt.
        """
        pairs = [self.layers[i].cross_attn.keys_values(embeds, places) for i in self.cross_layers]
        k, v = (torch.stack(side) for side in zip(*pairs, strict=True))
        return CrossKV(k, v)

    def embed(self, input_ids: Tensor, rows: Tensor, positions: Tensor, image_tokens: Tensor) -> Tensor:
        """Token embeddings with image tokens in the place of their placeholders.

        Args:
            input_ids: int64 [B, T].
            rows: int64 [n], the row of each image token.
            positions: int64 [n], its position in that row.
            image_tokens: [n, C].

        Returns:
            [B, T, C].
        """
        x = self.embed_tokens(input_ids)
        return x.index_put((rows, positions), image_tokens.to(x.dtype))

    def forward(self, x: Tensor, positions: Tensor, past: Past, view: CrossView | None = None) -> Tensor:
        """Runs all layers and the last norm.

        Args:
            x: [B, T, C], embeddings. Rows may be padded on the right.
            positions: int64 [B, T].
            past: what self-attention sees, made for this call (`past.make_past`).
            view: what the gated layers see; None where no token sees an image.

        Returns:
            Hidden states [B, T, C].
        """
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

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [*, C] to logits [*, vocab], gathered from all ranks."""
        if self.group.size == 1:
            return self.lm_head(hidden)
        return self.group.gather(self.local_logits(hidden))[..., : self.config.whole.vocab_size]

    def local_logits(self, hidden: Tensor) -> Tensor:
        """hidden [*, C] to the logits of this rank's rows of the vocabulary. The last rank's are padded with zeros."""
        return self.lm_head(self.group.spread(hidden))
