"""Scores of many answers to one figure with its 95 % interval, as a whole and by category."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nvlm_runtime.evaluation.samples import Sample
from nvlm_runtime.evaluation.tasks import Task

Z = 1.959963984540054  # of the normal distribution, 95 % between its two signs
RESAMPLES = 10_000
SEED = 0


def wilson(right: float, num: int) -> tuple[float, float]:
    """Computes Wilson's 95 % interval of a share, for scores of 0 and 1.

    Args:
        right: sum of the scores.
        num: number of scores, at least 1.

    Returns:
        Lower and upper end, within 0 to 1.

    Raises:
        ValueError: there are no scores.

    Source: Wilson 1927.
    """
    if num < 1:
        raise ValueError("an interval needs at least one score")
    share = right / num
    centre = (share + Z**2 / (2 * num)) / (1 + Z**2 / num)
    half = Z / (1 + Z**2 / num) * math.sqrt(share * (1 - share) / num + Z**2 / (4 * num**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(scores: Sequence[float]) -> tuple[float, float]:
    """Computes percentiles 2.5 and 97.5 of the means of 10,000 resamples, always the same ones.

    Args:
        scores: one per question, at least one.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: there are no scores.
    """
    if not scores:
        raise ValueError("an interval needs at least one score")
    values, counts = np.unique(np.asarray(scores, np.float64), return_counts=True)
    # how often each value is drawn says all of a resample, whatever the number of rows
    drawn = np.random.default_rng(SEED).multinomial(len(scores), counts / len(scores), RESAMPLES)
    low, high = np.percentile(drawn @ values / len(scores), (2.5, 97.5))
    return float(low), float(high)


def summary(scores: Sequence[float], binary: bool) -> dict[str, Any]:
    """Summarises scores.

    Args:
        scores: one per question, at least one.
        binary: whether each is 0 or 1, which decides the interval.

    Returns:
        {"rows", "score": the mean, "interval": [low, high]}.
    """
    interval = wilson(sum(scores), len(scores)) if binary else bootstrap(scores)
    return {"rows": len(scores), "score": sum(scores) / len(scores), "interval": list(interval)}


def report(name: str, task: Task, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, Any]:
    """Summarises a benchmark: all rows, and under "categories" each part of each division.

    Args:
        name: of the task.
        task: the task.
        samples: its questions.
        scores: one per question.

    Returns:
        JSON values, with the metric and the method of the interval; OCRBench's "points" are the sum of the scores.
    """
    parts: dict[str, dict[str, list[float]]] = {}
    for sample, score in zip(samples, scores, strict=True):
        for division, part in sample.categories:
            parts.setdefault(division, {}).setdefault(part, []).append(score)
    values = {
        "task": name,
        "metric": task.metric,
        **summary(scores, task.binary),
        "interval_method": "Wilson, 95 %" if task.binary else f"bootstrap, {RESAMPLES:,} resamples, 95 %",
        "categories": {
            division: {part: summary(found, task.binary) for part, found in sorted(of_division.items())}
            for division, of_division in sorted(parts.items())
        },
    }
    return values | ({"points": int(sum(scores))} if name == "ocrbench" else {})
