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
    """Wilson's interval of a share, for scores of 0 and 1 (Wilson 1927). ValueError without rows."""
    if num < 1:
        raise ValueError("an interval needs at least one score")
    share = right / num
    centre = (share + Z**2 / (2 * num)) / (1 + Z**2 / num)
    half = Z / (1 + Z**2 / num) * math.sqrt(share * (1 - share) / num + Z**2 / (4 * num**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(scores: Sequence[float]) -> tuple[float, float]:
    """Percentiles 2.5 and 97.5 of the means of 10,000 resamples, always the same ones. ValueError without rows."""
    if not scores:
        raise ValueError("an interval needs at least one score")
    values, counts = np.unique(np.asarray(scores, np.float64), return_counts=True)
    # how often each value is drawn says all of a resample, whatever the number of rows
    drawn = np.random.default_rng(SEED).multinomial(len(scores), counts / len(scores), RESAMPLES)
    low, high = np.percentile(drawn @ values / len(scores), (2.5, 97.5))
    return float(low), float(high)


def summary(scores: Sequence[float], binary: bool) -> dict[str, Any]:
    """{"rows", "score": the mean, "interval": [low, high]}."""
    interval = wilson(sum(scores), len(scores)) if binary else bootstrap(scores)
    return {"rows": len(scores), "score": sum(scores) / len(scores), "interval": list(interval)}


def report(name: str, task: Task, samples: Sequence[Sample], scores: Sequence[float]) -> dict[str, Any]:
    """`summary` of all rows, and under "categories" of each part of each division; OCRBench's "points" are the sum."""
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
