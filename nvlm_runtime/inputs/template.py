"""A checkpoint's own chat template, run in jinja2's sandbox, which never sees what was said.

Every text and every picture of a conversation is one private-use character to the template, and stands again where the
template wrote that character. So no text can forge a special token, whatever is typed and whatever the template does
with it; one that leaves a text or a picture out, writes it twice or swaps pictures is refused, not guessed at.

What the template can and cannot do with a content:
    the blanks around a text are passed as they are, so `trim`, `strip` and the like do what they would;
    the words are opaque: `'x' in content` is False, its length is 1, `upper` changes nothing, `split` cuts nothing out;
    an empty text is "", and false.
A content is a string, pictures among its words, as Qwen2-VL's and InternVL's templates take it; a template that loops
over contents and never asks whether one is a string (Llama 3.2 Vision's shape) gets [{"type": "text", "text": ...}],
or [] for nothing. A part of type "image" is never passed: a template would write another model's placeholder for it.

The sandbox refuses Python's inner attributes, changes to its arguments and ranges above its MAX_RANGE; more than
MAX_WRITTEN characters are refused here. A template that computes much and writes nothing is not stopped.
Sources: transformers' chat_template_utils (the environment), tokenization_utils_base and processing_utils (the files).
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

JINJA_FILE, JSON_FILE, CONFIG_FILE = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FIRST_MARK, LAST_MARK = 0xF0000, 0xFFFFD  # plane 15: assigned to nobody, unchanged by case and by NFC
MARK = re.compile(f"([{chr(FIRST_MARK)}-{chr(LAST_MARK)}])")
MAX_WRITTEN = 2**20  # characters, the texts of the conversation not counted


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation. `own`: the template's words, not the caller's. text: None is a picture."""

    text: str | None
    own: bool


