"""Heat maps: images in which the places that receive the most attention are bright and orange."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from nvlm_runtime.inputs.image import TilePlan, draw_plan

COLD_BRIGHTNESS = 0.35  # of a place with weight 0
HOT_COLOR = (255, 120, 0)  # mixed into the place with the largest weight
SMALLEST = 224  # pixels; tiles with a smaller side are enlarged


def draw_heat_map(image: Image.Image, plan: TilePlan, weights: Tensor) -> Image.Image:
    """Draws attention weights over an image, stretched to its tile grid, with the thumbnail beside it if there is one.

    The grid and the thumbnail are scaled separately: the brightest place of each has its own largest weight.

    Args:
        image: The image.
        plan: How the image is cut into tiles.
        weights: fp32 [N, S, S], the weights of the plan's N tiles, the thumbnail last.

    Returns:
        An RGB image.
    """
    side, num, scale = plan.image_size, plan.num_regular, max(1, SMALLEST // plan.image_size)
    grid = weights[:num].unflatten(0, (plan.rows, plan.cols)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    canvas = _heated(draw_plan(image, plan), grid, scale)
    if not plan.has_thumbnail:
        return canvas
    thumbnail = _heated(image.resize((side, side), Image.Resampling.BICUBIC), weights[num], scale)
    left = canvas.width + thumbnail.width // 8
    both = Image.new("RGB", (left + thumbnail.width, canvas.height), "white")
    both.paste(canvas, (0, 0))
    both.paste(thumbnail, (left, 0))
    return both


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """Puts images below one another.

    Args:
        images: At least one image.

    Returns:
        One RGB image on a white ground, with gaps of a sixteenth of the tallest image's height.
    """
    gap = max(image.height for image in images) // 16
    height = sum(image.height for image in images) + gap * (len(images) - 1)
    whole, top = Image.new("RGB", (max(image.width for image in images), height), "white"), 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height + gap
    return whole


def _heated(image: Image.Image, weights: Tensor, scale: int) -> Image.Image:
    """Enlarges the image `scale` times and draws weights [rows, cols] over it."""
    image = image.resize((scale * image.width, scale * image.height), Image.Resampling.BICUBIC)
    relative = (weights / weights.max().clamp(min=1e-12)).numpy()
    layer = Image.fromarray(np.uint8(255 * relative)).resize(image.size, Image.Resampling.BILINEAR)
    heat = np.asarray(layer, np.float32)[..., None] / 255
    pixels = np.asarray(image, np.float32)
    heated = pixels * (COLD_BRIGHTNESS + (1 - COLD_BRIGHTNESS) * heat)
    heated += 0.3 * heat * (np.array(HOT_COLOR, np.float32) - pixels)
    return Image.fromarray(np.uint8(heated.clip(0, 255)))
