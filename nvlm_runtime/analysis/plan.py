"""What a model needs of each GPU before any is rented: bytes a rank, and what the hardware's limits allow for time.

Bytes of weights are those of a rank's very parameters, counted on the meta device, and those of caches what `slots`
would allocate; those of activations are the largest that live at once by the layers' shapes, estimates. Times are
predictions from the roof: the larger of bytes over bandwidth and flops over the peak of dense bf16, collectives left
out; nothing in them is measured.
"""

from dataclasses import dataclass
from typing import Any

import torch

from nvlm_runtime.analysis.devices import DEVICES, Device
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.engine.nvlm import ROUNDING
from nvlm_runtime.engine.slots import cache_bytes, free_bytes
from nvlm_runtime.model.model import NVLMModel, outline
from nvlm_runtime.parallel.group import Group, VisionSplit, sizes
from nvlm_runtime.training.recipe import PARTS
from nvlm_runtime.training.trainer import part_of

CHUNK = 512  # tokens of a prompt that are read at a time
TAG_TOKENS = 16  # of a tag among NVLM-H's image keys, at most
QUESTION = 100  # tokens of a question and its answer
CPU = "this machine"
RESERVE = 0.08  # of the memory, for the context, kernels and fragments


@dataclass(frozen=True)
class Request:
    """What is asked of the model: rows at once, tokens of a row's prompt and answer, tiles of its picture."""

    batch: int
    context: int
    tiles: int


@dataclass(frozen=True)
class Plan:
    """bytes: a rank, by what they are for. seconds: predicted; empty where the device's limits are not known."""

    device: Device
    size: int
    bytes: dict[str, int]
    seconds: dict[str, float]

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        return self.total <= (1 - RESERVE) * self.device.memory


def find_device(name: str) -> Device:
    """Raises ValueError for a name that is not known; "cpu" is this machine, and its free memory."""
    if name == "cpu":
        return Device(CPU, free_bytes(torch.device("cpu")))
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}: expected cpu or one of {', '.join(DEVICES)}")
    return DEVICES[name]