class ChatTemplate:
    """A compiled template. variables: what it sees beside the conversation, "bos_token" and its like.

    ValueError if `source` is no text or no jinja2 template.
    """

    def __init__(self, source: str, variables: Mapping[str, str] | None = None):
        if not isinstance(source, str):
            raise ValueError(f"a chat template is a string, got {source!r:.60}")
        self.source, self.variables = source, dict(variables or {})
        environment = _environment()
        try:
            self.wants_parts = _wants_parts(environment.parse(source))
            self._compiled: Template = environment.from_string(source)
        except Exception as error:  # constants are folded here: a template's own arithmetic can raise anything
            raise ValueError(f"the chat template does not compile: {_words(error)}") from error

    @classmethod
    def load(cls, folder: str | Path) -> "ChatTemplate | None":
        """Reads a checkpoint's template: `JINJA_FILE`, else `JSON_FILE`, else the "chat_template" of `CONFIG_FILE`.

        Args:
            folder: the checkpoint's folder.

        Returns:
            The template, "default" of a list of named ones; None if the folder has none.

        Raises:
            ValueError: a file is damaged or holds no template, or the first two differ: transformers' tokenizer would
                take one, its processor the other.
        """
        folder = Path(folder)
        config = _read_object(folder / CONFIG_FILE)
        sources = {}
        if (folder / JINJA_FILE).is_file():
            sources[JINJA_FILE] = _read_text(folder / JINJA_FILE)
        if (folder / JSON_FILE).is_file():
            sources[JSON_FILE] = _default_of(_read_object(folder / JSON_FILE).get("chat_template"), folder / JSON_FILE)
        if len(set(sources.values())) > 1:
            raise ValueError(f"{folder}: {JINJA_FILE} and {JSON_FILE} hold different chat templates, keep one of them")
        if not sources and config.get("chat_template") is not None:
            sources[CONFIG_FILE] = _default_of(config["chat_template"], folder / CONFIG_FILE)
        if not sources:
            return None
        name, source = next(iter(sources.items()))
        try:
            return cls(source, _tokens(config, folder / CONFIG_FILE))
        except ValueError as error:
            raise ValueError(f"{folder / name}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Writes `JINJA_FILE`, and the variables into a new `CONFIG_FILE`, as `load` reads them.

        Args:
            folder: an existing folder.
        """
        Path(folder, JINJA_FILE).write_text(self.source, "utf-8")
        Path(folder, CONFIG_FILE).write_text(json.dumps(self.variables, indent=2) + "\n", "utf-8")

    def render(self, turns: Sequence[tuple[str, Sequence[str | None]]], generation: bool) -> list[Piece]:
        """Writes a conversation as the template does.

        Args:
            turns: role and parts of each message; a part is a text, or None for an image.
            generation: whether the beginning of an answer follows the last turn.

        Returns:
            The pieces of the conversation in order, each the template's own text or a part that was given.

        Raises:
            ValueError: the template fails or raises, drops or repeats a part, or moves an image before another.
        """
        parts: list[tuple[int, str | None]] = []  # number of the message, and what its mark stands for
        messages = []
        for number, (role, texts) in enumerate(turns, 1):
            content = ""
            for text in texts:
                before, core, after = ("", text, "") if text is None else _blanks_around(text)
                mark = "" if core == "" else chr(FIRST_MARK + len(parts))
                parts += [(number, core)] if mark else []
                content += before + mark + after
                if len(parts) > LAST_MARK - FIRST_MARK:
                    raise ValueError(f"a chat template takes at most {LAST_MARK - FIRST_MARK} parts")
            if self.wants_parts:
                content = [{"type": "text", "text": content}] if content else []
            messages.append({"role": role, "content": content})
        written = MARK.split(self._write(messages, generation))
        _check_marks([ord(mark) - FIRST_MARK for mark in written[1::2]], parts)
        pieces = []
        for text, mark in zip(written[::2], [*written[1::2], None], strict=True):
            pieces += [Piece(text, own=True)] if text else []
            pieces += [Piece(parts[ord(mark) - FIRST_MARK][1], own=False)] if mark else []
        return pieces

    def _write(self, messages: list[dict[str, Any]], generation: bool) -> str:
        values = {"tools": None, "documents": None, **self.variables}
        stream = self._compiled.generate(messages=messages, add_generation_prompt=generation, **values)
        texts, num_written = [], 0
        try:
            for text in stream:
                texts.append(text)
                num_written += len(text)
                if num_written > MAX_WRITTEN:
                    raise TemplateError(f"it writes more than {MAX_WRITTEN} characters")
        except Exception as error:  # a template is a program: whatever it raises is its own failure
            raise ValueError(f"the chat template failed: {_words(error)}") from error
        return "".join(texts)


def _check_marks(found: Sequence[int], parts: Sequence[tuple[int, str | None]]) -> None:
    counts = Counter(found)
    for index, (number, text) in enumerate(parts):
        if counts[index] != 1:
            what = "an image" if text is None else "text"
            how = "dropped" if not counts[index] else "repeated"
            raise ValueError(f"the chat template {how} {what} of message {number}")
    if len(counts) > len(parts):
        raise ValueError("the chat template writes a private-use character of plane 15, which stands for a text")
    pictures = [index for index in found if parts[index][1] is None]
    if pictures != sorted(pictures):
        raise ValueError("the chat template changed the order of the images")


def _blanks_around(text: str) -> tuple[str, str, str]:
    core = text.strip()
    if not core:
        return text, "", ""
    start = len(text) - len(text.lstrip())
    return text[:start], core, text[start + len(core) :]


def _words(error: Exception) -> str:
    said = str(error) or "no message"
    return said if isinstance(error, TemplateError) else f"{type(error).__name__}: {said}"


class _Generation(Extension):
    """`{% generation %}`, by which trainers find the answers, is a scope and writes what is in it."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Namespace(Namespace):
    """A namespace without inner names: jinja2 calls what it finds under `__call__` without asking the sandbox."""

    def __init__(*args, **kwargs):  # as in jinja2: a template may say namespace(self=...)
        self, args = args[0], args[1:]
        Namespace.__init__(self)
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}: names must not begin with an underscore")
        Namespace.__setitem__(self, name, value)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": _strftime_now, "namespace": _Namespace}
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _wants_parts(tree: nodes.Template) -> bool:
    """Whether it loops over contents and never asks whether one is a string."""
    names = {"content"}

    def is_content(node: nodes.Node) -> bool:
        if isinstance(node, nodes.Filter) or (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)):
            return node.node is not None and is_content(node.node)
        if isinstance(node, nodes.Getitem):
            return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
        if isinstance(node, nodes.Getattr):
            return node.attr == "content"
        return isinstance(node, nodes.Name) and node.name in names

    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name) and is_content(node.node):
            names.add(node.target.name)
    asks = any(node.name == "string" and is_content(node.node) for node in tree.find_all(nodes.Test))
    return not asks and any(is_content(node.iter) for node in tree.find_all(nodes.For))


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text") from error


def _read_object(path: Path) -> dict[str, Any]:
    """{} where there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {value!r:.60}")
    return value


def _default_of(value: Any, path: Path) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError(f"{path}: chat_template must be a string or a list of name and template, got {value!r:.60}")
    named = {str(entry.get("name")): entry.get("template") for entry in value}
    if not isinstance(named.get("default"), str):
        raise ValueError(f'{path}: no chat template is named "default", only {sorted(named)}')
    return named["default"]


def _tokens(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The named special tokens: a string, or an added token with its content."""
    tokens = {}
    for name in TOKENS:
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{path}: {name} must be a string or an added token, got {value!r:.60}")
        tokens |= {name: value} if value is not None else {}
    return tokens
