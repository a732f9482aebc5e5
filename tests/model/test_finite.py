import pytest
import torch

from tests.engine.test_batch import LARGE, fresh, vars_of

POISONED = {
    "vision_model.encoder.layers.1": "vision_model.encoder.layers.1.mlp.fc1.weight",
    "language_model.embed_tokens": "language_model.embed_tokens.weight",
    "language_model.layers.2": "language_model.layers.2.mlp.down_proj.weight",
    "language_model.layers.0": "language_model.layers.0.self_attn.qkv_proj.weight",
    "language_model.lm_head": "language_model.lm_head.weight",
}


@pytest.mark.parametrize("variant", ["d", "x", "h"])
@pytest.mark.parametrize("layer", POISONED)
def test_the_first_layer_is_named(variant, layer):
    model = fresh(variant, check=True)
    assert model.generate("What?", [LARGE], **vars_of(3)).token_ids
    with torch.no_grad():
        model.model.get_parameter(POISONED[layer]).fill_(float("nan"))
    with pytest.raises(
        ValueError, match=rf"^{layer} gave \d+ of \d+ values in torch.float32 that are not finite, after "
    ):
        model.generate("What?", [LARGE], **vars_of(3))


def test_it_excludes_what_it_cannot_look_into():
    for other in ("graphs", "native"):
        with pytest.raises(ValueError, match="excludes graphs and native"):
            fresh("d", check=True, **{other: True})


def test_answers_are_the_same():
    want = fresh("x", native=False).generate("What?", [LARGE], **vars_of(6)).token_ids
    assert fresh("x", check=True).generate("What?", [LARGE], **vars_of(6)).token_ids == want
