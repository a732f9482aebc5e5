"""Documents packed into rows are learnt as each would be alone; none of them sees another."""

import random
from dataclasses import replace

import pytest
import torch

from nvlm_kernels import rotary, tile_attention
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import PackedPast
from nvlm_runtime.training.documents import IGNORE, make_document
from nvlm_runtime.training.loss import token_loss
from nvlm_runtime.training.packing import fill_sequences, pack
from nvlm_runtime.training.records import JsonLines
from tests.small import TEXT, micro_tokenizer, small_model
from tests.training.data import write_data

VARIANTS = ("d", "x", "h")


def documents(folder, config):
    seen, text = write_data(folder, 4)
    rows = [JsonLines(path)[i] for path, count in ((seen, 5), (text, 2)) for i in range(count)]
    return [make_document(row, micro_tokenizer(), config, 300, "hf", "task", print) for row in rows]


class Cut:
    def __init__(self, tiles):
        self.tiles = tiles

    def result(self):
        return self.tiles


def batch_of(found, config, rows):
    cut = [Cut(document.pixel_values()) if document.images else None for document in found]
    return pack([[(found[i], cut[i]) for i in row] for row in rows], config)


def hidden_of(model: NVLMModel, batch, packed=True):
    vision = model.config.vision
    features = [
        model.encode(tiles.double())
        if len(tiles)
        else Features(torch.zeros(0, vision.num_patches, vision.hidden_size).double())
        for tiles in batch.pixel_values
    ]
    return model(batch.input_ids, batch.layouts, features, batch.documents if packed else None)


def loss_and_gradients(model, batch):
    model.zero_grad()
    loss = token_loss(model.language_model, hidden_of(model, batch), batch.labels)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("variant", "positions"), [("d", None), *((v, p) for v in "xh" for p in ("none", "sinusoidal"))]
)
def test_packed_is_unpacked(tmp_path, variant, positions):
    """In fp64, the vision encoder's gradients among them; the documents alone go through the path without packing."""
    model = (
        small_model(variant, **({} if variant == "d" else {"positions": positions, "ffn": "swiglu"})).double().train()
    )
    found = documents(tmp_path, model.config)
    rows = fill_sequences([len(document) for document in found], 300, random.Random(1))
    assert any(len(row) > 2 for row in rows)
    assert any(sum(bool(found[i].images) for i in row) > 1 for row in rows), "a row with pictures of two documents"
    packed = batch_of(found, model.config, rows)
    got_loss, got = loss_and_gradients(model, packed)
    alone = [batch_of(found, model.config, [[i]]) for i in range(len(found))]
    total, want = 0.0, {}
    for batch in alone:
        model.zero_grad()
        loss = token_loss(model.language_model, hidden_of(model, batch, packed=False), batch.labels, rows=None)
        loss.backward()
        total += loss.item()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                want[name] = want.get(name, 0) + parameter.grad
    # torch's attention on a CPU and the loss sum in fp32 where they choose to
    assert abs(got_loss - total) < 1e-6 * total
    assert set(got) == set(want) == {name for name, _ in model.named_parameters()}
    for name in want:
        error, scale = (got[name] - want[name]).abs().max(), want[name].abs().max()
        assert error <= 1e-6 * scale, f"{name}: {error} of {scale}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_document_changes_no_other_by_a_bit(tmp_path, variant):
    model = small_model(variant).double()
    found = documents(tmp_path, model.config)
    rows = [[0, 1, 2], [5, 3, 4]]
    with torch.no_grad():
        before = batch_of(found, model.config, rows)
        want = hidden_of(model, before)
        ids = before.input_ids.clone()
        start, end = before.documents[0][1]
        last = before.layouts[0].images[1]
        ids[0, end - 3 : end] = 7
        pixels = before.pixel_values[0].clone()
        first = before.layouts[0].images[0].num_tiles
        pixels[first : first + last.num_tiles] += 1
        tiles = (pixels, *before.pixel_values[1:])
        got = hidden_of(model, replace(before, input_ids=ids, pixel_values=tiles))
    changed = (got != want).any(-1)
    assert changed[0, start:end].any()
    changed[0, start:end] = False
    real = torch.zeros_like(changed)
    for row, spans in enumerate(before.documents):
        real[row, : spans[-1][1]] = True
    assert not (changed & real).any()


def test_the_kernels_intervals_are_the_documents():
    """What a GPU is given, one interval a token, against torch's attention document by document."""
    torch.manual_seed(0)
    heads, kv = TEXT.num_attention_heads, TEXT.num_key_value_heads
    qkv = torch.randn(2, 20, (heads + 2 * kv) * TEXT.head_dim).double()
    angles = torch.randn(2, 2, 20, TEXT.head_dim).double().unbind()
    past = PackedPast((((0, 7), (7, 8), (8, 20)), ((0, 15),)), 20, torch.device("cpu"))
    want = past.attend(qkv, angles, heads, kv)
    q, k = rotary(qkv, *angles, heads, kv)
    v = qkv.unflatten(-1, (-1, TEXT.head_dim))[:, :, -kv:]
    got = tile_attention(q, k, v, past.intervals)
    torch.testing.assert_close(got, want)
    assert not want[1, 15:].any()
    assert past.positions[0].tolist() == [*range(7), 0, *range(12)]


@pytest.mark.parametrize("chunks", [None, 1, 16, 1024])
def test_chunks_of_the_loss_do_not_matter(chunks, monkeypatch):
    """1,024 learnt tokens, at once and in chunks; of one chunk too, torch's chunked path is taken."""
    from nvlm_runtime.training import loss as module

    rows, chunked = chunks and 1024 // chunks, []
    original = module.F.linear_cross_entropy
    monkeypatch.setattr(module.F, "linear_cross_entropy", lambda *a, **k: chunked.append(k) or original(*a, **k))
    model = small_model("d").double().language_model
    hidden = torch.randn(2, 520, TEXT.hidden_size, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, TEXT.vocab_size, (2, 520))
    labels[0, :16] = IGNORE
    learnt = labels != IGNORE
    logits = hidden @ model.lm_head.weight.T
    want = torch.nn.functional.cross_entropy(logits[learnt], labels[learnt], reduction="sum")
    grads = torch.autograd.grad(want, [hidden, model.lm_head.weight])
    loss = token_loss(model, hidden, labels, rows)
    for a, b in zip(torch.autograd.grad(loss, [hidden, model.lm_head.weight]), grads):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert abs(loss - want) < 1e-5 * want
    assert [call["options"].batch_chunk_size for call in chunked] == ([rows] if chunks else [])
    nothing = token_loss(model, hidden, torch.full_like(labels, IGNORE), rows)
    assert nothing == 0
    assert not any(grad.any() for grad in torch.autograd.grad(nothing, [hidden]))
