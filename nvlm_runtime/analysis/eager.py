"""The eager reference: a request in plain PyTorch, one call after another, as the baseline of every speed-up.

The vision encoder is written here with torch's own functions over the model's weights. The decoder is the model's, with
torch's own linears and a cache of its own. There is no chunked prefill, no reuse of prefixes or images, no CUDA graph
and no compiled step. It is slow on purpose.

B requests, T prompt tokens, N tiles, P image tokens per tile, C hidden_size of the decoder.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_kernels import pixel_shuffle
from nvlm_runtime.engine.request import PHASES, PreparedPrompt
from nvlm_runtime.inputs.layout import Layout
from nvlm_runtime.model.cache import KVCache
from nvlm_runtime.model.decoder import CrossView
from nvlm_runtime.model.linear import with_plain_linears
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import make_past
from nvlm_runtime.model.vision import Block, InternViT


@dataclass(frozen=True)
class EagerOutput:
    """The answer to one request.

    Attributes:
        token_ids: The tokens with the largest logits, end tokens included.
        timings: Seconds of tile, encode, project, prefill and decode.
        token_seconds: Seconds of every token after the first.
    """

    token_ids: list[int]
    timings: dict[str, float]
    token_seconds: list[float]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def encode(encoder: InternViT, pixel_values: Tensor) -> Tensor:
    """Runs a vision encoder.

    Args:
        encoder: The weights.
        pixel_values: Tiles [N, 3, S, S], in the encoder's dtype.

    Returns:
        Features [N, 4P, vision hidden_size], as `InternViT` returns them up to rounding.
    """
    config, embeddings = encoder.config, encoder.embeddings

    def norm(x: Tensor, module: nn.Module) -> Tensor:
        weight = cast(Tensor, module.weight)
        if config.norm_type == "rms_norm":
            return _rms_norm(x, weight, config.layer_norm_eps)
        return F.layer_norm(x, x.shape[-1:], weight, cast(Tensor, module.bias), config.layer_norm_eps)

    patch = embeddings.patch_embedding
    x = F.conv2d(pixel_values, patch.weight, patch.bias, stride=config.patch_size).flatten(2).transpose(1, 2)
    x = torch.cat([embeddings.class_embedding.expand(len(x), -1, -1), x], dim=1) + embeddings.position_embedding
    for block in encoder.encoder.layers:
        assert isinstance(block, Block)
        attention, mlp = block.attn, block.mlp
        q, k, v = F.linear(norm(x, block.norm1), attention.qkv.weight, attention.qkv.bias).chunk(3, dim=-1)
        if config.qk_normalization:
            q, k = (_rms_norm(t, n.weight, n.eps) for t, n in ((q, attention.q_norm), (k, attention.k_norm)))
        q, k, v = (t.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [N, 4P + 1, C]
        x = x + F.linear(out, attention.proj.weight, attention.proj.bias) * block.ls1
        out = F.gelu(F.linear(norm(x, block.norm2), mlp.fc1.weight, mlp.fc1.bias))
        x = x + F.linear(out, mlp.fc2.weight, mlp.fc2.bias) * block.ls2
    return x[:, 1:]


def project(model: NVLMModel, features: Tensor) -> Tensor:
    """Runs the projector.

    Args:
        model: The model whose projector is run.
        features: [N, 4P, vision hidden_size], as `encode` returns them.

    Returns:
        Image tokens [N, P, C].
    """
    return with_plain_linears(model.mlp1)(pixel_shuffle(features, model.config.ps_version))


class EagerBatch:
    """B requests of equal length that decode greedily on one cache.

    Args:
        model: The model.
        batch: B.
        capacity: Positions of the cache.
        vocab_size: Tokens of the tokenizer. The embedding's padding rows after them are never drawn.
    """

    def __init__(self, model: NVLMModel, batch: int, capacity: int, vocab_size: int) -> None:
        weight = model.language_model.embed_tokens.weight
        self.decoder, self.vocab_size = with_plain_linears(model.language_model), vocab_size
        self.decoder.attention = "sdpa"
        self.cache = KVCache.allocate(model.config.text, batch, capacity, weight.device, weight.dtype)
        self.token = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.length = 0
        self.view: CrossView | None = None

    def prefill(self, x: Tensor, view: CrossView | None, layouts: Sequence[Layout]) -> None:
        """Reads the prompts and draws each request's first token.

        Args:
            x: Embedded prompts [B, T, C] of equal length.
            view: What cross-attention reads; None without image keys.
            layouts: One per prompt.
        """
        self.length = x.shape[1]
        positions = torch.arange(self.length, device=x.device).expand(len(x), -1)
        past = make_past(positions, self.decoder.attention, self.cache, self.length)
        hidden = self.decoder(x, positions, past, view)
        self._draw(hidden[:, -1])
        if view is not None:
            after = torch.tensor([layout.after for layout in layouts], device=x.device)
            self.view = CrossView(view.kv, after[:, None])

    def fill_context(self, length: int) -> None:
        """Replaces the context by noise: the time of a step does not depend on the values.

        Args:
            length: positions that are in use afterwards.
        """
        for side in (self.cache.k, self.cache.v):
            side.normal_()
        self.length = length

    def step(self) -> None:
        """Draws each request's next token."""
        positions = torch.full((len(self.token), 1), self.length, device=self.token.device)
        x = self.decoder.embed_tokens(self.token[:, None])
        past = make_past(positions, self.decoder.attention, self.cache, self.length + 1)
        hidden = self.decoder(x, positions, past, self.view)
        self._draw(hidden[:, 0])
        self.length += 1

    def _draw(self, hidden: Tensor) -> None:
        self.token = self.decoder.logits(hidden)[:, : self.vocab_size].argmax(-1)


