"""Rendered documents the micro models learn to read: receipts, labels, tables and signs over all 14 tile grids.

A document is laid out in tile units: every regular tile is a cell of SIDE x SIDE units that holds at most two lines
of text or a shape and a line, so each is small enough to vanish in the thumbnail. `draw` renders it at two to three
pixels a unit, the way a scan would be, and the model's own tiler brings it back to SIDE pixels a tile.
"""

import random
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nvlm_runtime.inputs.image import plan_tiles

SIDE = 64
GRIDS = tuple((c, r) for c in range(1, 7) for r in range(1, 7) if c * r <= 6)
CHARS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789."
LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"  # of codes: no I, O, Q, as on number plates
COLOURS = {
    "black": (25, 25, 25),
    "red": (205, 25, 30),
    "green": (10, 130, 45),
    "blue": (25, 60, 215),
    "purple": (140, 30, 170),
    "orange": (230, 120, 0),
}
SHAPES = ("circle", "square", "triangle", "star")
FIELDS = {
    "receipt": ("TOTAL", "TAX", "CASH"),
    "label": ("WEIGHT", "LOT", "PRICE"),
    "table": ("TOTAL", "ROW", "SCORE"),
    "sign": ("GATE", "ROOM", "EXIT"),
}
LABELS = tuple(sorted({label for labels in FIELDS.values() for label in labels}))
PAPERS = ((255, 255, 255), (252, 247, 230), (238, 240, 244), (230, 240, 252), (232, 246, 232), (252, 236, 238))
WORDS = (
    "APPLE BREAD MILK TEA COFFEE SUGAR SALT RICE FISH MEAT LEMON ONION HONEY BUTTER CREAM JUICE WATER SOUP CAKE PLUM "
    "GRAPE MELON PEACH OLIVE BEAN CORN EGG HAM NUT PIE NORTH SOUTH EAST WEST PLATE GLASS SPOON KNIFE FORK BOWL LAMP "
    "CHAIR TABLE DOOR WALL ROOF STONE PAPER CLOCK PHONE RADIO PIANO DRUM FLUTE HORSE TIGER ZEBRA MOUSE SHEEP GOAT "
    "CAMEL EAGLE RAVEN SWAN DUCK WOLF FOX BEAR LION FROG SNAKE RIVER OCEAN ISLAND FOREST DESERT VALLEY CLOUD STORM "
    "WIND SNOW RAIN SUN MOON STAR PLANET ROCKET ENGINE WHEEL BRIDGE TUNNEL TRAIN PLANE BOAT TRUCK BIKE VAN QUEUE "
    "JACKET SHIRT SHOE HAT SCARF GLOVE BELT COAT SOCK RING PEARL GOLD SILVER IRON STEEL WOOD CLAY SAND BRICK TILE "
    "MUSIC DANCE ACTOR MOVIE NOVEL POEM STORY PEN BRUSH PAINT CANVAS MARKET BANK HOTEL SCHOOL CHURCH CASTLE TOWER "
    "GARDEN FLOWER ROSE TULIP GRASS LEAF ROOT SEED TREE MAPLE CEDAR PINE OAK WINTER SPRING SUMMER AUTUMN MONDAY "
    "FRIDAY SUNDAY APRIL JUNE JULY DOCTOR NURSE PILOT BAKER FARMER SAILOR KING QUEEN PRINCE KNIGHT WIZARD DRAGON"
).split()


@dataclass(frozen=True)
class Line:
    """Text on a fixed pitch. x, y: left edge and middle in units inside the tile; role: word, number, label, value."""

    text: str
    role: str
    colour: str
    x: float
    y: float
    pitch: float
    height: float

    def centres(self) -> list[tuple[float, float]]:
        """Returns the (x, y) of each character's centre, in units of the tile."""
        return [(self.x + (i + 0.5) * self.pitch, self.y) for i in range(len(self.text))]


@dataclass(frozen=True)
class Shape:
    """A coloured shape of a tile, at (x, y) in units of the tile."""

    name: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass
class Tile:
    """What one tile of a document shows."""

    lines: list[Line] = field(default_factory=list)
    shape: Shape | None = None

    def only(self, role: str) -> Line | None:
        """Returns the tile's line of a role, None unless it has exactly one.

        Args:
            role: as in `Line.role`.
        """
        found = [line for line in self.lines if line.role == role]
        return found[0] if len(found) == 1 else None

    @property
    def label(self) -> str | None:
        """Text of the tile's label; None unless it has exactly one."""
        line = self.only("label")
        return line.text if line else None


@dataclass
class Document:
    """cols x rows cells in reading order; width, height: the picture's pixels."""

    kind: str
    cols: int
    rows: int
    width: int
    height: int
    paper: tuple[int, int, int]
    noise: float
    tiles: list[Tile]
    seed: str


def _number(rng: random.Random) -> str:
    style = rng.randrange(3)
    if style == 0:
        return f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d}"
    return str(rng.randint(10, 99) if style == 1 else rng.randint(100, 9999))


def _value(rng: random.Random, label: str) -> str:
    if label in ("GATE", "ROOM", "ROW", "EXIT", "LOT"):
        return rng.choice(LETTERS) + str(rng.randint(1, 999))
    return _number(rng)


def _line(rng: random.Random, text: str, role: str, colour: str, top: float, bottom: float) -> Line:
    """A line somewhere in the band [top, bottom] of a tile: a pitch of 8 units or more, so one glyph a patch column."""
    height = rng.uniform(11.0, 14.0)
    pitch = rng.uniform(8.6, min(10.2, (SIDE - 5.5) / len(text)))
    x = rng.uniform(2.5, SIDE - 2.5 - pitch * len(text))
    return Line(text, role, colour, x, rng.uniform(top + height / 2, bottom - height / 2), pitch, height)


def _tile(rng: random.Random, labels: list[str]) -> Tile:
    content = rng.choice(
        ("word", "number", "word number", "word number", "shape word", "shape number", "shape", "field")
    )
    if content == "field" and not labels:
        content = "word number"
    parts = content.split()
    rng.shuffle(parts)
    colour = rng.choice(list(COLOURS))
    tile = Tile()
    middle = SIDE / 2 + rng.uniform(-4, 4)
    bands = [(3, middle - 1), (middle + 1, SIDE - 3)] if len(parts) == 2 or content == "field" else [(3, SIDE - 3)]
    if content == "field":
        label = labels.pop()
        tile.lines.append(_line(rng, label, "label", colour, *bands[0]))
        tile.lines.append(_line(rng, _value(rng, label), "value", colour, *bands[1]))
        return tile
    for part, (top, bottom) in zip(parts, bands, strict=True):
        if part == "shape":
            radius = rng.uniform(8.5, 11.5)
            x = rng.uniform(radius + 3, SIDE - radius - 3)
            y = rng.uniform(top + radius, bottom - radius) if bottom - top > 2 * radius else (top + bottom) / 2
            tile.shape = Shape(rng.choice(SHAPES), rng.choice(list(COLOURS)), x, y, radius)
        else:
            text = rng.choice(WORDS) if part == "word" else _number(rng)
            tile.lines.append(_line(rng, text, part, rng.choice((colour, rng.choice(list(COLOURS)))), top, bottom))
    return tile


def make_document(seed: str, grid: tuple[int, int] | None = None) -> Document:
    """Makes the document of a seed, the same on every machine.

    Args:
        seed: any text.
        grid: (cols, rows) of tiles; None draws one from the seed.

    Returns:
        The document.
    """
    rng = random.Random(seed)
    cols, rows = rng.choice(GRIDS) if grid is None else grid
    kind = rng.choice(tuple(FIELDS))
    labels = rng.sample(FIELDS[kind], len(FIELDS[kind]))
    tiles = [_tile(rng, labels) for _ in range(cols * rows)]
    scale = rng.uniform(1.0, 1.3) if (cols, rows) == (1, 1) else rng.uniform(2.0, 3.0)
    stretch = rng.uniform(0.97, 1.03)
    width, height = round(SIDE * cols * scale * stretch), round(SIDE * rows * scale)
    plan = plan_tiles(width, height, SIDE)
    assert (plan.cols, plan.rows) == (cols, rows), "the picture's size must lead the tiler back to the grid"
    return Document(kind, cols, rows, width, height, rng.choice(PAPERS), rng.uniform(0, 7), tiles, seed)


