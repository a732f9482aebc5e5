"""A picture becomes tiles: which grid it is cut by, and the pixels of each tile.

    plan  = plan_tiles(width, height, image_size)     grid whose cols/rows is nearest to width/height
    tiles = resize to [image_size * rows, image_size * cols], cut row by row, then the thumbnail if there are several
    pixel = (rgb / 255 - MEAN) / STD                  [N, 3, image_size, image_size], fp32

N tiles. A `TilePlan` is made once and everything else (tags, token counts, pixels) is read off it. Sources: NVLM paper
(arXiv 2409.11402) section 4.1 for the ratios; Megatron-LM examples/multimodal/image_processing.py and the
NVLM-D-72B card's `dynamic_preprocess` for the choice. The card converts to RGB before it resizes and Megatron after: we
follow the card. Every error is a ValueError (FileNotFoundError where there is no file) that says what was expected.
"""

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

MAX_PIXELS = 178_956_970  # where Pillow too refuses a decompression bomb; from half of it on, it warns
MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB
STD = (0.229, 0.224, 0.225)

# What Pillow 13's readers raised over 36,000 cut and corrupted files of 20 formats, and EOFError, which seeks raise.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, RuntimeError, struct.error)


@dataclass(frozen=True)
class TilePlan:
    """How a picture is cut into tiles.

    Attributes:
        width: pixels of the picture after EXIF rotation.
        height: pixels of the picture after EXIF rotation.
        cols: columns of the grid.
        rows: rows of the grid.
        image_size: pixels of a tile's side.
    """

    width: int
    height: int
    cols: int
    rows: int
    image_size: int

    @property
    def num_regular(self) -> int:
        """Number of tiles of the grid, without the thumbnail."""
        return self.cols * self.rows

    @property
    def has_thumbnail(self) -> bool:
        """Whether a thumbnail follows the grid: with more than one regular tile."""
        return self.num_regular > 1

    @property
    def num_tiles(self) -> int:
        """Number of tiles, the thumbnail included."""
        return self.num_regular + 1 if self.has_thumbnail else 1


def plan_tiles(width: int, height: int, image_size: int, min_tiles: int = 1, max_tiles: int = 6) -> TilePlan:
    """Chooses the grid of `min_tiles` to `max_tiles` cells that is nearest in aspect ratio.

    Ratios are compared as Python floats, as published: exact fractions tie in other places (1000 x 1200). Of two grids
    equally near, the larger wins only if the picture has more than half as many pixels as its tiles.

    Args:
        width: pixels of the picture, at least 1.
        height: pixels of the picture, at least 1.
        image_size: pixels of a tile's side, at least 1.
        min_tiles: the fewest cells of the grid, 1 by default.
        max_tiles: the most cells of the grid, 6 by default. The thumbnail is not counted.

    Returns:
        The plan.

    Raises:
        ValueError: a size below 1, or not 1 <= min_tiles <= max_tiles.

    Source: NVLM-D-72B card, `dynamic_preprocess`.
    """
    if width < 1 or height < 1:
        raise ValueError(f"plan_tiles: picture is {width} x {height} pixels, expected at least 1 x 1")
    if image_size < 1:
        raise ValueError(f"plan_tiles: image_size is {image_size}, expected at least 1")
    if not 1 <= min_tiles <= max_tiles:
        raise ValueError(f"plan_tiles: tiles are {min_tiles} to {max_tiles}, expected 1 <= min_tiles <= max_tiles")
    best, best_distance = (0, 0), float("inf")
    for cols, rows in grids(min_tiles, max_tiles):
        distance = abs(width / height - cols / rows)
        tie_goes_up = distance == best_distance and width * height > 0.5 * image_size**2 * cols * rows
        if distance < best_distance or tie_goes_up:
            best, best_distance = (cols, rows), distance
    return TilePlan(width, height, *best, image_size)


