"""The yardstick: a request through plain PyTorch, one call after the other, which everything faster is timed against.

The vision encoder is written here in torch's own functions over the model's weights; the decoder is the model's with
torch's own linears, called on a cache of its own. No chunks, no kept prefix or handle, no captured or compiled step. It
stays slow on purpose.

B requests, T prompt tokens, N tiles, P image tokens a tile, C hidden_size of the decoder.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nvlm_kernels import pixel_shuffle
from nvlm_runtime.engine.request import PHASES, PreparedPrompt
from nvlm_runtime.inputs.layout import Layout
from nvlm_runtime.model.cache import KVCache
from nvlm_runtime.model.decoder import CrossView
from nvlm_runtime.model.linear import plain_twin
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import make_past
from nvlm_runtime.model.vision import InternViT


@dataclass(frozen=True)
class PlainAnswer:
    """token_ids: as drawn, the largest logit each. timings: seconds of tile, encode, project, prefill and decode.
    token_seconds: of every token after the first.
    """

    token_ids: list[int]
    timings: dict[str, float]
    token_seconds: list[float]


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def see(vision_encoder: InternViT, pixel_values: Tensor) -> Tensor:
    """Tiles [N, 3, S, S] to features [N, 4P, vision hidden_size], as `InternViT` gives them."""
    config, embeddings = vision_encoder.config, vision_encoder.embeddings

    def norm(x: Tensor, module: torch.nn.Module) -> Tensor:
        if config.norm_type == "rms_norm":
            return _rms(x, module.weight, config.layer_norm_eps)
        return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, config.layer_norm_eps)

    patch = embeddings.patch_embedding
    x = F.conv2d(pixel_values, patch.weight, patch.bias, stride=config.patch_size).flatten(2).transpose(1, 2)
    x = torch.cat([embeddings.class_embedding.expand(len(x), -1, -1), x], dim=1) + embeddings.position_embedding
    for block in vision_encoder.encoder.layers:
        q, k, v = F.linear(norm(x, block.norm1), block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=-1)
        if config.qk_normalization:
            q, k = (_rms(t, n.weight, n.eps) for t, n in ((q, block.attn.q_norm), (k, block.attn.k_norm)))
        q, k, v = (t.unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [N, 4P + 1, C]
        x = x + F.linear(out, block.attn.proj.weight, block.attn.proj.bias) * block.ls1
        mlp = block.mlp
        out = F.gelu(F.linear(norm(x, block.norm2), mlp.fc1.weight, mlp.fc1.bias))
        x = x + F.linear(out, mlp.fc2.weight, mlp.fc2.bias) * block.ls2
    return x[:, 1:]


def project(model: NVLMModel, features: Tensor) -> Tensor:
    """Features to image tokens [N, P, C]."""
    return plain_twin(model.mlp1)(pixel_shuffle(features, model.config.ps_version))


class PlainRows:
    """B rows of one length, decoding greedily on a cache of `capacity` slots. vocab_size: of the tokenizer, as the
    embedding's padding rows are never drawn.
    """

    def __init__(self, model: NVLMModel, batch: int, capacity: int, vocab_size: int):
        weight = model.language_model.embed_tokens.weight
        self.decoder, self.vocab_size = plain_twin(model.language_model), vocab_size
        self.decoder.attention = "sdpa"
        self.cache = KVCache.allocate(model.config.text, batch, capacity, weight.device, weight.dtype)
        self.token = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.length = 0
        self.view: CrossView | None = None

    def prefill(self, x: Tensor, view: CrossView | None, layouts: Sequence[Layout]) -> None:
        """Reads prompts [B, T, C] of one length and draws every row's first token."""
        self.length = x.shape[1]
        positions = torch.arange(self.length, device=x.device).expand(len(x), -1)
        past = make_past(positions, self.decoder.attention, self.cache, self.length)
        hidden = self.decoder(x, positions, past, view)
        self._draw(hidden[:, -1])
        if view is not None:
            after = torch.tensor([layout.after for layout in layouts], device=x.device)
            self.view = CrossView(view.kv, after[:, None])

    def pretend(self, length: int) -> None:
        """Stands behind a context of noise: what a step costs does not depend on what it reads."""
        for side in (self.cache.k, self.cache.v):
            side.normal_()
        self.length = length

    def step(self) -> None:
        """Draws every row's next token."""
        positions = torch.full((len(self.token), 1), self.length, device=self.token.device)
        x = self.decoder.embed_tokens(self.token[:, None])
        past = make_past(positions, self.decoder.attention, self.cache, self.length + 1)
        hidden = self.decoder(x, positions, past, self.view)
        self._draw(hidden[:, 0])
        self.length += 1

    def _draw(self, hidden: Tensor) -> None:
        self.token = self.decoder.logits(hidden)[:, : self.vocab_size].argmax(-1)


@torch.inference_mode()
def answer(model: NVLMModel, prepared: PreparedPrompt, num_tokens: int, vocab_size: int) -> PlainAnswer:
    """The first `num_tokens` tokens of a greedy answer, end tokens among them. vocab_size: of the tokenizer.

    Raises ValueError for less than one token, more than the context holds, and for images given as handles.
    """
    room = model.config.text.context - len(prepared.input_ids) + 1
    if not 1 <= num_tokens <= room:
        raise ValueError(f"num_tokens must be from 1 to {room}, what the context still holds, got {num_tokens}")
    weight = model.language_model.embed_tokens.weight
    timings = dict.fromkeys((*PHASES, "decode"), 0.0)

    def spent(stage: str, began: float) -> None:
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)
        timings[stage] += time.perf_counter() - began

    images = []
    for picture in prepared.images:
        began = time.perf_counter()
        pixel_values = picture.pixel_values.to(weight.device, weight.dtype)
        spent("tile", began)
        began = time.perf_counter()
        features = see(model.vision_model, pixel_values)
        spent("encode", began)
        began = time.perf_counter()
        images.append(project(model, features))
        spent("project", began)
    began = time.perf_counter()
    view = model.cross_view(len(prepared.input_ids), [prepared.layout], [images])
    spent("project", began)
    began = time.perf_counter()
    ids = torch.tensor([prepared.input_ids], device=weight.device)
    rows = PlainRows(model, 1, ids.shape[1] + num_tokens, vocab_size)
    rows.prefill(model.embed(ids, [prepared.layout], [images]), view, [prepared.layout])
    token_ids, seconds = rows.token.tolist(), []
    spent("prefill", began)
    for _ in range(num_tokens - 1):
        began = time.perf_counter()
        rows.step()
        token_ids += rows.token.tolist()
        seconds.append(time.perf_counter() - began)
    timings["decode"] = sum(seconds)
    return PlainAnswer(token_ids, timings, seconds)
