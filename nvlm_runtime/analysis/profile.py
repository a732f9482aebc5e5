"""Profiles one request phase by phase, next to the eager reference, and shows which operators a phase's time goes to.

Times are medians of runs without torch's profiler. Our runs and eager runs alternate, and every run starts without
cached images and prefixes. The profiled run comes last; its trace has a range "nvlm.<phase>" around every phase.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from nvlm_runtime.analysis import eager
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.request import PHASES, Output
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.model.adapter import AdaptedLinear

PROFILED_PHASES = ("open", *PHASES, "decode")


@dataclass(frozen=True)
class PhaseTime:
    """The time of one phase.

    Attributes:
        phase: One of `PROFILED_PHASES`.
        seconds: Median of our runs.
        share: Part of the time of all phases, from 0 to 1.
        eager_seconds: Median of the eager reference's runs.
        ops: Operators, slowest first, each with its part of the phase's own CPU time under the profiler.
    """

    phase: str
    seconds: float
    share: float
    eager_seconds: float
    ops: tuple[tuple[str, float], ...]

    @property
    def ratio(self) -> float | None:
        """Speed-up over the eager reference; None where one of the two does nothing."""
        return self.eager_seconds / self.seconds if self.seconds > 0 and self.eager_seconds > 0 else None


@dataclass(frozen=True)
class Profile:
    """The profile of one request.

    Attributes:
        phases: The phases that the request has.
        output: Of the run under the profiler.
        trace: That run's trace.
    """

    phases: tuple[PhaseTime, ...]
    output: Output
    trace: profile


def check_matplotlib() -> None:
    """Checks that charts can be drawn; call it before any work is done.

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError('a chart needs matplotlib: pip install "nvlm-runtime[viz]"') from error


def profile_request(
    model: NVLM, prompt: str, images: Sequence[Any], params: GenerationParams, rounds: int = 3
) -> Profile:
    """Runs one request several times, here and in the eager reference, and once under torch's profiler.

    Args:
        model: A model that keeps no prefixes and no encoded images, so that every run does all the work.
        prompt: The question.
        images: Its images.
        params: How to generate; the eager reference is greedy.
        rounds: Runs of each, after a warm-up.

    Returns:
        The profile.

    Raises:
        ValueError: The model reuses work, the parameters sample, adapters are not merged, or `rounds` is below 1; and
            whatever `NVLM.prepare` raises.
    """
    if model.reuse or model.encoder.cache.max_bytes:
        raise ValueError("a profile needs a model loaded with reuse=False and image_cache_bytes=0")
    if params.temperature or params.repetition_penalty != 1:
        raise ValueError("a profile needs greedy decoding: expected temperature 0 and repetition_penalty 1")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if any(isinstance(module, AdaptedLinear) for module in model.model.modules()):
        raise ValueError("a profile needs merged adapters (merge_lora=True): the eager reference has no adapters")

    def ours() -> Output:
        stream = model.stream(model.prepare(prompt, images), params=params)
        for _ in stream:
            pass
        return stream.output

    output = ours()
    num_tokens = len(output.token_seconds) + 1

    def reference() -> dict[str, float]:
        prepared = model.prepare(prompt, images)
        return prepared.timings | eager.generate(model.model, prepared, num_tokens, model.tokenizer.vocab_size).timings

    reference()
    engine_times: list[dict[str, float]] = []
    eager_times: list[dict[str, float]] = []
    for _ in range(rounds):
        engine_times.append(ours().timings)
        eager_times.append(reference())
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if model.device.type == "cuda" else [])
    with profile(activities=activities) as trace:
        output = ours()
    medians = [
        {phase: statistics.median(times[phase] for times in runs) for phase in PROFILED_PHASES}
        for runs in (engine_times, eager_times)
    ]
    total = sum(medians[0].values())
    ops = phase_ops(trace.events())
    phases = tuple(
        PhaseTime(phase, medians[0][phase], medians[0][phase] / total, medians[1][phase], ops.get(phase, ()))
        for phase in PROFILED_PHASES
        if medians[0][phase] or medians[1][phase] or phase in ops
    )
    return Profile(phases, output, trace)


def phase_ops(events: EventList) -> dict[str, tuple[tuple[str, float], ...]]:
    """Splits each phase's own CPU time by operator.

    Args:
        events: Of a profiled run, with a range "nvlm.<phase>" per phase.

    Returns:
        Per phase, its operators, slowest first, each with its part of the phase's time.
    """
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name.removeprefix("nvlm."))
        for event in events
        if event.name.startswith("nvlm.")
    )
    spent: dict[str, dict[str, float]] = {phase: {} for _, _, phase in spans}
    at = 0
    for event in sorted(events, key=lambda event: event.time_range.start):
        while at < len(spans) and spans[at][1] < event.time_range.start:
            at += 1
        inside = at < len(spans) and spans[at][0] <= event.time_range.start
        if inside and not event.name.startswith("nvlm."):
            ops = spent[spans[at][2]]
            ops[event.name] = ops.get(event.name, 0.0) + event.self_cpu_time_total
    found = {}
    for phase, ops in spent.items():
        whole = sum(ops.values()) or 1.0
        found[phase] = tuple((name, own / whole) for name, own in sorted(ops.items(), key=lambda op: -op[1]))
    return found


def draw_phases(phases: Sequence[PhaseTime], title: str, path: Path) -> None:
    """Draws a bar chart of the phases, ours next to the eager reference.

    Args:
        phases: What to draw.
        title: The chart's title.
        path: The image file to write.

    Raises:
        ValueError: matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.8 + 0.65 * len(phases)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, colour, offset, attribute in (
        ("eager", "#8c8c8c", 0.2, "eager_seconds"),
        ("ours", "#0b6e4f", -0.2, "seconds"),
    ):
        values = [1e3 * getattr(phase, attribute) for phase in phases]
        bars = axis.barh([i + offset for i in range(len(phases))], values, 0.38, color=colour, label=name)
        axis.bar_label(bars, [f"{value:,.1f}" for value in values], padding=3, fontsize=8)
    axis.set_yticks(range(len(phases)), [phase.phase for phase in phases])
    axis.invert_yaxis()
    axis.set(xlabel="ms", title=title)
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], frameon=False)
    figure.savefig(path, dpi=130)
