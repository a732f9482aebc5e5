"""Who is timed: plain PyTorch, ours as a user would call it, transformers. The same weights, tokens and pictures.

A contestant answers four questions, each on the clock from outside: `see` a picture, the `first` token of a prompt,
`steps` behind a context, `steps` of a batch. B rows, T prompt tokens.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from PIL import Image

from bench.peers.transformers_peer import transformers_model
from nvlm_runtime import NVLM
from nvlm_runtime.analysis import eager
from nvlm_runtime.engine.request import PreparedPrompt
from nvlm_runtime.engine.sampling import GenerationParams

# what of ours is timed, by name: keyword arguments of NVLM
CONFIGURATIONS: dict[str, dict[str, Any]] = {"ours": {"graphs": False}}
ON_CUDA: dict[str, dict[str, Any]] = {"ours, graphs": {"graphs": True}}  # besides
TOKEN = 9  # what prompts of a given length are made of


class Contestant(Protocol):
    def see(self, picture: Image.Image) -> float:
        """Seconds from a picture to its tokens."""

    def first(self, picture: Image.Image, question: str) -> tuple[float, float]:
        """Seconds from a picture never seen before and a question to the first token, and those of tiles and vision
        encoder.
        """

    def steps(self, batch: int, context: int, num: int) -> Iterator[float]:
        """Seconds of each of `num` decoding steps of `batch` rows behind prompts of `context` tokens."""


def wait(engine: NVLM) -> None:
    """Until its device has done what it was told."""
    if engine.device.type == "cuda":
        torch.cuda.synchronize(engine.device)


class Eager:
    """nvlm_runtime.analysis.eager. Its steps stand behind a cache of noise, which costs what a real one does."""

    def __init__(self, engine: NVLM):
        self.engine, self.model = engine, engine.model

    @torch.inference_mode()
    def see(self, picture: Image.Image) -> float:
        began = time.perf_counter()
        pixel_values = self.engine.prepare("?", [picture]).pixel_values[0]
        pixel_values = pixel_values.to(self.engine.device, self.engine.dtype)
        eager.project(self.model, eager.encode(self.model.vision_model, pixel_values))
        wait(self.engine)
        return time.perf_counter() - began

    def first(self, picture: Image.Image, question: str) -> tuple[float, float]:
        began = time.perf_counter()
        prepared = self.engine.prepare(question, [picture])
        given = eager.generate(self.model, prepared, 1, self.engine.tokenizer.vocab_size)
        return time.perf_counter() - began, sum(given.timings[stage] for stage in ("tile", "encode", "project"))

    @torch.inference_mode()
    def steps(self, batch: int, context: int, num: int) -> Iterator[float]:
        rows = eager.EagerBatch(self.model, batch, context + num, self.engine.tokenizer.vocab_size)
        rows.fill_context(context)
        for _ in range(num):
            began = time.perf_counter()
            rows.step()
            rows.token.tolist()
            yield time.perf_counter() - began


class Ours:
    """The public API of NVLM. Its contexts are read, not invented; a later round finds them in the buffers."""

    def __init__(self, engine: NVLM):
        self.engine = engine
        self._batches: dict[tuple[int, int], Any] = {}

    def see(self, picture: Image.Image) -> float:
        began = time.perf_counter()
        self.engine.encode_image(picture)
        wait(self.engine)
        return time.perf_counter() - began

    def first(self, picture: Any, question: str) -> tuple[float, float]:
        """picture: or a handle."""
        began = time.perf_counter()
        given = self.engine.generate(question, [picture], max_new_tokens=1, ignore_eos=True)
        return time.perf_counter() - began, sum(given.timings[stage] for stage in ("tile", "encode", "project"))

    def steps(self, batch: int, context: int, num: int) -> Iterator[float]:
        prepared = [self.engine.prepare(input_ids=[TOKEN] * context) for _ in range(batch)]
        yield from self.steps_of(prepared, num)

    def steps_of(self, requests: Sequence[PreparedPrompt], num: int) -> Iterator[float]:
        """The steps behind prompts that may hold images; all of one length."""
        size, length = len(requests), len(requests[0].input_ids)
        params = GenerationParams(max_new_tokens=num + size + 2, ignore_eos=True)
        rows = [self.engine.request(prepared, params) for prepared in requests]
        key = (size, length)
        if key not in self._batches:
            slots = max(row.num_positions for row in rows), max(row.prepared.layout.cross_length for row in rows)
            self._batches[key] = self.engine.batch(size, *slots)
        batch = self._batches[key]
        for row in rows:
            batch.admit(row)
        try:
            while not all(row.token_seconds for row in rows):
                for row, _ in batch.advance():
                    if row.error is not None:
                        raise row.error
            for _ in range(num):
                began = time.perf_counter()
                progress = batch.advance()
                yield time.perf_counter() - began
                if len(progress) != size:
                    raise RuntimeError(f"a step of {size} rows drew {len(progress)} tokens")
        finally:
            for row in rows:
                batch.cancel(row)

    def forget(self) -> None:
        """Lets the buffers of `steps` go."""
        self._batches.clear()


class Transformers:
    """transformers' code over the same weights, prompts and pixels. Its contexts are noise, as eager's are."""

    def __init__(self, engine: NVLM):
        from transformers import DynamicCache

        self.engine, self.new_cache = engine, DynamicCache
        self.model = transformers_model(engine.model, engine.tokenizer.special("<|vision_pad|>"))

    @torch.inference_mode()
    def see(self, picture: Image.Image) -> float:
        began = time.perf_counter()
        pixel_values = self.engine.prepare("?", [picture]).pixel_values[0]
        pixel_values = pixel_values.to(self.engine.device, self.engine.dtype)
        self.model.get_image_features(pixel_values, vision_feature_layer=-1)
        wait(self.engine)
        return time.perf_counter() - began

    @torch.inference_mode()
    def first(self, picture: Image.Image, question: str) -> tuple[float, float]:
        began = time.perf_counter()
        prepared = self.engine.prepare(question, [picture])
        pixel_values = prepared.pixel_values[0].to(self.engine.device, self.engine.dtype)
        tokens = self.model.get_image_features(pixel_values, vision_feature_layer=-1)
        wait(self.engine)
        seen = time.perf_counter() - began
        inputs = self._inputs(prepared.input_ids) | {"mm_encoder_outputs": {"image": tokens}, "logits_to_keep": 1}
        self.draw(self.model(**inputs)).tolist()
        return time.perf_counter() - began, seen

    @torch.inference_mode()
    def answer(self, picture: Image.Image, question: str, num: int) -> list[int]:
        """The first `num` tokens of a greedy answer, through `forward` with pixels."""
        prepared = self.engine.prepare(question, [picture])
        inputs = self._inputs(prepared.input_ids)
        pixel_values = prepared.pixel_values[0].to(self.engine.device, self.engine.dtype)
        tokens = [self.draw(self.model(**inputs, pixel_values=pixel_values, vision_feature_layer=-1))]
        while len(tokens) < num:
            tokens.append(self.draw(self.model(tokens[-1][:, None], past_key_values=inputs["past_key_values"])))
        return torch.cat(tokens).tolist()

    @torch.inference_mode()
    def steps(self, batch: int, context: int, num: int) -> Iterator[float]:
        text = self.engine.config.text
        cache = self.new_cache(config=self.model.config.text_config)
        for layer in range(text.num_hidden_layers):
            shape = (batch, text.num_key_value_heads, context, text.head_dim)
            noise = (torch.randn(shape, dtype=self.engine.dtype, device=self.engine.device) for _ in range(2))
            cache.update(*noise, layer)
        token = torch.full((batch,), TOKEN, device=self.engine.device)
        for _ in range(num):
            began = time.perf_counter()
            token = self.draw(self.model(token[:, None], past_key_values=cache, use_cache=True))
            token.tolist()
            yield time.perf_counter() - began

    def _inputs(self, input_ids: Sequence[int]) -> dict[str, Any]:
        cache = self.new_cache(config=self.model.config.text_config)
        ids = torch.tensor([input_ids], device=self.engine.device)
        return {"input_ids": ids, "past_key_values": cache, "use_cache": True}

    @staticmethod
    def draw(output: Any) -> torch.Tensor:
        return output.logits[:, -1].argmax(-1)


def quantized(engine: NVLM, scheme: Mapping[str, str]) -> NVLM:
    """An engine like another, with weights of its own where the scheme says so and the other's elsewhere."""
    shared = (*engine.model.parameters(), *engine.model.buffers(), engine.model.group)
    model = copy.deepcopy(engine.model, {id(one): one for one in shared})
    return NVLM(model, engine.tokenizer, quantize=scheme)


def contestants(engine: NVLM, peers: Sequence[str], schemes: Sequence[Mapping[str, str]] = ()) -> dict[str, Contestant]:
    """By name, in the order they take turns; of a group of ranks ours alone, for the others run whole models. schemes:
    ours again, each quantised so.

    ValueError for a peer that is not known or cannot be this model, and as `quantize` raises.
    """
    if engine.model.group.size > 1:
        if peers or schemes:
            raise ValueError("--peers and --quantize run whole models, not over ranks")
        return {"ours": Ours(engine)}
    if unknown := set(peers) - {"transformers"}:
        raise ValueError(f"peers must be transformers, got {', '.join(sorted(unknown))}")
    found: dict[str, Contestant] = {"eager": Eager(engine)}
    for name, options in (CONFIGURATIONS | (ON_CUDA if engine.device.type == "cuda" else {})).items():
        found[name] = Ours(NVLM(engine.model, engine.tokenizer, **options))
    for scheme in schemes:
        found["ours, " + " ".join(f"{part}={method}" for part, method in scheme.items())] = Ours(
            quantized(engine, scheme)
        )
    if peers:
        found["transformers"] = Transformers(engine)
    return found