def plan_model(
    config: NVLMConfig,
    request: Request,
    device: Device,
    size: int = 1,
    vision_split: VisionSplit = "tiles",
    dtype: torch.dtype = torch.bfloat16,
    trains: tuple[str, ...] = (),
    data: int = 1,
) -> Plan:
    """trains: parts that learn, with recomputed activations and rows of `context` tokens; () plans inference. data:
    groups of `size` ranks that share weights out by FSDP and have `batch` rows each.

    Raises ValueError for sizes below 1, a context beyond the model's and a number of ranks that cannot share the heads.
    """
    for name, value in (("batch", request.batch), ("context", request.context), ("tp", size), ("fsdp", data)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= request.tiles <= config.max_tiles + 1:
        raise ValueError(f"tiles must be from 0 to {config.max_tiles + 1}, thumbnail included, got {request.tiles}")
    if request.context > config.text.context:
        raise ValueError(f"the context of this model is {config.text.context} tokens, got {request.context}")
    if data > 1 and not trains:
        raise ValueError(f"fsdp shares weights out in training alone: got fsdp {data} without parts that learn")
    if data > 1:
        vision_split = "heads"  # as the trainer cuts the vision encoder then
    model = outline(config, Group(0, size), vision_split).to(dtype)
    if trains:
        found = _training_bytes(model, request, trains, on_cpu=device.name == CPU, data=data)
    else:
        found = _inference_bytes(model, request, dtype)
    return Plan(device, size, found, {} if trains else _seconds(model, request, device, vision_split, dtype))


def weight_bytes(model: NVLMModel) -> int:
    """Of a rank's parameters, a tied head counted once."""
    return sum(parameter.nbytes for parameter in model.parameters())


def image_keys(config: NVLMConfig, tiles: int) -> int:
    """Image keys of a picture, rounded as the engine's lone requests are; NVLM-H's tags at their longest."""
    if config.cross is None or not tiles:
        return 0
    regular = tiles - 1 if config.routing.cross == "regular" else tiles
    keys = regular * (config.tokens_per_tile + (TAG_TOKENS if config.routing.tags == "cross" else 0))
    return -(-keys // ROUNDING) * ROUNDING


def _inference_bytes(model: NVLMModel, request: Request, dtype: torch.dtype) -> dict[str, int]:
    shard, size = model.shard, dtype.itemsize
    text, vision = shard.text, shard.vision
    keys = image_keys(model.config, request.tiles)
    tokens = min(CHUNK, request.context)
    qkv = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    each = request.tiles if model.vision_model.tile_group.size == 1 else -(-request.tiles // model.group.size)
    patches = each * (vision.num_patches + 1)
    inner = 3 * vision.num_attention_heads * vision.head_dim
    image = request.tiles * model.config.tokens_per_tile * text.hidden_size * size
    return {
        "weights": weight_bytes(model),
        "keys and values": cache_bytes(shard, request.batch, request.context + 1, 0, dtype),
        "image keys and values": cache_bytes(shard, request.batch, 0, keys, dtype) if keys else 0,
        "image tokens": image + (cache_bytes(shard, 1, 0, keys, dtype) if keys else 0),
        "vision activations": patches * (2 * vision.hidden_size + max(inner, 2 * vision.intermediate_size)) * size,
        "prompt activations": tokens * (3 * text.hidden_size + max(qkv, 3 * text.intermediate_size)) * size,
        "logits": request.batch * text.vocab_size * (size + 4),
    }


def _state_bytes(model: NVLMModel, trains: tuple[str, ...], data: int) -> dict[str, int]:
    """Weights, gradients and moments. FSDP holds weights in fp32, a share of each, and gathers them in the model's
    dtype: what is outside of layers for all of the step, a layer and the next one while it runs.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    learns, whole = (sum(num for name, num in sizes.items() if part_of(name) in parts) for parts in (trains, PARTS))
    size = next(model.parameters()).element_size()
    if data == 1:
        masters = 4 * learns if size < 4 else 0
        weights = {"weights": weight_bytes(model), "fp32 masters": masters, "gradients": 4 * learns}
        return weights | {"optimizer": 8 * learns}
    layers = [*model.vision_model.encoder.layers, *model.language_model.layers]
    each = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    gathered = whole - sum(each) + 2 * max(each)
    return {
        "weights": 4 * -(-whole // data),
        "gathered weights": gathered * size,
        "gradients": 4 * -(-learns // data) + min(learns, gathered) * size,
        "optimizer": 8 * -(-learns // data),
    }


def _training_bytes(
    model: NVLMModel, request: Request, trains: tuple[str, ...], on_cpu: bool = False, data: int = 1
) -> dict[str, int]:
    """The step of a recipe whose activations are made again, rows packed full of pictures with a question each."""
    config, text, size = model.config, model.shard.text, next(model.parameters()).element_size()
    tokens = request.batch * request.context
    qkv = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    layer = tokens * (20 * text.hidden_size + 10 * text.intermediate_size + 6 * qkv) * size
    found = _state_bytes(model, trains, data) | {
        "kept activations": 2 * text.num_hidden_layers * tokens * text.hidden_size * size,
        "a layer's activations": layer,
        "logits of a chunk": min(tokens, CHUNK) * text.vocab_size * (size + 8),
    }
    if not request.tiles:
        return found
    shown = {"all": request.tiles, "thumbnail": 1, "none": 0}[config.routing.decoder]
    pictures = max(1, request.context // (QUESTION + shown * config.tokens_per_tile))  # of a row, packed
    vision, tiles = model.shard.vision, request.batch * pictures * request.tiles
    if "vision" in trains:
        rows, layers = tiles * (vision.num_patches + 1), vision.num_hidden_layers
        vision_encoder = rows * layers * (10 * vision.hidden_size + 3 * vision.intermediate_size)
    else:
        vision_encoder = (
            tiles // (request.batch if data == 1 else 1) * (vision.num_patches + 1)
        )  # row by row, but under FSDP
        vision_encoder *= 5 * vision.hidden_size + 2 * vision.intermediate_size
    projected = 3 * 4 * vision.hidden_size + (2 if config.variant == "x" else 4) * text.hidden_size
    if config.variant != "x":
        projected += 3 * text.intermediate_size
    keys, cross = pictures * image_keys(config, request.tiles), 0
    if config.cross is not None:
        cross = keys * (2 * text.hidden_size + 4 * text.num_key_value_heads * text.head_dim * len(config.cross.layers))
        if on_cpu:  # whose attention to intervals is a masked product, a document at a time
            found["scores of masked attention"] = 2 * 4 * tokens * (keys // pictures) * text.num_attention_heads
    return found | {
        "vision features": tiles * vision.num_patches * vision.hidden_size * size,
        "vision activations": vision_encoder * size,
        "image tokens": (tiles * config.tokens_per_tile * projected + request.batch * cross) * size,
    }


def _seconds(
    model: NVLMModel, request: Request, device: Device, vision_split: VisionSplit, dtype: torch.dtype
) -> dict[str, float]:
    if device.bandwidth is None or device.flops is None:
        return {}
    config, size = model.config, model.group.size
    text, vision = config.text, config.vision
    decoder = sum(p.nbytes for name, p in model.named_parameters() if part_of(name) in ("decoder", "cross"))
    if not text.tie_word_embeddings:  # a token looks up one row; a tied one is read as the head
        decoder -= model.language_model.embed_tokens.weight.nbytes
    vision_encoder = sum(p.numel() for p in model.vision_model.parameters())
    patches = vision.num_patches + 1
    each = -(-request.tiles // size) if vision_split == "tiles" else request.tiles
    attention = 4 * patches**2 * vision.hidden_size * vision.num_hidden_layers
    attention //= 1 if vision_split == "tiles" else size
    encode = each * (2 * patches * vision_encoder + attention) / device.flops
    shown = {"all": request.tiles, "thumbnail": min(1, request.tiles), "none": 0}[config.routing.decoder]
    prompt = min(request.context, QUESTION + shown * config.tokens_per_tile)
    weights = decoder / dtype.itemsize
    square = 2 * prompt**2 * text.hidden_size * text.num_hidden_layers / size
    prefill = max((2 * prompt * weights + square) / device.flops, decoder / device.bandwidth)
    keys = cache_bytes(model.shard, request.batch, request.context, image_keys(config, request.tiles), dtype)
    step = max((decoder + keys) / device.bandwidth, 2 * request.batch * weights / device.flops)
    found = {"encode a picture": encode} if request.tiles else {}
    return found | {f"read a prompt of {prompt} tokens": prefill, f"a token of {request.batch} rows": step}


def suggestions(
    config: NVLMConfig,
    request: Request,
    plan: Plan,
    vision_split: VisionSplit,
    dtype: torch.dtype,
    trains: tuple[str, ...],
    data: int = 1,
) -> list[str]:
    """What would make it fit, or, where it does, how much more would."""

    def fits(size: int = plan.size, data: int = data, **changes: int) -> bool:
        asked = Request(**{**vars(request), **changes})
        return plan_model(config, asked, plan.device, size, vision_split, dtype, trains, data).fits

    found = []
    if not plan.fits:
        enough = next((size for size in sizes(config) if size > plan.size and fits(size)), None)
        if enough is not None:
            found.append(f"--tp {enough} fits")
        groups = next((num for num in (2, 4, 8, 16, 32, 64) if trains and num > data and fits(data=num)), None)
        if groups is not None:
            found.append(f"--tp {plan.size} --fsdp {groups} fits")
    for name, most in (("batch", 4096), ("context", config.text.context)):
        best = _largest(lambda value, name=name: fits(**{name: value}), most)
        if best and best != getattr(request, name):
            found.append(f"--{name} {best:,} is the most that fits at --tp {plan.size}{f' --fsdp {data}' * (data > 1)}")
    return found


def _largest(fits: Any, most: int) -> int:
    """The largest value from 1 to `most` that fits, 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
