"""Pretrains the micro models' shared vision encoder on a dense target: what has its centre in each patch.

Every patch of a rendered tile is asked for its glyph, and a glyph's patch also for its colour, its place in the
line, its role and the label its tile carries; a shape's patches for shape and colour. Most patches are blank and
weigh little. The vision encoder is frozen afterwards, as in the paper; the heads only help a projector begin
(`readout`).
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvlm_runtime.config import VisionConfig
from nvlm_runtime.inputs.image import plan_tiles, tile_pixels
from nvlm_runtime.micro.document import CHARS, COLOURS, LABELS, SHAPES, SIDE, Document, Tile, draw, make_document
from nvlm_runtime.model.vision import InternViT

ROLES = ("none", "word", "number", "label", "value", *SHAPES)
TARGETS = {
    "glyph": len(CHARS) + 1,
    "role": len(ROLES),
    "colour": len(COLOURS),
    "place": 7,
    "label": len(LABELS) + 1,
}
IGNORE = -100
BLANK_WEIGHT = 0.05


def dense_target(tile: Tile, side: int) -> Tensor:
    """Says what has its centre in each patch of a tile.

    Args:
        tile: the tile.
        side: patches per side.

    Returns:
        int64 [len(TARGETS), side * side], one row per target; IGNORE where it does not apply.
    """
    target = torch.full((len(TARGETS), side, side), IGNORE)
    target[0] = target[1] = 0  # blank, no role
    unit = SIDE / side
    colours = list(COLOURS)
    if tile.shape:
        shape = tile.shape
        centre = (torch.arange(side) + 0.5) * unit
        inside = (centre[None] - shape.x).abs().maximum((centre[:, None] - shape.y).abs()) < 0.75 * shape.radius
        target[1][inside] = ROLES.index(shape.name)
        target[2][inside] = colours.index(shape.colour)
    for line in tile.lines:
        for place, (char, (x, y)) in enumerate(zip(line.text, line.centres(), strict=True)):
            values = (
                CHARS.index(char) + 1,
                ROLES.index(line.role),
                colours.index(line.colour),
                place,
                LABELS.index(tile.label) + 1 if tile.label else 0,
            )
            target[:, int(y / unit), int(x / unit)] = torch.tensor(values)
    return target.flatten(1)


def document_tiles(document: Document, thumbnail: bool = False) -> Tensor:
    """Draws a document and cuts it into tiles, as the model sees them.

    Args:
        document: the document.
        thumbnail: whether the thumbnail follows, where there is one.

    Returns:
        Pixels, fp32 [cols * rows (+ 1), 3, SIDE, SIDE].
    """
    plan = plan_tiles(document.width, document.height, SIDE)
    tiles = tile_pixels(draw(document), plan)
    return tiles if thumbnail else tiles[: plan.num_regular]


class TileStream(torch.utils.data.IterableDataset):
    """Batches of (pixel_values [batch, 3, SIDE, SIDE], targets [batch, *]) from fresh documents, for ever. target: of a
    tile; of a thumbnail, where they are asked for, that of an empty one.
    """

    def __init__(self, split: str, batch: int, target: Callable[[Tile], Tensor], thumbnails: bool = False):
        self.split, self.batch, self.target, self.thumbnails = split, batch, target, thumbnails

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        index, step = (worker.id, worker.num_workers) if worker else (0, 1)
        pixels, targets = [], []
        while True:
            document = make_document(f"{self.split}:{index}")
            index += step
            tiles = document_tiles(document, self.thumbnails)
            pixels.extend(tiles)
            shown = [*document.tiles, *[Tile()] * (len(tiles) - len(document.tiles))]
            targets.extend(self.target(tile) for tile in shown)
            if len(pixels) >= self.batch:
                yield torch.stack(pixels[: self.batch]), torch.stack(targets[: self.batch])
                pixels, targets = pixels[self.batch :], targets[self.batch :]


class DenseHeads(nn.Module):
    """One linear classifier a target, on the vision encoder's patch features."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in TARGETS.values())

    def forward(self, x: Tensor) -> list[Tensor]:
        """Classifies patches.

        Args:
            x: patch features [B, L, C].

        Returns:
            Logits [B, L, classes] per target, in the order of TARGETS.
        """
        x = self.norm(x)
        return [head(x) for head in self.heads]

    def readout(self) -> Tensor:
        """[sum of TARGETS, width]: the directions of a patch's features that tell the targets, of unit length."""
        weights = torch.cat([head.weight for head in self.heads]) * self.norm.weight
        return F.normalize(weights - weights.mean(-1, keepdim=True), dim=-1).detach()


