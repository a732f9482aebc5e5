"""Models of a real shape with random weights, for what depends on shapes alone: time and bytes.

The weights are made in the dtype they are used in. The tokenizer is the micro models' with names for the rest of the
vocabulary, so that a drawn token may be any and the whole row of logits is looked at, as in a model that was trained.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from nvlm_runtime import NVLM
from nvlm_runtime.checkpoint.bundled import checkpoint_folder
from nvlm_runtime.config import VARIANTS, CrossConfig, NVLMConfig, TextConfig, VisionConfig
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.presets import INTERNVIT_300M, MICRO_TEXT, MICRO_VISION

QWEN2_05B = TextConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=151_674,
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
)
# vision, decoder, and how many layers there are to a gated one in NVLM-X and -H
SHAPES: dict[str, tuple[VisionConfig, TextConfig, int]] = {
    "qwen2-0.5b+internvit-300m": (INTERNVIT_300M, QWEN2_05B, 4),
    "micro": (MICRO_VISION, MICRO_TEXT, 1),
}


def shape_config(shape: str, variant: str) -> NVLMConfig:
    """Raises ValueError for a shape or a variant that is not known."""
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
    vision, text, every = SHAPES[shape]
    cross = CrossConfig(tuple(range(0, text.num_hidden_layers, every)), positions="sinusoidal")
    return NVLMConfig(variant, vision, text, None if variant == "d" else cross)


def random_model(
    config: NVLMConfig, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
) -> NVLMModel:
    """Norms are 1, gates half open, matrices keep the size of what goes through them."""
    with torch.device("meta"):
        model = NVLMModel(config)
    model = model.to(dtype).to_empty(device=device)
    if config.text.tie_word_embeddings:
        model.language_model.tie()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("ls1", "ls2")):
                parameter.fill_(0.1)
            elif "gate" in name and parameter.numel() == 1:
                parameter.fill_(0.5)
            elif parameter.dim() == 1 and name.endswith("weight"):
                parameter.fill_(1)
            else:
                fan_in = parameter[0].numel() if parameter.dim() > 1 else 2500
                parameter.normal_(0, fan_in**-0.5, generator=generator)
    return model.eval()


def full_tokenizer(vocab_size: int) -> Tokenizer:
    """The micro models' tokenizer with a token of its own for every id below vocab_size."""
    values = json.loads((checkpoint_folder("micro-d") / "tokenizer.json").read_text("utf-8"))
    vocab = values["model"]["vocab"]
    used = {*vocab.values(), *(token["id"] for token in values["added_tokens"])}
    vocab |= {f"<token {i}>": i for i in range(vocab_size) if i not in used}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.json").write_text(json.dumps(values), "utf-8")
        return Tokenizer.load(folder)


def synthetic(
    shape: str,
    variant: str = "d",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    **options: Any,
) -> NVLM:
    """An NVLM of a shape of `SHAPES` with random weights. options: as of NVLM. ValueError as of `shape_config`."""
    config = shape_config(shape, variant)
    return NVLM(random_model(config, dtype, device=device), full_tokenizer(config.text.vocab_size), **options)
