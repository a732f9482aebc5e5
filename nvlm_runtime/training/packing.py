"""Documents to batches: several in a row of tokens, none of which sees another.

The documents of a window go into sequences that are drawn, so that lengths mix in every sequence as they do in random
order: a step that saw documents of one length would learn that length of answer. The longest are placed first, so that
the short ones fill the gaps. A sequence's images are numbered through, so that one interval per token says what it sees
of all their keys; `documents` says what it sees of the sequence.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.inputs.layout import Layout, pack_layouts
from nvlm_runtime.training.documents import IGNORE, Document

Span = tuple[int, int]


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch.

    input_ids, labels: int64 [B, T], padded on the right with 0 and IGNORE; labels are shifted by one already.
    documents: spans of each row's documents. layouts: one a row, of all its images. pixel_values: tiles of each row's
    images in order, fp32 [N, 3, S, S], N may be 0. tasks: of each row's documents.
    """

    input_ids: Tensor
    labels: Tensor
    documents: tuple[tuple[Span, ...], ...]
    layouts: tuple[Layout, ...]
    pixel_values: tuple[Tensor, ...]
    tasks: tuple[tuple[str, ...], ...]

    @property
    def num_documents(self) -> int:
        """Number of documents in all sequences."""
        return sum(map(len, self.documents))

    @property
    def num_tokens(self) -> int:
        """Of documents, padding left out."""
        return sum(end - start for row in self.documents for start, end in row)


def fill_sequences(lengths: Sequence[int], seq_len: int, random: Random) -> list[list[int]]:
    """Packs documents into sequences: the longest first, each into one drawn from those that have room for it.

    A sequence is drawn with a probability in proportion to the square of its room. Lengths then mix in a sequence as in
    random order, while the sequences are as full as those of first fit, longest first.

    Args:
        lengths: tokens of each document, none above `seq_len`.
        seq_len: tokens of a sequence.
        random: what draws.

    Returns:
        Indices of documents per sequence, ascending. Their number is at least what all tokens need.
    """
    num = -(-sum(lengths) // seq_len)
    rows: list[list[int]] = [[] for _ in range(num)]
    room = [seq_len] * num
    order = list(range(len(lengths)))
    random.shuffle(order)
    for index in sorted(order, key=lambda i: -lengths[i]):
        fits = [row for row, left in enumerate(room) if left >= lengths[index]]
        if fits:
            place = random.choices(fits, [room[row] ** 2 for row in fits])[0]
        else:
            rows.append([])
            room.append(seq_len)
            place = len(rows) - 1
        rows[place].append(index)
        room[place] -= lengths[index]
    return [sorted(row) for row in rows]


def pack(
    rows: Sequence[Sequence[tuple[Document, "Future[Tensor] | None"]]], config: NVLMConfig, length: int | None = None
) -> PackedBatch:
    """Makes the tensors of a micro-batch.

    Args:
        rows: per sequence its documents, each with the future of its tiles, fp32 [N, 3, S, S], or None without images.
        config: the model's configuration.
        length: tokens of the sequences; None is those of the longest.

    Returns:
        The micro-batch; sequences are padded with token 0, which is not learnt.
    """
    size = config.vision.image_size
    length = length or max(sum(len(document) for document, _ in row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORE, dtype=torch.int64)
    spans: list[tuple[Span, ...]] = []
    pixel_values: list[Tensor] = []
    for number, row in enumerate(rows):
        at, found, tiles = 0, [], [torch.zeros(0, 3, size, size)]
        for document, future in row:
            end = at + len(document)
            ids[number, at:end] = torch.tensor(document.input_ids)
            labels[number, at:end] = torch.tensor(document.labels)
            found.append((at, end))
            at = end
            if future is not None:
                tiles.append(future.result())
        spans.append(tuple(found))
        pixel_values.append(torch.cat(tiles))
    layouts = (pack_layouts([document.layout for document, _ in row]) for row in rows)
    tasks = (tuple(document.task for document, _ in row) for row in rows)
    return PackedBatch(ids, labels, tuple(spans), tuple(layouts), tuple(pixel_values), tuple(tasks))
