"""Images on their way to the decoder: the handle of an image, its file, the cache of handles, and the encoder.

A handle is what the decoder needs of one image, computed once: its tokens, and its keys and values for
cross-attention. It stands wherever an image may, in any prompt. It belongs to the weights that made it, which its
fingerprint names.
"""

import hashlib
import json
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.profiler import record_function

from nvlm_runtime.engine.graphs import CapturedRunner
from nvlm_runtime.engine.runner import Runner
from nvlm_runtime.inputs.image import TilePlan, open_image, plan_tiles, tile_pixels
from nvlm_runtime.inputs.layout import ImageLayout
from nvlm_runtime.model.cache import CrossKV
from nvlm_runtime.model.model import NVLMModel

FORMAT = "nvlm-image-handle-1"


@dataclass(frozen=True)
class ImageHandle:
    """tokens: [N, P, C], thumbnail last. kv: [gated layers, 1, S, Hkv, D], as for the first image of a prompt, or None
    in NVLM-D. key: names the picture's content and plan. fingerprint: names the weights.
    """

    plan: TilePlan
    key: str
    fingerprint: str
    tokens: Tensor
    kv: CrossKV | None

    @property
    def nbytes(self) -> int:
        tensors = [self.tokens, *((self.kv.k, self.kv.v) if self.kv else ())]
        return sum(tensor.nbytes for tensor in tensors)

    def save(self, path: str | Path) -> None:
        """One safetensors file, written under another name and renamed when it is whole."""
        path = Path(path)
        tensors = {"tokens": self.tokens.contiguous()}
        if self.kv is not None:
            tensors |= {"k": self.kv.k.contiguous(), "v": self.kv.v.contiguous()}
        digest = _digest(tensors)
        metadata = {
            "format": FORMAT,
            "plan": json.dumps(asdict(self.plan)),
            "key": self.key,
            "fingerprint": self.fingerprint,
            "sha256": digest,
        }
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            save_file(tensors, partial, metadata)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def load(path: str | Path, device: torch.device | str = "cpu") -> "ImageHandle":
        """Raises FileNotFoundError, or ValueError for a file that is no handle or was damaged."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"image handle {str(path)!r} does not exist")
        try:
            with safe_open(path, "pt", device="cpu") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not an image handle, or is damaged: {error}") from error
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not an image handle: its format is {metadata.get('format')!r}, not {FORMAT!r}")
        if metadata.get("sha256") != _digest(tensors):
            raise ValueError(f"{path} is damaged: its tensors are not those that were saved")
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
        kv = CrossKV(tensors["k"], tensors["v"]) if "k" in tensors else None
        plan = TilePlan(**json.loads(metadata["plan"]))
        return ImageHandle(plan, metadata["key"], metadata["fingerprint"], tensors["tokens"], kv)


@dataclass(frozen=True)
class ImageInput:
    """One image of a request. key: names its content and plan. pixels: waits for its tiles; unused with a handle."""

    plan: TilePlan
    key: str
    pixels: Callable[[], Tensor] | None
    handle: ImageHandle | None = None

    @property
    def pixel_values(self) -> Tensor:
        """Its tiles, fp32 [N, 3, S, S]. ValueError where only a handle was given."""
        if self.pixels is None:
            raise ValueError("the image was given as a handle, which has no pixels")
        return self.pixels()


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def fingerprint(model: NVLMModel) -> str:
    """Names the weights an image goes through: the config, and both ends of every one of their tensors."""
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in model.state_dict().items():
        parts = name.split(".")
        if parts[0] in ("vision_model", "mlp1") or {"k_proj", "v_proj", "embed_tokens"} & set(parts):
            flat = tensor.reshape(-1)
            ends = torch.cat([flat[:64], flat[-64:]]).cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(ends.view(torch.uint8).numpy())
    return digest.hexdigest()


def image_key(pixels: bytes, plan: TilePlan) -> str:
    """Names a decoded RGB picture, cut by a plan."""
    return hashlib.sha256(repr(plan).encode() + pixels).hexdigest()


class ImageCache:
    """The handles used last, up to `max_bytes` of them; 0 keeps none. Not for several threads at once."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._handles: OrderedDict[str, ImageHandle] = OrderedDict()

    def __len__(self) -> int:
        return len(self._handles)

    def get(self, key: str) -> ImageHandle | None:
        if key in self._handles:
            self._handles.move_to_end(key)
        return self._handles.get(key)

    def put(self, handle: ImageHandle) -> None:
        if handle.nbytes > self.max_bytes or handle.key in self._handles:
            return
        self._handles[handle.key] = handle
        self.nbytes += handle.nbytes
        while self.nbytes > self.max_bytes:
            _, oldest = self._handles.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def clear(self) -> None:
        self._handles.clear()
        self.nbytes = 0


