"""A run's loss, rate and gradient norm as a picture, from its metrics file."""

import json
from pathlib import Path


def check_matplotlib() -> None:
    """ValueError where it is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("the plot needs matplotlib: pip install 'nvlm-runtime[viz]', or --set plot=false") from error


def draw_metrics(metrics: Path, picture: Path) -> None:
    """Draws loss, learning rate and gradient norm over the steps, one above the other.

    Args:
        metrics: JSON lines of `trainer.Step`.
        picture: the PNG file to write.

    Raises:
        ValueError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    steps = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for axis, (key, label) in zip(
        axes, (("loss", "loss a learnt token"), ("lr", "learning rate"), ("grad_norm", "gradient norm"))
    ):
        axis.plot([step["step"] for step in steps], [step[key] for step in steps], linewidth=1)
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("step")
    figure.savefig(picture, dpi=120)
