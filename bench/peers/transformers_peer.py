"""The same model in transformers: InternVLForConditionalGeneration over Qwen2, holding the very weights of ours.

InternVL differs from NVLM-D in its projector alone (as wide as the decoder's feed-forward here, as the decoder there,
and with biases), so its two Linears are replaced by NVLM's. Everything else is transformers' code: sdpa, a
DynamicCache, a loop over `forward` (faster than its `generate`), logits of the last token only. Parameters are views
of ours.
"""

from typing import Any

import torch
from torch import Tensor, nn

from nvlm_runtime.model.model import NVLMModel


def transformers_config(model: NVLMModel, image_token: int) -> Any:
    """Raises ValueError where transformers has no such model."""
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    config, vision, text = model.config, model.config.vision, model.config.text
    if config.variant != "d" or config.ps_version != "v2" or not text.qkv_bias or text.rope_scaling:
        raise ValueError("transformers has only what is NVLM-D on Qwen2 with pixel shuffle v2: compare --variant d")
    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            num_hidden_layers=vision.num_hidden_layers,
            num_attention_heads=vision.num_attention_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            layer_norm_eps=vision.layer_norm_eps,
            norm_type=vision.norm_type,
            use_qk_norm=vision.qk_normalization,
            attention_bias=vision.qkv_bias,
            use_mean_pooling=True,
        ).to_dict(),
        text_config=Qwen2Config(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            intermediate_size=text.intermediate_size,
            num_hidden_layers=text.num_hidden_layers,
            num_attention_heads=text.num_attention_heads,
            num_key_value_heads=text.num_key_value_heads,
            rms_norm_eps=text.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
            max_position_embeddings=text.max_position_embeddings,
            tie_word_embeddings=False,
        ).to_dict(),
        image_token_id=image_token,
        image_seq_length=config.tokens_per_tile,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def _linear(name: str, ours: nn.Linear) -> dict[str, Tensor]:
    return {f"{name}.weight": ours.weight} | ({f"{name}.bias": ours.bias} if ours.bias is not None else {})


def _split(names: list[str], sizes: list[int], ours: nn.Linear) -> dict[str, Tensor]:
    weights = zip(names, ours.weight.split(sizes))
    biases = zip(names, ours.bias.split(sizes)) if ours.bias is not None else ()
    return {f"{name}.weight": part for name, part in weights} | {f"{name}.bias": part for name, part in biases}


def transformers_weights(model: NVLMModel) -> dict[str, Tensor]:
    """Our parameters under transformers' names; rows of joined ones are views."""
    vision_encoder, decoder, width = model.vision_model, model.language_model, model.config.vision.hidden_size
    text, out = model.config.text, {}
    seen = "model.vision_tower."
    out[f"{seen}embeddings.cls_token"] = vision_encoder.embeddings.class_embedding
    out[f"{seen}embeddings.position_embeddings"] = vision_encoder.embeddings.position_embedding
    out[f"{seen}embeddings.patch_embeddings.projection.weight"] = vision_encoder.embeddings.patch_embedding.weight
    out[f"{seen}embeddings.patch_embeddings.projection.bias"] = vision_encoder.embeddings.patch_embedding.bias
    for i, block in enumerate(vision_encoder.encoder.layers):
        name = f"{seen}encoder.layer.{i}."
        out |= _split([f"{name}attention.{part}_proj" for part in "qkv"], [width] * 3, block.attn.qkv)
        out |= _linear(f"{name}attention.projection_layer", block.attn.proj)
        if model.config.vision.qk_normalization:
            out[f"{name}attention.q_norm.weight"] = block.attn.q_norm.weight
            out[f"{name}attention.k_norm.weight"] = block.attn.k_norm.weight
        for part in ("fc1", "fc2"):
            out |= _linear(f"{name}mlp.{part}", getattr(block.mlp, part))
        for part, norm in (("layernorm_before", block.norm1), ("layernorm_after", block.norm2)):
            out |= {f"{name}{part}.{key}": tensor for key, tensor in norm.named_parameters()}
        out |= {f"{name}lambda_1": block.ls1, f"{name}lambda_2": block.ls2}
    norm, first, _, second = model.mlp1
    out |= {f"model.multi_modal_projector.layer_norm.{key}": tensor for key, tensor in norm.named_parameters()}
    out |= _linear("model.multi_modal_projector.linear_1", first)
    out |= _linear("model.multi_modal_projector.linear_2", second)
    q, kv = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    for i, layer in enumerate(decoder.layers):
        name = f"model.language_model.layers.{i}."
        attn, mlp = layer.self_attn, layer.mlp
        out |= _split([f"{name}self_attn.{part}_proj" for part in "qkv"], [q, kv, kv], attn.qkv_proj)
        out |= _linear(f"{name}self_attn.o_proj", attn.o_proj)
        out |= _split([f"{name}mlp.gate_proj", f"{name}mlp.up_proj"], [text.intermediate_size] * 2, mlp.gate_up_proj)
        out |= _linear(f"{name}mlp.down_proj", mlp.down_proj)
        for part in ("input_layernorm", "post_attention_layernorm"):
            out[f"{name}{part}.weight"] = getattr(layer, part).weight
    out["model.language_model.embed_tokens.weight"] = decoder.embed_tokens.weight
    out["model.language_model.norm.weight"] = decoder.norm.weight
    return out | {"lm_head.weight": decoder.lm_head.weight}


def transformers_model(model: NVLMModel, image_token: int) -> Any:
    """The InternVLForConditionalGeneration that computes what `model` does. ValueError where there is none."""
    from transformers import InternVLForConditionalGeneration
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    config = transformers_config(model, image_token)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        peer = InternVLForConditionalGeneration(config)
        first, second = model.mlp1[1], model.mlp1[3]
        projector = peer.model.multi_modal_projector
        projector.linear_1 = nn.Linear(first.in_features, first.out_features, bias=False)
        projector.linear_2 = nn.Linear(second.in_features, second.out_features, bias=False)
    peer.load_state_dict(transformers_weights(model), strict=True, assign=True)
    peer.model.language_model.rotary_emb = Qwen2RotaryEmbedding(peer.config.text_config)
    for at in (peer, peer.model.vision_tower, peer.model.language_model):
        assert at.config._attn_implementation == "sdpa"
    return peer.eval()
