"""Flops of a step against torch's own counter, and attention against a sum by hand."""

from concurrent.futures import Future

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nvlm_runtime.analysis import devices
from nvlm_runtime.analysis.devices import DEVICES, peak_flops
from nvlm_runtime.training.documents import make_document
from nvlm_runtime.training.flops import attention_flops, linear_flops, step_flops
from nvlm_runtime.training.loss import token_loss
from nvlm_runtime.training.packing import pack
from nvlm_runtime.training.records import JsonLines
from nvlm_runtime.training.trainer import freeze
from tests.small import micro_tokenizer, small_model
from tests.training.data import write_data

ALL = ("vision", "projector", "cross", "decoder")


def batch_of(folder, config):
    """A row of three documents, two of them with a picture, and nothing that pads it."""
    seen, text = (JsonLines(path) for path in write_data(folder))
    rows = (seen[0], text[2], seen[3])
    documents = [make_document(row, micro_tokenizer(), config, 900, "hf", "task", print) for row in rows]
    filled = []
    for document in documents:
        future = Future() if document.images else None
        if future:
            future.set_result(document.pixel_values())
        filled.append((document, future))
    return pack([filled], config)


def counted(model, batch, vision_learns: bool) -> int:
    """Of products with weights, by torch: all but those of attention, which have a batch dimension or an op."""
    with FlopCounterMode(display=False) as counter:
        with torch.set_grad_enabled(vision_learns):
            features = [model.encode(tiles) for tiles in batch.pixel_values]
        hidden = model(batch.input_ids, batch.layouts, features, batch.documents)
        token_loss(model.language_model, hidden, batch.labels, None).backward()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for op, flops in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm))


@pytest.mark.parametrize("variant", ["d", "x", "h"])
@pytest.mark.parametrize("trains", [ALL, ALL[1:], ("projector",)], ids=len)
def test_products_are_those_torch_counts(tmp_path, variant, trains):
    model = small_model(variant).train()
    freeze(model, tuple(part for part in trains if variant != "d" or part != "cross"))
    batch = batch_of(tmp_path, model.config)
    got, want = linear_flops(model, batch), counted(model, batch, "vision" in trains)
    if trains == ALL:
        assert got == want
    else:  # torch leaves out gradients that nothing learns from: text's in the first layer, all before the first image
        assert want <= got <= (1.02 if "decoder" in trains else 1.25) * want


def test_attention_is_over_what_is_seen(tmp_path):
    model = small_model("x")
    model.vision_model.requires_grad_(False)
    batch = batch_of(tmp_path, model.config)
    vision, text = model.config.vision, model.config.text
    tokens = [end - start for start, end in batch.documents[0]]
    pairs = sum(i + 1 for length in tokens for i in range(length))
    keys = sum(end - start for start, end in batch.layouts[0].intervals.tolist())
    tiles = sum(len(tiles) for tiles in batch.pixel_values)
    assert tiles > 2 and keys > 100
    want = 12 * pairs * text.hidden_size * text.num_hidden_layers
    want += 12 * keys * text.hidden_size * len(model.config.cross.layers)
    want += 4 * tiles * (vision.num_patches + 1) ** 2 * vision.hidden_size * vision.num_hidden_layers
    assert attention_flops(model, batch) == want
    assert step_flops(model, batch) == want + linear_flops(model, batch)


def test_a_tied_head_is_a_product(tmp_path):
    from dataclasses import replace

    from nvlm_runtime.model.model import NVLMModel

    plain = small_model("d")
    config = replace(plain.config, text=replace(plain.config.text, tie_word_embeddings=True))
    batch = batch_of(tmp_path, config)
    assert linear_flops(NVLMModel(config), batch) == linear_flops(NVLMModel(plain.config), batch)


def test_the_peak_of_a_known_gpu_and_of_this_machine(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(devices.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 0.5) or now[0])
    assert peak_flops(torch.device("cpu"), torch.float32) == 2 * 1024**3 / 0.5
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: DEVICES["h100"].name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == 989e12
