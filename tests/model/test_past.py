import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nvlm_runtime import NVLM
from nvlm_runtime.model import linear
from nvlm_runtime.model.cache import KVCache
from nvlm_runtime.model.past import CausalPast, Past, make_past
from tests.small import TEXT


def call(past: Past, length: int) -> torch.Tensor:
    torch.manual_seed(1)
    qkv = torch.randn(2, length, (TEXT.num_attention_heads + 2 * TEXT.num_key_value_heads) * TEXT.head_dim)
    angles = torch.randn(2, 2, length, TEXT.head_dim).unbind()
    return past.attend(qkv, angles, TEXT.num_attention_heads, TEXT.num_key_value_heads)


def test_flash_takes_whole_prompts_in_its_own_layout(monkeypatch):
    """A stand-in with flash-attn's signature; the package itself needs a GPU."""
    calls = []

    def flash_attn_func(q, k, v, causal):
        calls.append((q.shape, k.shape))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    positions = torch.arange(12).expand(2, -1)
    sdpa, flash = (call(CausalPast(positions, kind), 12) for kind in ("sdpa", "flash"))
    torch.testing.assert_close(flash, sdpa)
    assert calls == [((2, 12, 6, 8), (2, 12, 2, 8))]


@pytest.mark.parametrize("length", [1, 3, 8, 9, 12], ids=lambda n: f"{n} behind")
def test_behind_a_cache_is_the_end_of_the_whole(length):
    """One token or a few, through decode_attention, and many, through a mask: as in one causal call."""
    whole = call(CausalPast(torch.arange(20).expand(2, -1), "sdpa"), 20)
    torch.manual_seed(1)
    heads = TEXT.num_attention_heads + 2 * TEXT.num_key_value_heads
    qkv = torch.randn(2, 20, heads * TEXT.head_dim)
    angles = torch.randn(2, 2, 20, TEXT.head_dim).unbind()
    cache = KVCache.allocate(TEXT, 2, 24, torch.device("cpu"), torch.float32)
    for first, end in ((0, 20 - length), (20 - length, 20)):
        past = make_past(torch.arange(first, end).expand(2, -1), "flash" if first else "sdpa", cache, end)
        part = (angle[:, first:end] for angle in angles)
        out = past.attend(qkv[:, first:end], tuple(part), TEXT.num_attention_heads, TEXT.num_key_value_heads)
        torch.testing.assert_close(out, whole[:, first:end])


@torch.no_grad()
def test_long_bf16_prompts_are_computed_in_fp32_where_that_is_faster(monkeypatch):
    monkeypatch.setattr(linear, "fp32_is_faster", lambda: True)
    torch.manual_seed(1)
    heads, num_kv = TEXT.num_attention_heads, TEXT.num_key_value_heads
    qkv = torch.randn(1, 140, (heads + 2 * num_kv) * TEXT.head_dim).bfloat16()
    angles = torch.ones(1, 140, TEXT.head_dim).bfloat16(), torch.zeros(1, 140, TEXT.head_dim).bfloat16()
    out = CausalPast(torch.arange(140)[None], "sdpa").attend(qkv, angles, heads, num_kv)
    q, k, v = (
        t.double().transpose(1, 2) for t in qkv.unflatten(-1, (-1, TEXT.head_dim)).split([heads, num_kv, num_kv], 2)
    )
    exact = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    assert out.dtype == torch.bfloat16
    assert (out != exact.bfloat16()).double().mean() < 0.005, "rounded more than once"


def test_flash_is_refused_where_it_cannot_run(monkeypatch):
    with pytest.raises(ValueError, match="attention='flash' runs on a CUDA device, the model is on cpu"):
        NVLM.load("micro-d", attention="flash")
    with pytest.raises(ValueError, match="attention must be 'sdpa' or 'flash', got 'xformers'"):
        NVLM.load("micro-d", attention="xformers")
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="attention='flash' needs the flash-attn package"):
        call(CausalPast(torch.arange(3).expand(2, -1), "flash"), 3)
