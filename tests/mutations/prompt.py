TESTS = ("tests/inputs/test_prompt.py",)
FILE, MESSAGES = "nvlm_runtime/inputs/prompt.py", "nvlm_runtime/inputs/messages.py"
MUTATIONS = [
    (FILE, "    if len(cells) == 1:\n        cells = []\n", "", "trap 12: a single tile is <tile_1> too"),
    (FILE, 'isolate_tags=style == "megatron" or', "isolate_tags=True or", "trap 17: HF's tags are tokenised alone"),
    (
        FILE,
        'isolate_tags=style == "megatron" or config',
        "isolate_tags=config",
        "trap 17: Megatron's tags are not alone",
    ),
    (FILE, "    if len(positions) != num_tiles * size:", "    if False:", "trap 18: placeholders are not counted"),
    (
        MESSAGES,
        'if role == "user" else [content]',
        "if True else [content]",
        "trap 19: <image> in a system text or the history",
    ),
    (
        FILE,
        'writer.text("\\n" if style == "megatron" else "")',
        'writer.text("\\n")',
        "trap 20: HF's turns end with a newline",
    ),
    (FILE, 'writer.text("\\n" if style == "megatron" else "")', "pass", "trap 20: Megatron's turns end without"),
    (
        FILE,
        "* config.tokens_per_tile",
        "* (config.tokens_per_tile - 1)",
        "trap 22: a placeholder short, 7 tiles are not 1831",
    ),
    (
        FILE,
        'f"<tile_{i}>" for i, _ in enumerate(cells, 1)',
        'f"<tile_{i:02d}>" for i, _ in enumerate(cells, 1)',
        "tags of the later models",
    ),
    (
        FILE,
        "for y in range(rows) for x in range(cols)]",
        "for x in range(cols) for y in range(rows)]",
        "tags column by column",
    ),
    (
        FILE,
        'OPEN, CLOSE = "<Image>", "</Image>"',
        'OPEN, CLOSE = "<img>", "</img>"',
        "trap 31: other words around an image",
    ),
    (MESSAGES, '[IMAGE, "\\n"] * num_images', "[IMAGE] * num_images", "no newline after an image that had no place"),
    (
        FILE,
        'DEFAULT_SYSTEM = "Answer the questions."',
        'DEFAULT_SYSTEM = "Answer the question."',
        "another system message",
    ),
]
