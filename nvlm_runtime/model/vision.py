"""InternViT: a tile of pixels to one vector a patch.

N tiles, P patches, C hidden_size, H heads, D head_dim. Parameter names are the checkpoint's.
Every block: x += ls1 * attn(norm1(x));  x += ls2 * mlp(norm2(x)). No norm after the last block.
The 6B flavour norms q and k over the whole width C, all heads jointly, before they are split; its checkpoint
holds zero-padded heads, which `weights` cuts off (and puts back), so that no line here knows of them.
Sources: OpenGVLab InternViT-6B-448px configs, the published modeling_intern_vit.py as kept in vLLM.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_kernels import (
    add_rms_norm,
    layer_scale_residual,
    layer_scale_residual_statistics,
    qk_norm,
    qk_norm_from_sums,
    qk_sum_squares,
    rms_norm,
)
from nvlm_kernels.native import NativeLibrary
from nvlm_runtime.config import VisionConfig
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.vision_attention import attend
from nvlm_runtime.parallel.group import SOLO, Group
from nvlm_runtime.parallel.shard import VisionShard


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def join(self, x: Tensor, branch: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + branch, its norm): a residual stream takes in what the last block made where the next one reads it."""
        return (x, self(x)) if branch is None else add_rms_norm(x, branch, self.weight, self.eps)


def _norm(config: VisionConfig) -> nn.Module:
    if config.norm_type == "rms_norm":
        return RMSNorm(config.hidden_size, config.layer_norm_eps)
    return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class PatchEmbedding(nn.Module):
    """A stride = kernel convolution written as reshape + GEMM, so that a tile's bits do not depend on its batch."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, 3, config.patch_size, config.patch_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, pixel_values: Tensor) -> Tensor:
        num, channels, height, width = pixel_values.shape
        p = self.weight.shape[-1]
        x = pixel_values.reshape(num, channels, height // p, p, width // p, p)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(num, -1, channels * p * p)  # [N, P, 3*p*p]
        return F.linear(x, self.weight.flatten(1), self.bias)


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = nn.Parameter(torch.empty(1, config.num_patches + 1, config.hidden_size))
        for embedding in (self.class_embedding, self.position_embedding):
            nn.init.normal_(embedding, std=0.02)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values)
        return torch.cat([self.class_embedding.expand(len(x), -1, -1), x], dim=1) + self.position_embedding


def end_block(linear: nn.Module, x: Tensor, group: Group) -> Tensor:
    """linear(x), whose in features are shared out over the ranks; its bias is added once."""
    if group.size == 1:
        return linear(x)
    return group.reduce(F.linear(x, linear.weight)) + linear.bias


class Attention(nn.Module):
    """Of a rank's heads: one all-reduce, and where q and k are normed one more of two numbers a row."""

    def __init__(self, config: VisionConfig, group: Group = SOLO):
        super().__init__()
        size, inner = config.hidden_size, config.num_attention_heads * config.head_dim
        self.group, self.width = group, size
        self.num_heads = config.num_attention_heads
        self.native: NativeLibrary | None = None  # the library whose attention a CPU takes
        self.qkv = nn.Linear(size, 3 * inner, bias=config.qkv_bias)
        self.proj = nn.Linear(inner, size)
        self.qk_normalization = config.qk_normalization
        if config.qk_normalization:
            self.q_norm = RMSNorm(inner, config.layer_norm_eps)
            self.k_norm = RMSNorm(inner, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.group.spread(x))
        q, k, v = qkv.chunk(3, dim=-1)
        if self.qk_normalization:
            q, k = self._norm(qkv)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [N, H, P, D]
        return end_block(self.proj, attend(q, k, v, self.native), self.group)

    def _norm(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.q_norm.weight, self.k_norm.weight
        if self.group.size == 1:
            return qk_norm(qkv, *weights, self.q_norm.eps)
        sums = self.group.spread(self.group.reduce(qk_sum_squares(qkv)))  # [N, P, 2]; each rank norms its own by them
        return qk_norm_from_sums(qkv, sums, self.width, *weights, self.q_norm.eps)


class MLP(nn.Module):
    """Of a rank's inner columns: one all-reduce."""

    def __init__(self, config: VisionConfig, group: Group = SOLO):
        super().__init__()
        self.group = group
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return end_block(self.fc2, F.gelu(self.fc1(self.group.spread(x))), self.group)


class Block(nn.Module):
    def __init__(self, config: VisionConfig, group: Group = SOLO):
        super().__init__()
        self.norm1 = _norm(config)
        self.attn = Attention(config, group)
        self.ls1 = nn.Parameter(torch.full((config.hidden_size,), 0.1))
        self.norm2 = _norm(config)
        self.mlp = MLP(config, group)
        self.ls2 = nn.Parameter(torch.full((config.hidden_size,), 0.1))

    def forward(self, x: Tensor, last: bool = False) -> tuple[Tensor, Tensor | None]:
        """x, and where this is the last block the statistics of its rows, if a kernel makes them."""
        x = layer_scale_residual(x, self.attn(self.norm1(x)), self.ls1)
        branch = self.mlp(self.norm2(x))
        if last:
            return layer_scale_residual_statistics(x, branch, self.ls2)
        return layer_scale_residual(x, branch, self.ls2), None


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig, group: Group = SOLO):
        super().__init__()
        self.layers = nn.ModuleList(Block(config, group) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [N, 1 + P, C], and the statistics [N, 1 + P, 2] of its rows where kernels run."""
        statistics = None
        for i, layer in enumerate(self.layers):
            x, statistics = layer(x, last=i == len(self.layers) - 1)
        return x, statistics


class InternViT(nn.Module):
    """pixel_values [N, 3, image_size, image_size] to [N, P, C]: the class token is dropped at the end.

    config: a rank's own share (`VisionShard`) where the vision encoder is cut by heads. Otherwise every rank of the
    group holds the whole encoder and takes one part of the tiles, without a gradient. Raises ValueError for tiles of
    another shape.
    """

    def __init__(self, config: VisionConfig, group: Group = SOLO):
        super().__init__()
        by_heads = isinstance(config, VisionShard)
        self.config, self.tile_group = config, SOLO if by_heads else group
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config, group if by_heads else SOLO)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.features(pixel_values).patches

    def features(self, pixel_values: Tensor) -> Features:
        """What forward gives, with the statistics that the projector's norm needs where kernels have made them."""
        size = self.config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"vision: expected tiles [N, 3, {size}, {size}], got {tuple(pixel_values.shape)}")
        if self.tile_group.size == 1:
            x, statistics = self.encoder(self.embeddings(pixel_values))
            return Features(x[:, 1:], None if statistics is None else statistics[:, 1:])
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            raise ValueError(
                "vision: a vision encoder whose tiles are shared out does not train: use vision_split='heads'"
            )
        num, size, rank = len(pixel_values), self.tile_group.size, self.tile_group.rank
        each = -(-num // size)
        mine = pixel_values[rank * each : (rank + 1) * each]
        config = self.config
        features = pixel_values.new_zeros(each, config.num_patches, config.hidden_size)
        if len(mine):
            features[: len(mine)] = self.encoder(self.embeddings(mine))[0][:, 1:]
        return Features(self.tile_group.gather(features, dim=0)[:num])
