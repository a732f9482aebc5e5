"""Breaks kernels by hand, one line at a time, and writes down which test saw it: tests/mutations/README.md.

    python -m tests.mutations [OP...]          # mutates a copy of the tree; rows of other ops are kept

Every file beside this one lists MUTATIONS of one op: (file, old text, new text, what it breaks). The old text must
occur exactly once. A mutation counts as caught when the op's kernel tests fail, in the interpreter.
"""

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("README.md")
HEAD = """# Mutations of the kernels, and the test that saw each

Made by `python -m tests.mutations`: every line was applied to a copy of the tree and the op's tests run in the
interpreter. "not caught" stays in the table.

| op | mutation | caught by |
|---|---|---|
"""


def caught_by(op: str, file: str, old: str, new: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("nvlm_kernels", "tests", "bench", "pyproject.toml"):
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__", "runtime"))
            else:
                shutil.copy(source, copy / name)
        target = copy / file
        text = target.read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{op}: {old!r} occurs {text.count(old)} times in {file}, expected once")
        target.write_text(text.replace(old, new))
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/kernels/test_{op}.py"],
            cwd=copy,
            env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
    if run.returncode == 0:
        return "**not caught**"
    found = re.search(r"^(?:FAILED|ERROR) \S*?::(\w+)", run.stdout, re.MULTILINE)
    if not found:
        raise SystemExit(f"{op}: pytest stopped without naming a test:\n{run.stdout[-2000:]}\n{run.stderr[-500:]}")
    return f"`{found.group(1)}`"


def main(ops: list[str]) -> None:
    known = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]) if module.name != "__main__"]
    if unknown := set(ops) - set(known):
        raise SystemExit(f"no mutations of {sorted(unknown)}; known: {known}")
    rows = TABLE.read_text().splitlines()[HEAD.count("\n") :] if TABLE.exists() else []
    for op in ops or known:
        rows = [row for row in rows if not row.startswith(f"| {op} |")]
        for file, old, new, what in importlib.import_module(f"tests.mutations.{op}").MUTATIONS:
            row = f"| {op} | {what} | {caught_by(op, file, old, new)} |"
            print(row, flush=True)
            rows.append(row)
        TABLE.write_text(HEAD + "\n".join(sorted(rows, key=lambda row: row.split(" | ")[0])) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
