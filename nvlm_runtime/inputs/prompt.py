"""Messages and picture plans to token ids, and where each tile sits in them.

An image becomes one block, `<Image>` ... `</Image>`, of ordinary text (tile tags) and image slots, P = tokens_per_tile
of <|vision_pad|> a tile. The variants differ by `config.routing` only:

    D   <Image> tag_1 slots_1 ... tag_n slots_n </Image>      every tile in the decoder, tags before them
    H   <Image> slots_thumbnail </Image>                      tags stand beside the tiles in the keys and values
    X   <Image> tag_1 ... tag_n </Image>                      no slots: the tags are queries for their own tile

Style "hf" tokenises the whole string, split only at special tokens and slots, so `<Image><tile_1>` shares a "><" token.
Style "megatron" tokenises each tag alone and puts a newline after every <|im_end|>. X tags follow one another as text,
so there they are always tokenised alone: every sub-token then belongs to one tile.
Style "template" writes the turns as the checkpoint's chat template does, and pictures as "hf" does.
Sources: NVLM paper sections 4.2 to 4.5; the NVLM-D-72B chat() template; Megatron-LM examples/multimodal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nvlm_runtime.config import NVLMConfig, TagFormat
from nvlm_runtime.inputs.template import ChatTemplate
from nvlm_runtime.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:  # only the type: this file needs no picture library
    from nvlm_runtime.inputs.image import TilePlan

Style = Literal["hf", "megatron", "template"]
Span = tuple[int, int]
Turn = tuple[str, list[str | None]]  # role and parts; a part is a text or `PICTURE`
DEFAULT_SYSTEM = "Answer the questions."
PLACEHOLDER = "<image>"
OPEN, CLOSE = "<Image>", "</Image>"
PICTURE = None  # among the texts of a turn


@dataclass(frozen=True)
class TileSpan:
    """Half-open spans of one tile in input_ids; empty where the decoder has no tag, or no slots, of it."""

    tag: Span
    placeholders: Span


@dataclass(frozen=True)
class ImageBlock:
    """One image: `start` and `end` hold its tags and slots in input_ids. One tile span a tile, thumbnail last."""

    start: int
    end: int
    tiles: tuple[TileSpan, ...]


@dataclass(frozen=True)
class Prompt:
    """What the engine reads: token ids, and one block an image.

    answers: spans of what a model learns to say: an assistant's text and the <|im_end|> after it, in style "megatron"
    its newline too. Empty with `generation`, and of a chat template's turns.
    """

    input_ids: tuple[int, ...]
    blocks: tuple[ImageBlock, ...]
    answers: tuple[Span, ...] = ()


def tile_tags(plan: "TilePlan", tag_format: TagFormat, thumbnail_tag: str) -> tuple[str, ...]:
    """The tag text of every tile, thumbnail last. A single-tile image has the thumbnail tag alone.

    The paper gives "bbox" corners (left, top), (right, bottom) but no unit and no thumbnail: tile units and the
    thumbnail tag are our proposal.
    """
    return grid_tags(plan.cols, plan.rows, tag_format, thumbnail_tag)


def grid_tags(cols: int, rows: int, tag_format: TagFormat, thumbnail_tag: str) -> tuple[str, ...]:
    cells = [(x, y) for y in range(rows) for x in range(cols)]
    if len(cells) == 1:
        cells = []
    if tag_format == "none":
        return ("",) * (len(cells) + 1)
    if tag_format == "1d":
        regular = [f"<tile_{i}>" for i, _ in enumerate(cells, 1)]
    elif tag_format == "grid":
        regular = [f"<tile_x{x}_y{y}>" for x, y in cells]
    elif tag_format == "bbox":
        regular = [f"<box> ({x}, {y}), ({x + 1}, {y + 1}) </box>" for x, y in cells]
    else:
        raise ValueError(f"tag format must be none, 1d, grid or bbox, got {tag_format!r}")
    return (*regular, thumbnail_tag)


def tag_ids(tokenizer: Tokenizer, plan: "TilePlan", config: NVLMConfig) -> list[list[int]]:
    """Each tile's tag tokenised alone, thumbnail last: H's keys and values, X's tags, Megatron's D."""
    return [tokenizer.encode(tag) for tag in tile_tags(plan, config.tile_tags, config.thumbnail_tag)]


def build_prompt(
    tokenizer: Tokenizer,
    config: NVLMConfig,
    messages: Sequence[Mapping[str, Any]],
    plans: Sequence["TilePlan"],
    *,
    style: Style = "hf",
    generation: bool = True,
    template: ChatTemplate | None = None,
) -> Prompt:
    """`[system] user (assistant user)*` in the ChatML form NVLM was trained on; `generation` opens an assistant turn.

    `content` is a string, in which a user's `<image>` stands for a picture, or a list of {"type": "text", "text": ...}
    and {"type": "image"}, whose text is always literal. No system message means `DEFAULT_SYSTEM`; one with None or ""
    means none. With pictures but no place for them, `<image>\\n` for each opens the first user turn (HF's chat()).
    Style "template" leaves BOS, and what no system message means, to `template`; a system message is passed as it is.
    ValueError if the places and `plans` differ in number, for a role out of order, for a part it does not know, for
    style "template" without one, and for what `ChatTemplate.render` refuses.
    """
    if style not in ("hf", "megatron", "template"):
        raise ValueError(f"style must be hf, megatron or template, got {style!r}")
    if style == "template" and template is None:
        raise ValueError("style template needs a chat template, and this checkpoint has none")
    system, turns = _turns(messages, len(plans), generation)
    writer = _Writer(tokenizer, config, isolate_tags=style == "megatron" or config.routing.decoder == "none")
    if style == "template":
        _write_template(writer, turns if system is None else [("system", system), *turns], plans, template, generation)
    else:
        system = [DEFAULT_SYSTEM] if system is None else system
        _write_chatml(writer, [("system", system), *turns] if "".join(system) else turns, plans, style, generation)
    writer.put(())
    return Prompt(tuple(writer.ids), tuple(writer.blocks), tuple(writer.answers))


def _write_chatml(
    writer: "_Writer", turns: Sequence[Turn], plans: Sequence["TilePlan"], style: Style, generation: bool
) -> None:
    remaining = iter(plans)
    if writer.config.bos_token is not None:
        writer.special(writer.config.bos_token)
    for role, parts in turns:
        writer.special("<|im_start|>")
        writer.text(f"{role}\n")
        learnt = role == "assistant" and not generation
        start = writer.put(())[0] if learnt else 0  # an answer is cut from its prefix, as a generated one is
        for part in parts:
            if part is PICTURE:
                writer.image(next(remaining))
            else:
                writer.text(part)
        writer.special("<|im_end|>")
        writer.text("\n" if style == "megatron" else "")
        if learnt:
            writer.answers.append((start, writer.put(())[1]))
    if generation:
        writer.special("<|im_start|>")
        writer.text("assistant\n")


def _write_template(
    writer: "_Writer", turns: Sequence[Turn], plans: Sequence["TilePlan"], template: ChatTemplate, generation: bool
) -> None:
    """Special tokens are looked for in the template's own words alone. Text joins its neighbours before it is cut."""
    remaining = iter(plans)
    for piece in template.render(turns, generation):
        if piece.text is PICTURE:
            writer.image(next(remaining))
        elif not piece.own:
            writer.text(piece.text)
        elif "<|vision_pad|>" in piece.text:
            raise ValueError("the chat template writes <|vision_pad|>, which only a picture may")
        else:
            for part in writer.tokenizer.split(piece.text):
                if isinstance(part, str):
                    writer.text(part)
                else:
                    writer.put((part,))


def read_prompt(
    tokenizer: Tokenizer, config: NVLMConfig, input_ids: Sequence[int], plans: Sequence["TilePlan"]
) -> Prompt:
    """Finds the images in token ids that hold their tags and placeholders already.

    NVLM-D and NVLM-H are found by their placeholders, which text cannot forge; a tile of NVLM-D that does not follow
    its tag gets an empty tag span. NVLM-X is found by its tags, tokenised alone, between the texts `<Image>` and
    `</Image>`.

    Args:
        tokenizer: the model's tokenizer.
        config: the model's configuration.
        input_ids: token ids, used as they are.
        plans: one plan per image, in order.

    Raises:
        ValueError: the ids hold more or fewer placeholders than the plans need, the placeholders of a tile are not
            together, or, in NVLM-X, the tags are not those of the plans.
    """
    ids = list(input_ids)
    find = _find_tag_blocks if config.routing.decoder == "none" else _find_placeholder_blocks
    return Prompt(tuple(ids), find(tokenizer, config, ids, plans))


class _Writer:
    """Collects ids. Text waits in `pending` until a special token, a slot or an isolated tag cuts it."""

    def __init__(self, tokenizer: Tokenizer, config: NVLMConfig, isolate_tags: bool):
        self.tokenizer, self.config, self.isolate_tags = tokenizer, config, isolate_tags
        self.ids: list[int] = []
        self.blocks: list[ImageBlock] = []
        self.answers: list[Span] = []
        self.pending = ""

    def text(self, text: str) -> None:
        self.pending += text

    def special(self, name: str) -> None:
        self.put((self.tokenizer.special(name),))

    def put(self, ids: Sequence[int]) -> Span:
        self.ids += self.tokenizer.encode(self.pending)
        self.pending = ""
        start = len(self.ids)
        self.ids += ids
        return start, len(self.ids)

    def image(self, plan: "TilePlan") -> None:
        first, tiles = _first_with_slots(self.config, plan), []
        self.text(OPEN)
        for i, tag in enumerate(_decoder_tags(self.config, plan)):
            tag_ids = self.tokenizer.encode(tag)
            if self.isolate_tags:
                tag_span = self.put(tag_ids)
            else:
                self.text(tag)
            slots = self.put(_slots(self.tokenizer, self.config) if i >= first else ())
            if not self.isolate_tags:
                tag_span = (slots[0] - len(tag_ids), slots[0])
            tiles.append(TileSpan(tag_span, slots))
        self.text(CLOSE)
        self.blocks.append(_block(tiles))


def _block(tiles: Sequence[TileSpan]) -> ImageBlock:
    return ImageBlock(tiles[0].tag[0], tiles[-1].placeholders[1], tuple(tiles))


def _first_with_slots(config: NVLMConfig, plan: "TilePlan") -> int:
    """The tiles from this one on have slots in the decoder. The one tile of a small image counts as its thumbnail."""
    return {"all": 0, "thumbnail": plan.num_tiles - 1, "none": plan.num_tiles}[config.routing.decoder]


def _decoder_tags(config: NVLMConfig, plan: "TilePlan") -> tuple[str, ...]:
    return tile_tags(plan, config.tile_tags if config.routing.tags == "decoder" else "none", config.thumbnail_tag)


def _slots(tokenizer: Tokenizer, config: NVLMConfig) -> tuple[int, ...]:
    return (tokenizer.special("<|vision_pad|>"),) * config.tokens_per_tile


def _find_placeholder_blocks(
    tokenizer: Tokenizer, config: NVLMConfig, ids: list[int], plans: Sequence["TilePlan"]
) -> tuple[ImageBlock, ...]:
    size, pad = config.tokens_per_tile, tokenizer.special("<|vision_pad|>")
    positions = [i for i, token_id in enumerate(ids) if token_id == pad]
    num_tiles = sum(plan.num_tiles - _first_with_slots(config, plan) for plan in plans)
    if len(positions) != num_tiles * size:
        raise ValueError(f"expected {num_tiles} tiles x {size} = {num_tiles * size} image slots, got {len(positions)}")
    starts, blocks = iter(positions[::size]), []
    for number, plan in enumerate(plans, 1):
        first, tiles, start = _first_with_slots(config, plan), [], next(starts)
        for i, tag in enumerate(_decoder_tags(config, plan)):
            if i > first:
                start = next(starts)
            end = start + size if i >= first else start
            if any(token_id != pad for token_id in ids[start:end]):
                raise ValueError(f"image {number}: the {size} slots of tile {i + 1}, from {start}, are not together")
            tag_start = start - len(tokenizer.encode(tag))
            if not tokenizer.decode(ids[max(tag_start, 0) : start]).endswith(tag):
                tag_start = start  # the caller's ids are used as they are, tagged or not
            tiles.append(TileSpan((tag_start, start), (start, end)))
        blocks.append(_block(tiles))
    return tuple(blocks)


def _find_tag_blocks(
    tokenizer: Tokenizer, config: NVLMConfig, ids: list[int], plans: Sequence["TilePlan"]
) -> tuple[ImageBlock, ...]:
    grids = {(c, r) for c in range(1, config.max_tiles + 1) for r in range(1, config.max_tiles // c + 1)}
    grids |= {(plan.cols, plan.rows) for plan in plans}
    known = [grid_tags(*grid, config.tile_tags, config.thumbnail_tag) for grid in sorted(grids)]
    runs = {_run([tokenizer.encode(tag) for tag in tags]) for tags in known}
    after_open = [i for i in range(len(ids) + 1) if tokenizer.decode(ids[max(0, i - len(OPEN)) : i]).endswith(OPEN)]
    found = [(start, run) for start in after_open for run in runs if _stands_at(tokenizer, ids, start, run)]
    tags = [tag_ids(tokenizer, plan, config) for plan in plans]
    if [run for _, run in found] != [_run(each) for each in tags]:
        raise ValueError(
            f"expected {len(plans)} images with tags of {[len(_run(each)) for each in tags]} tokens, "
            f"got {len(found)} with {[len(run) for _, run in found]}"
        )
    blocks = []
    for (at, _), each in zip(found, tags, strict=True):
        tiles = []
        for tag in each:
            tiles.append(TileSpan((at, at + len(tag)), (at + len(tag), at + len(tag))))
            at += len(tag)
        blocks.append(_block(tiles))
    return tuple(blocks)


def _run(tags: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(token_id for tag in tags for token_id in tag)


def _stands_at(tokenizer: Tokenizer, ids: list[int], start: int, run: tuple[int, ...]) -> bool:
    end = start + len(run)
    return tuple(ids[start:end]) == run and tokenizer.decode(ids[end : end + len(CLOSE)]).startswith(CLOSE)


def _turns(
    messages: Sequence[Mapping[str, Any]], num_plans: int, generation: bool
) -> tuple[list[str | None] | None, list[Turn]]:
    """The parts of the system message, None without one, and the turns after it."""
    system, turns = None, []
    for number, message in enumerate(messages, 1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {number}: role must be system, user or assistant, got {role!r}")
        if role == "system" and number == 1:
            system = _parts(number, role, "" if content is None else content)
        elif role != ("assistant" if len(turns) % 2 else "user"):
            raise ValueError(f"message {number}: a {role} turn is out of order; after a system turn, user comes first")
        else:
            turns.append((role, _parts(number, role, content)))
    if not turns or (generation and turns[-1][0] != "user"):
        raise ValueError(f"the last of {len(messages)} messages must be a user's, to be answered")
    num_places = sum(parts.count(PICTURE) for _, parts in turns)
    if num_plans and not num_places:
        num_places = num_plans
        turns[0][1][:0] = [PICTURE, "\n"] * num_plans
    if num_places != num_plans:
        raise ValueError(f"the messages have {num_places} places for images, but there are {num_plans} images")
    for role, parts in turns:
        if role == "user" and PICTURE not in parts and not "".join(parts).strip():
            raise ValueError("a user turn has neither text nor an image")
    return system, turns


def _parts(number: int, role: str, content: Any) -> list[str | None]:
    if isinstance(content, str):
        texts = content.split(PLACEHOLDER) if role == "user" else [content]
        return [part for text in texts for part in (PICTURE, text)][1:]
    if isinstance(content, list | tuple):
        return [_part(number, role, part) for part in content]
    raise ValueError(f"message {number}: content must be a string or a list of parts, got {content!r:.60}")


def _part(number: int, role: str, part: Any) -> str | None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image" and role == "user":
        return PICTURE
    raise ValueError(f"message {number}: a {role} turn cannot hold the part {part!r:.80}")
