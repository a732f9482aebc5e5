"""InternViT-6B's own flavour, which transformers does not have: norms over the whole width, LayerScale, padding."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nvlm_kernels import pixel_shuffle
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.vision import Block, InternViT, PatchEmbedding
from nvlm_runtime.model.vision_attention import attend, computes_in_fp32
from tests.small import CONFIGS, VISION, randomise


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
    torch.testing.assert_close(block(x)[0], reference_block(block, x, dummy_heads), atol=1e-10, rtol=1e-9)


def test_class_token_is_dropped_and_there_is_no_final_norm():
    vision_encoder = randomise(InternViT(VISION))
    pixels = torch.randn(2, 3, 32, 32)
    x, _ = vision_encoder.encoder(vision_encoder.embeddings(pixels))
    assert x.shape == (2, 17, VISION.hidden_size)
    assert torch.equal(vision_encoder(pixels), x[:, 1:])


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_projector_is_its_modules(variant):
    """LayerNorm, Linear and, in NVLM-D and -H, exact GELU and Linear, over the published shuffle."""
    model = randomise(NVLMModel(CONFIGS[variant])).double()
    features = 3 * torch.randn(2, 16, VISION.hidden_size, dtype=torch.float64)
    x = F.layer_norm(pixel_shuffle(features, "v2"), (4 * VISION.hidden_size,), model.mlp1[0].weight, model.mlp1[0].bias)
    for number in (1, 3)[: 1 if variant == "x" else 2]:
        x = F.linear(x if number == 1 else x * 0.5 * (1 + torch.erf(x / 2**0.5)), model.mlp1[number].weight)
    torch.testing.assert_close(model.project(Features(features)), x, atol=1e-10, rtol=1e-9)


def test_patch_embedding_is_a_convolution():
    embedding = randomise(PatchEmbedding(VISION))
    pixels = torch.randn(2, 3, 32, 32)
    want = torch.nn.functional.conv2d(pixels, embedding.weight, embedding.bias, stride=8)
    torch.testing.assert_close(embedding(pixels), want.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_a_tile_does_not_depend_on_its_batch():
    vision_encoder = randomise(InternViT(VISION))
    pixels = torch.randn(5, 3, 32, 32)
    together = vision_encoder(pixels)
    for i in range(5):
        torch.testing.assert_close(vision_encoder(pixels[i : i + 1])[0], together[i], atol=1e-5, rtol=1e-5)
        embedding = vision_encoder.embeddings.patch_embedding
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


def heads(num: int, tokens: int, num_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """q, k, v [N, H, P, D] as the fused projection leaves them: strided. Logits of a few units, so that rows differ."""
    generator = torch.Generator().manual_seed(tokens)
    qkv = 2 * torch.randn(num, tokens, 3 * num_heads * head_dim, generator=generator)
    parts = qkv.to(dtype).chunk(3, dim=-1)
    return tuple(t.unflatten(-1, (num_heads, head_dim)).transpose(1, 2) for t in parts)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


@pytest.fixture
def no_amx(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.parametrize(
    "shape", [(1, 1025, 16, 64), (1, 1025, 3, 128), (2, 256, 3, 32), (3, 257, 5, 8)], ids=["300m", "6b", "256", "odd"]
)
def test_attention_in_fp32_is_at_least_as_exact_as_eager(no_amx, shape):
    q, k, v = heads(*shape, torch.bfloat16)
    assert computes_in_fp32(q)
    out, want = attend(q, k, v), eager(q.double(), k.double(), v.double())
    error, eager_error = ((t.double() - want).abs().max() for t in (out, eager(q, k, v)))
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    assert error <= eager_error
    # one rounding of the whole: half an ulp, and fp32's own error
    assert ((out.double() - want).abs() <= want.abs() * 2**-8 + 1e-5).all()


@pytest.mark.parametrize("tokens, dtype", [(255, torch.bfloat16), (257, torch.float32)], ids=["short", "fp32"])
def test_attention_stays_torchs_elsewhere(no_amx, tokens, dtype):
    q, k, v = heads(2, tokens, 3, 16, dtype)
    assert not computes_in_fp32(q)
    assert torch.equal(attend(q, k, v), eager(q, k, v))


def test_attention_stays_torchs_under_autograd(no_amx):
    q, k, v = (t.detach().requires_grad_() for t in heads(1, 257, 3, 16, torch.bfloat16))
    out = attend(q, k, v)
    assert torch.equal(out, eager(q, k, v))
    out.float().square().sum().backward()
    assert all(t.grad.abs().sum() > 0 for t in (q, k, v))
    with torch.no_grad():
        assert not torch.equal(attend(q, k, v), out), "without a gradient it is the other route"


def test_attention_with_amx_stays_bf16(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    q, k, v = heads(1, 257, 3, 16, torch.bfloat16)
    assert torch.equal(attend(q, k, v), eager(q, k, v))


@pytest.mark.parametrize("flavour", ["6b", "300m"])
def test_bf16_vision_encoder_is_as_exact_as_eager(no_amx, flavour):
    config = replace(VISION, image_size=128)  # 257 tokens
    if flavour == "300m":
        config = replace(config, norm_type="layer_norm", qk_normalization=False, qkv_bias=True, num_dummy_heads=0)
    vision_encoder = randomise(InternViT(config)).bfloat16()
    pixels = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    with_gradient = vision_encoder(pixels).detach()  # autograd keeps torch's bf16 attention
    with torch.no_grad():
        out = vision_encoder(pixels)
        want = vision_encoder.double()(pixels.double())
    assert not torch.equal(out, with_gradient)
    error, eager_error = ((t.double() - want).square().mean().sqrt() for t in (out, with_gradient))
    assert error <= 1.1 * eager_error  # the roundings around attention are alike and random