def grids(min_tiles: int, max_tiles: int) -> list[tuple[int, int]]:
    """Lists the grids that a picture may be cut by.

    Args:
        min_tiles: the fewest cells of a grid.
        max_tiles: the most cells of a grid.

    Returns:
        (cols, rows) of each, sorted by their number of cells.
    """
    sides = range(1, max_tiles + 1)
    found = [(cols, rows) for cols in sides for rows in sides if min_tiles <= cols * rows <= max_tiles]
    return sorted(found, key=lambda grid: grid[0] * grid[1])


def open_image(source: str | Path | Image.Image | np.ndarray) -> Image.Image:
    """Opens one picture, upright by its EXIF tag and in RGB.

    Alpha is dropped, not composited: the published code calls a plain `convert("RGB")`. 16-bit grey is scaled by 1/257
    and rounded; Pillow would clip it to white. Colour profiles are ignored. The source does not change and no file
    stays open.

    Args:
        source: a path, a PIL image, or a uint8 array [H, W], [H, W, 1], [H, W, 3] (RGB) or [H, W, 4] (RGBA).

    Returns:
        A new RGB image of at most `MAX_PIXELS` pixels.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the source is of another type, dtype or shape, or is no complete picture of one frame.
    """
    if isinstance(source, Image.Image):
        return _upright_rgb(source, "the PIL image")
    if isinstance(source, np.ndarray):
        return _upright_rgb(_from_array(source), "the array")
    if not isinstance(source, (str, Path)):
        raise ValueError(f"open_image: expected a path, a PIL image or a numpy array, got {type(source).__name__}")
    try:
        file = Path(source).open("rb")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source} does not exist, expected an image file") from error
    except (OSError, ValueError) as error:  # a directory, no permission, a null byte
        raise ValueError(f"{source} cannot be opened, expected an image file: {error.args[-1]}") from error
    with file:
        if not file.peek(1):  # a pipe cannot seek back
            raise ValueError(f"{source} is empty, expected an image file")
        with _reading(str(source)), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked below
            image = Image.open(file)
        return _upright_rgb(image, str(source))


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise ValueError(
            f"the array is {array.dtype} {list(array.shape)}, expected uint8 (0 to 255) of shape "
            "[H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Pillow's complaints about the picture `name`, in our words."""
    try:
        yield
    except Image.DecompressionBombError as error:
        reason = str(error).rstrip(".")
        raise ValueError(f"{name} is too large to decode, expected at most {MAX_PIXELS} pixels: {reason}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image, expected a format that Pillow reads, such as PNG or JPEG") from error
    except _DAMAGE as error:
        raise ValueError(f"{name} is truncated or damaged, expected a complete image: {error}") from error


def _upright_rgb(image: Image.Image, name: str) -> Image.Image:
    """A new RGB image. Size and frames are checked on the header, before anything is decoded."""
    width, height = image.size
    if not 1 <= width * height <= MAX_PIXELS:
        raise ValueError(f"{name} is {width} x {height} pixels, expected 1 to {MAX_PIXELS} pixels")
    with _reading(name):
        num_frames = getattr(image, "n_frames", 1)
    if num_frames > 1 and image.format != "MPO":  # MPO is a phone's JPEG with a depth map or preview after it
        raise ValueError(f"{name} holds {num_frames} frames, expected a picture of one frame")
    with _reading(name):
        image = ImageOps.exif_transpose(image)
    image.info.pop("transparency", None)  # dropped below in any case; Pillow warns when it has to
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _scale_to_8_bit(image, name)
    if image.mode == "F":
        raise ValueError(f"{name} has float pixels (mode F), expected 8-bit or 16-bit ones")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ValueError(f"{name} has mode {image.mode}, expected one that converts to RGB") from error


def _scale_to_8_bit(image: Image.Image, name: str) -> Image.Image:
    grey = np.asarray(image).astype(np.int32)
    if grey.min() < 0 or grey.max() > 65535:
        raise ValueError(f"{name} has pixels from {grey.min()} to {grey.max()}, expected 16-bit ones of 0 to 65535")
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8))


