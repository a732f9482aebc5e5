"""A row to a document: token ids, what of them is learnt, where its images go.

Learnt is what an assistant says, and the token that ends it; the system's and the users' turns, the assistant's prefix,
image slots and tags never are (Megatron-LM's loss mask for NVLM). A document too long for a row of `seq_len` tokens has
its pictures cut into fewer tiles, 12, 8, 6, 4, 2, 1, until it fits (Megatron-LM's loader, which
leaves four tokens free).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.inputs.image import TilePlan, open_image, plan_tiles, tile_pixels
from nvlm_runtime.inputs.layout import Layout, layout_prompt
from nvlm_runtime.inputs.prompt import build_prompt
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.training.records import BadRecord, Record

IGNORE = -100
TILE_LIMITS = (12, 8, 6, 4, 2, 1)

Log = Callable[[str], None]


@dataclass(frozen=True)
class Document:
    """input_ids and labels, one shorter than the conversation: labels[i] is the token after input_ids[i], or IGNORE."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    layout: Layout
    images: tuple[tuple[Path, TilePlan], ...]
    task: str
    where: str

    def __len__(self) -> int:
        return len(self.input_ids)

    def pixel_values(self) -> Tensor:
        """Tiles fp32 [N, 3, S, S] of all images, in order. Raises BadRecord for a picture that cannot be read."""
        try:
            tiles = [tile_pixels(open_image(path), plan) for path, plan in self.images]
        except (ValueError, OSError) as error:
            raise BadRecord(f"{self.where}: {error}") from error
        return torch.cat(tiles)


def make_document(
    row: Record, tokenizer: Tokenizer, config: NVLMConfig, seq_len: int, style: str, task: str, log: Log
) -> Document:
    """Makes a document of a record. Images get fewer tiles where the record is too long with all.

    Args:
        row: the record.
        tokenizer: the model's tokenizer.
        config: the model's configuration.
        seq_len: the most tokens of the document.
        style: how turns are written, as in `build_prompt`.
        task: name of the dataset, which the document keeps.
        log: called with a line where the tiles were limited.

    Returns:
        The document, whose labels are the tokens of the answers, each one position ahead of its input.

    Raises:
        BadRecord: the record is no prompt, or is longer than `seq_len` with the fewest tiles. Names file and line.
    """
    sizes = [_size(path, row.where) for path in row.images]
    for limit in (config.max_tiles, *(limit for limit in TILE_LIMITS if limit < config.max_tiles)):
        plans = [plan_tiles(*size, config.vision.image_size, min(config.min_tiles, limit), limit) for size in sizes]
        try:
            prompt = build_prompt(tokenizer, config, row.messages, plans, style=style, generation=False)
        except ValueError as error:
            raise BadRecord(f"{row.where}: {error}") from error
        if len(prompt.input_ids) - 1 <= seq_len or not row.images:
            break
    ids = prompt.input_ids
    if len(ids) - 1 > seq_len:
        fewest = ", with the fewest tiles" if row.images else ""
        raise BadRecord(f"{row.where}: {len(ids) - 1} tokens, more than a row's {seq_len}{fewest}")
    if row.images and limit < config.max_tiles:
        log(f"{row.where}: at most {limit} tiles a picture, so that it fits into {seq_len} tokens")
    labels = [IGNORE] * len(ids)
    for start, end in prompt.answers:
        labels[start:end] = ids[start:end]
    layout = layout_prompt(tokenizer, config, prompt, plans).truncate(len(ids) - 1)
    images = tuple(zip(row.images, plans, strict=True))
    return Document(ids[:-1], tuple(labels[1:]), layout, images, task, row.where)


def _size(path: Path, where: str) -> tuple[int, int]:
    """Of a picture as it is shown, from its header."""
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(0x0112, 1) >= 5
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise BadRecord(f"{where}: {path} is no picture that can be read: {error}") from error
    return (height, width) if turned else (width, height)
