"""Questions about a rendered document, with the one right answer each.

Kinds: `tile` and `read` name a tile by its number, `position` a corner, `colour`, `shape` and `field` what the
picture shows. A question is asked only where the document has exactly one answer to it.
"""

from dataclasses import dataclass

from nvlm_runtime.micro.document import COLOURS, SHAPES, Document

KINDS = ("tile", "read", "position", "colour", "shape", "field")


@dataclass(frozen=True)
class Question:
    """A question about a document and its right answer."""

    kind: str
    text: str
    answer: str


def _by_tile(document: Document) -> list[Question]:
    found = []
    for number, tile in enumerate(document.tiles, start=1):
        for role in ("word", "number"):
            if line := tile.only(role):
                found.append(Question("tile", f"What {role} is in tile {number}?", line.text))
                found.append(Question("tile", f"What colour is the {role} in tile {number}?", line.colour))
        if tile.shape:
            found.append(Question("tile", f"What shape is in tile {number}?", tile.shape.name))
            found.append(Question("tile", f"What colour is the shape in tile {number}?", tile.shape.colour))
        if tile.lines:
            lines = sorted(tile.lines, key=lambda line: line.y)
            found.append(Question("read", f"Read tile {number}.", " ".join(line.text for line in lines)))
    return found


def _by_position(document: Document) -> list[Question]:
    if document.rows == 1:
        ends = ("left", "right")
    else:
        ends = ("top", "bottom") if document.cols == 1 else ("top left", "bottom right")
    found = []
    for end, tile in zip(ends, (document.tiles[0], document.tiles[-1]), strict=True):
        for role in ("word", "number"):
            if line := tile.only(role):
                found.append(Question("position", f"What {role} is at the {end}?", line.text))
        if tile.shape:
            found.append(Question("position", f"What shape is at the {end}?", tile.shape.name))
    return found


def _by_look(document: Document) -> list[Question]:
    found = []
    lines = [line for tile in document.tiles for line in tile.lines]
    shapes = [tile.shape for tile in document.tiles if tile.shape]
    for colour in COLOURS:
        for role in ("word", "number"):
            texts = [line.text for line in lines if line.role == role and line.colour == colour]
            if len(texts) == 1:
                found.append(Question("colour", f"What is the {colour} {role}?", texts[0]))
        names = [shape.name for shape in shapes if shape.colour == colour]
        if len(names) == 1:
            found.append(Question("shape", f"What shape is {colour}?", names[0]))
    for name in SHAPES:
        colours = [shape.colour for shape in shapes if shape.name == name]
        if len(colours) == 1:
            found.append(Question("shape", f"What colour is the {name}?", colours[0]))
    for tile in document.tiles:
        if tile.label:
            found.append(Question("field", f"What is the {tile.label.lower()}?", tile.only("value").text))
    return found


def transcription(document: Document) -> Question:
    """Asks for all that the image shows, tile by tile: dense supervision for reading, in training alone.

    Args:
        document: the document.

    Returns:
        The question.
    """
    rows = []
    for number, tile in enumerate(document.tiles, start=1):
        parts = [f"{tile.shape.colour} {tile.shape.name}"] if tile.shape else []
        parts += [line.text for line in sorted(tile.lines, key=lambda line: line.y)]
        rows.append(" ".join(parts) if len(document.tiles) == 1 else f"{number} {' '.join(parts)}")
    return Question("page", "Read the picture.", "\n".join(rows))


def questions(document: Document) -> list[Question]:
    """Lists every question that a document answers, in a fixed order.

    Args:
        document: the document.

    Returns:
        The questions, perhaps none.
    """
    if len(document.tiles) == 1:
        return _by_look(document)
    return _by_tile(document) + _by_position(document) + _by_look(document)