def cut_tiles(image: Image.Image, plan: TilePlan) -> list[Image.Image]:
    """Cuts a picture into the tiles of its plan.

    The whole picture is resized, so its aspect ratio is not kept; bicubic is the default that published code gets.

    Args:
        image: an RGB image of the plan's width and height, as `open_image` returns it.
        plan: from `plan_tiles`.

    Returns:
        `plan.num_tiles` RGB images of image_size x image_size: the grid row by row, then the thumbnail if any.

    Raises:
        ValueError: the image has another size than the plan, or is not RGB.
    """
    side = plan.image_size
    canvas = _resize_to_grid(image, plan)
    boxes = [(side * c, side * r, side * (c + 1), side * (r + 1)) for r in range(plan.rows) for c in range(plan.cols)]
    tiles = [canvas.crop(box) for box in boxes]
    if plan.has_thumbnail:
        tiles.append(image.resize((side, side), Image.Resampling.BICUBIC))
    return tiles


def _resize_to_grid(image: Image.Image, plan: TilePlan) -> Image.Image:
    if image.size != (plan.width, plan.height):
        raise ValueError(f"picture is {image.width} x {image.height} pixels, its plan {plan.width} x {plan.height}")
    if image.mode != "RGB":
        raise ValueError(f"picture has mode {image.mode}, expected RGB from open_image")
    return image.resize((plan.image_size * plan.cols, plan.image_size * plan.rows), Image.Resampling.BICUBIC)


def tile_pixels(image: Image.Image, plan: TilePlan) -> Tensor:
    """Cuts a picture into tiles and normalises their pixels as for ImageNet.

    Args:
        image: an RGB image of the plan's width and height, as `open_image` returns it.
        plan: from `plan_tiles`.

    Returns:
        Pixels, fp32 [N, 3, image_size, image_size], in the order of `cut_tiles`: in [0, 1] before `MEAN` and `STD`.

    Raises:
        ValueError: as `cut_tiles`.
    """
    tiles = np.stack([np.asarray(tile) for tile in cut_tiles(image, plan)])  # [N, S, S, 3]
    x = torch.from_numpy(tiles).permute(0, 3, 1, 2).contiguous()  # [N, 3, S, S]
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (MEAN, STD))
    return x.to(torch.float32).div_(255).sub_(mean).div_(std)


def check_drawing(path: str | Path) -> None:
    """Checks that a picture can be saved to a path.

    Args:
        path: a file that need not exist. Its folder must, and its suffix must name a format that Pillow writes.

    Raises:
        ValueError: the folder does not exist, or the suffix names no format.
    """
    path = Path(path)
    if path.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"{path}: expected a file ending that names a picture format, such as .png")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: its folder is not there")


def draw_plan(image: Image.Image, plan: TilePlan) -> Image.Image:
    """Draws a plan's grid on its picture, for people: lines between the tiles and each regular tile's number, from 1.

    Args:
        image: an RGB image of the plan's width and height.
        plan: from `plan_tiles`.

    Returns:
        A new image of image_size * cols x image_size * rows pixels, without the thumbnail.

    Raises:
        ValueError: as `cut_tiles`.
    """
    side = plan.image_size
    canvas = _resize_to_grid(image, plan)
    draw = ImageDraw.Draw(canvas)
    line, size = max(1, side // 112), max(8, side // 8)
    for c in range(1, plan.cols):
        draw.line([(side * c, 0), (side * c, canvas.height)], fill="red", width=line)
    for r in range(1, plan.rows):
        draw.line([(0, side * r), (canvas.width, side * r)], fill="red", width=line)
    for i in range(plan.num_regular):
        corner = (side * (i % plan.cols) + size // 4, side * (i // plan.cols) + size // 4)
        font = ImageFont.load_default(size)
        draw.text(corner, str(i + 1), fill="white", font=font, stroke_width=line, stroke_fill="black")
    return canvas
