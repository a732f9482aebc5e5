"""What a model is: frozen dataclasses, and a reader of config.json that never guesses.

The three variants differ only in where an image's tiles go (`Routing`): into the decoder's sequence, into the
keys and values of gated cross-attention, or nowhere.
Sources: NVLM paper (arXiv 2409.11402) sections 3 and 4.5, the NVLM-D-72B config.json,
Megatron-LM examples/multimodal/nvlm.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Tiles = Literal["none", "thumbnail", "regular", "all"]
TagFormat = Literal["none", "1d", "grid", "bbox"]
VARIANTS = ("d", "x", "h")


@dataclass(frozen=True)
class VisionConfig:
    """An InternViT vision encoder. `num_dummy_heads` all-zero heads pad the checkpoint file, never the memory."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    norm_type: Literal["rms_norm", "layer_norm"]
    qk_normalization: bool
    qkv_bias: bool
    num_dummy_heads: int = 0

    @property
    def head_dim(self) -> int:
        """Width of a head, D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_patches(self) -> int:
        """Patches of a tile."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class RopeScaling:
    """YaRN, as Qwen2 publishes it for 131,072 tokens: factor 4 over 32,768."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class TextConfig:
    """A Qwen2 (QKV bias) or Llama (no bias) decoder."""

    architecture: Literal["Qwen2ForCausalLM", "LlamaForCausalLM"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_scaling: RopeScaling | None = None

    @property
    def head_dim(self) -> int:
        """Width of a head, D."""
        return self.hidden_size // self.num_attention_heads

    @property
    def context(self) -> int:
        """Positions the model can tell apart: YaRN stretches them."""
        scaling = self.rope_scaling
        stretched = int(scaling.factor * scaling.original_max_position_embeddings) if scaling else 0
        return max(self.max_position_embeddings, stretched)

    @property
    def qkv_bias(self) -> bool:
        """Whether q, k and v have biases: in Qwen2."""
        return self.architecture == "Qwen2ForCausalLM"


@dataclass(frozen=True)
class CrossConfig:
    """Gated cross-attention. The paper leaves placement, feed-forward and positions open; these are our switches.

    `positions` "sinusoidal" adds the place of a key in its sequence to the key/value input. Attention is blind to
    the order of its keys, so without it NVLM-H cannot tell which tile a tag stands beside.
    """

    layers: tuple[int, ...]
    placement: Literal["inside", "before"] = "inside"
    ffn: Literal["none", "swiglu", "gelu4x"] = "none"
    positions: Literal["none", "sinusoidal"] = "none"


@dataclass(frozen=True)
class Routing:
    """Where the tiles of an image go."""

    decoder: Tiles
    cross: Tiles
    tags: Literal["decoder", "cross"]  # which of the two sequences holds the tile tags


ROUTING = {
    "d": Routing(decoder="all", cross="none", tags="decoder"),
    "x": Routing(decoder="none", cross="all", tags="decoder"),
    "h": Routing(decoder="thumbnail", cross="regular", tags="cross"),
}


@dataclass(frozen=True)
class NVLMConfig:
    """A whole model.

    ps_version: order of the pixel shuffle. thumbnail_tag: the text before a thumbnail. bos_token: the special token
    every prompt begins with, None where there is none (Qwen2).
    """

    variant: Literal["d", "x", "h"]
    vision: VisionConfig
    text: TextConfig
    cross: CrossConfig | None
    ps_version: Literal["v1", "v2"] = "v2"
    min_tiles: int = 1
    max_tiles: int = 6
    tile_tags: TagFormat = "1d"
    thumbnail_tag: str = "<tile_global_thumbnail>"
    bos_token: str | None = None
    projector_eps: float = 1e-5  # as the HF code has it; Megatron's is 1e-6

    @property
    def routing(self) -> Routing:
        """Where the variant puts tiles and tags."""
        return ROUTING[self.variant]

    @property
    def tokens_per_tile(self) -> int:
        """Image tokens of a tile, P: a quarter of its patches."""
        return self.vision.num_patches // 4

    def __post_init__(self):
        _check(self)


def _check(config: NVLMConfig) -> None:
    v, t, c = config.vision, config.text, config.cross
    if v.hidden_size % v.num_attention_heads:
        raise ValueError(f"vision hidden_size {v.hidden_size} is no multiple of its {v.num_attention_heads} heads")
    if v.image_size % (2 * v.patch_size):
        raise ValueError(f"image_size {v.image_size} must be a multiple of twice the patch_size {v.patch_size}")
    if t.hidden_size % t.num_attention_heads or t.num_attention_heads % t.num_key_value_heads:
        raise ValueError(
            f"hidden_size {t.hidden_size}, {t.num_attention_heads} heads and {t.num_key_value_heads} "
            f"key/value heads do not divide"
        )
    if (config.routing.cross == "none") != (c is None):
        need = "no cross_attention" if c else "cross_attention in its config"
        raise ValueError(f"NVLM-{config.variant.upper()} has {need}")
    if t.head_dim % 2:
        raise ValueError(f"the decoder's head size {t.head_dim} must be even, for rotary positions")
    if c and (not c.layers or list(c.layers) != sorted({i for i in c.layers if 0 <= i < t.num_hidden_layers})):
        raise ValueError(
            f"cross_attention layers must be ascending, from 0 to {t.num_hidden_layers - 1}, got {list(c.layers)}"
        )
    if not 1 <= config.min_tiles <= config.max_tiles:
        raise ValueError(f"min_tiles {config.min_tiles} and max_tiles {config.max_tiles} do not fit")


class _Section:
    """One object of config.json: every read names what is missing or not understood."""

    def __init__(self, name: str, values: Mapping[str, Any]):
        if not isinstance(values, Mapping):
            raise ValueError(f"config: {name} must be an object, got {type(values).__name__}")
        self.name, self.values = name, values

    def need(self, key: str, kind: type = int, least: int | None = None) -> Any:
        least = least if least is not None else int(kind is int)  # sizes are 1 or more, epsilons above 0
        if self.values.get(key) is None:
            raise ValueError(f"config: {self.name} has no {key!r}")
        value = self.values[key]
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"config: {self.name} {key!r} must be {kind.__name__}, got {value!r}")
        if kind in (int, float) and not (least <= value < math.inf and (kind is int or value > 0)):
            raise ValueError(f"config: {self.name} {key!r} must be {least} or more, got {value!r}")
        return value

    def choose(self, key: str, known: tuple, default: Any = None) -> Any:
        """The value, which must be one of `known`; `default` where the key is absent, an error where that is None."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"config: {self.name} has no {key!r}")
        if not any(type(value) is type(each) and value == each for each in known):
            raise ValueError(f"config: {self.name} {key!r} must be {' or '.join(map(repr, known))}, got {value!r}")
        return value


