"""The README's Python runs as printed, and its tree names the files there are."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out


def test_the_tree_is_the_tree():
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, re.DOTALL).group(1)
    named = set(re.findall(r"[a-z_/]+\.py", tree))
    files = {path.name for path in (ROOT / "nvlm_runtime").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert files <= {name.split("/")[-1] for name in named}
    missing = [name for name in named if not list(ROOT.glob(f"**/{name}"))]
    assert not missing
