"""What the micro decoders train on: tower features of rendered documents, and conversations about them.

The tower is frozen, so every document is encoded once, into a file that all three variants read. Conversations are
drawn anew each epoch, several questions a document.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.image import TilePlan, plan_tiles, tile_pixels
from nvlm_runtime.layout import Layout, make_layout
from nvlm_runtime.micro.document import SIDE, Document, draw, make_document
from nvlm_runtime.micro.questions import Question, questions, transcription
from nvlm_runtime.model import NVLMModel
from nvlm_runtime.prompt import build_prompt, tag_ids
from nvlm_runtime.tokenizer import Tokenizer

IGNORE = -100
# Finding a thing by its look comes last: nothing in the question says where to search.
KIND_WEIGHTS = {"tile": 1, "read": 1, "position": 1, "colour": 4, "shape": 1, "field": 3}

SHUFFLED = 0.5  # of NVLM-X's conversations; all of them, and the decoder forgets how to read before it asks the tags


def document_at(seed: int, index: int) -> Document:
    return make_document(f"train:{seed}:{index}")


def documents_hash(seed: int) -> str:
    """Eight letters that change when documents are drawn or written otherwise."""
    digest = hashlib.sha256()
    for index in range(20):
        document = document_at(seed, index)
        digest.update(repr(document.tiles).encode() + draw(document).tobytes())
    return digest.hexdigest()[:8]


def plan_of(document: Document) -> TilePlan:
    return plan_tiles(document.width, document.height, SIDE)


def write_features(
    model: NVLMModel, path: Path, seed: int, num_documents: int, log: Callable[[str], None], chunk: int = 32
) -> None:
    """Encodes the documents of `seed` into a fp16 .npy file [tiles, 4P, C], renamed to `path` once it is whole."""
    counts = [plan_of(document_at(seed, i)).num_tiles for i in range(num_documents)]
    config = model.config
    shape = (sum(counts), 4 * config.tokens_per_tile, config.vision.hidden_size)
    partial = path.with_suffix(".partial")
    file = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
    at = 0
    for first in range(0, num_documents, chunk):
        documents = [document_at(seed, i) for i in range(first, min(first + chunk, num_documents))]
        pixels = torch.cat([tile_pixels(draw(document), plan_of(document)) for document in documents])
        with torch.inference_mode():
            features = model.encode(pixels)
        file[at : at + len(features)] = features.half().numpy()
        at += len(features)
        if first // chunk % 50 == 0:
            log(f"features: document {first}/{num_documents}")
    file.flush()
    partial.rename(path)


@dataclass(frozen=True)
class Sample:
    """One conversation. labels: the ids of answers and the <|im_end|> after them, IGNORE elsewhere, shifted by one."""

    input_ids: list[int]
    labels: list[int]
    layout: Layout
    features: slice
    kinds: list[tuple[str, int, int]]  # (question kind, first label, end) of every answer


def make_sample(
    config: NVLMConfig, tokenizer: Tokenizer, document: Document, chosen: list[Question], features: slice
) -> Sample:
    """A conversation of the chosen questions, in order, about one document."""
    plan = plan_of(document)
    prompt = build_prompt(tokenizer, config, [{"role": "user", "content": chosen[0].text}], [plan])
    start, end = tokenizer.special("<|im_start|>"), tokenizer.special("<|im_end|>")
    ids, labels, kinds = list(prompt.input_ids), [IGNORE] * (len(prompt.input_ids) - 1), []
    for turn, question in enumerate(chosen):
        if turn:
            asked = [start, *tokenizer.encode(f"user\n{question.text}"), end, start, *tokenizer.encode("assistant\n")]
            ids += asked
            labels += [IGNORE] * len(asked)
        answer = [*tokenizer.encode(question.answer), end]
        kinds.append((question.kind, len(labels), len(labels) + len(answer)))
        ids += answer
        labels += answer
    layout = make_layout(config, len(ids) - 1, prompt.blocks, [plan], [tag_ids(tokenizer, plan, config)])
    return Sample(ids[:-1], labels, layout, features, kinds)


def shuffle_keys(config: NVLMConfig, layout: Layout, rng: random.Random) -> Layout:
    """NVLM-X: one image's tiles in another order among the keys, every tag still seeing its own tile.

    The place of a key then says nothing of its tile, so a decoder learns to ask the tags. Others are left as they are.
    """
    (image,) = layout.images
    size, num = config.tokens_per_tile, len(image.cross)
    if config.routing.tags != "decoder" or num < 2:
        return layout
    order = rng.sample(range(num), num)
    place = torch.tensor([order.index(tile) * size for tile in range(num)])
    start, end = layout.intervals.unbind(-1)
    tagged = end - start == size
    start = torch.where(tagged, place[start // size % num], start)
    intervals = torch.stack([start, torch.where(tagged, start + size, end)], dim=-1)
    return Layout((replace(image, cross=tuple(image.cross[tile] for tile in order)),), intervals)


def _choose(rng: random.Random, document: Document, limit: int) -> list[Question]:
    """Up to `limit` questions, their kinds drawn by KIND_WEIGHTS."""
    kinds: dict[str, list[Question]] = {}
    for question in questions(document):
        kinds.setdefault(question.kind, []).append(question)
    chosen: list[Question] = []
    while kinds and len(chosen) < limit:
        (kind,) = rng.choices(list(kinds), [KIND_WEIGHTS[kind] for kind in kinds])
        chosen.append(kinds[kind].pop(rng.randrange(len(kinds[kind]))))
        if not kinds[kind]:
            del kinds[kind]
    return chosen


@dataclass(frozen=True)
class Batch:
    input_ids: Tensor  # [B, T], padded on the right
    labels: Tensor  # [B, T]
    layouts: list[Layout]
    features: list[Tensor]  # [N, 4P, C] a row
    kinds: list[list[tuple[str, int, int]]]


def batches(
    config: NVLMConfig,
    tokenizer: Tokenizer,
    path: Path,
    seed: int,
    num_documents: int,
    batch: int,
    num_questions: int,
    num_short: int,
    num_transcribed: int,
) -> Iterator[Batch]:
    """For ever. Conversations of like length share a batch.

    The first `num_short` batches are of documents of two or three tiles: a decoder that has to find a glyph among 140
    image tokens, or which tag is meant among seven, learns it sooner among 60 and four. In the first `num_transcribed`
    every conversation ends with a transcription.
    """
    file = np.load(path, mmap_mode="r")
    counts = [plan_of(document_at(seed, i)).num_tiles for i in range(num_documents)]
    offsets = np.concatenate([[0], np.cumsum(counts)])
    if offsets[-1] != len(file):
        raise ValueError(f"{path} holds {len(file)} tiles, {num_documents} documents of seed {seed} have {offsets[-1]}")
    rng = random.Random(seed)
    pool: list[Sample] = []
    num_batches = 0
    while True:
        for index in rng.sample(range(num_documents), num_documents):
            document = document_at(seed, index)
            if num_batches < num_short and len(document.tiles) not in (2, 3):
                continue
            chosen = _choose(rng, document, num_questions)
            if num_batches < num_transcribed:
                chosen.append(transcription(document))
            if chosen:
                rows = slice(*map(int, offsets[index : index + 2]))
                sample = make_sample(config, tokenizer, document, chosen, rows)
                if rng.random() < SHUFFLED:
                    sample = replace(sample, layout=shuffle_keys(config, sample.layout, rng))
                pool.append(sample)
            if len(pool) == 8 * batch:
                pool.sort(key=lambda sample: len(sample.input_ids))
                groups = [pool[i : i + batch] for i in range(0, len(pool), batch)]
                rng.shuffle(groups)
                yield from (_collate(group, file) for group in groups)
                num_batches += len(groups)
                pool = []


def _collate(samples: list[Sample], file: np.ndarray) -> Batch:
    def pad(rows: list[list[int]], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], True, value)

    return Batch(
        input_ids=pad([sample.input_ids for sample in samples], 0),
        labels=pad([sample.labels for sample in samples], IGNORE),
        layouts=[sample.layout for sample in samples],
        features=[torch.from_numpy(file[sample.features].astype(np.float32)) for sample in samples],
        kinds=[sample.kinds for sample in samples],
    )