@cache
def _glyph(char: str) -> Image.Image:
    """A glyph's coverage, cropped to its own width, cap height filling the picture."""
    font = ImageFont.load_default(64)
    left, _, right, _ = font.getbbox(char)
    _, top, _, bottom = font.getbbox("H")
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), char, fill=255, font=font, stroke_width=1)
    return mask


def _draw_line(image: Image.Image, line: Line, left: float, top: float, sx: float, sy: float) -> None:
    for char, (x, y) in zip(line.text, line.centres(), strict=True):
        mask = _glyph(char)
        height = max(1, round(line.height * sy))
        natural = mask.width * line.height / mask.height
        width = max(1, round(min(natural, line.pitch - 0.9) * sx))
        mask = mask.resize((width, height), Image.Resampling.BILINEAR)
        at = round((left + x) * sx - width / 2), round((top + y - line.height / 2) * sy)
        image.paste(COLOURS[line.colour], (*at, at[0] + width, at[1] + height), mask)


def _draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, left: float, top: float, sx: float, sy: float) -> None:
    x, y, rx, ry = (left + shape.x) * sx, (top + shape.y) * sy, shape.radius * sx, shape.radius * sy
    fill = COLOURS[shape.colour]
    if shape.name == "circle":
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)
    elif shape.name == "square":
        draw.rectangle((x - 0.85 * rx, y - 0.85 * ry, x + 0.85 * rx, y + 0.85 * ry), fill=fill)
    elif shape.name == "triangle":
        draw.polygon([(x, y - ry), (x + rx, y + 0.8 * ry), (x - rx, y + 0.8 * ry)], fill=fill)
    else:
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        reach = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
        draw.polygon(list(zip(x + rx * reach * np.cos(angles), y + ry * reach * np.sin(angles))), fill=fill)


def _draw_frame(draw: ImageDraw.ImageDraw, document: Document, sx: float, sy: float) -> None:
    """What tells a receipt from a sign: dashes between rows, cell borders, a frame."""
    ink = tuple(max(0, c - 60) for c in document.paper)
    width, height = document.width, document.height
    pen = max(1, round(0.7 * sx))
    for row in range(1, document.rows):
        y = row * SIDE * sy
        if document.kind == "receipt":
            for x in np.arange(2 * sx, width, 8 * sx):
                draw.line((x, y, x + 4 * sx, y), fill=ink, width=pen)
        elif document.kind == "table":
            draw.line((0, y, width, y), fill=ink, width=pen)
    if document.kind == "table":
        for col in range(1, document.cols):
            draw.line((col * SIDE * sx, 0, col * SIDE * sx, height), fill=ink, width=pen)
    if document.kind in ("label", "sign"):
        draw.rectangle((0, 0, width - 1, height - 1), outline=ink, width=pen * (2 if document.kind == "sign" else 1))


def draw(document: Document) -> Image.Image:
    """Draws a document.

    Args:
        document: the document.

    Returns:
        An RGB image of the document's width and height.
    """
    image = Image.new("RGB", (document.width, document.height), document.paper)
    pen = ImageDraw.Draw(image)
    sx = document.width / (SIDE * document.cols)
    sy = document.height / (SIDE * document.rows)
    _draw_frame(pen, document, sx, sy)
    for index, tile in enumerate(document.tiles):
        top, left = (SIDE * at for at in divmod(index, document.cols))
        if tile.shape:
            _draw_shape(pen, tile.shape, left, top, sx, sy)
        for line in tile.lines:
            _draw_line(image, line, left, top, sx, sy)
    if document.noise < 1:
        return image
    rng = np.random.default_rng(random.Random(document.seed).getrandbits(63))
    noise = rng.normal(0, document.noise, (document.height, document.width, 1))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
