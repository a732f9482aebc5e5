"""Prompts to answers: the calls that `NVLM` and `Engine` share, and how their arguments are read.

`generate` takes one prompt or a list, `stream` and `astream` take one. All of them read their arguments here and hand
on pairs of a prepared prompt and its sampling parameters.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from nvlm_runtime.engine.request import Output, PreparedPrompt, Request
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.inputs.prompt import Style

Images = Sequence[Any]
Message = Mapping[str, Any]
OnePrompt = str | PreparedPrompt


class TextStream(Iterator[str]):
    """Pieces of one answer, each as soon as its text is certain. A piece is never empty.

    A stream that is closed, or forgotten after its first piece, cancels its request; the text so far stays.

    Args:
        pieces: The pieces; closing the generator cancels the request.
        request: The request that the pieces belong to.
        cancel: Called by `close`, for a request that is under way before the first piece is asked for.
    """

    def __init__(self, pieces: Iterator[str], request: Request, cancel: Callable[[], None] = lambda: None):
        self._pieces, self._request, self._cancel = pieces, request, cancel

    def __next__(self) -> str:
        return next(piece for piece in self._pieces if piece)

    def close(self) -> None:
        """Cancels the request if it is not complete."""
        close = getattr(self._pieces, "close", None)
        if close is not None:
            close()
        self._cancel()

    @property
    def output(self) -> Output:
        """The answer so far; final once the stream is exhausted or closed."""
        return self._request.output


@dataclass(frozen=True)
class Question:
    """One prompt as the caller wrote it: exactly one of `prompt`, `messages` and `input_ids` is given."""

    prompt: OnePrompt | None
    images: Images | None
    messages: Sequence[Message] | None
    input_ids: Sequence[int] | None


class TextGenerator(ABC):
    """`generate`, `stream` and `astream` on top of `prepare`."""

    @abstractmethod
    def prepare(
        self,
        prompt: str | None = None,
        images: Images | None = None,
        *,
        messages: Sequence[Message] | None = None,
        input_ids: Sequence[int] | None = None,
        style: Style = "hf",
    ) -> PreparedPrompt:
        """Makes one prompt ready: token ids, a layout and opened images."""

    @overload
    def generate(
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
    ) -> Output: ...

    @overload
    def generate(
        self,
        prompt: Sequence[OnePrompt],
        images: Sequence[Images | None] | None = None,
        *,
        style: Style = "hf",
        params: GenerationParams | Sequence[GenerationParams] | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> list[Output]: ...

    def generate(
        self,
        prompt: OnePrompt | Sequence[OnePrompt] | None = None,
        images: Images | Sequence[Images | None] | None = None,
        *,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        style: Style = "hf",
        params: GenerationParams | Sequence[GenerationParams] | None = None,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> Output | list[Output]:
        """Answers one prompt, or each prompt of a list.

        Give exactly one of `prompt`, `messages` and `input_ids`. A list of prompts (or of conversations, or of lists
        of token ids) is decoded as one batch; each answer is the one that its prompt would get alone.

        Args:
            prompt: A question, a `PreparedPrompt` from `prepare`, or a list of them. Each `<image>` in a question
                stands for one image; without any, the images come first.
            images: The images of the prompt: paths, PIL images, uint8 arrays or `ImageHandle`s. With a list of
                prompts, one such list per prompt. None is no images. A `PreparedPrompt` has its own images.
            messages: A conversation of {"role": ..., "content": ...} that ends with a user turn.
            input_ids: Token ids, used as they are.
            style: How the turns are written: "hf", "megatron", or "template" for the checkpoint's chat template.
            params: The sampling parameters, or one `GenerationParams` per prompt of a list. Excludes the fields below.
            max_new_tokens: The most tokens to generate per prompt (default 512).
            stop: Texts that end the answer and are not part of it (default none).
            ignore_eos: Whether the end token is a token like any other (default False).
            temperature: 0 is greedy (default 0).
            top_k: Keep the k likeliest tokens; 0 is off (default 0).
            top_p: Keep the likeliest tokens of this total probability, in (0, 1] (default 1, off).
            min_p: Drop tokens less likely than this share of the likeliest, in [0, 1] (default 0, off).
            repetition_penalty: Divides the logits of tokens already seen (default 1, off).
            seed: Seed of the draws (default: a new one per request).

        Returns:
            One `Output` for one prompt; a list of them, in order, for a list, even of one prompt.

        Raises:
            ValueError: An argument is invalid or contradicts another, or the request does not fit.
            FileNotFoundError: An image path does not exist.
        """
        questions, is_list = read_questions(prompt, images, messages, input_ids)
        read = read_params(
            len(questions) if is_list else None,
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
        requests = [(self._prepared(question, style), each) for question, each in zip(questions, read, strict=True)]
        return self._answer_all(requests) if is_list else self._answer(*requests[0])

    def stream(
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
    ) -> TextStream:
        """Answers one prompt piece by piece: `for piece in model.stream(...)`.

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
            The pieces; `TextStream.output` has the whole answer.

        Raises:
            ValueError: As `generate`, here and not at the first piece.
            FileNotFoundError: An image path does not exist.
        """
        question = one_question("stream", prompt, images, messages, input_ids)
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
        return self._stream(self._prepared(question, style), read)

    def astream(
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
    ) -> AsyncIterator[str]:
        """Answers one prompt piece by piece: `async for piece in model.astream(...)`.

        The event loop is never blocked: prompts are prepared and decoded in other threads. A loop that is left, or a
        task that is cancelled, cancels the request.

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
            The pieces, none of them empty.

        Raises:
            ValueError: For sampling parameters here; for everything else at the first piece.
        """
        question = one_question("astream", prompt, images, messages, input_ids)
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
        return self._astream(question, style, read)

    def _prepared(self, question: Question, style: Style) -> PreparedPrompt:
        prompt = question.prompt
        if isinstance(prompt, PreparedPrompt):
            if question.images:
                raise ValueError("a PreparedPrompt has its images already: give images to prepare")
            return prompt
        return self.prepare(
            prompt, question.images, messages=question.messages, input_ids=question.input_ids, style=style
        )

    def _answer(self, prepared: PreparedPrompt, params: GenerationParams) -> Output:
        stream = self._stream(prepared, params)
        for _ in stream:
            pass
        return stream.output

    @abstractmethod
    def _answer_all(self, requests: Sequence[tuple[PreparedPrompt, GenerationParams]]) -> list[Output]: ...

    @abstractmethod
    def _stream(self, prepared: PreparedPrompt, params: GenerationParams) -> TextStream: ...

    @abstractmethod
    def _astream(self, question: Question, style: Style, params: GenerationParams) -> AsyncIterator[str]: ...


def read_questions(prompt: Any, images: Any, messages: Any, input_ids: Any) -> tuple[list[Question], bool]:
    """Reads the prompts of one call, and whether they were given as a list."""
    given = {"prompt": prompt, "messages": messages, "input_ids": input_ids}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of prompt, messages and input_ids, got {' and '.join(given) or 'none'}")
    ((name, value),) = given.items()
    # an empty list of prompts is a batch of none; an empty conversation or empty ids are one wrong prompt
    is_list = _is_list(value) and (name == "prompt" or bool(value) and all(map(_is_list, value)))
    if not is_list:
        return [Question(prompt, images, messages, input_ids)], False
    if images is not None and not _is_list(images):
        raise ValueError(f"images must be one list per {name}, got {type(images).__name__}")
    if images is not None and len(images) != len(value):
        raise ValueError(f"images must be one list per {name}: got {len(images)} for {len(value)}")
    if images is not None and not all(each is None or _is_list(each) for each in images):
        raise ValueError(f"images must be one list per {name}, got {[type(each).__name__ for each in images]}")
    parts = zip(value, images or [None] * len(value), strict=True)
    fields = dict.fromkeys(("prompt", "messages", "input_ids"))
    return [Question(**{**fields, name: each}, images=its) for each, its in parts], True


def one_question(method: str, prompt: Any, images: Any, messages: Any, input_ids: Any) -> Question:
    """Reads the prompt of a call that takes one. method: its name, for the error."""
    questions, is_list = read_questions(prompt, images, messages, input_ids)
    if is_list:
        raise ValueError(f"{method} takes one prompt, got a list of {len(questions)}: generate takes lists")
    return questions[0]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def read_params(count: int | None, params: Any, **fields: Any) -> list[GenerationParams]:
    """Reads the sampling parameters of each prompt.

    Args:
        count: Number of prompts in the list, or None for one prompt by itself.
        params: What the caller gave as `params`.
        fields: Fields of `GenerationParams` that the caller spelled out; None is the default.

    Raises:
        ValueError: Both are given, or the number of `params` is not that of the prompts.
    """
    named = {name: value for name, value in fields.items() if value is not None}
    if params is None:
        return [GenerationParams(**named)] * (1 if count is None else count)
    if named:
        raise ValueError(f"give params or {', '.join(named)}, not both")
    given = list(params) if _is_list(params) else [params]
    if wrong := [each for each in given if not isinstance(each, GenerationParams)]:
        raise ValueError(f"params must be GenerationParams, got {type(wrong[0]).__name__}")
    if not _is_list(params):
        return given * (1 if count is None else count)
    if count is None:
        raise ValueError(f"params must be one GenerationParams for one prompt, got a list of {len(given)}")
    if len(given) != count:
        raise ValueError(f"params must be one, or one per prompt: got {len(given)} for {count}")
    return given
