"""The bench's pictures: milliseconds a token against the context, tokens a second against the batch; and bars."""

from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nvlm_runtime.analysis.profile import check_matplotlib

AXES = {
    "token_ms": ("tokens of context", "ms a token", "One row"),
    "tokens_per_s": ("rows in the batch", "tokens/s, all rows", "Batches"),
}
COLOURS = ("#8c8c8c", "#0b6e4f", "#c8553d", "#3d5a80", "#e0a458", "#6d597a")


def _ticks(axis: Any, values: list[int]) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{value:,}" for value in values])
    axis.xaxis.set_minor_locator(NullLocator())


def picture_path(word: str) -> Path:
    """For argparse: a file to draw into, refused where there is no matplotlib, before any work is done."""
    try:
        check_matplotlib()
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
    return Path(word)


@contextmanager
def one_axis(path: Path, width: float = 7.0) -> Iterator[Any]:
    """The axis of a picture that is written to `path` at the end. width: inches. ValueError without matplotlib."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure.subplots()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """rows: of `bench.generate`; medians as lines, p20 to p80 as bands. ValueError without matplotlib or such rows."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [measure for measure in AXES if any(row["measure"] == measure for row in rows)]
    if not shown:
        raise ValueError(f"nothing to draw: none of {', '.join(AXES)} was measured")
    names = list(dict.fromkeys(row["contestant"] for row in rows if row["measure"] in AXES))
    figure = Figure(figsize=(5.5 * len(shown), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, measure in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        xlabel, ylabel, heading = AXES[measure]
        mine = [row for row in rows if row["measure"] == measure]
        for name, colour in zip(names, COLOURS):
            points = sorted((row for row in mine if row["contestant"] == name), key=lambda row: row["at"])
            at = [row["at"] for row in points]
            axis.plot(at, [row["p50"] for row in points], marker="o", color=colour, label=name)
            axis.fill_between(
                at, [row["p20"] for row in points], [row["p80"] for row in points], color=colour, alpha=0.2, lw=0
            )
        floors = sorted({row["at"]: row["limit"] for row in reversed(mine) if row.get("limit") is not None}.items())
        if floors:
            axis.plot(*zip(*floors), color="black", ls=":", lw=1.2, label="memory's limit")
        _ticks(axis, sorted({row["at"] for row in mine}))
        axis.set(xlabel=xlabel, ylabel=ylabel, title=heading)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
