"""Milliseconds a tile on the CPU, beside the machine's GEMM rates: python -m bench.vision [--peers transformers]

InternViT-300M's shape (24 layers unless --layers says else), 1,025 tokens, random weights, one tile. The GEMM rates,
the contestants and the peer take turns in one process; medians over --rounds with 20th and 80th percentile. "eager" is
this vision encoder with torch's attention and linears in the inputs' dtype; the others take what is native. Share: the
vision encoder's flops at the rate of bf16 4096^3, over its time. Error: root mean square against the same weights in
fp64, as a share of the output's.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.reports.report import table, write
from nvlm_kernels.native import load_library
from nvlm_runtime.config import VisionConfig
from nvlm_runtime.engine.native import use_library
from nvlm_runtime.model.linear import with_inference_linears
from nvlm_runtime.model.quantize import quantize
from nvlm_runtime.model.vision import Attention, InternViT
from nvlm_runtime.presets import INTERNVIT_300M

ROOF = "gemm bf16 4096x4096x4096"


class EagerAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def eager(vision_encoder: InternViT) -> InternViT:
    """A vision encoder of the same parameters whose attention is torch's."""
    made = copy.deepcopy(vision_encoder)
    for block in made.encoder.layers:
        attention = EagerAttention(vision_encoder.config).to(block.attn.proj.weight.dtype)
        attention.load_state_dict(block.attn.state_dict())
        block.attn = attention
    return made


def transformers_vision_encoder(c: VisionConfig) -> torch.nn.Module:
    """The peer at the same shape, bf16, random weights."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    config = InternVLVisionConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        image_size=c.image_size,
        patch_size=c.patch_size,
        attention_bias=c.qkv_bias,
    )
    return InternVLVisionModel._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()


def flops(c: VisionConfig) -> int:
    """Of one tile: patch embedding, the linears, attention."""
    tokens = c.num_patches + 1
    linears = 2 * tokens * (4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size)
    attention = 4 * tokens**2 * c.hidden_size
    return c.num_hidden_layers * (linears + attention) + 2 * c.num_patches * 3 * c.patch_size**2 * c.hidden_size


def gemms(c: VisionConfig) -> dict[str, tuple[int, Callable[[], Tensor]]]:
    """Name to flops and call: the roof, and every linear of a block as bf16, fp32 and int8."""
    tokens, size, inner = c.num_patches + 1, c.hidden_size, c.intermediate_size
    shapes = [(4096, 4096, 4096), (tokens, size, 3 * size), (tokens, size, size)]
    shapes += [(tokens, size, inner), (tokens, inner, size)]
    found = {}
    for m, k, n in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
            name = f"gemm {'bf16' if dtype == torch.bfloat16 else 'fp32'} {m}x{k}x{n}"
            found[name] = 2 * m * k * n, partial(F.linear, x, w)
        x, w = (torch.randint(-127, 128, s, dtype=torch.int8) for s in ((m, k), (n, k)))
        found[f"gemm int8 {m}x{k}x{n}"] = 2 * m * k * n, partial(torch._int_mm, x, w.t())
    return found


def measure(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, ...]]:
    """Milliseconds of each call: 20th, 50th, 80th percentile over rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    deciles = {name: statistics.quantiles(t, n=10, method="inclusive") for name, t in times.items()}
    return {name: (found[1], found[4], found[7]) for name, found in deciles.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.vision", description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="*", choices=["transformers"], default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=INTERNVIT_300M.num_hidden_layers)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="default: bench/results/vision.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = replace(INTERNVIT_300M, num_hidden_layers=args.layers)
    bf16 = InternViT(config).bfloat16().eval()
    int8, pixels = copy.deepcopy(bf16), torch.randn(1, 3, 448, 448).bfloat16()
    quantize(int8, {"vision": "int8_dynamic"})
    plain, found = eager(bf16), load_library()
    bf16 = with_inference_linears(bf16)
    for vision_encoder in (bf16, int8):
        use_library(vision_encoder, found)
    vision_encoders = {"eager bf16": plain, "bf16": bf16, "fp32": copy.deepcopy(bf16).float(), "int8_dynamic": int8}
    calls = {
        name: partial(vision_encoder, pixels.to(vision_encoder.embeddings.class_embedding.dtype))
        for name, vision_encoder in vision_encoders.items()
    }
    work = {name: flops(config) for name in calls}
    with torch.inference_mode():
        outputs = {name: call().double().flatten() for name, call in calls.items()}
        want = copy.deepcopy(bf16).double()(pixels.double()).flatten()
        if "transformers" in args.peers:
            peer = transformers_vision_encoder(config)
            calls["transformers bf16 sdpa"] = partial(peer, pixels)
            work["transformers bf16 sdpa"] = flops(config)
        for name, (count, call) in gemms(config).items():
            work[name], calls[name] = count, call
            call()
        times = measure(calls, args.rounds)
    roof = work[ROOF] / times[ROOF][1]
    rows = []
    for name, (p20, p50, p80) in times.items():
        row = {"what": name, "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "gflops": work[name] / p50 / 1e6}
        row["share_of_roof"] = work[name] / p50 / roof
        if name in outputs:
            row["error"] = ((outputs[name] - want).square().mean() / want.square().mean()).sqrt().item()
            row["cosine"] = F.cosine_similarity(outputs[name], want, dim=0).item()
        rows.append(row)
    head = ("what", "p20 ms", "p50 ms", "p80 ms", "GFLOP/s", "share", "error", "cosine")
    print(table(head, [[*row.values(), *[None] * (len(head) - len(row))] for row in rows]))
    write(args.json, "vision", rows, some=not args.peers or args.layers != INTERNVIT_300M.num_hidden_layers)


if __name__ == "__main__":
    main()
