"""A model is not changed by being used: every NVLM computes on a view of its own."""

import itertools

import pytest
import torch

from nvlm_kernels.native import BuildError, load_library
from nvlm_runtime import NVLM
from tests.small import micro_tokenizer, small_model

OPTIONS = {
    "plain": {"native": False},
    "native": {"native": True},
    "quantize": {"native": False, "quantize": {"vision": "int8_dynamic", "decoder": "int8"}},
    "check": {"check": True},
    "graphs": {"graphs": True},
}
IDS = [7, 9, 11, 5]


def state(model):
    """What makes a model compute as it does: classes, attributes by identity, and what is in its dicts."""
    found = {}
    for name, module in model.named_modules():
        values = vars(module)
        inner = {key: list(value.items()) for key, value in values.items() if isinstance(value, dict)}
        found[name] = (
            type(module),
            {key: id(value) for key, value in values.items()},
            {key: [(k, id(v)) for k, v in items] for key, items in inner.items()},
        )
    return found


def compiler():
    try:
        load_library()
    except BuildError:
        return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("pair", list(itertools.permutations(OPTIONS, 2)), ids="-".join)
def test_two_engines_over_one_model_are_independent(pair, dtype):
    if "native" in pair and not compiler():
        pytest.skip("no compiler")
    model = small_model("x").to(dtype)
    before, ids = state(model), IDS
    alone = [NVLM(small_model("x").to(dtype), micro_tokenizer(), **OPTIONS[name]) for name in pair]
    want = [each.logits(ids) for each in alone]
    text = [each.generate(input_ids=ids, max_new_tokens=4, ignore_eos=True).token_ids for each in alone]
    both = [NVLM(model, micro_tokenizer(), **OPTIONS[name]) for name in pair]
    for _ in range(2):  # each answers as if the other were not there, in turn
        assert all(torch.equal(each.logits(ids), logits) for each, logits in zip(both, want, strict=True))
        got = [each.generate(input_ids=ids, max_new_tokens=4, ignore_eos=True).token_ids for each in both]
        assert got == text
    assert state(model) == before


def test_weights_changed_in_place_are_seen():
    model = small_model("d")
    engine = NVLM(model, micro_tokenizer(), native=False)
    before, version = engine.logits(IDS), engine.model.version
    with torch.no_grad():
        model.language_model.norm.weight.mul_(2)
    assert engine.model.version > version and not torch.equal(engine.logits(IDS), before)


def test_lists():
    engine = NVLM(small_model("d"), micro_tokenizer(), native=False)
    assert isinstance(engine.generate(["Hello?"], max_new_tokens=2), list) and engine.generate([]) == []
    with pytest.raises(ValueError, match="images must be one list per prompt: got 1 for 2"):
        engine.generate(["a", "b"], [[]])
    with pytest.raises(ValueError, match="not both"):
        engine.generate("a", params=engine.request(engine.prepare("a"), _params()).params, seed=1)


def _params():
    from nvlm_runtime import GenerationParams

    return GenerationParams(max_new_tokens=2)
