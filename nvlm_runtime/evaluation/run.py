"""Questions through one running batch, answers in the order of the questions."""

from collections import deque
from collections.abc import Iterator, Sequence

from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.request import Output, PreparedPrompt
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.engine.serving import Engine
from nvlm_runtime.evaluation.samples import Sample, opened
from nvlm_runtime.inputs.image import TilePlan, grids
from nvlm_runtime.inputs.prompt import Style, build_prompt

SEAM = 8  # tokens: text may be cut otherwise where a picture stands in it


def answers(
    model: NVLM, samples: Sequence[Sample], *, batch: int, max_new_tokens: int, style: Style = "hf"
) -> Iterator[tuple[Sample, Output]]:
    """Answers questions greedily; each answer comes when it and all before it are complete.

    Questions join and leave the running batch; over several ranks, which must do the same at the same time, a batch
    ends before the next.

    Args:
        model: the model.
        samples: the questions.
        batch: the most questions that decode at a time.
        max_new_tokens: the most tokens of an answer.
        style: how turns are written, as in `NVLM.prepare`.

    Yields:
        Each question with its output, in order.

    Raises:
        ValueError: the model cannot be asked a question, as where its prompt is too long; names its row.
    """
    if not samples:
        return
    params = GenerationParams(max_new_tokens=max_new_tokens)
    if model.model.group.size > 1:
        for at in range(0, len(samples), batch):
            some, prepared = samples[at : at + batch], []
            for sample in some:
                try:
                    prepared.append(_prepare(model, sample, style))
                    model.request(prepared[-1], params)  # refuses what the batch would
                except (ValueError, OSError) as error:
                    raise sample.row.error(str(error)) from error
            yield from zip(some, model.generate(prepared, params=params))
        return
    max_pictures = max(len(sample.pictures) for sample in samples)
    waiting: deque = deque()
    with Engine(
        model,
        max_batch_size=min(batch, len(samples)),
        max_model_len=_capacity(model, samples, style) + max_new_tokens,
        max_image_tokens=max_pictures * model.max_image_keys,
        max_queue=batch,
    ) as engine:
        for sample in samples:
            try:
                waiting.append((sample, engine.submit(_prepare(engine, sample, style), params=params)))
            except (ValueError, OSError) as error:
                yield from _complete(waiting, 0)
                raise sample.row.error(str(error)) from error
            yield from _complete(waiting, 2 * min(batch, len(samples)) - 1)
        yield from _complete(waiting, 0)


def _prepare(model: NVLM | Engine, sample: Sample, style: Style) -> PreparedPrompt:
    return model.prepare(messages=sample.messages, images=[opened(source) for source in sample.pictures], style=style)


def _complete(waiting: deque, most: int) -> Iterator[tuple[Sample, Output]]:
    """Waits for the first answers until at most `most` are left."""
    while len(waiting) > most:
        sample, answer = waiting.popleft()
        try:
            yield sample, answer.result()
        except ValueError as error:
            raise sample.row.error(str(error)) from error


def _capacity(model: NVLM, samples: Sequence[Sample], style: Style) -> int:
    """Tokens that no prompt exceeds, without opening a picture: every picture counts as the one with most tokens."""
    config, size = model.config, model.config.vision.image_size
    plans = [TilePlan(cols * size, rows * size, cols, rows, size) for cols, rows in grids(1, config.max_tiles)]

    def length(messages: list, plans: list[TilePlan]) -> int:
        prompt = build_prompt(model.tokenizer, config, messages, plans, style=style, template=model.template)
        return len(prompt.input_ids)

    picture = max(length([{"role": "user", "content": [{"type": "image"}]}], [plan]) for plan in plans) + SEAM
    prompts = {sample.prompt: len(sample.pictures) for sample in samples}
    return max(
        length([{"role": "user", "content": [{"type": "text", "text": text}]}], []) + num_pictures * picture
        for text, num_pictures in prompts.items()
    )