class ImageEncoder:
    """Encodes images and keeps their handles. Any thread may call it; one encodes at a time.

    No lock is held while an image's tiles are cut or the weights are read, which other threads' work may be part of.

    Args:
        runner: The model's.
        cache: The handles that are kept, until a weight changes in place.
    """

    def __init__(self, runner: Runner | CapturedRunner, cache: ImageCache):
        self.runner, self.cache = runner, cache
        self.model = runner.model
        self._lock = threading.Lock()  # of the cache and the next two
        self._version, self._fingerprint = -1, ""
        self._encoding = threading.Lock()  # of the runner: who holds it waits for no other thread
        self._threads = ThreadPoolExecutor(2, "nvlm-image")
        self._stream: torch.cuda.Stream | None = None
        self._aside: ThreadPoolExecutor | None = None
        device = self.model.language_model.embed_tokens.weight.device
        if device.type == "cuda" and self.model.group.size == 1:  # ranks must launch their collectives in one order
            self._stream = torch.cuda.Stream(device)
            self._aside = ThreadPoolExecutor(1, "nvlm-encode")

    @property
    def fingerprint(self) -> str:
        """Of the weights as they are now."""
        version = self.model.version
        with self._lock:
            if version == self._version:
                return self._fingerprint
        found = fingerprint(self.model)
        with self._lock:
            if version != self._version:
                self._version, self._fingerprint = version, found
                self.cache.clear()
        return found

    def open(self, sources: Iterable[Any]) -> tuple[ImageInput, ...]:
        """Opens the images of a request, in threads; their tiles are cut in threads too.

        Args:
            sources: paths, PIL images, uint8 arrays [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], or `ImageHandle`s.

        Returns:
            One input per source, in order. The tiles of an image whose handle is in the cache are not cut until
            somebody asks for them.

        Raises:
            ValueError: an image that cannot be read, or a handle of other weights than this model's.
            FileNotFoundError: a path that does not exist.
        """
        return tuple(self._threads.map(self._open, sources))

    def _open(self, source: Any) -> ImageInput:
        if isinstance(source, ImageHandle):
            if source.fingerprint != self.fingerprint:
                raise ValueError("the image handle was made by other weights than this model's")
            return ImageInput(source.plan, source.key, None, source)
        picture, config = open_image(source), self.model.config
        plan = plan_tiles(*picture.size, config.vision.image_size, config.min_tiles, config.max_tiles)
        key = image_key(picture.tobytes(), plan)
        handle = self.cached(key)
        if handle is not None:
            return ImageInput(plan, key, lambda: tile_pixels(picture, plan), handle)
        return ImageInput(plan, key, self._threads.submit(tile_pixels, picture, plan).result)

    def cached(self, key: str) -> ImageHandle | None:
        """Returns the handle in the cache under this `image_key`; None without one, and after a weight changed."""
        made_by = self.fingerprint
        with self._lock:
            found = self.cache.get(key)
        return found if found is not None and found.fingerprint == made_by else None

    def handle(self, picture: ImageInput, image: ImageLayout, timings: dict[str, float]) -> ImageHandle:
        """A picture's handle, from the cache or computed now; adds to timings' tile, encode and project seconds."""
        if picture.handle is not None:
            return picture.handle
        found = self.cached(picture.key)
        if found is not None:
            return found
        began = time.perf_counter()
        with record_function("nvlm.tile"):
            pixel_values = picture.pixel_values
        timings["tile"] += time.perf_counter() - began
        with self._encoding:
            found = self.cached(picture.key)  # another thread may have encoded it meanwhile
            if found is None:
                found = self._encode(picture, pixel_values, image, timings)
                with self._lock:
                    self.cache.put(found)
        return found

    def start(self, picture: ImageInput, image: ImageLayout, timings: dict[str, float]) -> Future[ImageHandle]:
        """As `handle`, without waiting for a GPU: a thread of its own encodes, on a CUDA stream of its own.

        A CPU, and every rank of a group, has computed the handle when this returns.
        """
        if self._aside is not None and picture.handle is None:
            return self._aside.submit(self.handle, picture, image, timings)
        made: Future[ImageHandle] = Future()
        made.set_result(self.handle(picture, image, timings))
        return made

    def keys_values(self, handle: ImageHandle, image: ImageLayout) -> CrossKV:
        """A handle's keys and values where the layout has put them: their positions may count from another image's."""
        if image.first_key_position == 0 or self.model.config.cross.positions == "none":
            return handle.kv
        return self._keys_values(handle.tokens, image)

    @torch.inference_mode()
    def _encode(
        self, picture: ImageInput, pixel_values: Tensor, image: ImageLayout, timings: dict[str, float]
    ) -> ImageHandle:
        if self._stream is None:
            return self._encode_here(picture, pixel_values, image, timings)
        used_by = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(used_by)
        with torch.cuda.stream(self._stream):
            handle = self._encode_here(picture, pixel_values, image, timings)
        for tensor in (handle.tokens, *((handle.kv.k, handle.kv.v) if handle.kv else ())):
            tensor.record_stream(used_by)  # its memory is not given away before that stream has read it
        return handle

    def _encode_here(
        self, picture: ImageInput, pixel_values: Tensor, image: ImageLayout, timings: dict[str, float]
    ) -> ImageHandle:
        """Encodes on the current stream, and waits for this stream alone."""
        weight = self.model.language_model.embed_tokens.weight
        times = [time.perf_counter()]
        features = self.runner.encode(pixel_values.to(weight.device, weight.dtype))
        del pixel_values
        self._wait(features.patches)
        times.append(time.perf_counter())
        tokens = self.runner.project(features)
        kv = self._keys_values(tokens, replace(image, first_key_position=0)) if self.model.config.cross else None
        self._wait(tokens)
        times.append(time.perf_counter())
        for stage, began, ended in zip(("encode", "project"), times, times[1:]):
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
            torch.cuda.current_stream(tensor.device).synchronize()
