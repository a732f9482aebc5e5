"""The results of a visit: one JSON, one Markdown summary, two pictures."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.processes import Outcome, as_json
from bench.gpu.step import Row, Visit
from bench.reports.chart import one_axis
from nvlm_runtime.analysis.profile import check_matplotlib

OURS, EAGER = "#0b6e4f", "#8c8c8c"


def is_right(row: Row) -> bool:
    """Whether a row reports nothing wrong: no part that failed, no answer that differs."""
    return "failed" not in row and row.get("right", True)


def write_results(visit: Visit, outcomes: Sequence[Outcome]) -> None:
    """Writes gpu.json and gpu.md, and the pictures where there are times and matplotlib. Each file is whole or old."""
    note = {"device": visit.device, "quick": visit.quick}
    _write(visit.out / "gpu.json", json.dumps({**note, "steps": as_json(outcomes)}, indent=1) + "\n")
    _write(visit.out / "gpu.md", markdown(visit, outcomes))
    times = rows_of(outcomes, "times")
    if times and _can_draw():
        try:
            _draw_roofline(visit.out / "roofline.png", times)
            _draw_gaps(visit.out / "gaps.png", times)
        except Exception as error:  # the figures are written already, and the next step must follow
            print(f"a picture could not be drawn: {type(error).__name__}: {error}", flush=True)


def rows_of(outcomes: Iterable[Outcome], name: str) -> list[Row]:
    """What a step found, without its parts that failed."""
    return [row for outcome in outcomes if outcome.name == name for row in outcome.rows if "failed" not in row]


def markdown(visit: Visit, outcomes: Sequence[Outcome]) -> str:
    """The summary."""
    lines = [
        "# A visit to a GPU" if visit.device == "cuda" else "# A trial of the script on a CPU: no time here counts"
    ]
    for row in rows_of(outcomes, "ceilings")[:1]:
        lines += [
            "",
            ", ".join(f"{name} {value}" for name, value in row.items() if name not in ("part", "environment")),
        ]
    lines += ["", *_table(("step", "status", "seconds", "rows", "wrong", "died"), map(_step_cells, outcomes))]
    wrong = [(outcome.name, row) for outcome in outcomes for row in outcome.rows if not is_right(row)]
    if wrong:
        lines += ["", "## Wrong", ""]
        lines += [f"- {name}, {row['part']}: {row.get('failed') or _without_part(row)}" for name, row in wrong]
    for outcome in outcomes:
        if outcome.printed:
            lines += ["", f"## What {outcome.name} printed last", "", "```", outcome.printed.strip(), "```"]
    for name, head, cells in SECTIONS:
        rows = rows_of(outcomes, name)
        if rows:
            lines += ["", f"## {name.capitalize()}", "", *_table(head, (cells(row) for row in rows))]
    return "\n".join(lines) + "\n"


def _step_cells(outcome: Outcome) -> list[Any]:
    wrong = sum(not is_right(row) for row in outcome.rows)
    return [outcome.name, outcome.status, f"{outcome.seconds:.0f}", len(outcome.rows), wrong, outcome.died]


def _without_part(row: Row) -> str:
    return ", ".join(f"{name} {value}" for name, value in row.items() if name != "part")


def _times_cells(row: Row) -> list[Any]:
    us = row["us"]
    share = row["share_of_roofline"]
    spread = f"{us['p50']:.1f} ({us['p20']:.1f} to {us['p80']:.1f})"
    return [
        row["case"],
        row["pass"],
        row["column"],
        spread,
        "-" if share is None else f"{100 * share:.0f} %",
        us["method"],
    ]


def _layer_cells(row: Row) -> list[Any]:
    us = row["us"]
    error = f"{row['error']:.1e} ({row['eager_error']:.1e})"
    return [row["part"], row["column"], f"{us['p50']:.1f}", f"{row['one_by_one_us']:.1f}", row["launches"], error]


def _ceiling_cells(row: Row) -> list[Any]:
    rate = row.get("bytes_per_s"), row.get("flops")
    shown = f"{rate[0] / 1e9:.0f} GB/s" if rate[0] else f"{rate[1] / 1e12:.2f} TFLOP/s" if rate[1] else "-"
    return [row["part"], shown]


def _answer_cells(row: Row) -> list[Any]:
    return [
        row["part"],
        "right" if row["right"] else "WRONG",
        _without_part({k: v for k, v in row.items() if k != "right"}),
    ]


def _error_cells(row: Row) -> list[Any]:
    figures = [f"{row[name]:.1e}" for name in ("error", "eager", "allowed")]
    return [row["case"], row["size"], row["dtype"], row["what"], *figures, "right" if row["right"] else "WRONG"]


Section = tuple[str, tuple[str, ...], Callable[[Row], list[Any]]]
SECTIONS: tuple[Section, ...] = (
    ("ceilings", ("what", "rate"), _ceiling_cells),
    ("answers", ("what", "", "figures"), _answer_cells),
    ("times", ("case", "pass", "column", "us: median (p20 to p80)", "of the roofline", "method"), _times_cells),
    ("layers", ("what", "column", "us", "launched one by one", "launches", "error (eager's)"), _layer_cells),
    ("correctness", ("case", "size", "dtype", "what", "error", "eager's", "allowed", ""), _error_cells),
)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)


def _can_draw() -> bool:
    try:
        check_matplotlib()
    except ValueError:
        return False
    return True


def _by_case(times: Iterable[Row], column: str) -> dict[str, Row]:
    return {f"{row['case']} {row['pass']}": row for row in times if row["column"] == column}


def _draw_roofline(path: Path, times: Sequence[Row]) -> None:
    """Bytes a second that the case needs at least against its arithmetic intensity, with the chip's roofline."""
    with one_axis(path, 8.0) as axis:
        for column, colour in (("eager", EAGER), ("ours", OURS)):
            points = [_rate(row, row["us"]["p50"]) for row in times if row["column"] == column]
            if points:
                axis.scatter(*zip(*points), color=colour, label=column)
        known = sorted({_rate(row, row["roofline_us"]) for row in times if row["roofline_us"]})
        if known:
            axis.plot(*zip(*known), color="black", ls=":", label="roofline")
        axis.set_xscale("symlog", linthresh=1)
        axis.set(yscale="log", xlabel="flops per byte", ylabel="GB/s")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)


def _rate(row: Row, microseconds: float) -> tuple[float, float]:
    return row["flops"] / row["bytes"], row["bytes"] / microseconds / 1e3


def _draw_gaps(path: Path, times: Sequence[Row]) -> None:
    """Microseconds above the roofline of every case, or all of them where the chip's is not known."""
    ours, eager = _by_case(times, "ours"), _by_case(times, "eager")

    def gap(row: Row) -> float:
        return row["us"]["p50"] - (row["roofline_us"] or 0)

    names = sorted(ours, key=lambda name: gap(ours[name]))
    with one_axis(path, 9.0) as axis:
        axis.figure.set_figheight(1.5 + 0.22 * len(names))
        places = range(len(names))
        axis.barh([at + 0.2 for at in places], [gap(ours[name]) for name in names], 0.4, color=OURS, label="ours")
        beside = [gap(eager[name]) if name in eager else 0 for name in names]
        axis.barh([at - 0.2 for at in places], beside, 0.4, color=EAGER, label="eager")
        axis.set_yticks(list(places), names, fontsize=7)
        axis.set(xscale="symlog", xlabel="microseconds above the roofline")
        axis.legend(frameon=False, loc="lower right")
