"""README and docs name what is there: links, paths, modules, commands, options, fields; in the glossary's words."""

import importlib.util
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest

import nvlm_kernels
import nvlm_runtime
from nvlm_runtime.commands.cli import COMMANDS, _parser
from nvlm_runtime.training.recipe import Recipe
from tests.docs.pages import GUIDES, PAGES, ROOT, anchors_of, blocks_of, name_of, prose_of, spans_of
from tests.test_imports import ORDER

TOP = ("nvlm_kernels/", "nvlm_runtime/", "bench/", "tests/", "examples/", "docs/")
LEFT_OPEN = re.compile(r"NAME|ROOM|FOLDER|FILE|\{")  # a path that a reader completes
# private words that the project does not use any more
OLD_WORDS = re.compile(
    r"\btold\b|behind [1N]|not to be had|(?-i:\bas of [A-Z])|(?<!-)\btowers?\b|\bjoined checkpoints?\b|\bat rest\b"
    r"|\bpictures?\b|\broofs?\b|\bmay_look\b|\bimage slots?\b|\bnvlm look\b|--no-compile|generate_batch|max_rows",
    re.IGNORECASE,
)
ALLOWED = re.compile(r"picture\.png")


def options() -> set[str]:
    """Every option of the nvlm command."""
    (commands,) = [action for action in _parser()._actions if action.dest == "command"]
    return {
        word for parser in commands.choices.values() for action in parser._actions for word in action.option_strings
    }


def table_after(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading, its head left out."""
    text = page.read_text().split(f"{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def names_in(cells: list[str]) -> set[str]:
    return {re.match(r"\w*", word)[0] for cell in cells for word in re.findall(r"`([^`]+)`", cell)}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors_of(file), target


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_paths_exist(page):
    for span in spans_of(page):
        path = span.split(":")[0]
        if path.startswith(TOP) and " " not in path and not LEFT_OPEN.search(path):
            assert list(ROOT.glob(path.rstrip("/"))), span
    for module in re.findall(r"python -m ((?:bench|tests|nvlm_runtime)[\w.]*)", page.read_text()):
        if not LEFT_OPEN.search(module):
            assert importlib.util.find_spec(module.rstrip(".")), module


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_commands_and_options_exist(page):
    texts = [*spans_of(page), *(line for b in blocks_of(page) if b.language != "python" for line in b.commands)]
    for text in texts:
        text = text.split(" # ")[0]
        found = re.match(r"(?:\.venv/bin/)?nvlm ([a-z][\w-]*)", text)
        if not found:
            continue
        assert found[1] in COMMANDS, text
        assert set(re.findall(r"(?<=\s)--[a-z][\w-]*", text)) <= options(), text


def test_options_named_alone_exist():
    others = {
        "--json",
        "--peers",
        "--shape",
        "--against",
        "--quick",
        "--only",
        "--base",
        "--rounds",
        "--check",
        "--dist",
    }
    for page in GUIDES:
        for span in spans_of(page):
            if span.startswith("--"):
                assert set(re.findall(r"--[a-z][\w-]*", span)) <= options() | others, f"{name_of(page)}: {span}"


@pytest.mark.parametrize("page", GUIDES, ids=name_of)
def test_words_are_the_glossarys(page):
    lines = [ALLOWED.sub("", line) for line in page.read_text().splitlines()]
    assert not [line for line in lines if OLD_WORDS.search(line)]


GUIDE, SERVING = ROOT / "docs" / "guide.md", ROOT / "docs" / "serving.md"


def test_the_guide_lists_every_option_of_load():
    shown = names_in([row[0] for row in table_after(GUIDE, "## Load a model")])
    assert shown == set(inspect.signature(nvlm_runtime.NVLM.load).parameters) - {"name", "group", "vision_split"}


def test_the_guide_lists_every_sampling_parameter():
    shown = names_in([row[0] for row in table_after(GUIDE, "## Sampling")])
    assert shown == {field.name for field in fields(nvlm_runtime.GenerationParams)}


def test_the_guide_lists_every_field_of_an_output():
    shown = names_in([row[0] for row in table_after(GUIDE, "## What an answer holds")])
    assert shown == {field.name for field in fields(nvlm_runtime.Output)}


def test_the_guide_lists_every_command():
    rows = table_after(GUIDE, "## The shell")
    assert {re.match(r"`nvlm ([\w-]+)", row[0])[1] for row in rows} == set(COMMANDS)


def test_serving_lists_every_size_of_an_engine():
    shown = names_in([row[0] for row in table_after(SERVING, "## The engine")])
    assert shown == set(inspect.signature(nvlm_runtime.Engine).parameters) - {"model"}


def test_training_lists_every_key_of_a_recipe():
    shown = names_in([row[0] for row in table_after(ROOT / "docs" / "training.md", "## Fine-tuning")])
    assert shown == {field.name for field in fields(Recipe)}


def test_kernels_lists_every_function():
    shown = names_in([row[0] for row in table_after(ROOT / "docs" / "kernels.md", "## The functions")])
    assert shown == {name for name in nvlm_kernels.__all__ if name.islower()}


ARCHITECTURE = ROOT / "docs" / "architecture.md"


def test_the_changelog_lists_what_is_exported():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert not [name for name in nvlm_runtime.__all__ if name not in text]


def test_the_rooms_are_the_folders():
    shown = [
        re.search(r"`nvlm_runtime/([^`]+)`", row[0])[1] for row in table_after(ARCHITECTURE, "## The runtime's rooms")
    ]
    rooms = {path.name + "/" for path in (ROOT / "nvlm_runtime").iterdir() if (path / "__init__.py").is_file()}
    files = {path.name for path in (ROOT / "nvlm_runtime").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(shown) == rooms | files
    assert [name.removesuffix("/").removesuffix(".py") for name in shown] == list(ORDER), "in the order of imports"


def test_every_module_of_the_rooms_is_named():
    text = ARCHITECTURE.read_text()
    modules = {p.stem for p in (ROOT / "nvlm_runtime").glob("*/*.py")} - {"__init__"}
    assert not {name for name in modules if f"`{name}`" not in text}


@pytest.mark.parametrize("package", ["nvlm_kernels", "nvlm_runtime"])
def test_words_of_the_code_are_plain(package):
    old = re.compile(r"\btold\b|behind 1|not to be had|\bas of [A-Z]")
    files = [path for path in (ROOT / package).rglob("*") if path.suffix in (".py", ".h", ".cpp")]
    lines = [(str(path.relative_to(ROOT)), line) for path in files for line in path.read_text().splitlines()]
    assert not [(path, line) for path, line in lines if old.search(line)]
