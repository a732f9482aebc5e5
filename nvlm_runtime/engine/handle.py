"""What the decoder needs of one image, computed once: its tokens, and its keys and values for cross-attention.

A handle stands wherever a picture may: in any prompt, at any place. It belongs to the weights that made it, which its
fingerprint names.
"""

import hashlib
import json
import os
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nvlm_runtime.inputs.image import TilePlan
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