def _loss(outputs: list[Tensor], targets: Tensor) -> Tensor:
    total = outputs[0].new_zeros(())
    for row, logits in enumerate(outputs):
        weight = torch.ones(logits.shape[-1])
        if row < 2:
            weight[0] = BLANK_WEIGHT
        total = total + F.cross_entropy(logits.flatten(0, 1).float(), targets[:, row].flatten(), weight=weight)
    return total


def accuracy(outputs: list[Tensor], targets: Tensor) -> dict[str, float]:
    """Computes the share of right patches per target; for glyph and role, over the patches that hold something.

    Args:
        outputs: logits as of `DenseHeads`.
        targets: int64 [B, len(TARGETS), L].

    Returns:
        Shares, 0 to 1, by target.
    """
    shares = {}
    for row, (name, logits) in enumerate(zip(TARGETS, outputs, strict=True)):
        counted = targets[:, row] > 0 if row < 2 else targets[:, row] != IGNORE
        shares[name] = (logits.argmax(-1) == targets[:, row])[counted].float().mean().item()
    return shares


def pretrain(
    config: VisionConfig,
    seed: int,
    log: Callable[[str], None],
    steps: int = 2000,
    batch: int = 128,
    lr: float = 2e-3,
    compile: bool = True,
) -> tuple[InternViT, DenseHeads]:
    """Trains a vision encoder on the dense target.

    Args:
        config: of the vision encoder.
        seed: of weights and documents.
        log: called with a line now and then.
        steps: number of steps, 2000 by default.
        batch: tiles per step.
        lr: peak learning rate.
        compile: whether torch.compile is used.

    Returns:
        The vision encoder, frozen and in eval mode, and the heads that read it.
    """
    torch.manual_seed(seed)
    encoder, heads = InternViT(config), DenseHeads(config.hidden_size)
    params = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.02)
    _fit(torch.compile(encoder) if compile else encoder, heads, optimizer, _batches(config, seed, batch), steps, log)
    return encoder.eval().requires_grad_(False), heads


def fit_heads(
    encoder: InternViT, seed: int, log: Callable[[str], None], steps: int = 300, batch: int = 128, lr: float = 1e-2
) -> DenseHeads:
    """Trains heads on a vision encoder that has learned its target already; it does not change.

    Args:
        encoder: the vision encoder, in eval mode. It is frozen.
        seed: of weights and documents.
        log: called with a line now and then.
        steps: number of steps, 300 by default.
        batch: tiles per step.
        lr: peak learning rate.

    Returns:
        The heads.
    """
    torch.manual_seed(seed)
    encoder.requires_grad_(False)
    heads = DenseHeads(encoder.config.hidden_size)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    _fit(encoder, heads, optimizer, _batches(encoder.config, seed, batch), steps, log)
    return heads


def _batches(config: VisionConfig, seed: int, batch: int) -> Iterable[tuple[Tensor, Tensor]]:
    stream = TileStream(f"tower:{seed}", batch, partial(dense_target, side=config.image_size // config.patch_size))
    return torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1)


def _fit(
    encode: Callable[[Tensor], Tensor],
    heads: DenseHeads,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    log: Callable[[str], None],
) -> None:
    """Steps at the optimizer's rate, up to it over 100 steps, down to 0 at the last."""
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    lr = optimizer.param_groups[0]["lr"]
    for step, (pixels, targets) in zip(range(steps), batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / 100, 1 - step / steps)
        outputs = heads(encode(pixels))
        loss = _loss(outputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            shares = " ".join(f"{name} {share:.3f}" for name, share in accuracy(outputs, targets).items())
            log(f"vision encoder step {step}/{steps} loss {loss.item():.3f} {shares}")
