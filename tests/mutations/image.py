TESTS = ("tests/inputs/test_image.py",)
FILE = "nvlm_runtime/inputs/image.py"
MUTATIONS = [
    (FILE, "- cols / rows)", "- rows / cols)", "trap 11: grids are (rows, cols)"),
    (
        FILE,
        "for r in range(plan.rows) for c in range(plan.cols)]\n    tiles",
        "for c in range(plan.cols) for r in range(plan.rows)]\n    tiles",
        "trap 11: tiles column by column",
    ),
    (FILE, "tiles.append(image.resize", "tiles.insert(0, image.resize", "trap 11: the thumbnail is first"),
    (
        FILE,
        "if plan.has_thumbnail:\n        tiles",
        "if True:\n        tiles",
        "trap 12: a single tile has a thumbnail",
    ),
    (FILE, "> 0.5 * image_size", "> 0.4 * image_size", "trap 13: a tie goes up from 0.4 of the area"),
    (FILE, "if distance < best_distance or tie_goes_up", "if distance < best_distance", "trap 13: a tie never goes up"),
    (
        FILE,
        "abs(width / height - cols / rows)",
        "abs(Fraction(width, height) - Fraction(cols, rows))",
        "trap 13: exact fractions",
    ),
    (
        FILE,
        "key=lambda grid: grid[0] * grid[1]",
        "key=lambda grid: -grid[0] * grid[1]",
        "trap 13: from the largest grid down",
    ),
    (FILE, '        return image.convert("RGB")', "        return image", "trap 14: no RGB before the resize"),
    (FILE, "max_tiles: int = 6)", "max_tiles: int = 12)", "trap 15: up to 12 tiles"),
    (FILE, "MEAN = (0.485, 0.456, 0.406)", "MEAN = (0.5, 0.5, 0.5)", "another mean"),
    (
        FILE,
        "canvas = _resize_to_grid(image, plan)\n    boxes",
        "canvas = ImageOps.pad(image, (side * plan.cols, side * plan.rows))\n    boxes",
        "the aspect ratio is kept",
    ),
]
