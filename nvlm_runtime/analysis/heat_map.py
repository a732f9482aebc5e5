"""Pictures for people of what a model looked at: warm where it read most."""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from nvlm_runtime.inputs.image import TilePlan, draw_plan

DARK, WARM = 0.35, (255, 120, 0)  # brightness of what was not looked at, and the colour of what was most
SMALLEST = 224  # pixels of a tile's side: smaller ones are enlarged


def draw_heat(image: Image.Image, plan: TilePlan, weights: Tensor) -> Image.Image:
    """The picture as its grid stretches it, with its tiles' lines; beside it the thumbnail, where there is one.

    weights: [N, S, S] of the plan's tiles. The warmest place of each of the two is its own largest weight.
    """
    side, num, times = plan.image_size, plan.num_regular, max(1, SMALLEST // plan.image_size)
    grid = weights[:num].unflatten(0, (plan.rows, plan.cols)).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    canvas = _warm(draw_plan(image, plan), grid, times)
    if not plan.has_thumbnail:
        return canvas
    thumbnail = _warm(image.resize((side, side), Image.Resampling.BICUBIC), weights[num], times)
    left = canvas.width + thumbnail.width // 8
    both = Image.new("RGB", (left + thumbnail.width, canvas.height), "white")
    both.paste(canvas, (0, 0))
    both.paste(thumbnail, (left, 0))
    return both


def stack(pictures: Sequence[Image.Image]) -> Image.Image:
    """One above the other."""
    gap = max(picture.height for picture in pictures) // 16
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    whole, at = Image.new("RGB", (max(picture.width for picture in pictures), height), "white"), 0
    for picture in pictures:
        whole.paste(picture, (0, at))
        at += picture.height + gap
    return whole


def _warm(picture: Image.Image, weights: Tensor, times: int) -> Image.Image:
    """weights: [rows, cols], over the picture enlarged so many times."""
    picture = picture.resize((times * picture.width, times * picture.height), Image.Resampling.BICUBIC)
    heat = (weights / weights.max().clamp(min=1e-12)).numpy()
    heat = Image.fromarray(np.uint8(255 * heat)).resize(picture.size, Image.Resampling.BILINEAR)
    heat = np.asarray(heat, np.float32)[..., None] / 255
    pixels = np.asarray(picture, np.float32)
    pixels = pixels * (DARK + (1 - DARK) * heat) + 0.3 * heat * (np.array(WARM, np.float32) - pixels)
    return Image.fromarray(np.uint8(pixels.clip(0, 255)))
