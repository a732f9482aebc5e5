"""Rotary position embedding, with YaRN as Qwen2 publishes it for long contexts.

    cos(p * f), sin(p * f)        f_i = theta^(-2i/D), twice over D; nvlm_kernels' rotary turns q and k by them

Sources: transformers' Qwen2 (angles in fp32, cos and sin rounded to the activations' dtype) and its YaRN
(arXiv 2309.00071): low frequencies are divided by the factor, high ones kept, a ramp between, and cos and sin
grow by 0.1 ln(factor) + 1.
"""

import math
from functools import cache

import torch
from torch import Tensor, nn

from nvlm_runtime.config import RopeScaling, TextConfig


def _yarn(freqs: Tensor, theta: float, head_dim: int, scaling: RopeScaling) -> tuple[Tensor, float]:
    def dimension(rotations: float) -> float:
        turns = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return freqs / scaling.factor * (1 - keep) + freqs * keep, 0.1 * math.log(scaling.factor) + 1.0


@cache
@torch.inference_mode(False)
def _frequencies(config: TextConfig, device: torch.device) -> tuple[Tensor, float]:
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    freqs, scale = 1.0 / (config.rope_theta**exponents), 1.0
    if config.rope_scaling is not None:
        freqs, scale = _yarn(freqs, config.rope_theta, config.head_dim, config.rope_scaling)
    return freqs.to(device), scale


class Rotary(nn.Module):
    """positions [B, T] to (cos, sin), each [B, T, D] in the dtype asked for."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config

    def frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """fp32 [D/2] on the device, always the same tensor, and what cos and sin are multiplied by."""
        return _frequencies(self.config, device)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        freqs, scale = self.frequencies(positions.device)
        angles = positions[..., None].float() * freqs  # [B, T, D/2]
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
