"""The pages of the documentation, and their code blocks, links and headings."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # the changelog names what is gone
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    """A page's path in the tree, which is its id in a test."""
    return str(page.relative_to(ROOT))


@dataclass(frozen=True)
class Block:
    """A code block: its page, language, text, and the page's line at which the text begins."""

    page: Path
    language: str
    text: str
    line: int

    @property
    def where(self) -> str:
        return f"{name_of(self.page)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """The lines that are shell commands, without a prompt, continued lines joined."""
        lines = (line.removeprefix("$ ").strip() for line in self.text.replace("\\\n", " ").splitlines())
        return [line for line in lines if line and not line.startswith("#")]


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    return [Block(page, m[1], m[2], text[: m.start(2)].count("\n") + 1) for m in FENCE.finditer(text)]


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", page.read_text())


def spans_of(page: Path) -> list[str]:
    """The texts in backticks outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", prose_of(page))


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
