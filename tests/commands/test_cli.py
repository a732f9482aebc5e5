"""The command, as a user starts it: words on stderr, exit codes, nothing imported before its time."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from nvlm_runtime.commands.cli import main

ROOT = Path(__file__).parents[2]
RECEIPT = ROOT / "examples" / "receipt.png"


def run(capsys, *argv):
    code = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_help_imports_no_torch():
    code = "import sys; from nvlm_runtime.commands.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'numpy', 'PIL', 'rich', 'triton', 'jinja2'} & set(sys.modules), sorted(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ask" in done.stdout and "chat" in done.stdout and "info" in done.stdout


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_ask_answers(capsys, variant):
    code, out, err = run(
        capsys, "ask", RECEIPT, "What is the total?", "--model", f"micro-{variant}", "--plan", "--timings"
    )
    assert (code, err) == (0, "")
    assert "17.40" in out.splitlines(), "the answer stands on a line of its own"
    assert "<tile_1>" in out and "encode" in out and "decode" in out
    assert re.search(r"a step reads \d+\.\d MB, \d+\.\d GB/s: \d+% of the \d+\.\d GB/s that memory gives", out), out


def test_ask_json(capsys):
    code, out, _ = run(capsys, "ask", RECEIPT, "What is the total?", "--json")
    values = json.loads(out)
    assert code == 0 and values["text"] == "17.40" and values["finish_reason"] == "stop"
    assert values["plans"][0]["tiles"] == values["plans"][0]["cols"] * values["plans"][0]["rows"] + 1
    assert values["timings"]["total"] > 0 and values["token_ids"]


def test_info(capsys, tmp_path):
    code, out, _ = run(capsys, "info", "nvlm-d-72b", RECEIPT, "--json", "--draw", tmp_path / "tiles.png")
    values = json.loads(out)
    assert code == 0 and values["parameters"]["total"] == 79_379_593_344
    plan = values["plans"][0]
    assert plan["decoder_image_tokens"] == 256 * plan["tiles"] and plan["cross_image_tokens"] == 0
    with Image.open(tmp_path / "tiles.png") as drawn:
        assert drawn.size == (448 * plan["cols"], 448 * plan["rows"])
    code, out, _ = run(capsys, "info", "micro-h", RECEIPT)
    assert code == 0 and "NVLM-H" in out and "gated cross-attention in layers 0, 1, 2, 3, 4, 5" in " ".join(out.split())


def test_chat(capsys, monkeypatch, tmp_path):
    lines = iter([f"/image {RECEIPT}", "", "What is the total?", "What is the tax?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    code, out, _ = run(capsys, "chat", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and len(answers) == 2 and answers[0]["text"] == "17.40"
    assert answers[1]["num_prompt_tokens"] > answers[0]["num_prompt_tokens"] and answers[1]["plans"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["ask", "missing.png", "What?"], "missing.png does not exist"),
        (["ask", __file__, "What?"], "is not an image"),
        (["ask", RECEIPT, ""], "prompt is empty"),
        (["ask", RECEIPT, "What?", "--model", "micro-z"], "unknown model 'micro-z'"),
        (["ask", RECEIPT, "What?", "--model", str(ROOT / "tests")], "no config.json"),
        (["ask", RECEIPT, "<image> <image>"], "2 places for images, but there are 1"),
        (["ask", "What?", "--temperature", "-1"], "temperature"),
        (["ask", "What?", "--style", "template"], "needs a chat template, and this checkpoint has none"),
        (["info", "nothing"], "unknown model 'nothing'"),
        (["info", "micro-d", "--draw", "x.png"], "--draw needs a picture"),
        (["eval", "micro", "--variant", "d", "--model", "micro-x"], "NVLM-X, not -D"),
        (["eval", "micro", "--variant", "d", "--open-mask"], "only NVLM-X"),
        (["eval", "micro", "--variant", "d", "--samples", "0"], "samples must be"),
    ],
    ids=lambda v: " ".join(map(str, v))[-40:] if isinstance(v, list) else "",
)
def test_bad_input_is_one_sentence(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2 and message in err
    assert err.count("\n") == 1 and err.startswith("nvlm: ") and "Traceback" not in err


def test_ctrl_c_keeps_the_answer_so_far(capsys, monkeypatch):
    from nvlm_runtime.engine.generator import TextStream

    def interrupted(self):
        yield "17"
        raise KeyboardInterrupt

    monkeypatch.setattr(TextStream, "__iter__", interrupted)
    code, out, _ = run(capsys, "ask", RECEIPT, "What is the total?")
    assert code == 130 and out == "17\n"


@pytest.mark.skipif(
    torch.version.cuda is not None or torch.version.hip is not None, reason="a GPU's ops are registered"
)
@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_an_answer_on_a_cpu_does_not_load_torchs_compiler(variant):
    """It takes as long as everything else from the shell's prompt to the answer."""
    words = ["ask", "examples/receipt.png", "What is the total?", "--model", f"micro-{variant}"]
    program = (
        f"import sys; from nvlm_runtime.commands import cli; code = cli.main({words!r}); print(code, *sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    answer, loaded = said.splitlines()
    code, *modules = loaded.split()
    assert (answer, code) == ("17.40", "0")
    assert not {"torch._dynamo", "torch._inductor", "sympy", "transformers", "matplotlib"} & set(modules)
