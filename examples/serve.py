"""Many replicas of a model behind Ray Serve, each a process or a tensor-parallel group of processes.

    pip install 'nvlm-runtime[serve]'
    NVLM_MODEL=micro-h NVLM_TP=3 serve run examples.serve:app
    curl -s localhost:8000 -d @request.json    # {"prompt": "What is the total?", "images": ["iVBORw0KGgo..."]}

A request is a JSON object: prompt, images (base64 of PNG, JPEG, ...), and what `NVLM.generate` takes to sample; its
answer has text, finish_reason and seconds. Bad input is answered with status 400 and a sentence, a full line with 503.
With NVLM_TP=1 a replica is one process with an `Engine`, whose rows join and leave a running batch; with more it is a
`Group` of ranks, actors that Ray keeps on one machine, which answer one request at a time. Replicas come and go with
the load, from NVLM_MIN to NVLM_MAX; one that dies, or has lost a rank, is replaced, and the others answer meanwhile.
"""

import asyncio
import base64
import io
import os
import socket
from datetime import timedelta
from typing import Any

import ray
from PIL import Image
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from nvlm_runtime import NVLM, Engine, Output, QueueFull
from nvlm_runtime.parallel.group import Group
from nvlm_runtime.parallel.ranks import TIMEOUT

HEALTH_S = 5.0  # between two looks at a replica, and how long its ranks may take to answer
LOADING_S = 3600.0


def values(output: Output) -> dict[str, Any]:
    return {"text": output.text, "finish_reason": output.finish_reason, "seconds": output.timings["total"]}


@ray.remote(concurrency_groups={"health": 1})
class Rank:
    """One process of a replica's group."""

    def __init__(self, rank: int, size: int, port: int, model: str, device: str):
        import torch.distributed as dist

        backend = "nccl" if device.startswith("cuda") else "gloo"
        timeout = timedelta(seconds=LOADING_S)
        dist.init_process_group(backend, f"tcp://localhost:{port}", rank=rank, world_size=size, timeout=timeout)
        group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
        self.model = NVLM.load(model, device=device, group=Group(rank, size, group))
        dist.barrier()  # ranks load at their own pace, but answer at one

    def answer(self, prompt: str, pictures: list[bytes], options: dict[str, Any]) -> dict[str, Any]:
        return values(self.model.generate(prompt, open_all(pictures), **options))

    @ray.method(concurrency_group="health")  # also while it answers
    def process(self) -> int:
        return os.getpid()


def open_all(pictures: list[bytes]) -> list[Image.Image]:
    """ValueError for one that is no picture."""
    opened = []
    for number, data in enumerate(pictures, 1):
        try:
            opened.append(Image.open(io.BytesIO(data)))
        except OSError as error:
            raise ValueError(f"image {number} is not one that Pillow reads") from error
    return opened


def read_request(given: Any) -> tuple[str, list[bytes], dict[str, Any]]:
    """Prompt, pictures as files, and the rest. ValueError for what is no request."""
    if not isinstance(given, dict) or not isinstance(given.get("prompt"), str):
        raise ValueError('expected a JSON object with a "prompt"')
    encoded = given.get("images", [])
    if not isinstance(encoded, list) or not all(isinstance(each, str) for each in encoded):
        raise ValueError('"images" must be a list of base64 strings')
    try:
        pictures = [base64.b64decode(each, validate=True) for each in encoded]
    except ValueError as error:
        raise ValueError(f'"images" must be base64: {error}') from error
    options = {name: value for name, value in given.items() if name not in ("prompt", "images")}
    if unknown := set(options) - set(OPTIONS):
        raise ValueError(f"unknown {', '.join(sorted(unknown))}: a request takes prompt, images, {', '.join(OPTIONS)}")
    return given["prompt"], pictures, options


OPTIONS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "ignore_eos"),
)


@serve.deployment(health_check_period_s=HEALTH_S, health_check_timeout_s=2 * HEALTH_S, max_ongoing_requests=64)
class Replica:
    """size: ranks of its group; 1 is an `Engine` in this process."""

    def __init__(self, model: str, size: int = 1, device: str = "cpu"):
        self.engine, self.ranks, self.turn = None, [], asyncio.Lock()
        self.lost: Exception | None = None
        if size == 1:
            self.engine = Engine(NVLM.load(model, device=device))
            return
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        on_gpu = device.startswith("cuda")
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        options = Rank.options(num_cpus=0 if on_gpu else 1, num_gpus=int(on_gpu), scheduling_strategy=here)
        self.ranks = [options.remote(rank, size, port, model, device) for rank in range(size)]
        ray.get([rank.process.remote() for rank in self.ranks])  # all have loaded

    async def answer(self, prompt: str, pictures: list[bytes], options: dict[str, Any]) -> dict[str, Any]:
        if self.engine is not None:
            return values(await asyncio.to_thread(self.engine.generate, prompt, open_all(pictures), **options))
        async with self.turn:  # ranks make the same calls in the same order
            calls = [rank.answer.remote(prompt, pictures, options) for rank in self.ranks]
            try:
                return (await asyncio.gather(*calls))[0]
            except ValueError as error:  # all ranks have refused it; ray puts a traceback before the words
                raise ValueError(str(getattr(error, "cause", error))) from error
            except Exception as error:
                self.lost = error
                raise

    async def __call__(self, request: Request) -> JSONResponse:
        try:
            return JSONResponse(await self.answer(*read_request(await request.json())))
        except QueueFull as error:
            return JSONResponse({"error": str(error)}, status_code=503)
        except ValueError as error:
            return JSONResponse({"error": str(error)}, status_code=400)

    def processes(self) -> list[int]:
        """This process and its ranks'."""
        return [os.getpid(), *ray.get([rank.process.remote() for rank in self.ranks])]

    async def check_health(self) -> None:
        """Raises where a rank is gone or an answer failed: the replica is then replaced, its ranks with it."""
        if self.lost is not None:
            raise RuntimeError("a rank was lost") from self.lost
        for rank in self.ranks:
            await asyncio.wait_for(rank.process.remote(), HEALTH_S)


def build(model: str, size: int, device: str, **options: Any) -> serve.Application:
    """options: as of a Serve deployment, autoscaling_config or num_replicas among them."""
    return Replica.options(**options).bind(model, size, device)


app = build(
    os.environ.get("NVLM_MODEL", "micro-d"),
    int(os.environ.get("NVLM_TP", "1")),
    os.environ.get("NVLM_DEVICE", "cpu"),
    autoscaling_config={
        "min_replicas": int(os.environ.get("NVLM_MIN", "1")),
        "max_replicas": int(os.environ.get("NVLM_MAX", "8")),
        "target_ongoing_requests": 4,
    },
)
