"""The micro models on the kernels: the answers of the reference path, and its gradients."""

import copy
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from bench.proofs.bf16 import exact_bf16
from nvlm_kernels import _backend, row_statistics
from nvlm_kernels._backend import INTERPRET
from nvlm_runtime import NVLM
from nvlm_runtime.micro.dataset import row
from nvlm_runtime.micro.document import draw, make_document
from nvlm_runtime.micro.questions import questions
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.training import documents
from nvlm_runtime.training.loss import token_loss
from nvlm_runtime.training.packing import PackedBatch, pack
from nvlm_runtime.training.records import JsonLines
from tests.conftest import CUDA

pytestmark = pytest.mark.skipif(not (INTERPRET or CUDA), reason="no Triton here: both paths would be the reference")
DOCUMENT = make_document("kernels:1", (2, 1))
QUESTION = next(q for q in questions(DOCUMENT) if q.answer == "OAK")


def on_reference(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(_backend, "EAGER", True)
        return run()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_same_greedy_answer(variant, dtype, monkeypatch, memory, device):
    model = NVLM.load(f"micro-{variant}", device=device, dtype=dtype)

    def run():
        return model.generate(QUESTION.text, images=[draw(DOCUMENT)], max_new_tokens=8)

    want = on_reference(monkeypatch, run)
    with exact_bf16() if INTERPRET else nullcontext():
        got = run()
    assert got.token_ids == want.token_ids and got.text == QUESTION.answer
    assert memory is None or len(memory.launches) > 100, "the answer came from the kernels"


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_projector_is_given_its_statistics(variant, memory, device):
    """By the tower's last kernel: no pass over its output before the product."""
    model = NVLM.load(f"micro-{variant}", device=device).model
    pixels = torch.randn(2, 3, 64, 64, device=device)
    with torch.no_grad():
        features = model.encode(pixels)
        torch.testing.assert_close(features.statistics, row_statistics(features.patches), rtol=1e-5, atol=1e-5)
        if memory:
            memory.launches.clear()
        tokens = model.project(features)
        assert memory is None or memory.launches == ["_project_kernel"]
        torch.testing.assert_close(tokens, model.project(Features(features.patches)))


def batch_of(engine: NVLM, folder: Path) -> PackedBatch:
    """The document and its question twice in a row of tokens, as training packs them."""
    draw(DOCUMENT).save(folder / "page.png")
    (folder / "rows.jsonl").write_text(row("page.png", [QUESTION]))
    read = JsonLines(folder / "rows.jsonl")[0]
    document = documents.make_document(read, engine.tokenizer, engine.config, 1024, "hf", "pages", print)
    tiles: Future[torch.Tensor] = Future()
    tiles.set_result(document.pixel_values())
    return pack([[(document, tiles), (document, tiles)]], engine.config)


def gradients(model: NVLMModel, batch: PackedBatch) -> dict[str, torch.Tensor]:
    """Of one training step on all parameters, tower included."""
    weight = next(model.parameters())
    features = [model.encode(tiles.to(weight)) for tiles in batch.pixel_values]
    hidden = model(batch.input_ids.to(weight.device), batch.layouts, features, batch.documents)
    loss = token_loss(model.language_model, hidden, batch.labels.to(weight.device), None)
    names, parameters = zip(*model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, parameters)))


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_same_gradients(variant, monkeypatch, memory, device, tmp_path):
    """Against fp64, at most twice the reference path's error in norm, and the rounding of a sum of 2^15 terms: a gate's
    gradient is one number, where the error of either path is luck.
    """
    engine = NVLM.load(f"micro-{variant}", device=device)
    model, wide = engine.model, copy.deepcopy(engine.model).double()
    batch = batch_of(engine, tmp_path)
    true = on_reference(monkeypatch, lambda: gradients(wide, batch))
    eager = on_reference(monkeypatch, lambda: gradients(model, batch))
    before = len(memory.launches) if memory else 0
    ours = gradients(model, batch)
    assert memory is None or len(memory.launches) - before > 100
    for name, exact in true.items():
        size = exact.norm() + 1e-3 * exact.numel() ** 0.5
        error, allowed = (ours[name] - exact).norm() / size, 2 * (eager[name] - exact).norm() / size + 2e-5
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
