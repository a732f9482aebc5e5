"""InternViT-6B's own flavour, which transformers does not have: norms over the whole width, LayerScale, padding."""

import pytest
import torch

from nvlm_kernels import pixel_shuffle
from nvlm_runtime.vision import Block, InternViT, PatchEmbedding
from tests.runtime.small import VISION, randomise


def rms(x: torch.Tensor, weight: torch.Tensor, over: int) -> torch.Tensor:
    return x / (x[..., :over].square().sum(-1, keepdim=True) / over + 1e-6).sqrt() * weight


def reference_block(block: Block, x: torch.Tensor, dummy_heads: int = 0) -> torch.Tensor:
    """The published block in fp64, one head at a time, with zero-padded heads as its checkpoint holds them."""
    p = {name: value.double() for name, value in block.named_parameters()}
    size, heads = VISION.hidden_size, VISION.num_attention_heads
    head_dim, extra = size // heads, dummy_heads * (size // heads)
    pad_rows = lambda w: torch.cat([w, w.new_zeros(extra, *w.shape[1:])])  # noqa: E731
    w_q, w_k, w_v = (pad_rows(w) for w in p["attn.qkv.weight"].split(size))
    w_proj = torch.cat([p["attn.proj.weight"], p["attn.proj.weight"].new_zeros(size, extra)], dim=1)
    y = rms(x, p["norm1.weight"], size)
    q = rms(y @ w_q.T, pad_rows(p["attn.q_norm.weight"]), size)  # the mean is over the real channels
    k = rms(y @ w_k.T, pad_rows(p["attn.k_norm.weight"]), size)
    v = y @ w_v.T
    outs = []
    for h in range(heads + dummy_heads):
        at = slice(h * head_dim, (h + 1) * head_dim)
        outs.append((q[..., at] @ k[..., at].transpose(-1, -2) * head_dim**-0.5).softmax(-1) @ v[..., at])
    x = x + (torch.cat(outs, -1) @ w_proj.T + p["attn.proj.bias"]) * p["ls1"]
    y = rms(x, p["norm2.weight"], size) @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"]
    y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
    return x + (y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]) * p["ls2"]


@pytest.mark.parametrize("dummy_heads", [0, 3], ids=["cropped", "padded"])
def test_block_is_the_published_one(dummy_heads):
    block = randomise(Block(VISION)).double()
    x = torch.randn(2, 17, VISION.hidden_size, dtype=torch.float64)
    # the norm's statistic is fp32-or-better, so fp64 in is fp64 throughout
    torch.testing.assert_close(block(x), reference_block(block, x, dummy_heads), atol=1e-10, rtol=1e-9)


def test_class_token_is_dropped_and_there_is_no_final_norm():
    tower = randomise(InternViT(VISION))
    pixels = torch.randn(2, 3, 32, 32)
    x = tower.encoder(tower.embeddings(pixels))
    assert x.shape == (2, 17, VISION.hidden_size)
    assert torch.equal(tower(pixels), x[:, 1:])


def test_patch_embedding_is_a_convolution():
    embedding = randomise(PatchEmbedding(VISION))
    pixels = torch.randn(2, 3, 32, 32)
    want = torch.nn.functional.conv2d(pixels, embedding.weight, embedding.bias, stride=8)
    torch.testing.assert_close(embedding(pixels), want.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_a_tile_does_not_depend_on_its_batch():
    tower = randomise(InternViT(VISION))
    pixels = torch.randn(5, 3, 32, 32)
    together = tower(pixels)
    for i in range(5):
        torch.testing.assert_close(tower(pixels[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5)
        embedding = tower.embeddings.patch_embedding
        assert torch.equal(embedding(pixels[i : i + 1])[0], embedding(pixels)[i]), "bit for bit"


@pytest.mark.parametrize("shape", [(2, 3, 32, 16), (2, 1, 32, 32), (2, 3, 64, 64)], ids=str)
def test_rejects_other_tiles(shape):
    with pytest.raises(ValueError, match="expected tiles"):
        InternViT(VISION)(torch.zeros(shape))


def test_pixel_shuffle_is_the_closed_form():
    x = torch.arange(2 * 16 * 3).reshape(2, 16, 3).float()
    grid = x.reshape(2, 4, 4, 3)
    v2 = pixel_shuffle(x, "v2").reshape(2, 2, 2, 12)
    v1 = pixel_shuffle(x, "v1").reshape(2, 2, 2, 12)
    for r in range(2):
        for q in range(2):
            for dr in range(2):
                for dq in range(2):
                    at = (2 * dr + dq) * 3
                    want = grid[:, 2 * r + dr, 2 * q + dq]
                    assert torch.equal(v2[:, r, q, at : at + 3], want)
                    assert torch.equal(v1[:, q, r, at : at + 3], want), "v1 transposes the tokens"


@pytest.mark.parametrize("shape", [(1, 15, 4), (1, 9, 4), (16, 4)], ids=str)
def test_pixel_shuffle_rejects(shape):
    with pytest.raises(ValueError, match="pixel_shuffle"):
        pixel_shuffle(torch.zeros(shape), "v2")
    with pytest.raises(ValueError, match="version"):
        pixel_shuffle(torch.zeros(1, 16, 4), "v3")
