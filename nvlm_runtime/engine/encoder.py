"""Pictures to handles: the vision encoder, the projector and the image keys, each run once for a picture that comes
again.
"""

import threading
import time
from dataclasses import replace

import torch
from torch.profiler import record_function

from nvlm_runtime.engine.handle import ImageCache, ImageHandle, fingerprint, image_key
from nvlm_runtime.engine.request import ImageInput
from nvlm_runtime.engine.stages import Stages
from nvlm_runtime.inputs.image import TilePlan
from nvlm_runtime.inputs.layout import ImageLayout
from nvlm_runtime.model.cache import CrossKV


class ImageEncoder:
    """stages: of the model. cache: the handles that are kept, until a weight changes in place. Any thread may call it,
    one encodes at a time.
    """

    def __init__(self, stages: Stages, cache: ImageCache):
        self.stages, self.cache = stages, cache
        self.model = stages.model
        self._lock = threading.RLock()
        self._version, self._fingerprint = -1, ""

    @property
    def fingerprint(self) -> str:
        """Of the weights as they are now."""
        with self._lock:
            version = self.model.version
            if version != self._version:
                self._version, self._fingerprint = version, fingerprint(self.model)
                self.cache.clear()
            return self._fingerprint

    def cached(self, key: str) -> ImageHandle | None:
        with self._lock:
            return self.cache.get(key) if self.fingerprint else None

    def handle(self, picture: ImageInput, image: ImageLayout, timings: dict[str, float]) -> ImageHandle:
        """A picture's handle, from the cache or computed now; adds to timings' tile, encode and project seconds."""
        if picture.handle is not None:
            return picture.handle
        with self._lock:
            found = self.cached(picture.key)
            if found is None:
                found = self._encode(picture, image, timings)
                self.cache.put(found)
            return found

    def keys_values(self, handle: ImageHandle, image: ImageLayout) -> CrossKV:
        """A handle's keys and values where the layout has put them: their positions may count from another image's."""
        if image.first_key_position == 0 or self.model.config.cross.positions == "none":
            return handle.kv
        return self._keys_values(handle.tokens, image)

    @torch.inference_mode()
    def _encode(self, picture: ImageInput, image: ImageLayout, timings: dict[str, float]) -> ImageHandle:
        weight = self.model.language_model.embed_tokens.weight
        times = [time.perf_counter()]
        with record_function("nvlm.tile"):
            pixel_values = picture.pixel_values.to(weight.device, weight.dtype)
        times.append(time.perf_counter())
        features = self.stages.encode(pixel_values)
        del pixel_values
        self._wait(features.patches)
        times.append(time.perf_counter())
        tokens = self.stages.project(features)
        kv = self._keys_values(tokens, replace(image, first_key_position=0)) if self.model.config.cross else None
        self._wait(tokens)
        times.append(time.perf_counter())
        for stage, began, ended in zip(("tile", "encode", "project"), times, times[1:]):
            timings[stage] += ended - began
        return ImageHandle(picture.plan, picture.key, self.fingerprint, tokens, kv)

    @torch.inference_mode()
    def from_embeds(self, image_embeds: torch.Tensor, plan: TilePlan, image: ImageLayout) -> ImageHandle:
        """A handle of image tokens [N, P, C] computed elsewhere. ValueError for another shape."""
        config, weight = self.model.config, self.model.language_model.embed_tokens.weight
        shape = (plan.num_tiles, config.tokens_per_tile, config.text.hidden_size)
        if image_embeds.shape != shape:
            raise ValueError(f"image_embeds must be [N, P, C] = {list(shape)}, got {list(image_embeds.shape)}")
        tokens = image_embeds.to(weight.device, weight.dtype)
        kv = self._keys_values(tokens, replace(image, first_key_position=0)) if config.cross else None
        raw = tokens.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return ImageHandle(plan, image_key(raw, plan), self.fingerprint, tokens, kv)

    def _keys_values(self, tokens: torch.Tensor, image: ImageLayout) -> CrossKV:
        with record_function("nvlm.project"):
            embeds = self.model.key_embeds(image, tokens)[None]
            return self.model.language_model.cross_kv(embeds, image.key_positions.to(embeds.device))

    @staticmethod
    def _wait(tensor: torch.Tensor) -> None:
        """So that a stage's time is its own."""
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
