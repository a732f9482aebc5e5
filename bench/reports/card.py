"""What a model weighs and what the machine can do: the bytes of a step, and the least time they take here.

Bytes are read off the tensors. The two roofs are measured: a sum over memory that no cache holds, on every thread, and
a large bf16 product.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from nvlm_runtime.analysis.devices import read_bandwidth
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.engine.slots import cache_bytes
from nvlm_runtime.engine.step_bytes import step_bytes
from nvlm_runtime.inputs.image import TilePlan
from nvlm_runtime.inputs.layout import num_image_keys
from nvlm_runtime.inputs.prompt import tag_ids
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.model.model import NVLMModel

READ_BYTES = 2**30
GEMM_SIZE = 4096


def weight_bytes(model: NVLMModel) -> dict[str, int]:
    """Bytes of vision, projector, embedding, cross, layers (the decoder's, its norm too), head, and their total.

    A head that shares the embedding's weight counts 0.
    """
    found = dict.fromkeys(("vision", "projector", "embedding", "cross", "layers", "head"), 0)
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parts[0] in ("vision_model", "mlp1"):
            part = {"vision_model": "vision", "mlp1": "projector"}[parts[0]]
        elif "cross_attn" in parts:
            part = "cross"
        else:
            part = {"embed_tokens": "embedding", "lm_head": "head"}.get(parts[1], "layers")
        found[part] += parameter.nbytes
    return found | {"total": sum(found.values())}


def image_key_bytes(config: NVLMConfig, tokenizer: Tokenizer, plan: TilePlan, dtype: torch.dtype) -> int:
    """Of one image's keys and values in the gated layers; 0 in NVLM-D."""
    if config.cross is None:
        return 0
    keys = num_image_keys(config, [len(tag) for tag in tag_ids(tokenizer, plan, config)])
    return cache_bytes(config, 1, 0, keys, dtype) - cache_bytes(config, 1, 0, 0, dtype)


def _seconds(run: Callable[[], Any], rounds: int) -> list[float]:
    run()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times


def gemm_rate(size: int = GEMM_SIZE, rounds: int = 3, device: torch.device | str = "cpu") -> float:
    """Flops a second of a square bf16 product, the median."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return 2 * size**3 / statistics.median(_seconds(lambda: (a @ b)[0, 0].item(), rounds))


def card(model: NVLMModel, tokenizer: Tokenizer, plan: TilePlan, dtype: torch.dtype) -> dict[str, Any]:
    """plan: of the image that is asked for. floor_ms: of a step at no context, its bytes at the measured bandwidth.

    Of a rank of a group what it holds and reads itself, and its own machine's roofs.
    """
    device = next(model.parameters()).device
    bandwidth, reads = read_bandwidth(device, READ_BYTES), step_bytes(model)
    step = reads.total(0)
    return {
        "weight_bytes": weight_bytes(model),
        "kv_bytes_a_token": reads.token,
        "image_key_bytes": image_key_bytes(model.shard, tokenizer, plan, dtype),
        "image_tiles": plan.num_tiles,
        "step_bytes": step,
        "read_gb_per_s": bandwidth / 1e9,
        "floor_ms": 1e3 * step / bandwidth,
        "ceiling_tokens_per_s": bandwidth / step,
        "gemm_gflop_per_s": gemm_rate(device=device) / 1e9,
    }
