"""Shell blocks: `sh` is run, `nvlm` being this tree's; a command in any other block has its reason in NOT_RUN."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.docs.pages import PAGES, ROOT, blocks_of, name_of

LANGUAGES = {"python", "sh", "console", "text", "json"}
COMMAND = re.compile(
    r"^(\$ |nvlm |python |python3 |pip |make |pytest |torchrun |curl |TRITON_INTERPRET|NVLM_)", re.MULTILINE
)
# (page, how the block begins): why it is not run
NOT_RUN = {
    ("README.md", "$ make demo"): "installs an environment; .ci/run does it",
    ("README.md", "$ python3 -m venv"): "installs an environment",
    ("CONTRIBUTING.md", "$ make test"): "installs an environment and runs every test",
    ("docs/guide.md", 'nvlm ask examples/receipt.png "What is the tax?" --model smol-x'): "builds smol-x first; "
    "tests of the checkpoint ask it",
    ("docs/kernels.md", "$ python -m bench.gpu"): "needs a GPU; tests/bench/test_gpu_visit.py runs it on a CPU",
    ("docs/serving.md", "nvlm ask --tp 8"): "needs 8 GPUs",
    ("docs/serving.md", "torchrun"): "needs two machines",
    ("docs/serving.md", "pip install"): "needs Ray; examples/test_serve.py runs it",
    ("docs/training.md", "nvlm train sft-x --set"): "needs a dataset; tests/training runs it",
    ("docs/training.md", "nvlm train sft-x ... --tp 8"): "needs 32 GPUs",
    ("docs/training.md", "nvlm init"): "tests/checkpoint/test_assembly.py runs it",
    ("docs/training.md", "nvlm train micro"): "trains for more than an hour",
    ("docs/evaluation.md", "nvlm eval docvqa"): "needs published files; tests/evaluation runs it on small ones",
    ("docs/evaluation.md", "nvlm eval micro"): "asks 500 questions; tests/micro asks fewer",
}
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [
    pytest.param(command, id=f"{block.where}-{i}")
    for block in BLOCKS
    if block.language == "sh"
    for i, command in enumerate(block.commands)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_shell_commands_run(command, tmp_path):
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "receipt.png", tmp_path / "examples")
    name, *words = shlex.split(command, comments=True)
    assert name == "nvlm", "a block of language sh holds nvlm commands; other commands belong into console or text"
    run = subprocess.run(
        [sys.executable, "-m", "nvlm_runtime", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout and not run.stderr


def test_every_block_has_a_known_language():
    assert not [block.where for block in BLOCKS if block.language not in LANGUAGES]


def test_what_is_not_run_has_a_reason():
    left = [block for block in BLOCKS if block.language in ("console", "text") and COMMAND.search(block.text)]
    known = {
        block.where: [key for key in NOT_RUN if key[0] == name_of(block.page) and block.text.startswith(key[1])]
        for block in left
    }
    assert not [where for where, keys in known.items() if not keys], "a block of commands that nobody runs"
    assert {keys[0] for keys in known.values()} == set(NOT_RUN), "a reason for a block that is gone"
