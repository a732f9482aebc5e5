TESTS = ("tests/checkpoint/test_composite.py",)
FILE, SOURCES = "nvlm_runtime/checkpoint/composite.py", "nvlm_runtime/checkpoint/sources.py"
ASSEMBLY = "nvlm_runtime/checkpoint/assembly.py"
MUTATIONS = [
    (FILE, "if (found := text_model_digest(text)) != text_digest:", "if False:", "any text model will do"),
    (
        SOURCES,
        '[path / "config.json", *sorted(path.glob("*.safetensors"))]',
        '[path / "config.json"]',
        "no weights in the hash",
    ),
    (FILE, "if not composed[name].equal(wanted[name])", "if False", "a text model that has learnt is left out"),
    (
        FILE,
        'if not (whole / "config.json").is_file():\n        if',
        "if True:\n        if",
        "put together at every load",
    ),
    (
        FILE,
        "if wrong := set(tensors) ^ set(entries):",
        "if wrong := set(tensors) - set(entries):",
        "missing tensors stay as drawn",
    ),
    (FILE, " + (folder / SINGLE).read_bytes()", "", "other weights under the same name"),
    (
        FILE,
        'if not (whole / "config.json").is_file():  # else',
        "if True:  # else",
        "another process must not be first",
    ),
    (ASSEMBLY, "shutil.rmtree(partial, ignore_errors=True)", "pass", "what was refused stays half written"),
]
