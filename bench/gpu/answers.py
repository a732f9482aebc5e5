"""The micro models' answers: eager against captured, one by one and in batches that requests join and leave.

fp32 tokens must be equal; in bf16 the receipt's total must be read. Then nothing may be compiled after warm-up.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from bench.gpu.step import Part, Row, Visit
from nvlm_runtime import NVLM, Engine, GenerationParams

MODELS = ("micro-d", "micro-x", "micro-h")
RECEIPT = Path(__file__).parents[2] / "examples" / "receipt.png"
TOTAL = "17.40"
MOST = 400  # tokens of a prompt and its answer
WAYS = (
    GenerationParams(max_new_tokens=12, ignore_eos=True),
    GenerationParams(max_new_tokens=12, ignore_eos=True, temperature=0.8, seed=3),
    GenerationParams(max_new_tokens=12, ignore_eos=True, temperature=0.9, top_k=20, top_p=0.9, seed=4),
)


def parts(visit: Visit) -> Iterator[Part]:
    """Per model: bf16, single answers, batches, compiles."""
    for name in MODELS[:1] if visit.quick else MODELS:
        yield f"{name} reads the total in bf16", partial(_total, visit, name)
        yield f"{name} captured against eager", partial(_captured, visit, name)
        yield f"{name} batched with joins and cancels", partial(_batched, visit, name)
        yield f"{name} compiles after warm-up", partial(_compiles, visit, name)


def _load(visit: Visit, name: str, dtype: str = "float32", graphs: bool = False) -> NVLM:
    return NVLM.load(name, device=visit.device, dtype=dtype, graphs=graphs, native=False)


def _prompts() -> list[tuple[str, list[np.ndarray | Path]]]:
    wide = np.random.default_rng(7).integers(0, 255, (64, 128, 3), dtype=np.uint8)
    return [("What is the total?", [RECEIPT]), ("Hello?", []), ("Read tile 2.", [wide, RECEIPT])]


def _tokens(model: NVLM) -> list[list[int]]:
    return [model.generate(text, images, params=way).token_ids for text, images in _prompts() for way in WAYS]


def _total(visit: Visit, name: str) -> Iterator[Row]:
    for graphs in (False, True):
        text = _load(visit, name, "bfloat16", graphs).generate("What is the total?", images=[RECEIPT]).text
        yield {"graphs": graphs, "text": text, "right": text == TOTAL}


def _captured(visit: Visit, name: str) -> Iterator[Row]:
    want, got = _tokens(_load(visit, name)), _tokens(_load(visit, name, graphs=True))
    yield {"answers": len(want), "different": sum(a != b for a, b in zip(want, got, strict=True)), "right": want == got}


def _batched(visit: Visit, name: str) -> Iterator[Row]:
    """Requests come while others decode; every third one is cancelled after two pieces."""
    want = _tokens(_load(visit, name))
    asked = [(text, images, way) for text, images in _prompts() for way in WAYS]
    with Engine(_load(visit, name, graphs=True), max_batch_size=4, max_model_len=MOST) as engine:
        answers, cancelled = [], 0
        for number, (text, images, way) in enumerate(asked):
            answers.append(engine.submit(text, images, params=way))
            if number % 3 == 2:
                left = engine.submit(text, images, params=way)
                for count, _ in enumerate(left):
                    if count == 1:
                        left.cancel()
                        cancelled += 1
                        break
        got = [answer.result().token_ids for answer in answers]
    different = sum(a != b for a, b in zip(want, got, strict=True))
    yield {"answers": len(want), "cancelled": cancelled, "different": different, "right": not different}


def _compiles(visit: Visit, name: str) -> Iterator[Row]:
    for graphs in (False, True):
        model = _load(visit, name, "bfloat16", graphs)
        model.warmup(max_model_len=MOST, max_images=2)
        _tokens(model)
        count = model.compiles_after_warmup
        captured = [step.graph is not None for step in model.runner.steps.values()] if graphs else []
        yield {
            "graphs": graphs,
            "compiled": count,
            "steps": len(captured),
            "right": count == 0 and (visit.device == "cpu" or all(captured)),
        }