def vision_from_hf(values: Mapping[str, Any]) -> VisionConfig:
    """Reads the configuration of a vision encoder.

    Args:
        values: InternViT's own config.json, or "vision_config" of another's.

    Returns:
        The configuration. `num_dummy_heads` is 0 where it is absent.

    Raises:
        ValueError: a value is missing, of a wrong type, or one that this runtime does not know; names it.
    """
    section = _Section("vision_config", values)
    section.choose("hidden_act", ("gelu",), "gelu")
    return VisionConfig(
        hidden_size=section.need("hidden_size"),
        intermediate_size=section.need("intermediate_size"),
        num_hidden_layers=section.need("num_hidden_layers"),
        num_attention_heads=section.need("num_attention_heads"),
        image_size=section.need("image_size"),
        patch_size=section.need("patch_size"),
        layer_norm_eps=section.need("layer_norm_eps", float),
        norm_type=section.choose("norm_type", ("rms_norm", "layer_norm"), "rms_norm"),  # absent in InternViT-6B's
        qk_normalization=section.need("qk_normalization", bool),
        qkv_bias=section.need("qkv_bias", bool),
        num_dummy_heads=section.need("num_dummy_heads", least=0) if "num_dummy_heads" in values else 0,
    )


def _rope_from_hf(section: _Section) -> RopeScaling | None:
    scaling = section.values.get("rope_scaling")
    if scaling is None:
        return None
    rope = _Section("rope_scaling", scaling)
    rope.choose("rope_type" if "rope_type" in scaling else "type", ("yarn",))
    betas = {name: rope.need(name, float) for name in ("beta_fast", "beta_slow") if name in scaling}
    known = {"type", "rope_type", "factor", "original_max_position_embeddings", *betas}
    if unknown := set(scaling) - known:
        raise ValueError(f"config: rope_scaling holds {sorted(unknown)}, which this runtime does not know")
    return RopeScaling(rope.need("factor", float), rope.need("original_max_position_embeddings"), **betas)


def text_from_hf(values: Mapping[str, Any]) -> TextConfig:
    """Reads the configuration of a text model.

    Args:
        values: a Qwen2's or Llama's own config.json, or "llm_config" of another's.

    Returns:
        The configuration.

    Raises:
        ValueError: a value is missing, of a wrong type, or one that this runtime does not know; names it.
    """
    section = _Section("llm_config", values)
    architecture = section.need("architectures", list)[:1]
    if architecture not in (["Qwen2ForCausalLM"], ["LlamaForCausalLM"]):
        raise ValueError(
            f"config: llm_config architecture must be 'Qwen2ForCausalLM' or 'LlamaForCausalLM', got {architecture}"
        )
    section.choose("hidden_act", ("silu",))
    section.choose("use_sliding_window", (False,), False)
    section.choose("mlp_bias", (False,), False)
    section.choose("attention_bias", (architecture == ["Qwen2ForCausalLM"],), architecture == ["Qwen2ForCausalLM"])
    head_dim = section.need("hidden_size") // section.need("num_attention_heads")
    section.choose("head_dim", (head_dim,), head_dim)
    return TextConfig(
        architecture=architecture[0],
        vocab_size=section.need("vocab_size"),
        hidden_size=section.need("hidden_size"),
        intermediate_size=section.need("intermediate_size"),
        num_hidden_layers=section.need("num_hidden_layers"),
        num_attention_heads=section.need("num_attention_heads"),
        num_key_value_heads=section.need("num_key_value_heads"),
        rms_norm_eps=section.need("rms_norm_eps", float),
        rope_theta=section.need("rope_theta", float),
        max_position_embeddings=section.need("max_position_embeddings"),
        tie_word_embeddings=section.need("tie_word_embeddings", bool),
        rope_scaling=_rope_from_hf(section),
    )


