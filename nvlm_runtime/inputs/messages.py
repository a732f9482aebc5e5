"""Checks chat messages and cuts them into turns of texts and images."""

from collections.abc import Mapping, Sequence
from typing import Any

IMAGE_MARKER = "<image>"  # stands for an image in a user's text
IMAGE = None  # stands for an image among the parts of a turn
Part = str | None  # a text, or IMAGE
Turn = tuple[str, list[Part]]  # role and parts


def parse_messages(
    messages: Sequence[Mapping[str, Any]], num_images: int, generation: bool
) -> tuple[list[Part] | None, list[Turn]]:
    """Cuts `[system] user (assistant user)*` into the parts of the system message and the turns after it.

    Where there are images and no message says where they go, each goes before the first user turn, with a newline.

    Args:
        messages: mappings with "role" and "content", as `build_prompt` takes them.
        num_images: number of images of the conversation.
        generation: whether the last message must be a user's, to be answered.

    Returns:
        The parts of the system message, None where there is none, and the turns.

    Raises:
        ValueError: a role is unknown or out of order, a content is malformed, a user turn is empty, or the messages
            have another number of images than `num_images`.
    """
    system, turns = _read_turns(messages)
    if not turns or (generation and turns[-1][0] != "user"):
        raise ValueError(f"the last of {len(messages)} messages must be a user's, to be answered")
    num_places = sum(parts.count(IMAGE) for _, parts in turns)
    if num_images and not num_places:
        num_places = num_images
        turns[0][1][:0] = [IMAGE, "\n"] * num_images
    if num_places != num_images:
        raise ValueError(
            f"the messages have {num_places} places for images, but there are {num_images} images: "
            f"write {IMAGE_MARKER}, or an image part, once per image"
        )
    for role, parts in turns:
        if role == "user" and IMAGE not in parts and not join_texts(parts).strip():
            raise ValueError("a user turn has neither text nor an image")
    return system, turns


def join_texts(parts: Sequence[Part]) -> str:
    """Joins the texts of a turn, images left out.

    Args:
        parts: texts and `IMAGE`.

    Returns:
        One string.
    """
    return "".join(part for part in parts if part is not IMAGE)


def _read_turns(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Part] | None, list[Turn]]:
    system: list[Part] | None = None
    turns: list[Turn] = []
    for number, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {number}: role must be system, user or assistant, got {role!r}")
        if role == "system" and number == 1:
            system = _read_parts(number, role, "" if content is None else content)
        elif role != ("assistant" if len(turns) % 2 else "user"):
            raise ValueError(
                f"message {number}: a {role} turn is out of order; expected [system] user assistant user ..."
            )
        else:
            turns.append((role, _read_parts(number, role, content)))
    return system, turns


def _read_parts(number: int, role: str, content: Any) -> list[Part]:
    if isinstance(content, str):
        texts = content.split(IMAGE_MARKER) if role == "user" else [content]
        return [part for text in texts for part in (IMAGE, text)][1:]
    if isinstance(content, list | tuple):
        return [_read_part(number, role, part) for part in content]
    raise ValueError(f"message {number}: content must be a string or a list of parts, got {content!r:.60}")


def _read_part(number: int, role: str, part: Any) -> Part:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image" and role == "user":
        return IMAGE
    raise ValueError(
        f"message {number}: a {role} turn cannot hold the part {part!r:.80}; expected "
        '{"type": "text", "text": ...}' + (' or {"type": "image"}' if role == "user" else "")
    )
