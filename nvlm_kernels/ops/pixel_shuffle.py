"""Pixel shuffle: 2x2 patches become one image token of four times the width.

    v2:  out[r, q, (2*dr + dq)*C + c] = x[2r + dr, 2q + dq, c]        dr, dq in {0, 1}
    v1:  the same tensor with r and q swapped (tokens in transposed order)

x: [N, S*S, C], patches row-major; out: [N, (S/2)*(S/2), 4C], tokens row-major. Both orders pass
every shape check, so the version comes from the checkpoint's config ("ps_version").
Source: Megatron-LM examples/multimodal (tag NVLM-1.0), `pixel_shuffle`. Bound: memory.
"""

from torch import Tensor


def pixel_shuffle_ref(x: Tensor, version: str) -> Tensor:
    num, patches, width = x.shape
    half = round(patches**0.5) // 2
    x = x.reshape(num, half, 2, half, 2, width)  # [N, r, dr, q, dq, C]
    rows, cols = (1, 3) if version == "v2" else (3, 1)
    return x.permute(0, rows, cols, 2, 4, 5).reshape(num, half * half, 4 * width)


def pixel_shuffle(x: Tensor, version: str) -> Tensor:
    """[N, S*S, C] patches to [N, S*S/4, 4C] image tokens. version: "v1" or "v2".

    Raises ValueError when the patch count is not the square of an even number, or the version is unknown.
    """
    if version not in ("v1", "v2"):
        raise ValueError(f"pixel_shuffle: version must be 'v1' or 'v2', got {version!r}")
    side = round(x.shape[1] ** 0.5) if x.dim() == 3 else 0
    if x.dim() != 3 or side * side != x.shape[1] or side % 2:
        raise ValueError(f"pixel_shuffle: expected [N, S*S, C] with S even, got {tuple(x.shape)}")
    return pixel_shuffle_ref(x, version)