def _cross_from_hf(values: Mapping[str, Any]) -> CrossConfig:
    section = _Section("cross_attention", values)
    if not all(type(layer) is int for layer in section.need("layers", list)):
        raise ValueError(f"config: cross_attention 'layers' must be layer numbers, got {values['layers']}")
    return CrossConfig(
        layers=tuple(section.need("layers", list)),
        placement=section.choose("placement", ("inside", "before")),
        ffn=section.choose("ffn", ("none", "swiglu", "gelu4x")),
        positions=section.choose("positions", ("none", "sinusoidal"), "none"),
    )


def from_hf(values: Mapping[str, Any]) -> NVLMConfig:
    """Reads a config.json in the published layout, architectures NVLM_D, NVLM_X or NVLM_H.

    Keys this runtime has no use for are ignored. Absent keys fall back only on what the published code itself falls
    back on.

    Args:
        values: the JSON object.

    Returns:
        The configuration.

    Raises:
        ValueError: a value is missing, of a wrong type, or one that this runtime does not know; names it.
    """
    section = _Section("config.json", values)
    architecture = section.need("architectures", list)[:1]
    known = [variant for variant in VARIANTS if architecture == [f"NVLM_{variant.upper()}"]]
    if not known:
        raise ValueError(f"config: architectures must be one of NVLM_D, NVLM_X, NVLM_H, got {values['architectures']}")
    (variant,) = known
    vision = vision_from_hf(section.need("vision_config", dict))
    text = text_from_hf(section.need("llm_config", dict))
    section.choose("downsample_ratio", (0.5,))
    section.choose("use_thumbnail", (True,))  # the published class defaults to false, the model needs true
    section.choose("dynamic_image_size", (True,), True)
    section.choose("force_image_size", (vision.image_size,), vision.image_size)
    section.choose("select_layer", (-1,), -1)
    section.choose("template", ("chatml",), "chatml")
    if text.architecture == "LlamaForCausalLM" and not {"thumbnail_tag", "bos_token"} <= values.keys():
        raise ValueError(
            "config: a model on Llama has to give 'thumbnail_tag' and 'bos_token', which were never published"
        )
    thumbnail_tag = "<tile_global_thumbnail>"
    return NVLMConfig(
        variant=variant,
        vision=vision,
        text=text,
        cross=_cross_from_hf(section.need("cross_attention", dict)) if variant != "d" else None,
        ps_version=section.choose("ps_version", ("v1", "v2")),
        min_tiles=section.need("min_dynamic_patch") if "min_dynamic_patch" in values else 1,
        max_tiles=section.need("max_dynamic_patch") if "max_dynamic_patch" in values else 6,
        tile_tags=section.choose("tile_tags", ("none", "1d", "grid", "bbox"), "1d"),
        thumbnail_tag=section.need("thumbnail_tag", str) if "thumbnail_tag" in values else thumbnail_tag,
        bos_token=section.need("bos_token", str) if values.get("bos_token") is not None else None,
        projector_eps=section.need("projector_eps", float) if "projector_eps" in values else NVLMConfig.projector_eps,
    )


def to_hf(config: NVLMConfig, dtype: str) -> dict[str, Any]:
    """Writes the config.json that `from_hf` reads back.

    Args:
        config: the model's configuration.
        dtype: the checkpoint's, as torch names it ("bfloat16").

    Returns:
        The JSON object.
    """
    vision, text = asdict(config.vision), asdict(config.text)
    text["architectures"] = [text.pop("architecture")]
    text |= {"hidden_act": "silu", "attention_bias": config.text.qkv_bias, "torch_dtype": dtype}
    if config.text.rope_scaling:
        text["rope_scaling"] = {"type": "yarn", **text["rope_scaling"]}
    values = {
        "architectures": [f"NVLM_{config.variant.upper()}"],
        "model_type": f"NVLM_{config.variant.upper()}",
        "torch_dtype": dtype,
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": config.vision.image_size,
        "select_layer": -1,
        "ps_version": config.ps_version,
        "use_thumbnail": True,
        "min_dynamic_patch": config.min_tiles,
        "max_dynamic_patch": config.max_tiles,
        "template": "chatml",
        "tile_tags": config.tile_tags,
        "thumbnail_tag": config.thumbnail_tag,
        "bos_token": config.bos_token,
        "projector_eps": config.projector_eps,
        "vision_config": {"model_type": "intern_vit_6b", "hidden_act": "gelu", **vision},
        "llm_config": text,
    }
    if config.cross:
        values["cross_attention"] = asdict(config.cross) | {"layers": list(config.cross.layers)}
    return values
