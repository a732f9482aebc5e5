"""Requests from many threads and tasks on one batch: each answer is the lone fresh one, and nothing hangs or leaks."""

import asyncio
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.request import Output, PreparedPrompt
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.engine.serving import Answer, Engine, EngineStopped, QueueFull
from tests.engine.test_batch import LARGE, SMALL, VARIANTS, fresh
from tests.model.test_model import picture

GUARD = 60  # seconds after which a test is taken to hang
BROKEN = picture((32, 96), 5)  # 3 tiles and a thumbnail, which no other picture here has
IMAGES = (LARGE, SMALL, picture((64, 64), 2))
WORDS = ("red", "total", "what", "hello there", "tile 3", "a", "receipt?", "12.50")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "nvlm-engine"]


class Gate:
    """Holds the engine's thread before each call of a stage until `let` has allowed it, or `free` all of them."""

    def __init__(self, model: NVLM, stage: str, monkeypatch):
        self.permits, self.is_free, self.calls = threading.Semaphore(0), False, 0
        original = getattr(model.runner, stage)

        def held(*args):
            self.calls += 1
            if not self.is_free:
                assert self.permits.acquire(timeout=GUARD)
            return original(*args)

        monkeypatch.setattr(model.runner, stage, held)

    def let(self, count: int) -> None:
        """Returns when so many calls more were made and the next one waits."""
        target = self.calls + count + (not self.calls)
        self.permits.release(count)
        until(lambda: self.calls == target)

    def free(self) -> None:
        self.is_free = True
        self.permits.release()


def until(condition) -> None:
    end = time.monotonic() + GUARD
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def long(count: int = 40) -> GenerationParams:
    return GenerationParams(max_new_tokens=count, ignore_eos=True)


def alone(variant: str, prompt: str, images=(), count: int = 40, **options) -> Output:
    return fresh(variant, **options).generate(prompt, images, max_new_tokens=count, ignore_eos=True)


def double(variant: str, **options) -> NVLM:
    """In fp64, where no rounding that depends on the neighbours can choose another token."""
    small = fresh(variant, **options)
    return NVLM(small.model.double(), small.tokenizer, **options)


def drawn_requests(seed: int, count: int) -> list[tuple[str, list, GenerationParams, int | None]]:
    """(prompt, images, params, pieces after which it is cancelled). Every sixth has the broken image."""
    rng = random.Random(seed)
    found = []
    for number in range(count):
        images = [BROKEN] if number % 6 == 5 else rng.choices(IMAGES, k=rng.choice((0, 0, 1, 1, 2)))
        params = GenerationParams(
            max_new_tokens=rng.randint(1, 30),
            ignore_eos=True,
            temperature=rng.choice((0.0, 0.9)),
            top_k=rng.choice((0, 20)),
            seed=number,
        )
        cancelled = rng.choice((0, 1, 3)) if rng.random() < 0.3 else None
        found.append((" ".join(rng.choices(WORDS, k=rng.randint(1, 12))), images, params, cancelled))
    return found


def consume(engine: Engine, request) -> tuple[Answer, str]:
    """In a client's thread: the answer and its pieces, up to where the request is to be cancelled."""
    prompt, images, params, cancelled = request
    answer, text = engine.submit(engine.prepare(prompt, images), params=params), ""
    if cancelled == 0:
        answer.cancel()
    for number, piece in enumerate(answer, 1):
        text += piece
        if number == cancelled:
            break
    return answer, text


def break_encode(model: NVLM, monkeypatch) -> None:
    encode = model.runner.encode

    def broken(pixel_values):
        if len(pixel_values) == 4:
            raise ZeroDivisionError("this picture cannot be encoded")
        return encode(pixel_values)

    monkeypatch.setattr(model.runner, "encode", broken)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["deterministic", "fp64, reuse"])
