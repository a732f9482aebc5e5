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

from nvlm_kernels import add_rms_norm, layer_scale_residual, qk_norm, rms_norm
from nvlm_runtime.config import VisionConfig
from nvlm_runtime.vision_attention import attend


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
        self.class_embedding = nn.Parameter(torch.randn(1, 1, config.hidden_size) * 0.02)
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = nn.Parameter(torch.randn(1, config.num_patches + 1, config.hidden_size) * 0.02)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embedding(pixel_values)
        return torch.cat([self.class_embedding.expand(len(x), -1, -1), x], dim=1) + self.position_embedding


class Attention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        size = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.qkv = nn.Linear(size, 3 * size, bias=config.qkv_bias)
        self.proj = nn.Linear(size, size)
        self.qk_normalization = config.qk_normalization
        if config.qk_normalization:
            self.q_norm = RMSNorm(size, config.layer_norm_eps)
            self.k_norm = RMSNorm(size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        q, k, v = qkv.chunk(3, dim=-1)
        if self.qk_normalization:
            q, k = qk_norm(qkv, self.q_norm.weight, self.k_norm.weight, self.q_norm.eps)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))  # [N, H, P, D]
        return self.proj(attend(q, k, v))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = _norm(config)
        self.attn = Attention(config)
        self.ls1 = nn.Parameter(0.1 * torch.ones(config.hidden_size))
        self.norm2 = _norm(config)
        self.mlp = MLP(config)
        self.ls2 = nn.Parameter(0.1 * torch.ones(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = layer_scale_residual(x, self.attn(self.norm1(x)), self.ls1)
        return layer_scale_residual(x, self.mlp(self.norm2(x)), self.ls2)


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class InternViT(nn.Module):
    """pixel_values [N, 3, image_size, image_size] to [N, P, C]: the class token is dropped at the end.

    Raises ValueError when the tiles have another shape.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        size = self.config.image_size
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(f"vision: expected tiles [N, 3, {size}, {size}], got {tuple(pixel_values.shape)}")
        return self.encoder(self.embeddings(pixel_values))[:, 1:]
