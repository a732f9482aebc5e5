"""Tanh-gated cross-attention: how NVLM-X and NVLM-H read image tokens without putting them into the sequence.

    x += tanh(gate) * o_proj(tile_attention(q_proj(norm(x)), k, v, intervals))
    x += tanh(ffn_gate) * ffn(ffn_norm(x))                        where the feed-forward is on

B requests, T query tokens, S image tokens, H heads, Hkv kv heads, D head_dim, C hidden_size.
A row whose interval is empty is changed by exactly nothing, attention and feed-forward alike, forward and backward.
Keys and values depend on the image alone (`keys_values`), so they are computed once an image, never per token.
The paper (section 4.3) fixes the tanh gate; the placement and the feed-forward are switches of `CrossConfig`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_kernels import gated_project, tanh_gated_add, tile_attention
from nvlm_runtime.config import CrossConfig, TextConfig
from nvlm_runtime.model.adapter import AdaptedLinear
from nvlm_runtime.model.vision import RMSNorm
from nvlm_runtime.model.weight_only import dense_weight
from nvlm_runtime.parallel.group import SOLO, Group
from nvlm_runtime.parallel.shard import TextShard


def sinusoids(places: Tensor, width: int) -> Tensor:
    """places: int64 [*, S]. Returns [*, S, width] fp32: sines, then cosines, at wavelengths from 2 pi to 2,000 pi."""
    freqs = 1000.0 ** (-torch.arange(0, width, 2, device=places.device) / width)
    angles = places[..., None] * freqs
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class SharedLinear(nn.Linear):
    """Keys or values of a kv head that ranks share: the weight's gradient is the sum of theirs."""

    def __init__(self, text: TextShard, group: Group):
        super().__init__(text.hidden_size, text.num_key_value_heads * text.head_dim, bias=False)
        self.group, self.at, self.num = group, text.first_kv_head, text.whole.num_key_value_heads

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.group.share_gradient(self.weight, self.at, self.num))


def kv_linear(text: TextConfig, group: Group) -> nn.Linear:
    """Of a rank's kv heads."""
    if isinstance(text, TextShard) and text.whole.num_key_value_heads < group.size:
        return SharedLinear(text, group)
    return nn.Linear(text.hidden_size, text.num_key_value_heads * text.head_dim, bias=False)


class GatedCrossAttention(nn.Module):
    """One gated layer. Every gate starts at 0: the decoder is then the bare language model, bit for bit.

    Of a rank's heads and inner columns: one all-reduce for the attention and one for the feed-forward. Gates are held
    by all ranks and applied once, behind the sum.
    """

    def __init__(self, text: TextConfig, cross: CrossConfig, group: Group = SOLO):
        super().__init__()
        self.group = group
        size, head_dim = text.hidden_size, text.head_dim
        self.head_dim = head_dim
        self.positions = cross.positions
        self.ffn = cross.ffn
        self.norm = RMSNorm(size, text.rms_norm_eps)
        self.q_proj = nn.Linear(size, text.num_attention_heads * head_dim, bias=False)
        self.k_proj, self.v_proj = kv_linear(text, group), kv_linear(text, group)
        self.o_proj = nn.Linear(text.num_attention_heads * head_dim, size, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))
        if cross.ffn == "none":
            return
        self.ffn_norm = RMSNorm(size, text.rms_norm_eps)
        self.ffn_gate = nn.Parameter(torch.zeros(1))
        if cross.ffn == "swiglu":
            self.gate_proj = nn.Linear(size, text.intermediate_size, bias=False)
            self.up_proj = nn.Linear(size, text.intermediate_size, bias=False)
            self.down_proj = nn.Linear(text.intermediate_size, size, bias=False)
        else:
            inner = -(-4 * size // group.size)
            self.fc1 = nn.Linear(size, inner, bias=False)
            self.fc2 = nn.Linear(inner, size, bias=False)

    def keys_values(self, embeds: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """embeds: [B, S, C] image tokens (NVLM-H: tags beside them); places: [S] or [B, S], where each stands among
        those of its prompt's images.

        Returns k, v: [B, S, Hkv, D].
        """
        if self.positions == "sinusoidal":
            embeds = embeds + sinusoids(places, embeds.shape[-1]).to(embeds.dtype)
        embeds = self.group.spread(embeds)
        k, v = (linear(embeds).unflatten(-1, (-1, self.head_dim)) for linear in (self.k_proj, self.v_proj))
        return k, v

    def _feed_forward(self, x: Tensor) -> Tensor:
        x = self.group.spread(x)
        if self.ffn == "swiglu":
            return self.group.reduce(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))
        return self.group.reduce(self.fc2(F.gelu(self.fc1(x))))

    def forward(self, x: Tensor, branch: Tensor | None, k: Tensor, v: Tensor, intervals: Tensor) -> Tensor:
        """x, branch: [B, T, C], the residual stream and what is still to be added to it; k, v: [B, S, Hkv, D];
        intervals: [B, T, 2]. Returns [B, T, C].
        """
        x, normed = self.norm.join(x, branch)
        q = self.q_proj(self.group.spread(normed)).unflatten(-1, (-1, self.head_dim))
        sees = intervals[..., 1] > intervals[..., 0]
        out = tile_attention(q, k, v, intervals)
        if self.group.size == 1 and not isinstance(self.o_proj, AdaptedLinear):
            x = gated_project(out.flatten(2), dense_weight(self.o_proj, x.dtype), x, self.gate, sees)
        else:  # no bias: a row that sees nothing gets 0
            x = tanh_gated_add(x, self.group.reduce(self.o_proj(out.flatten(2))), self.gate)
        if self.ffn == "none":
            return x
        branch = torch.where(sees[..., None], self._feed_forward(self.ffn_norm(x)), 0)
        return tanh_gated_add(x, branch, self.ffn_gate)
