"""Writes the speed tables of docs/benchmarks.md from bench/results/generate-*.json: python -m bench.reports.tables"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.reports.report import RESULTS

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- speed: python -m bench.reports.tables -->", "<!-- /speed -->"
NAMES = {
    "tile_ms": "ms per tile, tiles in the image: {at}",
    "first_token_s": "s to the first token, {at}",
    "token_ms": "ms per token, context of {at} tokens",
    "tokens_per_s": "tokens/s, batch of {at}",
    "working_mb": "MB besides weights and caches, {at}",
    "startup_s": "s from the start of `nvlm ask` to the first token, {at}",
}


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    spread = f" ({_number(row['p20'])}-{_number(row['p80'])})" if row["num"] > 1 else ""
    return _number(row["p50"]) + spread


def _label(row: dict[str, Any]) -> str:
    at = f"{row['at']:,}" if isinstance(row["at"], int) else row["at"]
    label = NAMES[row["measure"]].format(at=at)
    return label.removesuffix(" tokens") if str(at).endswith("tiles") else label


def _only(values: Iterable[Any]) -> str:
    """One value, or all there are."""
    return ", ".join(dict.fromkeys(map(str, values)))


def speed(result: dict[str, Any]) -> str:
    """The table of one results file, a line a measure and place, a column a contestant."""
    parts = list(result["parts"].values())
    rows = [row for part in parts for row in part["rows"]]
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    limited = any("limit" in row for row in rows)
    settings = [part["setting"] for part in parts]
    roofs = [part["card"]["read_gb_per_s"] for part in parts]
    loads = [part["load"] for part in parts]
    head = ["", *contestants, *(["memory bandwidth limit"] if limited else [])]
    lines = [
        f"`{result['model']}`, {_only(part['dtype'] for part in parts)}, {_only(s['cpu'] for s in settings)}, "
        f"{_only(s['cpu_threads'] for s in settings)} threads, torch {_only(s['torch'] for s in settings)}, "
        f"memory {min(roofs):.0f} to {max(roofs):.0f} GB/s, load before {min(loads):.1f} to {max(loads):.1f}, "
        f"commit {_only(s['commit'] for s in settings)}:",
        "",
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
    ]
    by_place = {(row["measure"], row["at"], row["contestant"]): row for row in rows}
    for measure in NAMES:
        for at in dict.fromkeys(row["at"] for row in rows if row["measure"] == measure):
            found = [by_place.get((measure, at, contestant)) for contestant in contestants]
            some = next(row for row in found if row)
            limit = [_number(some["limit"]) if "limit" in some else "-"] if limited else []
            lines.append("| " + " | ".join([_label(some), *map(_cell, found), *limit]) + " |")
    return "\n".join(lines)


def section(results: Path = RESULTS) -> str:
    """What stands between the markers."""
    files = sorted(results.glob("generate-*.json"), key=lambda path: ("micro" in path.name, path.name))
    tables = [speed(json.loads(path.read_text())) for path in files]
    return "\n\n".join(tables) if tables else "Nothing was measured."


def renewed(text: str, inside: str) -> str:
    """`text` with `inside` between its markers. ValueError where they are not there once each, in order."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"expected {BEGIN} and then {END}, once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{inside}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(), section()))