def test_answers_are_those_of_single_fresh_runs(variant, mode, monkeypatch):
    """Six clients, 24 requests, 3 rows: random sizes, cancelled at random, every sixth with an image that fails."""

    def make():
        return fresh(variant, deterministic=True) if mode == "deterministic" else double(variant, chunk=16)

    requests = drawn_requests(VARIANTS.index(variant), 24)
    model = make()
    break_encode(model, monkeypatch)
    with Engine(model, max_batch_size=3, max_model_len=300) as engine, ThreadPoolExecutor(6) as clients:
        futures = [clients.submit(consume, engine, request) for request in requests]
        ends = [future.exception(GUARD) or future.result() for future in futures]
    for (prompt, images, params, cancelled), end in zip(requests, ends, strict=True):
        if BROKEN in images:
            assert isinstance(end, ZeroDivisionError) or cancelled == 0 and not end[0].output.token_ids
            continue
        lone = make()
        want = lone.stream(lone.prepare(prompt, images), params=params)
        whole = "".join(want)
        answer, text = end
        out = answer.result(GUARD)
        assert out.token_ids == want.output.token_ids[: len(out.token_ids)]
        assert out.finish_reason in ("length", "cancelled") and whole.startswith(text)
        if cancelled is None:
            assert out.token_ids == want.output.token_ids and out.text == text == whole
            assert out.finish_reason == "length"


@pytest.mark.parametrize("variant", VARIANTS)
def test_deterministic_logits_have_the_bits_of_the_single_run(variant, monkeypatch):
    requests = [("What is it?", [LARGE]), ("Hello, what can you do for me today?", []), ("And <image>?", [SMALL])]

    def watch(model):
        seen: dict[int, list] = {}
        original = model.runner.backend.logits

        def keep(slots, *rest):
            logits = original(slots, *rest)
            for seed, row, active in zip(slots.sampling.seed.tolist(), logits, slots.active.tolist()):
                if active:
                    seen.setdefault(seed, []).append(row.clone())
            return logits

        monkeypatch.setattr(model.runner.backend, "logits", keep)
        return seen

    model = fresh(variant, deterministic=True)
    together = watch(model)
    with Engine(model, max_batch_size=3, max_model_len=200) as engine:
        for seed, request in enumerate(requests):
            engine.submit(
                engine.prepare(*request), params=GenerationParams(max_new_tokens=9, ignore_eos=True, seed=seed)
            )
    for seed, request in enumerate(requests):
        model = fresh(variant, deterministic=True)
        single = watch(model)
        model.generate(*request, max_new_tokens=9, ignore_eos=True, seed=seed)
        assert len(single[seed]) == len(together[seed]) == 8
        assert all(torch.equal(a, b) for a, b in zip(together[seed], single[seed], strict=True))


def test_a_full_line_is_refused_and_empties(monkeypatch):
    model = fresh("x")
    gate = Gate(model, "step", monkeypatch)
    with Engine(model, max_batch_size=1, max_model_len=200, max_queue=2) as engine:
        prepared = engine.prepare("Hello?")
        answers = [engine.submit(prepared, params=long(3)) for _ in range(3)]
        with pytest.raises(QueueFull, match="^2 requests wait already, and no more may"):
            engine.submit(prepared, params=long(3))
        answers[1].cancel()
        gate.free()
        reasons = [answer.result(GUARD).finish_reason for answer in answers]
        assert reasons == ["length", "cancelled", "length"]
        again = [engine.submit(prepared, params=long(3)) for _ in range(3)]
        assert [answer.result(GUARD).token_ids for answer in again] == [answers[0].output.token_ids] * 3


def test_requests_start_in_the_order_they_came(monkeypatch):
    model = fresh("x")
    gate = Gate(model, "prefill", monkeypatch)
    started = []
    take = model.runner.draw_first
    monkeypatch.setattr(
        model.runner, "draw_first", lambda *args: started.append(int(args[0].sampling.seed[0])) or take(*args)
    )
    with Engine(model, max_batch_size=1, max_model_len=200) as engine:
        prepared = engine.prepare("Hello?")
        answers = [
            engine.submit(prepared, params=GenerationParams(max_new_tokens=5, ignore_eos=True, seed=i))
            for i in range(5)
        ]
        gate.free()
        outs = [answer.result(GUARD) for answer in answers]
    assert started == list(range(5))
    queues = [out.timings["queue"] for out in outs]
    assert queues == sorted(queues) and queues[1] >= outs[0].timings["decode"] > 0
    assert all(out.timings["total"] >= out.timings["queue"] + out.timings["decode"] for out in outs)


