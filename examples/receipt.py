"""Draws examples/receipt.png, a document of the kind the micro models read: python examples/receipt.py"""

from pathlib import Path

from nvlm_runtime.micro.document import SIDE, Document, Line, Tile, draw

ROWS = (
    ("MILK", "word", "1.20", "number", "blue"),
    ("BREAD", "word", "2.50", "number", "black"),
    ("COFFEE", "word", "6.40", "number", "green"),
    ("HONEY", "word", "7.30", "number", "orange"),
    ("TAX", "label", "1.45", "value", "black"),
    ("TOTAL", "label", "17.40", "value", "red"),
)


def receipt() -> Document:
    tiles = []
    for name, name_role, price, price_role, colour in ROWS:
        left, pitch = 4.0, 9.3
        right = SIDE - 4.0 - pitch * len(price)
        tiles.append(
            Tile(
                [
                    Line(name, name_role, colour, left, 19.0, pitch, 12.5),
                    Line(price, price_role, colour, right, 43.0, pitch, 12.5),
                ]
            )
        )
    scale = 4
    return Document("receipt", 2, 3, 2 * SIDE * scale, 3 * SIDE * scale, (252, 247, 230), 3.0, tiles, "receipt")


if __name__ == "__main__":
    draw(receipt()).save(Path(__file__).with_name("receipt.png"))
