"""Plans a model's memory and predicts its speed on a device, before the weights or the GPUs are there.

Bytes of weights are counted on a rank's own parameters on the meta device. Bytes of caches are what the engine
allocates. Bytes of activations are estimates: the largest tensors that are alive at the same time, from the layers'
shapes. Times are roofline predictions: the larger of bytes over bandwidth and flops over the peak of dense bf16,
without collectives. Nothing in them is measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nvlm_runtime.analysis.devices import DEVICES, Device
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.engine.nvlm import ROUNDING
from nvlm_runtime.engine.slots import cache_bytes, free_bytes
from nvlm_runtime.model.model import NVLMModel, outline
from nvlm_runtime.model.parts import PARTS, part_of
from nvlm_runtime.parallel.group import Group
from nvlm_runtime.parallel.shard import VisionSplit, group_sizes

CHUNK = 512  # prompt tokens per prefill chunk
TAG_TOKENS = 16  # at most, of a tile tag among NVLM-H's image keys
QUESTION = 100  # tokens of a question and its answer
CPU = "this machine"
RESERVE = 0.08  # of the memory, for the CUDA context, kernels and fragmentation


@dataclass(frozen=True)
class Workload:
    """What the model has to hold at once.

    Attributes:
        batch: Requests in inference; packed sequences per step in training.
        context: Tokens per workload (prompt and answer) or per packed sequence.
        tiles: Tiles of each image, thumbnail included; 0 for text alone.
    """

    batch: int
    context: int
    tiles: int


@dataclass(frozen=True)
class Plan:
    """Memory and predicted times of one rank.

    Attributes:
        device: The rank's device.
        size: Ranks that share each layer (tensor parallelism).
        bytes: Bytes per purpose.
        seconds: Predicted seconds per phase; empty in training and where the device's limits are unknown.
    """

    device: Device
    size: int
    bytes: dict[str, int]
    seconds: dict[str, float]

    @property
    def total(self) -> int:
        """Bytes of all purposes together."""
        return sum(self.bytes.values())

    @property
    def fits(self) -> bool:
        """Whether the total leaves `RESERVE` of the device's memory free."""
        return self.total <= (1 - RESERVE) * self.device.memory


def find_device(name: str) -> Device:
    """Finds a device by name.

    Args:
        name: A key of `DEVICES`, or "cpu" for this machine with its free memory.

    Returns:
        The device.

    Raises:
        ValueError: The name is unknown.
    """
    if name == "cpu":
        return Device(CPU, free_bytes(torch.device("cpu")))
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}: expected cpu or one of {', '.join(DEVICES)}")
    return DEVICES[name]


