"""The models this runtime knows by name: the published sizes, and the micro models that come with the package.

Sources: NVLM paper (arXiv 2409.11402) section 4.5, Megatron-LM examples/multimodal/nvlm, OpenGVLab InternViT configs.
Which layers hold cross-attention is not published; one in 8 (72B) or 6 (34B) from layer 0 gives the paper's ten.
"""

from typing import Literal

from nvlm_runtime.config import VARIANTS, CrossConfig, NVLMConfig, TextConfig, VisionConfig

INTERNVIT_6B = VisionConfig(
    hidden_size=3200,
    intermediate_size=12800,
    num_hidden_layers=45,
    num_attention_heads=25,
    image_size=448,
    patch_size=14,
    layer_norm_eps=1e-6,
    norm_type="rms_norm",
    qk_normalization=True,
    qkv_bias=False,
    num_dummy_heads=7,
)
INTERNVIT_300M = VisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=448,
    patch_size=14,
    layer_norm_eps=1e-6,
    norm_type="layer_norm",
    qk_normalization=False,
    qkv_bias=True,
)
QWEN2_72B = TextConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
)
YI_34B = TextConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64000,
    hidden_size=7168,
    intermediate_size=20480,
    num_hidden_layers=60,
    num_attention_heads=56,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=5e6,
    max_position_embeddings=4096,
    tie_word_embeddings=False,
)
MICRO_VISION = VisionConfig(
    hidden_size=160,
    intermediate_size=640,
    num_hidden_layers=5,
    num_attention_heads=5,
    image_size=64,
    patch_size=8,
    layer_norm_eps=1e-6,
    norm_type="rms_norm",
    qk_normalization=True,
    qkv_bias=False,
)
MICRO_TEXT = TextConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=512,
    hidden_size=192,
    intermediate_size=448,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=3,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    max_position_embeddings=2048,
    tie_word_embeddings=False,
)


def _family(
    text: TextConfig, every: int, thumbnail_tag: str, bos_token: str | None, suffix: str
) -> dict[str, NVLMConfig]:
    cross = CrossConfig(layers=tuple(range(0, text.num_hidden_layers, every)))
    return {
        f"nvlm-{variant}-{suffix}": NVLMConfig(
            variant=variant,
            vision=INTERNVIT_6B,
            text=text,
            cross=None if variant == "d" else cross,
            thumbnail_tag=thumbnail_tag,
            bos_token=bos_token,
        )
        for variant in VARIANTS
    }


def _micro(variant: Literal["d", "x", "h"]) -> NVLMConfig:
    layers = tuple(range(MICRO_TEXT.num_hidden_layers))
    cross = None if variant == "d" else CrossConfig(layers, positions="sinusoidal")
    return NVLMConfig(variant=variant, vision=MICRO_VISION, text=MICRO_TEXT, cross=cross)


PRESETS: dict[str, NVLMConfig] = {
    **_family(QWEN2_72B, 8, "<tile_global_thumbnail>", None, "72b"),
    **_family(YI_34B, 6, "<tile_global>", "<|startoftext|>", "34b"),
    **{f"micro-{variant}": _micro(variant) for variant in VARIANTS},
}
