"""The command line that the benches over CASES share."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.proofs.cases import Case


def options(bench: str, doc: str) -> argparse.ArgumentParser:
    """CASE... and --json of `python -m bench.BENCH`, described by the first line of its docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{bench}", description=doc.splitlines()[0])
    parser.add_argument("cases", nargs="*", help="ids of cases, or the start of them; all where none is named")
    parser.add_argument("--json", type=Path, help=f"default: bench/results/{bench}.json, where no case is named")
    return parser


def chosen(parser: argparse.ArgumentParser, names: list[str]) -> "list[Case]":
    """The cases whose id begins with one of the names; all where there are none. Ends the program where none fits."""
    from bench.proofs.cases import CASES  # not above: bench.proofs.traffic first has to ask for the interpreter

    found = [case for case in CASES if not names or case.id.startswith(tuple(names))]
    if not found:
        parser.error(f"no case begins with {names}; known: {', '.join(case.id for case in CASES)}")
    return found
