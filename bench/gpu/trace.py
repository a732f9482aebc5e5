"""A trace of one answer, launched one by one and captured, for Perfetto or chrome://tracing: trace.json.gz."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.gpu.answers import RECEIPT
from bench.gpu.step import Part, Row, Visit
from nvlm_runtime import NVLM

TRACE = "trace.json.gz"


def parts(visit: Visit) -> Iterator[Part]:
    """One trace."""
    yield "trace of micro-d", partial(_traced, visit)


def _traced(visit: Visit) -> Iterator[Row]:
    on_gpu = visit.device == "cuda"
    models = {
        graphs: NVLM.load("micro-d", device=visit.device, dtype="bfloat16", graphs=graphs, native=False)
        for graphs in (False, True)
    }
    for model in models.values():
        model.generate("What is the total?", images=[RECEIPT], max_new_tokens=4)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as found:
        for graphs, model in models.items():
            with record_function("captured" if graphs else "launched one by one"):
                model.generate("What is the total?", images=[RECEIPT], max_new_tokens=4)
                if on_gpu:
                    torch.cuda.synchronize()
    path = visit.out / TRACE
    found.export_chrome_trace(str(path))
    yield {"file": TRACE, "bytes": path.stat().st_size}
