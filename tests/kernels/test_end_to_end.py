"""The micro models on the kernels: the answers of the reference path, and its gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F

from nvlm_kernels import _backend
from nvlm_kernels._backend import INTERPRET
from nvlm_runtime import NVLM
from nvlm_runtime.image import tile_pixels
from nvlm_runtime.micro.dataset import IGNORE, make_sample, plan_of
from nvlm_runtime.micro.document import draw, make_document
from nvlm_runtime.micro.questions import questions
from nvlm_runtime.model import NVLMModel
from tests.conftest import CUDA

pytestmark = pytest.mark.skipif(not (INTERPRET or CUDA), reason="no Triton here: both paths would be the reference")
DOCUMENT = make_document("kernels:1", (2, 1))
QUESTION = next(q for q in questions(DOCUMENT) if q.answer == "OAK")


def on_reference(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(_backend, "EAGER", True)
        return run()


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_same_greedy_answer(variant, monkeypatch, memory, device):
    model = NVLM.load(f"micro-{variant}", device=device)

    def run():
        return model.generate(QUESTION.text, images=[draw(DOCUMENT)], max_new_tokens=8)

    want = on_reference(monkeypatch, run)
    got = run()
    assert got.token_ids == want.token_ids and got.text == QUESTION.answer
    assert memory is None or len(memory.launches) > 100, "the answer came from the kernels"


def gradients(model: NVLMModel, tokenizer) -> dict[str, torch.Tensor]:
    """Of one training step on all parameters, tower included."""
    sample = make_sample(model.config, tokenizer, DOCUMENT, [QUESTION], slice(0))
    weight = next(model.parameters())
    pixels = tile_pixels(draw(DOCUMENT), plan_of(DOCUMENT)).to(weight)
    ids, labels = (torch.tensor([t], device=weight.device) for t in (sample.input_ids, sample.labels))
    hidden = model(ids, [sample.layout], [model.encode(pixels)])
    loss = F.cross_entropy(model.language_model.logits(hidden[0]), labels[0], ignore_index=IGNORE)
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_same_gradients(variant, monkeypatch, memory, device):
    """Against fp64, at most twice the reference path's error in norm, and the rounding of a sum of 2^15 terms: a gate's
    gradient is one number, where the error of either path is luck.
    """
    engine = NVLM.load(f"micro-{variant}", device=device)
    model, wide = engine.model, copy.deepcopy(engine.model).double()
    true = on_reference(monkeypatch, lambda: gradients(wide, engine.tokenizer))
    eager = on_reference(monkeypatch, lambda: gradients(model, engine.tokenizer))
    before = len(memory.launches) if memory else 0
    ours = gradients(model, engine.tokenizer)
    assert memory is None or len(memory.launches) - before > 100
    for name, exact in true.items():
        size = exact.norm() + 1e-3 * exact.numel() ** 0.5
        error, allowed = (ours[name] - exact).norm() / size, 2 * (eager[name] - exact).norm() / size + 2e-5
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
