"""One request, stage by stage: what each takes, beside plain PyTorch, and what torch's profiler sees inside it.

Times are medians of runs without the profiler, ours and plain PyTorch in turn, on cold images and prompts. The profiled
run comes after them: its trace has a range "nvlm.STAGE" around every stage, and says what a stage's time went into.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from nvlm_runtime.analysis.eager import answer
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.request import Output
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.model.adapter import AdaptedLinear

STAGES = ("open", "tile", "encode", "project", "prefill", "decode")


@dataclass(frozen=True)
class StageTime:
    """seconds, plain_seconds: medians. share: of all our stages. ops: largest first, (name, its share of the stage's
    own CPU time under the profiler).
    """

    stage: str
    seconds: float
    share: float
    plain_seconds: float
    ops: tuple[tuple[str, float], ...]

    @property
    def ratio(self) -> float | None:
        """How many times faster than plain PyTorch; None where a stage does nothing."""
        return self.plain_seconds / self.seconds if self.seconds > 0 and self.plain_seconds > 0 else None


@dataclass(frozen=True)
class Profile:
    """stages: those the request has. output: of the profiled run."""

    stages: tuple[StageTime, ...]
    output: Output
    trace: profile


def check_matplotlib() -> None:
    """ValueError where pictures cannot be drawn, to be called before any work is done."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError('a picture needs matplotlib: pip install "nvlm-runtime[viz]"') from error


def profile_request(
    engine: NVLM, prompt: str, images: Sequence[Any], params: GenerationParams, rounds: int = 3
) -> Profile:
    """engine: must keep neither handles nor prefixes, or later runs would find what earlier ones made.

    Raises ValueError for such an engine, for sampling (plain PyTorch is greedy), for less than one round, and as
    `prepare` does.
    """
    if engine.reuse or engine.encoder.cache.max_bytes:
        raise ValueError("a profile needs an engine made with reuse=False and image_cache_bytes=0")
    if params.temperature or params.repetition_penalty != 1:
        raise ValueError("a profile is greedy: expected temperature 0 and repetition_penalty 1")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if any(isinstance(module, AdaptedLinear) for module in engine.model.modules()):
        raise ValueError("a profile needs adapters merged: plain PyTorch reads the weights alone")

    def ours() -> Output:
        stream = engine.complete(engine.prepare(prompt, images), params)
        for _ in stream:
            pass
        return stream.output

    output = ours()
    num_tokens = len(output.token_seconds) + 1

    def plain() -> dict[str, float]:
        prepared = engine.prepare(prompt, images)
        return prepared.timings | answer(engine.model, prepared, num_tokens, engine.tokenizer.vocab_size).timings

    plain()
    engine_times: list[dict[str, float]] = []
    plain_times: list[dict[str, float]] = []
    for _ in range(rounds):
        engine_times.append(ours().timings)
        plain_times.append(plain())
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if engine.device.type == "cuda" else [])
    with profile(activities=activities) as trace:
        output = ours()
    medians = [
        {stage: statistics.median(times[stage] for times in runs) for stage in STAGES}
        for runs in (engine_times, plain_times)
    ]
    total = sum(medians[0].values())
    ops = stage_ops(trace.events())
    stages = tuple(
        StageTime(stage, medians[0][stage], medians[0][stage] / total, medians[1][stage], ops.get(stage, ()))
        for stage in STAGES
        if medians[0][stage] or medians[1][stage] or stage in ops
    )
    return Profile(stages, output, trace)


def stage_ops(events: EventList) -> dict[str, tuple[tuple[str, float], ...]]:
    """What each stage's own CPU time went into, largest first, by the ranges of a profiled run."""
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name.removeprefix("nvlm."))
        for event in events
        if event.name.startswith("nvlm.")
    )
    spent: dict[str, dict[str, float]] = {stage: {} for _, _, stage in spans}
    at = 0
    for event in sorted(events, key=lambda event: event.time_range.start):
        while at < len(spans) and spans[at][1] < event.time_range.start:
            at += 1
        inside = at < len(spans) and spans[at][0] <= event.time_range.start
        if inside and not event.name.startswith("nvlm."):
            ops = spent[spans[at][2]]
            ops[event.name] = ops.get(event.name, 0.0) + event.self_cpu_time_total
    found = {}
    for stage, ops in spent.items():
        whole = sum(ops.values()) or 1.0
        found[stage] = tuple((name, own / whole) for name, own in sorted(ops.items(), key=lambda op: -op[1]))
    return found


def draw_stages(stages: Sequence[StageTime], title: str, path: Path) -> None:
    """Bars of every stage, ours beside plain PyTorch. ValueError without matplotlib."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.8 + 0.65 * len(stages)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, colour, offset, attribute in (
        ("eager", "#8c8c8c", 0.2, "plain_seconds"),
        ("ours", "#0b6e4f", -0.2, "seconds"),
    ):
        values = [1e3 * getattr(stage, attribute) for stage in stages]
        bars = axis.barh([i + offset for i in range(len(stages))], values, 0.38, color=colour, label=name)
        axis.bar_label(bars, [f"{value:,.1f}" for value in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(stages)), [stage.stage for stage in stages])
    axis.invert_yaxis()
    axis.set(xlabel="ms", title=title)
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], frameon=False)
    figure.savefig(path, dpi=130)
