"""Small random models, one a variant, shaped like the real ones: odd head counts, GQA, QKV bias."""

from dataclasses import replace
from functools import cache

import torch

from nvlm_runtime.config import CrossConfig, NVLMConfig, TextConfig, VisionConfig
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.micro.vocabulary import make_tokenizer
from nvlm_runtime.model.model import NVLMModel

VISION = VisionConfig(
    hidden_size=40,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=5,
    image_size=32,
    patch_size=8,
    layer_norm_eps=1e-6,
    norm_type="rms_norm",
    qk_normalization=True,
    qkv_bias=False,
    num_dummy_heads=3,
)
TEXT = TextConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=512,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
CROSS = CrossConfig(layers=(0, 2))
CONFIGS = {
    "d": NVLMConfig("d", VISION, TEXT, None),
    "x": NVLMConfig("x", VISION, TEXT, CROSS),
    "h": NVLMConfig("h", VISION, TEXT, CROSS),
}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every parameter random and none of them special: norms near 1, biases and gates not zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = centre + scale * noise
    return model.eval()


def small_model(variant: str, **cross: str) -> NVLMModel:
    config = CONFIGS[variant]
    if cross:
        config = replace(config, cross=replace(config.cross, **cross))
    return randomise(NVLMModel(config))


@cache
def micro_tokenizer() -> Tokenizer:
    return make_tokenizer(512)


def small_engine(variant: str, **given) -> NVLM:
    """Never draws an image slot, which a random model else would: its logit is 0. given: of CrossConfig and of NVLM."""
    cross = {name: value for name, value in given.items() if name in ("placement", "ffn", "positions")}
    options = {name: value for name, value in given.items() if name not in cross}
    model, tokenizer = small_model(variant, **cross), micro_tokenizer()
    model.language_model.lm_head.weight.data[tokenizer.special("<|vision_pad|>")] = 0
    return NVLM(model, tokenizer, **options)
