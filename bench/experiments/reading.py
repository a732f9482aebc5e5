"""Reading pretraining: vision encoder and projector learn to say a rendered tile in a text model's tokens, in order.

A tile has up to two parts, lines or a shape, one above the other; the first half of its image tokens says the upper
one, the second half the lower. Each of them holds, as mixed embeddings of the text model, the next token of the part
(its end is a token too), the token before it, and the part's role, colour and label; behind the end, and in a
thumbnail, nothing. Cross-attention then finds in a picture what a text model finds in a text.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.micro.document import CHARS, COLOURS, LABELS, SHAPES, WORDS, Shape, Tile
from nvlm_runtime.micro.vision_encoder import ROLES, TileStream
from nvlm_runtime.model.model import NVLMModel

FIELDS = ("token", "before", "role", "colour", "label")
NUMBERS = ("10.57", "9284", "K360")  # as documents show them
NOTHING_WEIGHT = 0.1  # of an image token that says nothing


@dataclass(frozen=True)
class Vocabulary:
    """What image tokens can say. tokens: ids of the text model, class 1 + place; end: the id behind a part's last;
    start: the id before its first. Class 0 of every field is nothing. room: image tokens of a part.
    """

    tokenizer: Tokenizer
    tokens: tuple[int, ...]
    start: int
    end: int
    room: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, tokens_per_tile: int) -> "Vocabulary":
        """Of all that documents show. start: a line break, what a chat template writes before an answer.

        Raises ValueError where a text and its end are more tokens than half a tile's image tokens, and where a number
        is not a token a character.
        """
        room = tokens_per_tile // 2
        start, end = tokenizer.encode("\n")[-1], tokenizer.special("<|im_end|>")
        found = {start, end}
        for text in (*WORDS, *LABELS, *SHAPES, *CHARS, *NUMBERS):
            ids = tokenizer.encode(text)
            if len(ids) >= room:
                raise ValueError(f"{text!r} is {len(ids)} tokens, a part of a tile has room for {room - 1} and an end")
            found.update(ids)
        for number in NUMBERS:
            if tokenizer.encode(number) != [token for char in number for token in tokenizer.encode(char)]:
                raise ValueError(f"{number!r} must be a token a character, it is {len(tokenizer.encode(number))}")
        return cls(tokenizer, tuple(sorted(found)), start, end, room)

    def target(self, tile: Tile) -> Tensor:
        """int64 [len(FIELDS), 2 * room]: the class of each image token's fields."""
        target = torch.zeros(len(FIELDS), 2 * self.room, dtype=torch.int64)
        parts = sorted([*tile.lines, *([tile.shape] if tile.shape else [])], key=lambda part: part.y)
        for number, part in enumerate(parts):
            is_shape = isinstance(part, Shape)
            ids = [*self.tokenizer.encode(part.name if is_shape else part.text), self.end]
            where = slice(number * self.room, number * self.room + len(ids))
            target[0, where] = torch.tensor([1 + self.tokens.index(token) for token in ids])
            target[1, where] = torch.tensor([1 + self.tokens.index(token) for token in (self.start, *ids[:-1])])
            target[2, where] = ROLES.index(part.name if is_shape else part.role)
            target[3, where] = 1 + list(COLOURS).index(part.colour)
            target[4, where] = 1 + LABELS.index(tile.label) if tile.label else 0
        return target

    @torch.no_grad()
    def directions(self, embedding: Tensor) -> list[Tensor]:
        """A field's classes as directions [classes, C] in the space of a text model's embedding [V, C]: unit vectors
        of the mean embedding of what they say, rolled by a field's share of the width, which tells fields apart.
        """
        mean = embedding.mean(0)
        texts: list[Sequence[str]] = [ROLES[1:], tuple(COLOURS), [label.lower() for label in LABELS]]
        rows = [embedding[list(self.tokens)]] * 2
        rows += [torch.stack([embedding[self.tokenizer.encode(text)].mean(0) for text in said]) for said in texts]
        shift = embedding.shape[1] // len(FIELDS)
        units = [F.normalize(row - mean, dim=-1).roll(field * shift, -1) for field, row in enumerate(rows)]
        return [torch.cat([unit.new_zeros(1, unit.shape[1]), unit]) for unit in units]


def reading_loss(image_tokens: Tensor, targets: Tensor, directions: Sequence[Tensor]) -> tuple[Tensor, list[float]]:
    """image_tokens: [N, P, C]; targets: int64 [N, fields, P]. Returns the loss and a field's share right, of image
    tokens that say something.
    """
    says = targets[:, 0] > 0
    weight = torch.where(says, 1.0, NOTHING_WEIGHT)
    loss, shares = image_tokens.new_zeros(()), []
    for field, rows in enumerate(directions):
        logits = image_tokens @ rows.T
        losses = F.cross_entropy(logits.flatten(0, 1), targets[:, field].flatten(), reduction="none")
        loss = loss + (losses * weight.flatten()).sum() / weight.sum()
        shares.append((logits.argmax(-1) == targets[:, field])[says].float().mean().item())
    return loss, shares


@torch.no_grad()
def reading_shares(model: NVLMModel, tokenizer: Tokenizer, split: str, num_tiles: int) -> dict[str, float]:
    """A field's share right over tiles of documents of a split, of image tokens that say something."""
    vocabulary = Vocabulary.of(tokenizer, model.config.tokens_per_tile)
    directions = vocabulary.directions(model.language_model.embed_tokens.weight)
    pixels, targets = next(iter(TileStream(split, num_tiles, vocabulary.target, thumbnails=True)))
    return dict(zip(FIELDS, reading_loss(model.project(model.encode(pixels)), targets, directions)[1]))


def learn_to_read(
    model: NVLMModel, tokenizer: Tokenizer, seed: int, steps: int, log: Callable[[str], None], batch: int = 128
) -> None:
    """Trains vision encoder and projector of a model in fp32, in place."""
    vocabulary = Vocabulary.of(tokenizer, model.config.tokens_per_tile)
    directions = vocabulary.directions(model.language_model.embed_tokens.weight)
    stream = TileStream(f"reading:{seed}", batch, vocabulary.target, thumbnails=True)
    batches = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1)
    parameters = [*model.vision_model.parameters(), *model.mlp1.parameters()]
    matrices = [p for p in parameters if p.dim() == 2]
    others = [p for p in parameters if p.dim() != 2]
    optimizers = {
        4e-3: torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        1e-3: torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    }
    for step, (pixels, targets) in zip(range(steps), batches):
        scale = min((step + 1) / min(100, steps), 1 - step / steps)
        loss, shares = reading_loss(model.project(model.encode(pixels)), targets, directions)
        for rate, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            told = " ".join(f"{name} {share:.3f}" for name, share in zip(FIELDS, shares))
            log(f"reading: step {step}/{steps} loss {loss.item():.3f} {told}")
