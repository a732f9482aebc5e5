"""Digests of the bundled models' logits on 20 fixed requests: python -m tests.digests [--write [CASE ...]]

Each case loads one model with some options and answers its requests, alone or in one batch. Recorded are the logits of
the whole prompt and of every decode step but the last, in float32, with the token ids. digests.json holds

    origin      the commit that the records come from, and the cases that were replaced since, each with its reason
    reference   of every request: its token ids and the 8 largest logits of some positions, for CPUs without digests
    digests     CPU kind (`fingerprint`) to request to sha256: of these CPUs the bits are known

`--write` replaces the reference of the named cases (default: all) and their digests for this CPU kind; digests of other
CPU kinds are kept where the new values agree with the old ones, and dropped where they do not.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nvlm_kernels.native.library import find_compiler
from nvlm_runtime.engine import runner
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.sampling import GenerationParams

FILE = Path(__file__).with_suffix(".json")
RECEIPT = Path(__file__).parents[1] / "examples" / "receipt.png"
NUM_LARGEST = 8
# How far a logit may be from the reference on another kind of CPU, where sums run in another order. At a64516f on a
# Xeon, AVX-512 and AMX against PyTorch and oneDNN held to AVX2 and to SSE: at most 5.6e-5 in float32, 0.30 with int8
# activations (one that is rounded the other way moves all that follows), 0.63 in bfloat16 (logits up to 33, whose
# spacing is 0.25 there). Allowed is about ten times the first and three times the others.
TOLERANCE = {"float32": 5e-4, "int8": 0.9, "bfloat16": 2.0}


@dataclass(frozen=True)
class Request:
    """A prompt, its images ("receipt" or "drawn") and how it is answered (fields of `GenerationParams`)."""

    prompt: str
    images: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Requests to a model loaded with `options`: one is answered alone, several together in one batch."""

    model: str
    options: Mapping[str, Any]
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Record:
    """token_ids: the answer, n tokens. prompt: fp32 [T, V]. steps: fp32 [n - 1, V], the logits of all but the last."""

    token_ids: tuple[int, ...]
    prompt: Tensor
    steps: Tensor

    @property
    def digest(self) -> str:
        """sha256 of the token ids and of all logits."""
        found = hashlib.sha256(json.dumps(self.token_ids).encode())
        for logits in (self.prompt, self.steps):
            found.update(logits.contiguous().numpy().tobytes())
        return found.hexdigest()

    @property
    def places(self) -> Tensor:
        """Logits of four positions of the prompt, its last among them, and of every step."""
        some = torch.linspace(0, len(self.prompt) - 1, 4).long()
        return torch.cat([self.prompt[some], self.steps])


TOTAL = Request("What is the total?", ("receipt",))
DRAWN = Request("Read tile 1.", ("drawn",))
TEXT = Request("What is the capital of France?")
BOTH = Request("<image>Which of the two has a date? <image>", ("receipt", "drawn"))
REPEATS = Request("one two three four. one two three four. one two", ("drawn",))
SAMPLED = Request("What is the date?", ("receipt",), {"temperature": 0.7, "top_k": 20, "top_p": 0.95})
EAGER, NATIVE, GRAPHS = {"native": False}, {"native": True}, {"native": False, "graphs": True}
INT8 = {"quantize": {"decoder": "int8", "vision": "int8_dynamic"}}
CASES = {
    "micro-d-eager": Case("micro-d", EAGER, (TOTAL,)),
    "micro-d-native-batch": Case("micro-d", NATIVE, (TOTAL, TEXT, DRAWN)),
    "micro-d-native-speculation": Case("micro-d", NATIVE | {"speculate": 4}, (REPEATS,)),
    "micro-x-native": Case("micro-x", NATIVE, (BOTH,)),
    "micro-x-eager-batch": Case("micro-x", EAGER, (DRAWN, TEXT, TOTAL)),
    "micro-x-eager-speculation": Case("micro-x", EAGER | {"speculate": 3}, (REPEATS,)),
    "micro-x-graphs": Case("micro-x", GRAPHS, (TOTAL,)),
    "micro-h-native-batch": Case("micro-h", NATIVE, (BOTH, SAMPLED)),
    "micro-h-native-int8": Case("micro-h", NATIVE | INT8, (TOTAL,)),
    "micro-h-deterministic-batch": Case("micro-h", EAGER | {"deterministic": True}, (DRAWN, TOTAL)),
    "micro-h-graphs": Case("micro-h", GRAPHS, (TEXT,)),
    "smol-x-native": Case("smol-x", NATIVE, (TOTAL,)),
    "smol-x-native-float32": Case("smol-x", NATIVE | {"dtype": torch.float32}, (DRAWN,)),
    "smol-x-eager": Case("smol-x", EAGER, (TEXT,)),
}
NUM_TOKENS = 10


def names(case: str) -> list[str]:
    """The requests of a case as digests.json names them."""
    return [f"{case}/{number}" for number in range(len(CASES[case].requests))]


def open_image(name: str) -> Image.Image:
    """The receipt, or 13 x 20 coloured squares of 10 x 10 pixels."""
    if name == "receipt":
        return Image.open(RECEIPT).convert("RGB")
    squares = np.random.default_rng(20).integers(0, 256, (20, 13, 3), dtype=np.uint8)
    return Image.fromarray(squares.repeat(10, 0).repeat(10, 1))


