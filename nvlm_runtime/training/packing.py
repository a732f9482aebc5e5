"""Documents to batches: several in a row of tokens, none of which sees another.

First fit, longest first, within a window of documents: the rows of a window are full but for its last ones, and what
goes where depends on the window alone. A row's images are numbered through, so that one interval a token says what it
sees of all their keys; `documents` says what it sees of the row.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

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


def fill_sequences(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Packs documents into sequences: each into the first that has room for it, the longest document first.

    Args:
        lengths: tokens of each document, none above `seq_len`.
        seq_len: tokens of a sequence.

    Returns:
        Indices of documents per sequence, ascending.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((row for row, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
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
