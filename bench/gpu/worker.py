"""The process of one step: `python -m bench.gpu.worker MODULE SHARE LINES DEVICE QUICK OUT`, of `bench.gpu`.

The file LINES takes a line of JSON when a part begins and one for every row as soon as it is made, so that a process
that dies keeps what it had. Parts that stand there as begun are passed over. SHARE is "0/1" for all parts, "1/4" for
every fourth from the second on.
"""

import itertools
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from bench.gpu.step import Part, Row, Visit

AGAIN = 75  # exit status: the device no longer answers this process; a new one may go on with the next part


def main(module: str, share: str, lines: str, device: str, quick: str, out: str) -> int:
    """Runs the parts of a module that have not begun yet.

    Returns:
        0, or AGAIN.
    """
    path, (number, count) = Path(lines), map(int, share.split("/"))
    begun = {row.get("begins") for row in read_lines(path)}
    with open(path, "a", encoding="utf-8") as file:

        def write(row: Row) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

        parts = import_module(module).parts(Visit(device, quick == "quick", Path(out)))
        for part in itertools.islice(parts, number, None, count):
            if part[0] not in begun:
                write({"begins": part[0]})
                if not _run(part, write, device):
                    return AGAIN
    return 0


def _run(part: Part, write: Callable[[Row], None], device: str) -> bool:
    """Runs a part. Returns whether the device still answers."""
    name, rows = part
    if torch := sys.modules.get("torch"):  # a module without it starts at once
        torch.manual_seed(0)
    try:
        for row in rows():
            write({"part": name, **row})
    except Exception as error:
        write({"part": name, "failed": f"{type(error).__name__}: {str(error)[:500]}"})
    if device != "cuda" or torch is None:
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def read_lines(path: Path) -> list[Row]:
    """The whole lines of a file of JSON lines; a process that was killed may have left half a line."""
    text = path.read_text("utf-8") if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