def test_rows_decode_while_a_prompt_is_read(monkeypatch):
    model = fresh("h", chunk=2)
    gate, events = Gate(model, "step", monkeypatch), []
    for stage in ("prefill", "step"):
        original = getattr(model.runner, stage)
        monkeypatch.setattr(
            model.runner, stage, lambda *args, s=stage, f=original: (events.append((s, args[1])), f(*args))[1]
        )
    with Engine(model, max_batch_size=2, max_model_len=300) as engine:
        first = engine.submit(engine.prepare("Hello?"), params=long(60))
        gate.let(1)
        second = engine.submit(engine.prepare("What is it, in all of these many words?", [LARGE]), params=long(3))
        gate.free()
        assert (
            second.result(GUARD).token_ids
            == alone("h", "What is it, in all of these many words?", [LARGE], 3).token_ids
        )
        assert first.result(GUARD).token_ids == alone("h", "Hello?", count=60).token_ids
    reads = [i for i, (stage, row) in enumerate(events) if stage == "prefill" and row == 1]
    assert len(reads) > 10 and all("step" in [s for s, _ in events[a:b]] for a, b in zip(reads, reads[1:]))


def test_what_can_never_fit_is_refused_at_once():
    model = fresh("x")
    with Engine(model, max_batch_size=1, max_model_len=100, max_image_tokens=28) as engine:
        with pytest.raises(
            ValueError, match=r"needs \d+ tokens \(\d+ of them its prompt\) .* the engine has 100 and 28"
        ):
            engine.submit(engine.prepare("Hello?"), params=long(200))
        with pytest.raises(ValueError, match=r"and 32 image keys, the engine has 100 and 28 per request"):
            engine.submit(engine.prepare("<image><image>", [LARGE, SMALL]), params=long(2))
        with pytest.raises(ValueError, match="submit takes one prompt, got a list of 2"):
            engine.submit(["Hello?", "What?"])
        with pytest.raises(ValueError, match="max_new_tokens must be"):
            engine.generate("Hello?", max_new_tokens=0)
        with pytest.raises(ValueError, match="max_new_tokens must be"):
            engine.astream("Hello?", max_new_tokens=0)
        with pytest.raises(ValueError, match="the prompt is empty"):
            engine.generate(" ")
        assert engine.generate("Hello?", max_new_tokens=3).token_ids


@pytest.mark.parametrize(
    "sizes",
    [{"max_batch_size": 0}, {"max_model_len": 2.5}, {"max_image_tokens": -1}, {"max_queue": True}],
    ids=lambda sizes: next(iter(sizes)),
)
def test_wrong_sizes(sizes):
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} must be a whole number of at least"):
        Engine(fresh("x"), **sizes)