class _Timings:
    """Seconds per phase; on a GPU a phase ends when its work is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys((*PHASES, "decode"), 0.0)

    def add(self, phase: str, began: float) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[phase] += time.perf_counter() - began


@torch.inference_mode()
def generate(model: NVLMModel, prepared: PreparedPrompt, num_tokens: int, vocab_size: int) -> EagerOutput:
    """Generates exactly `num_tokens` tokens greedily; an end token does not end the answer.

    Args:
        model: The model, in one process.
        prepared: The request; its images hold pixels.
        num_tokens: At least 1; prompt and answer fit the model's context.
        vocab_size: Tokens of the tokenizer.

    Returns:
        The tokens and the time of each phase.

    Raises:
        ValueError: `num_tokens` is out of range, or an image is given as a handle.
    """
    room = model.config.text.context - len(prepared.input_ids) + 1
    if not 1 <= num_tokens <= room:
        raise ValueError(f"num_tokens must be from 1 to {room}, what the context still holds, got {num_tokens}")
    weight = model.language_model.embed_tokens.weight
    timings = _Timings(weight.device)
    images = []
    for image in prepared.images:
        began = time.perf_counter()
        pixel_values = image.pixel_values.to(weight.device, weight.dtype)
        timings.add("tile", began)
        began = time.perf_counter()
        features = encode(model.vision_model, pixel_values)
        timings.add("encode", began)
        began = time.perf_counter()
        images.append(project(model, features))
        timings.add("project", began)
    began = time.perf_counter()
    view = model.cross_view(len(prepared.input_ids), [prepared.layout], [images])
    timings.add("project", began)
    began = time.perf_counter()
    ids = torch.tensor([prepared.input_ids], device=weight.device)
    batch = EagerBatch(model, 1, ids.shape[1] + num_tokens, vocab_size)
    batch.prefill(model.embed(ids, [prepared.layout], [images]), view, [prepared.layout])
    token_ids: list[int] = batch.token.tolist()
    seconds: list[float] = []
    timings.add("prefill", began)
    for _ in range(num_tokens - 1):
        began = time.perf_counter()
        batch.step()
        token_ids += batch.token.tolist()
        seconds.append(time.perf_counter() - began)
    timings.seconds["decode"] = sum(seconds)
    return EagerOutput(token_ids, timings.seconds, seconds)