def plan_model(
    config: NVLMConfig,
    workload: Workload,
    device: Device,
    size: int = 1,
    vision_split: VisionSplit = "tiles",
    dtype: torch.dtype = torch.bfloat16,
    trains: tuple[str, ...] = (),
    data: int = 1,
) -> Plan:
    """Plans the memory of one rank and, for inference, predicts its speed.

    Args:
        config: The model.
        workload: What the model has to hold.
        device: The device of each rank.
        size: Ranks that share each layer (tensor parallelism).
        vision_split: How ranks share the vision encoder, by tiles or by heads.
        dtype: Of weights, caches and activations.
        trains: Parts that are trained, with recomputed activations; () plans inference.
        data: Groups of `size` ranks that shard weights by FSDP; every group has the whole workload.

    Returns:
        The plan.

    Raises:
        ValueError: A size is below 1, the context is longer than the model's, or the ranks cannot share the heads.
    """
    for name, value in (("batch", workload.batch), ("context", workload.context), ("tp", size), ("fsdp", data)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 <= workload.tiles <= config.max_tiles + 1:
        raise ValueError(f"tiles must be from 0 to {config.max_tiles + 1}, thumbnail included, got {workload.tiles}")
    if workload.context > config.text.context:
        raise ValueError(f"the context of this model is {config.text.context} tokens, got {workload.context}")
    if data > 1 and not trains:
        raise ValueError(f"fsdp is for training only: got fsdp {data} and no part to train")
    if data > 1:
        vision_split = "heads"  # as the trainer splits the vision encoder then
    model = outline(config, Group(0, size), vision_split).to(dtype)
    if trains:
        found = _training_bytes(model, workload, trains, on_cpu=device.name == CPU, data=data)
    else:
        found = _inference_bytes(model, workload, dtype)
    return Plan(device, size, found, {} if trains else _seconds(model, workload, device, vision_split, dtype))


def weight_bytes(model: NVLMModel) -> int:
    """Counts the bytes of a rank's parameters.

    Args:
        model: The rank's part of a model.

    Returns:
        Bytes; a tied head counts once.
    """
    return sum(parameter.nbytes for parameter in model.parameters())


def image_keys(config: NVLMConfig, tiles: int) -> int:
    """Counts the image keys of one image.

    Args:
        config: The model.
        tiles: Tiles of the image, thumbnail included.

    Returns:
        Keys, with NVLM-H's tile tags at their longest, rounded up as the engine does for a single request.
    """
    if config.cross is None or not tiles:
        return 0
    regular = tiles - 1 if config.routing.cross == "regular" else tiles
    keys = regular * (config.tokens_per_tile + (TAG_TOKENS if config.routing.tags == "cross" else 0))
    return -(-keys // ROUNDING) * ROUNDING


def _inference_bytes(model: NVLMModel, workload: Workload, dtype: torch.dtype) -> dict[str, int]:
    shard, size = model.shard, dtype.itemsize
    text, vision = shard.text, shard.vision
    keys = image_keys(model.config, workload.tiles)
    tokens = min(CHUNK, workload.context)
    qkv = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    each = workload.tiles if model.vision_model.tile_group.size == 1 else -(-workload.tiles // model.group.size)
    patches = each * (vision.num_patches + 1)
    inner = 3 * vision.num_attention_heads * vision.head_dim
    image = workload.tiles * model.config.tokens_per_tile * text.hidden_size * size
    return {
        "weights": weight_bytes(model),
        "keys and values": cache_bytes(shard, workload.batch, workload.context + 1, 0, dtype),
        "image keys and values": cache_bytes(shard, workload.batch, 0, keys, dtype) if keys else 0,
        "image tokens": image + (cache_bytes(shard, 1, 0, keys, dtype) if keys else 0),
        "vision activations": patches * (2 * vision.hidden_size + max(inner, 2 * vision.intermediate_size)) * size,
        "prompt activations": tokens * (3 * text.hidden_size + max(qkv, 3 * text.intermediate_size)) * size,
        "logits": workload.batch * text.vocab_size * (size + 4),
    }


def _state_bytes(model: NVLMModel, trains: tuple[str, ...], data: int) -> dict[str, int]:
    """Weights, gradients and optimizer moments.

    FSDP shards fp32 weights and gathers them in the model's dtype: the weights outside of layers for the whole step,
    two layers (the running one and the next) at a time.
    """
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    learns, whole = (sum(num for name, num in sizes.items() if part_of(name) in parts) for parts in (trains, PARTS))
    size = next(model.parameters()).element_size()
    if data == 1:
        masters = 4 * learns if size < 4 else 0
        weights = {"weights": weight_bytes(model), "fp32 master weights": masters, "gradients": 4 * learns}
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
    model: NVLMModel, workload: Workload, trains: tuple[str, ...], on_cpu: bool = False, data: int = 1
) -> dict[str, int]:
    """A training step with recomputed activations; sequences are packed full of images with a question each."""
    text, size = model.shard.text, next(model.parameters()).element_size()
    tokens = workload.batch * workload.context
    qkv = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    layer = tokens * (20 * text.hidden_size + 10 * text.intermediate_size + 6 * qkv) * size
    found = _state_bytes(model, trains, data) | {
        "kept activations": 2 * text.num_hidden_layers * tokens * text.hidden_size * size,
        "a layer's activations": layer,
        "logits of a chunk": min(tokens, CHUNK) * text.vocab_size * (size + 8),
    }
    return found | _image_training_bytes(model, workload, trains, on_cpu, data) if workload.tiles else found


def _image_training_bytes(
    model: NVLMModel, workload: Workload, trains: tuple[str, ...], on_cpu: bool, data: int
) -> dict[str, int]:
    """What the images of a training step add."""
    config, text, size = model.config, model.shard.text, next(model.parameters()).element_size()
    found: dict[str, int] = {}
    shown = {"all": workload.tiles, "thumbnail": 1, "none": 0}[config.routing.decoder]
    images = max(1, workload.context // (QUESTION + shown * config.tokens_per_tile))  # per packed sequence
    vision, tiles = model.shard.vision, workload.batch * images * workload.tiles
    if "vision" in trains:
        rows, layers = tiles * (vision.num_patches + 1), vision.num_hidden_layers
        encoder = rows * layers * (10 * vision.hidden_size + 3 * vision.intermediate_size)
    else:  # frozen: one packed sequence at a time, all at once under FSDP
        encoder = tiles // (workload.batch if data == 1 else 1) * (vision.num_patches + 1)
        encoder *= 5 * vision.hidden_size + 2 * vision.intermediate_size
    projected = 3 * 4 * vision.hidden_size + (2 if config.variant == "x" else 4) * text.hidden_size
    if config.variant != "x":
        projected += 3 * text.intermediate_size
    keys, cross = images * image_keys(config, workload.tiles), 0
    if config.cross is not None:
        cross = keys * (2 * text.hidden_size + 4 * text.num_key_value_heads * text.head_dim * len(config.cross.layers))
        if on_cpu:  # there, attention to intervals is a masked product, one document at a time
            tokens = workload.batch * workload.context
            found["scores of masked attention"] = 2 * 4 * tokens * (keys // images) * text.num_attention_heads
    return found | {
        "vision features": tiles * vision.num_patches * vision.hidden_size * size,
        "vision activations": encoder * size,
        "image tokens": (tiles * config.tokens_per_tile * projected + workload.batch * cross) * size,
    }


def _seconds(
    model: NVLMModel, workload: Workload, device: Device, vision_split: VisionSplit, dtype: torch.dtype
) -> dict[str, float]:
    """Roofline predictions of each phase; {} where the device's limits are unknown."""
    if device.bandwidth is None or device.flops is None:
        return {}
    config, size = model.config, model.group.size
    text, vision = config.text, config.vision
    decoder = sum(p.nbytes for name, p in model.named_parameters() if part_of(name) in ("decoder", "cross"))
    if not text.tie_word_embeddings:  # a token reads one row of it; a tied one is read as the head
        decoder -= model.language_model.embed_tokens.weight.nbytes
    encoder = sum(p.numel() for p in model.vision_model.parameters())
    patches = vision.num_patches + 1
    each = -(-workload.tiles // size) if vision_split == "tiles" else workload.tiles
    attention = 4 * patches**2 * vision.hidden_size * vision.num_hidden_layers
    attention //= 1 if vision_split == "tiles" else size
    encode = each * (2 * patches * encoder + attention) / device.flops
    shown = {"all": workload.tiles, "thumbnail": min(1, workload.tiles), "none": 0}[config.routing.decoder]
    prompt = min(workload.context, QUESTION + shown * config.tokens_per_tile)
    weights = decoder / dtype.itemsize
    square = 2 * prompt**2 * text.hidden_size * text.num_hidden_layers / size
    prefill = max((2 * prompt * weights + square) / device.flops, decoder / device.bandwidth)
    keys = cache_bytes(model.shard, workload.batch, workload.context, image_keys(config, workload.tiles), dtype)
    step = max((decoder + keys) / device.bandwidth, 2 * workload.batch * weights / device.flops)
    found = {"encode an image": encode} if workload.tiles else {}
    return found | {f"prefill of {prompt} tokens": prefill, f"decode step, batch of {workload.batch}": step}


def suggestions(
    config: NVLMConfig,
    workload: Workload,
    plan: Plan,
    vision_split: VisionSplit,
    dtype: torch.dtype,
    trains: tuple[str, ...],
    data: int = 1,
) -> list[str]:
    """Suggests options that make a plan fit, and the largest batch and context that fit.

    Args:
        config: The model.
        workload: What was planned.
        plan: What `plan_model` returned for it.
        vision_split: As in `plan_model`.
        dtype: As in `plan_model`.
        trains: As in `plan_model`.
        data: As in `plan_model`.

    Returns:
        Lines for a person, with the options of `nvlm plan`.
    """

    def fits(size: int = plan.size, data: int = data, **changes: int) -> bool:
        changed = Workload(**{**vars(workload), **changes})
        return plan_model(config, changed, plan.device, size, vision_split, dtype, trains, data).fits

    found = []
    if not plan.fits:
        enough = next((size for size in group_sizes(config) if size > plan.size and fits(size)), None)
        if enough is not None:
            found.append(f"--tp {enough} fits")
        groups = next((num for num in (2, 4, 8, 16, 32, 64) if trains and num > data and fits(data=num)), None)
        if groups is not None:
            found.append(f"--tp {plan.size} --fsdp {groups} fits")
    for name, most in (("batch", 4096), ("context", config.text.context)):

        def fits_with(value: int, name: str = name) -> bool:
            return fits(**{name: value})

        best = _largest(fits_with, most)
        if best and best != getattr(workload, name):
            found.append(
                f"--{name} {best:,} is the largest that fits at --tp {plan.size}{f' --fsdp {data}' * (data > 1)}"
            )
    return found


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest value from 1 to `most` that fits, or 0."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
