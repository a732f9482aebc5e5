"""How many answers about rendered documents of a fresh seed are exactly right."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from nvlm_runtime.engine.images import ImageInput, image_key
from nvlm_runtime.engine.nvlm import NVLM
from nvlm_runtime.engine.request import PreparedPrompt
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.micro.document import GRIDS, draw, make_document
from nvlm_runtime.micro.questions import questions

BATCH = 25


def _samples(seed: int, samples: int, grids: Sequence[tuple[int, int]]) -> list[tuple[Any, Any]]:
    """(document, question) pairs: every grid in turn, one question a document, of a kind in turn where it has it."""
    found, index = [], 0
    while len(found) < samples:
        document = make_document(f"eval:{seed}:{index}", grids[index % len(grids)])
        asked = questions(document)
        index += 1
        if asked:
            kinds = sorted({question.kind for question in asked})
            kind = kinds[index // len(grids) % len(kinds)]
            of_kind = [question for question in asked if question.kind == kind]
            found.append((document, of_kind[index % len(of_kind)]))
    return found


def open_tag_mask(prepared: PreparedPrompt) -> PreparedPrompt:
    """Opens the tile-tag mask: every token that sees a tile sees every tile of all the images.

    Args:
        prepared: a prompt of NVLM-X.

    Returns:
        A copy with other intervals.
    """
    intervals = prepared.layout.intervals.clone()
    sees = intervals[:, 1] > intervals[:, 0]
    intervals[sees] = torch.tensor([0, prepared.layout.cross_length])
    return replace(prepared, layout=replace(prepared.layout, intervals=intervals))


def _blank(prepared: PreparedPrompt) -> PreparedPrompt:
    """Regular tiles without a picture on them; the thumbnail is kept."""
    pictures = []
    for picture in prepared.images:
        tiles = picture.pixel_values.clone()
        tiles[:-1] = 0
        key = image_key(tiles.numpy().tobytes(), picture.plan)
        pictures.append(ImageInput(picture.plan, key, lambda tiles=tiles: tiles))
    return replace(prepared, images=tuple(pictures))


def evaluate(
    model: NVLM,
    seed: int,
    samples: int,
    *,
    open_mask: bool = False,
    blank_tiles: bool = False,
    grids: Sequence[tuple[int, int]] = GRIDS,
) -> dict[str, Any]:
    """Asks a model about drawn documents, and counts exact greedy answers.

    Args:
        model: a micro model.
        seed: of the documents.
        samples: number of questions, at least 1.
        open_mask: whether the tile-tag mask of NVLM-X is opened.
        blank_tiles: whether only the thumbnail can be read; documents of one tile, which are their own thumbnail, keep
            it.
        grids: columns and rows of tiles, in turn.

    Returns:
        {"variant", "seed", "samples", "accuracy", "by_kind": {kind: share}, "kinds": {kind: [asked, right]}}.

    Raises:
        ValueError: fewer than one question, or `open_mask` for another variant.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if open_mask and model.config.routing.tags != "decoder" or open_mask and not model.config.cross:
        raise ValueError("only NVLM-X has a tile-tag mask to open")
    pairs = _samples(seed, samples, grids)
    kinds: dict[str, list[int]] = {}
    for first in range(0, samples, BATCH):
        batch = pairs[first : first + BATCH]
        prepared = [model.prepare(question.text, [draw(document)]) for document, question in batch]
        if open_mask:
            prepared = [open_tag_mask(each) for each in prepared]
        if blank_tiles:
            prepared = [_blank(each) for each in prepared]
        outputs = model.generate(prepared, params=GenerationParams(max_new_tokens=32))
        for (_, question), output in zip(batch, outputs, strict=True):
            count = kinds.setdefault(question.kind, [0, 0])
            count[0] += 1
            count[1] += output.text == question.answer
    return {
        "variant": model.config.variant,
        "seed": seed,
        "samples": samples,
        "accuracy": sum(right for _, right in kinds.values()) / samples,
        "by_kind": {kind: right / asked for kind, (asked, right) in sorted(kinds.items())},
        "kinds": dict(sorted(kinds.items())),
    }
