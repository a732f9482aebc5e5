"""Requests from any thread or task on one running batch: they wait in line, join it and leave it between steps.

One thread owns the batch and the line. Everybody else sends it messages and reads what an `Answer` has published, so
that nothing of the batch is shared and nobody's cancelling, failing or going away can harm another's answer.
"""

import asyncio
import atexit
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from numbers import Integral
from queue import Empty, SimpleQueue
from typing import Any, Literal

from nvlm_runtime.engine.batch import Batch
from nvlm_runtime.engine.generator import (
    Images,
    Message,
    OnePrompt,
    Question,
    TextGenerator,
    TextStream,
    one_question,
    read_params,
)
from nvlm_runtime.engine.nvlm import NVLM, ROUNDING
from nvlm_runtime.engine.request import Output, PreparedPrompt, Request
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.inputs.prompt import Style

Closing = Literal["drain", "now"]


class QueueFull(RuntimeError):
    """As many requests wait as may: try again when some have been answered."""


class EngineStopped(RuntimeError):
    """The engine was closed, or failed: then the failure is the cause."""

    def again(self) -> "EngineStopped":
        """The same for somebody else, who gets a traceback of his own."""
        other = EngineStopped(*self.args)
        other.__cause__ = self.__cause__
        return other


class Answer:
    """One request on its way through an `Engine`: pieces for a thread (`for`) or a task (`async for`), or the `result`.

    Every loop begins with the first piece; pieces that nobody has fetched yet come as one. A loop that is left early
    frees the row, as `cancel` does; an answer that nobody reads is computed to its end. Loops and `result` raise the
    request's own error, and EngineStopped where the engine ended first.
    """

    def __init__(self, request: Request, inbox: "SimpleQueue[Answer | Closing]"):
        self.request, self._inbox = request, inbox
        self._since = time.perf_counter()
        self._left = False
        self._changed = threading.Condition()  # of the next three
        self._shown = 0  # characters of the row's text that are certain
        self._ended = False
        self._wakers: list[Callable[[], Any]] = []

    def __iter__(self) -> Iterator[str]:
        sent = 0
        try:
            while (shown := self._wait(sent)) > sent:
                yield self.request.text[sent:shown]
                sent = shown
        finally:
            self.cancel()
        self._raise()

    async def __aiter__(self) -> AsyncIterator[str]:
        event, loop = asyncio.Event(), asyncio.get_running_loop()
        wake = partial(loop.call_soon_threadsafe, event.set)
        with self._changed:
            self._wakers.append(wake)
        sent = 0
        try:
            while True:
                event.clear()
                with self._changed:
                    shown, ended = self._shown, self._ended
                if shown > sent:
                    yield self.request.text[sent:shown]
                    sent = shown
                elif ended:
                    break
                else:
                    await event.wait()
        finally:
            with self._changed:
                self._wakers.remove(wake)
            self.cancel()
        self._raise()

    def result(self, timeout: float | None = None) -> Output:
        """The whole answer. Raises TimeoutError after `timeout` seconds; the answer goes on."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"the answer is not complete after {timeout} s")
        self._raise()
        return self.output

    def cancel(self) -> None:
        """Frees the row before the next step, or the place in the line; the text so far stays. Returns at once."""
        if not self._ended:
            self._left = True
            self._inbox.put(self)  # may be called while garbage is collected, in any thread: it takes no lock

    @property
    def output(self) -> Output:
        """The answer so far, final when a loop has ended."""
        return self.request.output

    def _wait(self, sent: int) -> int:
        """Characters that are certain, more than `sent` unless the answer has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._shown > sent or self._ended)
            return self._shown

    def _raise(self) -> None:
        if self.request.error is not None:
            raise self.request.error

    def _publish(self) -> None:
        """The engine's thread has changed the row."""
        with self._changed:
            self._shown, self._ended = self.request.num_shown, self.request.done
            self._changed.notify_all()
            for wake in self._wakers:
                try:
                    wake()
                except RuntimeError:  # its event loop is closed: nobody will read on
                    self.cancel()


