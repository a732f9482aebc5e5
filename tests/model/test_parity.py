"""Against code nobody here wrote: transformers' Qwen2, Llama and InternVL, small random weights, fp32."""

from dataclasses import replace

import pytest
import torch
import transformers
from transformers.models.internvl.modeling_internvl import InternVLMultiModalProjector, InternVLVisionModel

from nvlm_kernels import pixel_shuffle
from nvlm_runtime.config import NVLMConfig, RopeScaling, TextConfig, VisionConfig
from nvlm_runtime.model.cache import KVCache
from nvlm_runtime.model.decoder import Decoder
from nvlm_runtime.model.model import projector as projector_of
from nvlm_runtime.model.past import make_past
from nvlm_runtime.model.vision import InternViT
from tests.small import randomise

YARN = RopeScaling(factor=4.0, original_max_position_embeddings=64)


def text_config(architecture: str, tied: bool, scaling: RopeScaling | None) -> TextConfig:
    return TextConfig(
        architecture=architecture,
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
        rope_scaling=scaling,
    )


def published(config: TextConfig) -> torch.nn.Module:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling:
        rope |= {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    family = {
        "Qwen2ForCausalLM": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "LlamaForCausalLM": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    }
    make_config, make_model = family[config.architecture]
    shared = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "rms_norm_eps max_position_embeddings tie_word_embeddings"
    ).split()
    values = {name: getattr(config, name) for name in shared}
    return randomise(make_model(make_config(**values, rope_parameters=rope, attention_dropout=0.0)))


def copy_text(ours: Decoder, theirs: torch.nn.Module) -> None:
    """Their weights, joined the way ours are: written out here, so that `weights` is not its own judge."""
    state = theirs.state_dict()
    target = ours.state_dict()
    for name in target:
        if ".qkv_proj." in name:
            parts = [state["model." + name.replace("qkv_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            target[name] = torch.cat(parts)
        elif ".gate_up_proj." in name:
            target[name] = torch.cat(
                [state["model." + name.replace("gate_up_proj", p)] for p in ("gate_proj", "up_proj")]
            )
        else:
            target[name] = state[name if name.startswith("lm_head") else "model." + name]
    ours.load_state_dict(target)


@pytest.mark.parametrize("scaling", [None, YARN], ids=["rope", "yarn"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "LlamaForCausalLM"])
def test_decoder(architecture, tied, scaling):
    config = text_config(architecture, tied, scaling)
    theirs, ours = published(config), Decoder(config, None).eval()
    copy_text(ours, theirs)
    ids = torch.randint(0, 200, (2, 100))
    positions = torch.arange(100).expand(2, -1)
    with torch.inference_mode():
        want = theirs(ids).logits
        got = ours.logits(ours(ours.embed_tokens(ids), positions, make_past(positions, "sdpa")))
        assert (got - want).abs().max() < 1e-4
        cache = KVCache.allocate(config, 2, 100, torch.device("cpu"), torch.float32)
        ours(ours.embed_tokens(ids[:, :90]), positions[:, :90], make_past(positions[:, :90], "sdpa", cache, 90))
        for t in range(90, 100):
            past = make_past(positions[:, t : t + 1], "sdpa", cache, t + 1)
            hidden = ours(ours.embed_tokens(ids[:, t : t + 1]), positions[:, t : t + 1], past)
            assert (ours.logits(hidden[:, 0]) - want[:, t]).abs().max() < 1e-4, t


def test_vision_and_projector():
    config = VisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
        layer_norm_eps=1e-6,
        norm_type="layer_norm",
        qk_normalization=False,
        qkv_bias=True,
    )
    published_config = transformers.InternVLVisionConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=[56, 56],
        patch_size=[14, 14],
        norm_type="layer_norm",
        use_qk_norm=False,
        attention_bias=True,
        use_mean_pooling=True,  # no norm at the end
    )
    theirs, ours = randomise(InternVLVisionModel(published_config)), InternViT(config).eval()
    state = theirs.state_dict()
    state.pop("embeddings.mask_token", None)
    target = ours.state_dict()
    renames = {
        "embeddings.class_embedding": "embeddings.cls_token",
        "embeddings.position_embedding": "embeddings.position_embeddings",
        "embeddings.patch_embedding.weight": "embeddings.patch_embeddings.projection.weight",
        "embeddings.patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.projection_layer",
        "ls1": "lambda_1",
        "ls2": "lambda_2",
        "encoder.layers": "encoder.layer",
    }
    for name in target:
        if ".qkv." in name:
            layer, kind = name.split(".")[2], name.split(".")[-1]
            parts = [f"encoder.layer.{layer}.attention.{p}_proj.{kind}" for p in "qkv"]
            target[name] = torch.cat([state.pop(part) for part in parts])
            continue
        theirs_name = name
        for old, new in renames.items():
            theirs_name = theirs_name.replace(old, new)
        target[name] = state.pop(theirs_name)
    assert not state, "a published weight that we have no place for"
    ours.load_state_dict(target)

    text = transformers.Qwen2Config(hidden_size=64, num_hidden_layers=1)
    model_config = transformers.InternVLConfig(
        vision_config=published_config, text_config=text, downsample_ratio=0.5, projector_hidden_act="gelu"
    )
    projector = randomise(InternVLMultiModalProjector(model_config))
    pixels = torch.randn(3, 3, 56, 56)
    with torch.inference_mode():
        want = theirs(pixels).last_hidden_state[:, 1:]
        got = ours(pixels)
        assert (got - want).abs().max() < 1e-4
        shuffled = transformers.InternVLModel.pixel_shuffle(None, want.reshape(3, 4, 4, 48), 0.5)
        for layer in (projector.linear_1, projector.linear_2):
            layer.bias.zero_()  # NVLM's has none
        want = projector(shuffled.reshape(3, 4, -1))
        text = replace(text_config("Qwen2ForCausalLM", False, None), intermediate_size=64)  # InternVL's inner width
        ours_projector = projector_of(NVLMConfig("d", config, text, None))
        for name, weights in (("0", projector.layer_norm), ("1", projector.linear_1), ("3", projector.linear_2)):
            for kind, value in weights.named_parameters():
                if f"{name}.{kind}" in dict(ours_projector.named_parameters()):
                    ours_projector.get_parameter(f"{name}.{kind}").copy_(value)
        assert (ours_projector(pixel_shuffle(got, "v2")) - want).abs().max() < 1e-4
