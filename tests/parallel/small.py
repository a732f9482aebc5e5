"""Models small enough for many processes and odd enough to be cut: 25 vision heads, few kv heads, uneven columns."""

from dataclasses import replace
from pathlib import Path

from nvlm_runtime.checkpoint.weights import save
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.model.model import NVLMModel
from tests.small import CONFIGS, CROSS, TEXT, VISION, micro_tokenizer, randomise

VISION_25 = replace(VISION, hidden_size=100, num_attention_heads=25, intermediate_size=67, num_dummy_heads=7)
# 8 heads over 2 kv heads: shared out at 2, and held by two ranks each at 4. 81 inner columns divide by neither.
TEXT_8 = replace(
    TEXT, hidden_size=64, intermediate_size=81, num_attention_heads=8, num_key_value_heads=2, vocab_size=515
)
TEXT_3 = replace(TEXT, hidden_size=48, num_attention_heads=6, num_key_value_heads=3)


def config(variant: str, ffn: str = "swiglu", text=TEXT_8) -> NVLMConfig:
    cross = None if variant == "d" else replace(CROSS, ffn=ffn, positions="sinusoidal")
    return replace(CONFIGS[variant], vision=VISION_25, text=text, cross=cross)


def write(folder: Path, variant: str, **given) -> None:
    """A random checkpoint that never draws an image slot."""
    model, tokenizer = randomise(NVLMModel(config(variant, **given))), micro_tokenizer()
    model.language_model.lm_head.weight.data[tokenizer.special("<|vision_pad|>")] = 0
    save(model, folder)
    tokenizer.save(folder)


def load(folder: Path, **options) -> NVLM:
    return NVLM.load(folder, native=False, **options)
