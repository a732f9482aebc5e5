"""Breaks the code by hand, one line at a time, and writes down which test saw it: tests/mutations/README.md.

    python -m tests.mutations [--new] [NAME...]   # mutates a copy of the tree; rows of other names are kept
    python -m tests.mutations --check             # runs nothing: does every mutation still apply?

--new applies only what the table does not have yet.

Every file beside this one lists MUTATIONS: (file, old text, new text, what it breaks). The old text must occur exactly
once. A mutation counts as caught when one of the file's TESTS (what pytest is told) fails; a file without them is of a
kernel, whose tests run in the interpreter.
"""

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("README.md")
HEAD = """# Mutations, and the test that saw each

Made by `python -m tests.mutations`: every line was applied to a copy of the tree and the tests of its part run, a
kernel's in the interpreter. "not caught" stays in the table. A trap is one of the list in the reference of the model.

| part | mutation | caught by |
|---|---|---|
"""


def caught_by(part: str, tests: Sequence[str] | None, file: str, old: str, new: str) -> str:
    is_kernel, tests = tests is None, tests or (f"tests/kernels/test_{part}.py",)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("nvlm_kernels", "nvlm_runtime", "tests", "bench", "examples", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        target = copy / file
        text = target.read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{part}: {old!r} occurs {text.count(old)} times in {file}, expected once")
        target.write_text(text.replace(old, new))
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
            cwd=copy,
            env=os.environ | {"PYTHONPATH": str(copy)} | ({"TRITON_INTERPRET": "1"} if is_kernel else {}),
            capture_output=True,
            text=True,
        )
    if run.returncode == 0:
        return "**not caught**"
    found = re.search(r"^(?:FAILED|ERROR) \S*?::(\w+)", run.stdout, re.MULTILINE)
    if not found:
        raise SystemExit(f"{part}: pytest stopped without naming a test:\n{run.stdout[-2000:]}\n{run.stderr[-500:]}")
    return f"`{found.group(1)}`"


def parts() -> list[str]:
    """Names of the files beside this one that list mutations."""
    return [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name != "__main__"]


def stale() -> list[str]:
    """A line for every mutation that no longer applies: its file or a test file is missing, or its text has moved."""
    lines = []
    for part in parts():
        listed = importlib.import_module(f"tests.mutations.{part}")
        tests = getattr(listed, "TESTS", None) or (f"tests/kernels/test_{part}.py",)
        lines += [
            f"{part}: no test file {name}" for name in tests if name.endswith(".py") and not (ROOT / name).is_file()
        ]
        for file, old, _, what in listed.MUTATIONS:
            count = (ROOT / file).read_text().count(old) if (ROOT / file).is_file() else None
            if count is None:
                lines.append(f"{part}: no file {file} ({what})")
            elif count != 1:
                lines.append(f"{part}: {old!r} occurs {count} times in {file}, expected once ({what})")
    return lines


def main(words: list[str]) -> None:
    if words == ["--check"]:
        raise SystemExit("\n".join(stale()))
    is_new, chosen = "--new" in words, [word for word in words if word != "--new"]
    if unknown := set(chosen) - set(parts()):
        raise SystemExit(f"no mutations of {sorted(unknown)}; known: {parts()}")
    rows = TABLE.read_text().splitlines()[HEAD.count("\n") :] if TABLE.exists() else []
    for part in chosen or parts():
        before = {row.rpartition(" | ")[0]: row for row in rows if row.startswith(f"| {part} |")}
        rows = [row for row in rows if not row.startswith(f"| {part} |")]
        listed = importlib.import_module(f"tests.mutations.{part}")
        tests = getattr(listed, "TESTS", None)
        for file, old, new, what in listed.MUTATIONS:
            name = f"| {part} | {what}"
            if is_new and name in before:
                rows.append(before[name])
                continue
            rows.append(f"{name} | {caught_by(part, tests, file, old, new)} |")
            print(rows[-1], flush=True)
        TABLE.write_text(HEAD + "\n".join(sorted(rows, key=lambda row: row.split(" | ")[0])) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