def run(case: Case, cache_folder: str | Path) -> list[Record]:
    """One record a request. cache_folder: where the native library is built and smol-x is put together."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = NVLM.load(case.model, cache_folder=cache_folder, **case.options)
        images = [[open_image(name) for name in request.images] for request in case.requests]
        prepared = [model.prepare(request.prompt, given) for request, given in zip(case.requests, images)]
        wanted = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True}
        params = [GenerationParams(**wanted, **request.params, seed=seed) for seed, request in enumerate(case.requests)]
        with recorded() as steps:
            answers = [output.token_ids for output in model.generate(prepared, params=params)]
        records = []
        for seed, (request, token_ids) in enumerate(zip(prepared, answers, strict=True)):
            first = len(request.input_ids)
            found = torch.stack([steps[seed, position] for position in range(first, first + len(token_ids) - 1)])
            prompt = model.logits(input_ids=request.input_ids, images=images[seed]).float()
            records.append(Record(tuple(token_ids), prompt, found))
        return records
    finally:
        torch.set_num_threads(threads)


@contextmanager
def recorded() -> Iterator[dict[tuple[int, int], Tensor]]:
    """Logits fp32 [V] by the seed of a request and the position of the token that is drawn from them.

    A draft that was wrong is replaced by the step that follows it. An inactive batch slot has a position behind the
    last one that is looked up here.
    """
    found: dict[tuple[int, int], Tensor] = {}
    original = runner.draw_over_ranks

    def draw(logits, sampling, positions, *rest):
        for seed, position, row in zip(sampling.seed.tolist(), positions.tolist(), logits.float().clone(), strict=True):
            found[seed, position] = row
        return original(logits, sampling, positions, *rest)

    with mock.patch.object(runner, "draw_over_ranks", draw):
        yield found


def fingerprint() -> str:
    """What a CPU's bits depend on: PyTorch, vector code, the CPU, its caches (block sizes) and the C++ compiler."""
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    kind = [cpu.get(key, "unknown") for key in ("vendor_id", "cpu family", "model")] or [platform.machine()]
    amx = "AMX" if "amx_tile" in cpu.get("flags", "").split() else "no AMX"
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    compiler = find_compiler()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout if compiler else "none"
    built = version.splitlines()[0]
    found = [
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        amx,
        *kind,
        *(path.read_text().strip() for path in caches),
        built,
    ]
    return " | ".join(found)


def reference_of(record: Record) -> dict[str, Any]:
    """What digests.json keeps of a record for unknown CPU kinds: ids and values of the largest logits."""
    values, ids = record.places.topk(NUM_LARGEST)
    rounded = [[float(str(value)) for value in row] for row in values.numpy()]
    return {"token_ids": list(record.token_ids), "ids": ids.tolist(), "values": rounded}


def distance(record: Record, reference: Mapping[str, Any], tolerance: float) -> float:
    """The largest difference of a logit from the reference's, as far as the two answers are the same.

    Infinite where they part at a token that the reference's logits decide by more than two tolerances.
    """
    ids, values = torch.tensor(reference["ids"]), torch.tensor(reference["values"])
    if record.places.shape[0] != len(ids):
        return float("inf")
    same = [a == b for a, b in zip(record.token_ids, reference["token_ids"], strict=True)]
    end = same.index(False) if False in same else len(same)
    num_prompt = len(ids) - (len(same) - 1)
    if end < len(same) - 1:
        row = num_prompt + end
        at = (ids[row] == record.token_ids[end]).nonzero()
        if not len(at) or values[row, 0] - values[row, at[0, 0]] > 2 * tolerance:
            return float("inf")
    rows = slice(0, num_prompt + min(end + 1, len(same) - 1))  # logits that both computed of the same tokens
    return (record.places[rows].gather(1, ids[rows]) - values[rows]).abs().max().item()


def tolerance_of(case: Case) -> float:
    dtype = case.options.get("dtype", torch.bfloat16 if case.model == "smol-x" else torch.float32)
    return TOLERANCE["int8" if "quantize" in case.options else str(dtype).removeprefix("torch.")]


def read() -> dict[str, Any]:
    """digests.json."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {"origin": {}, "reference": {}, "digests": {}}


def write(values: Mapping[str, Any]) -> None:
    """digests.json, a line a request."""

    def lines(table: Mapping[str, Any]) -> str:
        return ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in table.items())

    digests = ",\n".join(f"{json.dumps(kind)}: {{\n{lines(found)}\n}}" for kind, found in values["digests"].items())
    origin = json.dumps(values["origin"], indent=1)
    parts = {"origin": origin, "reference": f"{{\n{lines(values['reference'])}\n}}", "digests": f"{{\n{digests}\n}}"}
    FILE.write_text("{\n" + ",\n".join(f'"{name}": {text}' for name, text in parts.items()) + "\n}\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.digests", description=__doc__.splitlines()[0])
    parser.add_argument("--write", nargs="*", metavar="CASE", help="replace what is stored of these cases, or of all")
    args = parser.parse_args(argv)
    values, kind, wrong = read(), fingerprint(), 0
    known = values["digests"].setdefault(kind, {})
    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as folder:
        for name in (args.write or CASES) if args.write is not None else CASES:
            for key, record in zip(names(name), run(CASES[name], folder), strict=True):
                old = values["reference"].get(key)
                away = float("inf") if old is None else distance(record, old, tolerance_of(CASES[name]))
                same = known.get(key) == record.digest
                wrong += not same
                print(f"{key:32} {'same bits' if same else 'OTHER BITS'}, {away:.2e} from the reference", flush=True)
                if args.write is not None:
                    if away > tolerance_of(CASES[name]):
                        for other in values["digests"].values():
                            other.pop(key, None)
                    values["reference"][key], known[key] = reference_of(record), record.digest
    if args.write is not None:
        write(values)
        return 0
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