class Engine(TextGenerator):
    """A model that answers many requests at once: `generate`, `stream`, `submit`; `close` ends its thread.

    max_batch_size: requests that decode together. max_model_len: of prompt and answer, a request.
    max_image_tokens: image keys a row, None for the largest picture's; nothing in NVLM-D. max_queue: requests that may
    wait behind the rows. warmup: compiles and captures all that its requests can need before it takes any; `warmed` has
    the seconds a phase then, and `NVLM.compiles_after_warmup` counts what is compiled all the same.

    Requests start first come, first served. Their timings' "queue" is the wait until a row began to read the prompt.
    A request's failure is its own; any other in the thread ends the engine and every request with EngineStopped.
    Raises ValueError for sizes below 1 (max_image_tokens, max_queue: 0) or caches that memory cannot hold.
    """

    def __init__(
        self,
        model: NVLM,
        *,
        max_batch_size: int = 8,
        max_model_len: int = 2048,
        max_image_tokens: int | None = None,
        max_queue: int = 64,
        warmup: bool = False,
    ):
        if model.model.group.size > 1:
            raise ValueError("an engine's order of requests is its process's own: it serves a model of one process")
        if max_image_tokens is None:
            max_image_tokens = -(-model.max_image_keys // ROUNDING) * ROUNDING
        _check_size("max_batch_size", max_batch_size, 1)
        _check_size("max_model_len", max_model_len, 1)
        _check_size("max_image_tokens", max_image_tokens, 0)
        _check_size("max_queue", max_queue, 0)
        self.model = model
        self.max_batch_size, self.max_queue = max_batch_size, max_queue
        self.max_model_len = min(max_model_len, model.config.text.context)
        self.max_image_tokens = max_image_tokens
        batch = model.batch(max_batch_size, self.max_model_len, max_image_tokens)
        self.warmed = model.warm(batch) if warmup else {}
        self._inbox: SimpleQueue[Answer | Closing] = SimpleQueue()
        self._room = threading.Semaphore(max_batch_size + max_queue)
        self._lock = threading.Lock()  # of `_stopped`: who sees None may still send a request
        self._stopped: EngineStopped | None = None
        line = _Line(batch, self._inbox, self._room)
        self._thread = threading.Thread(target=self._run, args=(line,), name="nvlm-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, drain=False)  # an interpreter must not go away under a step

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        self.close(drain=kind is None)

    def close(self, drain: bool = True) -> None:
        """Takes no more requests, and returns when the thread has ended: with every answer complete, or else at once,
        with EngineStopped for those that are not. May be called again, to stop waiting for answers too.
        """
        with self._lock:
            self._stopped = self._stopped or EngineStopped("the engine is closed")
        self._inbox.put("drain" if drain else "now")
        self._thread.join()
        atexit.unregister(self.close)

    def prepare(
        self,
        prompt: str | None = None,
        images: Images | None = None,
        *,
        messages: Sequence[Message] | None = None,
        input_ids: Sequence[int] | None = None,
        style: Style = "hf",
    ) -> PreparedPrompt:
        """Makes one prompt ready, as `NVLM.prepare`, and waits for its tiles, so that no batch waits for them.

        Args:
            prompt: As in `NVLM.prepare`, as are the arguments below.
            images: As in `NVLM.prepare`.
            messages: As in `NVLM.prepare`.
            input_ids: As in `NVLM.prepare`.
            style: As in `NVLM.prepare`.

        Returns:
            The prompt. The time of its tiles counts as "open".

        Raises:
            ValueError: As `NVLM.prepare`.
            FileNotFoundError: An image path does not exist.
        """
        prepared = self.model.prepare(prompt, images, messages=messages, input_ids=input_ids, style=style)
        began = time.perf_counter()
        for image in prepared.images:
            if image.handle is None:
                image.pixels()
        opened = prepared.timings["open"] + time.perf_counter() - began
        return replace(prepared, timings={**prepared.timings, "open": opened})

    def submit(
        self,
        prompt: OnePrompt | None = None,
        images: Images | None = None,
        *,
        messages: Sequence[Message] | None = None,
        input_ids: Sequence[int] | None = None,
        style: Style = "hf",
        params: GenerationParams | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Answer:
        """Queues one prompt and returns at once; a prompt that is not a `PreparedPrompt` is prepared first.

        Args:
            prompt: As in `generate`; one prompt, as are the arguments below.
            images: As in `generate`.
            messages: As in `generate`.
            input_ids: As in `generate`.
            style: As in `generate`.
            params: As in `generate`.
            max_new_tokens: As in `generate`.
            stop: As in `generate`.
            ignore_eos: As in `generate`.
            temperature: As in `generate`.
            top_k: As in `generate`.
            top_p: As in `generate`.
            min_p: As in `generate`.
            repetition_penalty: As in `generate`.
            seed: As in `generate`.

        Returns:
            The answer: its result, or its pieces.

        Raises:
            ValueError: An argument is invalid, or the request can never fit.
            QueueFull: `max_queue` requests wait already.
            EngineStopped: The engine is closed or has failed.
        """
        question = one_question("submit", prompt, images, messages, input_ids)
        (read,) = read_params(
            None,
            params,
            max_new_tokens=max_new_tokens,
            stop=stop,
            ignore_eos=ignore_eos,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
        )
        return self._submit(self._prepared(question, style), read)

    def _submit(self, prepared: PreparedPrompt, params: GenerationParams) -> Answer:
        request = self.model.request(prepared, params)
        num_keys = prepared.layout.cross_length
        if request.num_positions > self.max_model_len or num_keys > self.max_image_tokens:
            raise ValueError(
                f"the request needs {request.num_positions} tokens ({len(prepared.input_ids)} of them its prompt) and "
                f"{num_keys} image keys, the engine has {self.max_model_len} and {self.max_image_tokens} per request"
            )
        len(prepared.keys)  # computed here, not between two steps
        answer = Answer(request, self._inbox)
        with self._lock:
            if self._stopped is not None:
                raise self._stopped.again()
            if not self._room.acquire(blocking=False):
                raise QueueFull(f"{self.max_queue} requests wait already, and no more may (max_queue)")
            self._inbox.put(answer)
        return answer

    def _answer(self, prepared: PreparedPrompt, params: GenerationParams) -> Output:
        answer = self._submit(prepared, params)
        try:
            return answer.result()
        finally:
            answer.cancel()

    def _answer_all(self, requests: Sequence[tuple[PreparedPrompt, GenerationParams]]) -> list[Output]:
        """Queues as many requests as there is room for, and waits for its own oldest where the queue is full."""
        answers: list[Answer] = []
        num_done = 0
        try:
            for request in requests:
                while True:
                    try:
                        answers.append(self._submit(*request))
                        break
                    except QueueFull:
                        if num_done == len(answers):
                            raise
                        answers[num_done].result()
                        num_done += 1
            return [answer.result() for answer in answers]
        finally:
            for answer in answers:
                answer.cancel()

    def _stream(self, prepared: PreparedPrompt, params: GenerationParams) -> TextStream:
        answer = self._submit(prepared, params)
        return TextStream(iter(answer), answer.request, answer.cancel)

    async def _astream(self, question: Question, style: Style, params: GenerationParams) -> AsyncIterator[str]:
        answer = self._submit(await asyncio.to_thread(self._prepared, question, style), params)
        async with aclosing(aiter(answer)) as pieces:
            async for piece in pieces:
                yield piece

    def _run(self, line: "_Line") -> None:
        try:
            line.run()
            rest = EngineStopped("the engine was closed before the answer was complete")
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold the caches
            rest = EngineStopped(f"the engine failed: {type(error).__name__}: {error}")
            rest.__cause__ = error
            with self._lock:
                self._stopped = rest
        line.end(rest)


class _Line:
    """What the engine's thread alone touches: the batch, the requests in it and those that wait for it."""

    def __init__(self, batch: Batch, inbox: "SimpleQueue[Answer | Closing]", room: threading.Semaphore):
        self.batch: Batch | None = batch
        self.inbox, self.room = inbox, room
        self.waiting: deque[Answer] = deque()
        self.active: dict[int, Answer] = {}  # by the id of the row
        self.closing: Closing | None = None

    def run(self) -> None:
        """Until the engine is closed."""
        while True:
            self._receive()
            if self.closing == "now" or self.closing == "drain" and self._idle:
                return
            # one prompt is read at a time: until then a request waits in line, where the rows that leave may help it
            if self.waiting and self.batch.num_free and not self.batch.is_reading:
                answer = self.waiting.popleft()
                self._stop_waiting(answer)
                self.batch.admit(answer.request)
                self.active[id(answer.request)] = answer
            # a row may have made two steps of progress: its prompt's end and a token
            for row in {id(row) for row, _ in self.batch.advance()}:
                self._publish(self.active[row])

    def end(self, error: EngineStopped) -> None:
        """Fails every request that is left."""
        self.waiting += (message for message in self._messages() if isinstance(message, Answer))
        for answer in (*self.active.values(), *self.waiting):
            if not answer.request.done:
                answer.request.error = error.again()
            if not answer._ended:
                self._publish(answer)
        self.batch.close()
        self.batch = None

    @property
    def _idle(self) -> bool:
        return not self.waiting and not self.active

    def _messages(self) -> Iterator[Answer | Closing]:
        try:
            while True:
                yield self.inbox.get_nowait()
        except Empty:
            return

    def _receive(self) -> None:
        """Heeds every message there is, and waits for one where there is nothing else to do."""
        if self._idle and self.closing is None:
            self._heed(self.inbox.get())
        for message in self._messages():
            self._heed(message)

    def _heed(self, message: Answer | Closing) -> None:
        if not isinstance(message, Answer):
            self.closing = "now" if self.closing == "now" else message
        elif message._left and not message._ended:
            self._cancel(message)
        elif not message._ended:
            self.waiting.append(message)

    def _cancel(self, answer: Answer) -> None:
        if id(answer.request) in self.active:
            self.batch.cancel(answer.request)
        else:
            if answer in self.waiting:
                self.waiting.remove(answer)
            answer.request.finish("cancelled")
        self._publish(answer)

    def _publish(self, answer: Answer) -> None:
        if answer.request.done:
            self._stop_waiting(answer)
            self.active.pop(id(answer.request), None)
            self.room.release()
        answer._publish()

    def _stop_waiting(self, answer: Answer) -> None:
        answer.request.timings.setdefault("queue", time.perf_counter() - answer._since)


def _check_size(name: str, value: Any, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