def test_memory_is_refused_before_a_thread_starts():
    with pytest.raises(ValueError, match=r"a batch of \d+ needs [0-9,]+ bytes"):
        Engine(fresh("x"), max_batch_size=10**9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_default_sizes_hold_the_largest_picture(variant):
    model = fresh(variant)
    with Engine(model) as engine:
        assert engine.max_model_len == model.config.text.context == 512
        assert engine.max_image_tokens == (256 if variant != "d" else 0)
        for size in ((192, 32), (96, 64), (32, 32)):
            assert engine.generate("What is it?", [picture(size)], max_new_tokens=2).token_ids


def test_the_end_of_the_context_ends_the_answer():
    model = fresh("d")
    with Engine(model) as engine:
        out = engine.generate("Hello?", max_new_tokens=10_000, ignore_eos=True)
    assert out.finish_reason == "length" and out.num_prompt_tokens + len(out.token_ids) == 513


def test_close_waits_for_every_answer(monkeypatch):
    model = fresh("x")
    gate = Gate(model, "step", monkeypatch)
    engine = Engine(model, max_batch_size=2, max_model_len=200)
    answers = [engine.submit(engine.prepare("Hello?"), params=long(5)) for _ in range(5)]
    closing = threading.Thread(target=engine.close)
    closing.start()
    gate.free()
    closing.join(GUARD)
    assert not closing.is_alive()
    assert [answer.result(0).token_ids for answer in answers] == [alone("x", "Hello?", count=5).token_ids] * 5
    with pytest.raises(EngineStopped, match="^the engine is closed$"):
        engine.submit(engine.prepare("Hello?"), params=long(3))
    engine.close()
    engine.close(drain=False)


@pytest.mark.parametrize("drains", [[False], [True, False], [False, True]], ids=str)
def test_close_without_waiting_ends_every_request(drains, monkeypatch):
    """Whatever another thread's close waits for."""
    model = fresh("x")
    gate = Gate(model, "step", monkeypatch)
    engine = Engine(model, max_batch_size=2, max_model_len=300)
    answers = [engine.submit(engine.prepare("Hello?"), params=long(200)) for _ in range(5)]
    gate.let(4)
    threads = [threading.Thread(target=engine.close, args=(drain,)) for drain in drains]
    for number, thread in enumerate(threads, 1):
        thread.start()
        until(lambda: engine._inbox.qsize() == number)  # noqa: B023
    gate.free()
    for thread in threads:
        thread.join(GUARD)
        assert not thread.is_alive()
    for answer in answers:
        with pytest.raises(EngineStopped, match="closed before the answer was complete"):
            answer.result(0)
        with pytest.raises(EngineStopped):
            list(answer)
        assert answer.output.finish_reason is None


def test_leaving_the_block_by_an_error_does_not_wait(monkeypatch):
    model = fresh("x")
    gate = Gate(model, "step", monkeypatch)
    with pytest.raises(KeyError), Engine(model, max_batch_size=1, max_model_len=300) as engine:
        answer = engine.submit(engine.prepare("Hello?"), params=long(200))
        gate.let(3)
        engine._inbox.put("now")  # what leaving does first; here before the thread may go on
        gate.free()
        raise KeyError
    with pytest.raises(EngineStopped):
        answer.result(0)
    assert 0 < len(answer.output.token_ids) < 200


@pytest.mark.parametrize("when", ["queued", "prefill", "decode"])
def test_cancel_frees_the_row(when, monkeypatch):
    """The one row is held in the stage, cancelled there, and answers the next request; what was read stays good."""
    model = fresh("x", chunk=4)
    gate = Gate(model, "prefill" if when == "prefill" else "step", monkeypatch)
    with Engine(model, max_batch_size=1, max_model_len=300) as engine:
        first = engine.submit(engine.prepare("What is it?", [LARGE]), params=long(200))
        second = engine.submit(engine.prepare("What is it?", [LARGE]), params=long(6))
        gate.let(3)
        cancelled, other = (second, first) if when == "queued" else (first, second)
        cancelled.cancel()
        if when == "queued":
            third = engine.submit(engine.prepare("What is it?", [LARGE]), params=long(6))
        gate.free()
        out = cancelled.result(GUARD)
        assert out.finish_reason == "cancelled" and out.text == "".join(cancelled)
        # the prompt's token, three steps, and the one that is held
        assert len(out.token_ids) == {"queued": 0, "prefill": 0, "decode": 5}[when]
        last = third if when == "queued" else other
        assert last.result(GUARD).token_ids == alone("x", "What is it?", [LARGE], 6).token_ids
        cancelled.cancel()
        assert cancelled.result(GUARD) == out  # and was not taken up again


def test_a_loop_left_early_frees_its_row_and_a_second_one_begins_anew(monkeypatch):
    model = fresh("x")
    gate = Gate(model, "step", monkeypatch)
    with Engine(model, max_batch_size=1, max_model_len=300) as engine:
        answer = engine.submit(engine.prepare("What is it?", [LARGE]), params=long(200))
        gate.let(5)
        pieces = iter(answer)
        piece = next(pieces)
        pieces.close()
        gate.free()
        out = answer.result(GUARD)
        assert out.finish_reason == "cancelled" and len(out.token_ids) <= 7
        assert out.text.startswith(piece) and "".join(answer) == "".join(answer) == out.text


def test_result_gives_up_waiting_and_the_answer_goes_on(monkeypatch):
    model = fresh("x")
    gate = Gate(model, "step", monkeypatch)
    with Engine(model, max_batch_size=1, max_model_len=300) as engine:
        answer = engine.submit(engine.prepare("Hello?"), params=long(5))
        with pytest.raises(TimeoutError, match="not complete after 0.01 s"):
            answer.result(0.01)
        gate.free()
        assert answer.result(GUARD).token_ids == alone("x", "Hello?", count=5).token_ids


def test_an_interrupted_consumer_leaves_the_engine_usable(monkeypatch):
    model = fresh("x")
    handled, step, calls = threading.Event(), model.runner.step, []

    def interrupt(*args):
        calls.append(args)
        if len(calls) == 3:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            assert handled.wait(GUARD)
        return step(*args)

    monkeypatch.setattr(model.runner, "step", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's shell ignores it
    try:
        with Engine(model, max_batch_size=1, max_model_len=300) as engine:
            with pytest.raises(KeyboardInterrupt):
                engine.generate("What is it?", [LARGE], max_new_tokens=200, ignore_eos=True)
            handled.set()
            text = engine.generate("Hello?", max_new_tokens=5, ignore_eos=True).text
            assert text == alone("x", "Hello?", count=5).text
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) < 20


@pytest.mark.parametrize("stage", ["step", "draw_first"])
def test_a_crash_ends_every_request_and_the_engine(stage, monkeypatch):
    """`draw_first` fails inside one row's prompt, which is its own affair; a step is everybody's."""
    model = fresh("x")
    gate = Gate(model, stage, monkeypatch)
    original, calls = getattr(model.runner, stage), []

    def fail(*args):
        calls.append(args)
        if len(calls) == 3:
            if stage == "step":
                answers.append(engine.submit(prepared, params=long(20)))  # not read by the thread any more
            raise MemoryError("no page is left")
        return original(*args)

    monkeypatch.setattr(model.runner, stage, fail)
    engine = Engine(model, max_batch_size=2, max_model_len=200)
    prepared = engine.prepare("Hello?")
    answers = [engine.submit(prepared, params=long(20)) for _ in range(5)]
    streamed = engine.astream("Hello?", max_new_tokens=20, ignore_eos=True)
    gate.free()
    if stage == "draw_first":
        ends = [failure(answer.result) for answer in answers]
        assert [type(end) for end in ends].count(MemoryError) == 1 and ends.count(None) == 4
        engine.close()
        return
    for answer in answers:
        for read in (lambda: answer.result(GUARD), lambda: list(answer)):  # noqa: B023
            end = failure(read)
            assert isinstance(end, EngineStopped) and isinstance(end.__cause__, MemoryError)
            assert str(end) == "the engine failed: MemoryError: no page is left"
    with pytest.raises(EngineStopped, match="MemoryError: no page is left"):
        engine.submit(engine.prepare("Hello?"), params=long(3))
    with pytest.raises(EngineStopped, match="MemoryError: no page is left"):
        asyncio.run(collect(streamed))
    engine.close()
    with Engine(fresh("x"), max_batch_size=1, max_model_len=200) as other:
        assert other.generate("Hello?", max_new_tokens=3).token_ids


def failure(call) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


async def collect(pieces) -> str:
    return "".join([piece async for piece in pieces])


@pytest.mark.parametrize("variant", VARIANTS)
def test_many_tasks_stream_at_once(variant):
    asked = [(f"What is {word}?", [LARGE] if n % 2 else []) for n, word in enumerate(WORDS)]
    model = fresh(variant, deterministic=True)

    async def run(engine):
        return await asyncio.gather(
            *(collect(engine.astream(*each, max_new_tokens=12, ignore_eos=True)) for each in asked)
        )

    with Engine(model, max_batch_size=3, max_model_len=200) as engine:
        texts = asyncio.run(run(engine))
    assert texts == [alone(variant, *each, count=12, deterministic=True).text for each in asked]


@pytest.mark.parametrize("how", ["abandoned", "cancelled", "loop closed"])
def test_a_task_that_goes_away_frees_its_row(how, monkeypatch):
    model = fresh("x")
    gate, rows = Gate(model, "step", monkeypatch), []
    make = model.request
    monkeypatch.setattr(model, "request", lambda *args: rows.append(make(*args)) or rows[-1])

    async def leave(engine):
        stream = engine.astream("What is it?", [LARGE], max_new_tokens=200, ignore_eos=True)
        async for _ in stream:
            if how == "cancelled":
                await asyncio.Event().wait()
            break
        return stream if how == "loop closed" else None

    async def both(engine):
        task = asyncio.create_task(leave(engine))
        if how == "cancelled":
            await asyncio.to_thread(gate.let, 5)
            task.cancel()
        await asyncio.wait([task])
        del task
        for _ in range(10):  # the loop closes the forgotten stream when it has a moment; then a step takes notice
            await asyncio.sleep(0.05)
            gate.permits.release()
        gate.free()
        return await collect(engine.astream("Hello?", max_new_tokens=5, ignore_eos=True))

    with Engine(model, max_batch_size=1, max_model_len=300) as engine:
        if how != "cancelled":
            gate.permits.release(5)
        if how == "loop closed":
            loop = asyncio.new_event_loop()
            stream = loop.run_until_complete(leave(engine))
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
            gate.free()
            text = engine.submit(engine.prepare("Hello?"), params=long(5)).result(GUARD).text
            del stream
        else:
            text = asyncio.run(both(engine))
        assert text == alone("x", "Hello?", count=5).text
    assert rows[0].finish_reason == "cancelled" and len(rows[0].token_ids) < 20


def test_a_cancelled_loop_over_an_answer(monkeypatch):
    """`async for` over what submit returned, cancelled while it waits."""
    model = fresh("x")
    gate = Gate(model, "step", monkeypatch)

    async def run(engine):
        answer = engine.submit(engine.prepare("Hello?"), params=long(200))
        task = asyncio.create_task(collect(answer))
        await asyncio.to_thread(gate.let, 3)
        task.cancel()
        done, _ = await asyncio.wait([task])
        gate.free()
        assert done.pop().cancelled()
        return await asyncio.to_thread(answer.result, GUARD)

    with Engine(model, max_batch_size=1, max_model_len=300) as engine:
        out = asyncio.run(run(engine))
    assert out.finish_reason == "cancelled" and len(out.token_ids) == 5


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_answers_beside_its_engine(variant):
    """Two batches of one row, stepping in two threads: nothing of a step is shared between them."""
    model = fresh(variant)
    want = [alone(variant, "What is it?", [image], 100).token_ids for image in (LARGE, SMALL)]
    with Engine(model, max_batch_size=1, max_model_len=300) as engine:
        for _ in range(6):
            answer = engine.submit(engine.prepare("What is it?", [LARGE]), params=long(100))
            beside = model.generate("What is it?", [SMALL], max_new_tokens=100, ignore_eos=True)
            assert [answer.result(GUARD).token_ids, beside.token_ids] == want


def test_tiles_are_cut_before_a_request_stands_in_line():
    with Engine(fresh("x"), max_batch_size=1, max_model_len=200) as engine:
        out = engine.generate("What is it?", [LARGE], max_new_tokens=2)
        prepared = engine.prepare("What is it?", [SMALL])
    assert isinstance(prepared, PreparedPrompt) and prepared.timings["open"] > 0
    assert list(out.timings) == ["queue", "open", "tile", "encode", "project", "prefill", "decode", "total"]


def test_an_interpreter_may_end_with_an_open_engine():
    """Its end under a step may be an abort: the thread is gone before."""
    code = """if True:
        import atexit
        from nvlm_runtime.engine.sampling import GenerationParams
        from nvlm_runtime.engine.serving import Engine
        from tests.small import small_engine
        atexit.register(lambda: print(engine._thread.is_alive()))
        engine = Engine(small_engine("x"))
        engine.submit(engine.prepare("Hello?"), params=GenerationParams(max_new_tokens=400, ignore_eos=True))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=10 * GUARD)
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")
