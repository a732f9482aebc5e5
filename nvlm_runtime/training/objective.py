"""A micro-batch to its loss, from pixels on, as one module: what a training step runs, and what FSDP shares out."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from nvlm_runtime.inputs.layout import Layout, unseen_image
from nvlm_runtime.model.features import Features
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.training.flops import vision_learns
from nvlm_runtime.training.loss import token_loss
from nvlm_runtime.training.packing import PackedBatch


class Objective(nn.Module):
    """`forward(batch, loss_rows)`: the sum of a micro-batch's cross-entropies, fp32 scalar.

    evenly: every call runs every module once, whatever the batch holds, and gives every weight that learns a gradient:
    ranks that share weights out meet in each module. A batch without a picture gets one that no token sees; its
    gradients are zero.
    """

    def __init__(self, model: NVLMModel, evenly: bool = False):
        super().__init__()
        self.model, self.evenly = model, evenly

    def features(self, tiles: Tensor) -> Features:
        """Runs the vision encoder, with a gradient where it learns.

        Args:
            tiles: pixels, [N, 3, S, S]. N may be 0.

        Returns:
            What the projector takes of N tiles.
        """
        vision = self.model.config.vision
        weight = self.model.language_model.embed_tokens.weight
        if not len(tiles):
            return Features(weight.new_zeros(0, vision.num_patches, vision.hidden_size))
        with torch.set_grad_enabled(vision_learns(self.model)):
            return self.model.encode(tiles.to(weight.device, weight.dtype))

    def forward(self, batch: PackedBatch, loss_rows: int) -> Tensor:
        """Computes the loss of a micro-batch.

        Args:
            batch: the micro-batch.
            loss_rows: `rows` of `token_loss`.

        Returns:
            The sum of the cross-entropies, an fp32 scalar.
        """
        if self.evenly:
            batch = with_unseen_image(self.model, batch)
            together = self.features(torch.cat(batch.pixel_values))
            features = together.split([len(tiles) for tiles in batch.pixel_values])
        else:
            features = [self.features(tiles) for tiles in batch.pixel_values]
        device = self.model.language_model.embed_tokens.weight.device
        ids, labels = batch.input_ids.to(device), batch.labels.to(device)
        hidden = self.model(ids, batch.layouts, features, batch.documents)
        return token_loss(self.model.language_model, hidden, labels, loss_rows)


def with_unseen_image(model: NVLMModel, batch: PackedBatch) -> PackedBatch:
    """Adds an image of one black tile to a batch without images; no interval reaches it and it has no placeholder.

    Args:
        model: whose configuration counts.
        batch: the micro-batch.

    Returns:
        `batch` itself where it holds an image; else a copy with one in its first sequence.
    """
    if any(layout.images for layout in batch.layouts):
        return batch
    image, size = unseen_image(model.config), model.config.vision.image_size
    return replace(
        batch,
        layouts=(Layout((image,), batch.layouts[0].intervals), *batch.layouts[1:]),
        pixel_values=(torch.zeros(1, 3, size, size), *batch.pixel_values[1:]),
    )
