"""Many short requests through one engine: python -m bench.soak [--requests 10000] [--model micro-x]

Every answer is compared with that of the same request alone in a model that keeps nothing; some are cancelled on the
way, and theirs must be its beginning. Reports what was wrong or lost, the resident memory as it goes, and the rates.
"""

import argparse
import random
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bench.reports import report
from nvlm_runtime import NVLM
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.engine.serving import Answer, Engine, QueueFull
from nvlm_runtime.micro.document import GRIDS, draw, make_document
from nvlm_runtime.micro.questions import questions

DOCUMENTS, QUESTIONS, TEXTS = 8, 5, 10
CANCELLED = 0.1  # of the requests
PATIENCE = 60  # seconds without an answer's end, after which it is lost
MARKS = (0.1, 0.5, 1.0)  # where memory is read


@dataclass(frozen=True)
class Request:
    prompt: str
    images: tuple[Image.Image, ...]
    params: GenerationParams


def distinct_requests() -> list[Request]:
    """Questions about rendered documents, every fourth about two of them, every third sampled; and some text alone."""
    documents = [make_document(f"soak:{i}", GRIDS[i % len(GRIDS)]) for i in range(DOCUMENTS)]
    pictures = [draw(document) for document in documents]
    found = []
    for i, document in enumerate(documents):
        for question in questions(document)[:QUESTIONS]:
            pair = (pictures[i], pictures[i - 1]) if len(found) % 4 == 3 else (pictures[i],)
            found.append((question.text, pair))
    found += [(f"What is {number} and {number + 1}?", ()) for number in range(TEXTS)]
    temperatures = [0.0, 0.0, 0.8]
    return [
        Request(prompt, pair, GenerationParams(max_new_tokens=16, temperature=temperatures[i % 3], seed=i))
        for i, (prompt, pair) in enumerate(found)
    ]


def resident_bytes() -> int:
    """VmRSS of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return 1024 * int(line.split()[1])


def soak(name: str, num_requests: int, deterministic: bool) -> dict[str, Any]:
    distinct = distinct_requests()
    lone = NVLM.load(name, reuse=False, image_cache_bytes=0)
    wanted = [
        lone.generate([lone.prepare(each.prompt, each.images)], params=each.params)[0].token_ids for each in distinct
    ]
    model = NVLM.load(name, deterministic=deterministic)
    rng = random.Random(0)
    counts = {"wrong": 0, "lost": 0, "cancelled": 0, "tokens": 0, "refused": 0, "reused_tokens": 0}
    memory: dict[str, int] = {}
    pending: deque[tuple[int, Answer]] = deque()
    marks = {int(num_requests * mark): mark for mark in MARKS}
    ended = 0

    def end() -> None:
        """Waits for the request that was sent first."""
        nonlocal ended
        number, answer = pending.popleft()
        ended += 1
        if ended in marks:
            memory[f"{marks[ended]:.0%}"] = resident_bytes()
        try:
            out = answer.result(PATIENCE)
        except TimeoutError:
            counts["lost"] += 1
            return
        want = wanted[number]
        if out.finish_reason == "cancelled":
            counts["cancelled"] += 1
            want = want[: len(out.token_ids)]
        counts["wrong"] += out.token_ids != want
        counts["tokens"] += len(out.token_ids)
        counts["reused_tokens"] += out.num_reused

    began = time.perf_counter()
    with Engine(model) as engine:
        for _ in range(num_requests):
            number = rng.randrange(len(distinct))
            prepared = engine.prepare(distinct[number].prompt, distinct[number].images)
            while True:
                try:
                    answer = engine.submit(prepared, params=distinct[number].params)
                    break
                except QueueFull:
                    counts["refused"] += 1
                    end()
            pending.append((number, answer))
            if rng.random() < CANCELLED:
                rng.choice(pending)[1].cancel()
        while pending:
            end()
    seconds = time.perf_counter() - began
    return {
        "model": name,
        "deterministic": deterministic,
        "requests": num_requests,
        "distinct": len(distinct),
        **counts,
        "rows": engine.max_batch_size,
        "resident_bytes": memory,
        "seconds": seconds,
        "requests_per_second": num_requests / seconds,
        "tokens_per_second": counts["tokens"] / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000, help="at least 10; the default is what is committed")
    parser.add_argument("--model", default="micro-x")
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--json", type=Path, help="default: bench/results/soak.json, at the default number of requests")
    args = parser.parse_args()
    if args.requests < 10:
        parser.error(f"--requests must be at least 10, got {args.requests}")
    row = soak(args.model, args.requests, args.deterministic)
    print(report.table(("", "value"), [(name, value) for name, value in row.items() if not isinstance(value, dict)]))
    print(report.table(("requests", "resident bytes"), row["resident_bytes"].items()))
    report.write(args.json, "soak", [row], some=args.requests != parser.get_default("requests"))


if __name__ == "__main__":
    main()
