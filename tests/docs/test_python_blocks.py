"""Every Python block of README and docs runs as printed; the blocks of a page share a namespace, in order."""

import shutil

import pytest

from tests.docs.pages import GUIDES, ROOT, blocks_of, name_of

WITH_PYTHON = [page for page in GUIDES if any(block.language == "python" for block in blocks_of(page))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    (tmp_path / "examples").mkdir()
    shutil.copy(ROOT / "examples" / "receipt.png", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for block in blocks_of(page):
        if block.language == "python":
            source = "\n" * (block.line - 1) + block.text  # so that a traceback has the page's line
            exec(compile(source, name_of(page), "exec"), namespace)
    assert capsys.readouterr().out


def test_the_pages_with_python_are_known():
    assert {"README.md", "docs/guide.md", "docs/serving.md", "docs/training.md"} <= set(map(name_of, WITH_PYTHON))
