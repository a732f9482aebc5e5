"""Turns messages and tile plans into token ids, and says where each tile's tag and placeholders are among them.

An image becomes one block, `<Image>` ... `</Image>`, of tile tags (ordinary text) and image placeholders: P =
tokens_per_tile ids of <|vision_pad|> per tile. The variants differ by `config.routing` only:

    D   <Image> tag_1 placeholders_1 ... tag_n placeholders_n </Image>   every tile in the decoder, after its tag
    H   <Image> placeholders_thumbnail </Image>                          tags are among the image keys
    X   <Image> tag_1 ... tag_n </Image>                                 no placeholders: tags are queries of their tile

A prompt is written in one of three styles:

    hf         the whole string is tokenised, cut only at special tokens and placeholders: `<Image><tile_1>` shares a
               "><" token
    megatron   each tag is tokenised alone, and a newline follows every <|im_end|>
    template   the checkpoint's chat template writes the turns; images are written as in hf

The tags of NVLM-X follow one another as text, so they are tokenised alone in every style: each token then belongs to
one tile.
Source: NVLM paper (arXiv 2409.11402) sections 4.2 to 4.5; chat() template of NVLM-D-72B; Megatron-LM
examples/multimodal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nvlm_runtime.config import NVLMConfig, TagFormat
from nvlm_runtime.inputs.messages import IMAGE, Part, Turn, join_texts, parse_messages
from nvlm_runtime.inputs.template import ChatTemplate
from nvlm_runtime.inputs.tokenizer import Tokenizer

if TYPE_CHECKING:  # only the type: this file needs no image library
    from nvlm_runtime.inputs.image import TilePlan

Style = Literal["hf", "megatron", "template"]
Span = tuple[int, int]  # [start, end)
DEFAULT_SYSTEM = "Answer the questions."
PLACEHOLDER = "<|vision_pad|>"  # the special token of an image placeholder
OPEN, CLOSE = "<Image>", "</Image>"


@dataclass(frozen=True)
class TileSpan:
    """Where one tile is among the token ids.

    Attributes:
        tag: span of its tag; empty where the decoder has none.
        placeholders: span of its image placeholders; empty where the decoder has none.
    """

    tag: Span
    placeholders: Span


@dataclass(frozen=True)
class ImageBlock:
    """Where one image is among the token ids.

    Attributes:
        start: position of its first tag token or placeholder.
        end: one past its last tag token or placeholder.
        tiles: one span per tile, the thumbnail last.
    """

    start: int
    end: int
    tiles: tuple[TileSpan, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt as token ids.

    Attributes:
        input_ids: token ids.
        blocks: one block per image, in order.
        answers: spans that a model learns to write: each assistant text and the <|im_end|> after it, in style
            "megatron" with its newline. Empty with `generation`, in style "template" and from `read_prompt`.
    """

    input_ids: tuple[int, ...]
    blocks: tuple[ImageBlock, ...]
    answers: tuple[Span, ...] = ()


def tile_tags(plan: "TilePlan", tag_format: TagFormat, thumbnail_tag: str) -> tuple[str, ...]:
    """Writes the tag text of every tile of an image, as `grid_tags` does.

    Args:
        plan: how the image is cut.
        tag_format: form of the regular tiles' tags.
        thumbnail_tag: tag of the thumbnail.

    Returns:
        One text per tile, thumbnail last.
    """
    return grid_tags(plan.cols, plan.rows, tag_format, thumbnail_tag)


def grid_tags(cols: int, rows: int, tag_format: TagFormat, thumbnail_tag: str) -> tuple[str, ...]:
    """Returns the tag text of every tile of a grid, thumbnail last. A grid of one tile has the thumbnail tag alone.

    Args:
        cols: number of columns.
        rows: number of rows.
        tag_format: "none", "1d", "grid" or "bbox". The paper gives "bbox" the corners (left, top), (right, bottom) but
            no unit and no thumbnail: tile units and the thumbnail tag are this project's choice.
        thumbnail_tag: the thumbnail's tag, unless `tag_format` is "none".

    Raises:
        ValueError: `tag_format` is unknown.

    Source: NVLM paper (arXiv 2409.11402) section 4.2.
    """
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
    """Tokenises the tag of each tile of an image, each alone.

    Args:
        tokenizer: the model's tokenizer.
        plan: how the image is cut.
        config: the model's configuration, which names the tags' form.

    Returns:
        Token ids per tile, thumbnail last.
    """
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
    """Writes a conversation as token ids, in the ChatML form that NVLM was trained on or by a chat template.

    Args:
        tokenizer: the model's tokenizer.
        config: the model's configuration.
        messages: `[system] user (assistant user)*`, mappings with "role" and "content". `content` is a string, in
            which a user's `<image>` stands for an image, or a list of {"type": "text", "text": ...} and
            {"type": "image"}, whose text is literal. Where no message says where the images go, `<image>\\n` for each
            opens the first user turn, as HF's chat() does. No system message means `DEFAULT_SYSTEM`, one with None or
            "" means none; with style "template" the template decides.
        plans: one tile plan per image, in order.
        style: "hf", "megatron" or "template".
        generation: opens an assistant turn, to be answered.
        template: the checkpoint's chat template, for style "template".

    Raises:
        ValueError: the messages have another number of images than `plans`, a role is out of order, a part is
            unknown, style "template" comes without a template, or `ChatTemplate.render` refuses the conversation.
    """
    if style not in ("hf", "megatron", "template"):
        raise ValueError(f"style must be hf, megatron or template, got {style!r}")
    if style == "template" and template is None:
        raise ValueError("style template needs a chat template, and this checkpoint has none: use hf or megatron")
    system, turns = parse_messages(messages, len(plans), generation)
    writer = _Writer(tokenizer, config, isolate_tags=style == "megatron" or config.routing.decoder == "none")
    if style == "template":
        assert template is not None
        _write_template(writer, turns if system is None else [("system", system), *turns], plans, template, generation)
    else:
        parts: list[Part] = [DEFAULT_SYSTEM] if system is None else system
        _write_chatml(writer, [("system", parts), *turns] if join_texts(parts) else turns, plans, style, generation)
    writer.flush()
    return Prompt(tuple(writer.ids), tuple(writer.blocks), tuple(writer.answers))


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
        plans: one tile plan per image, in order.

    Raises:
        ValueError: the ids hold more or fewer placeholders than the plans need, the placeholders of a tile are not
            together, or, in NVLM-X, the tags are not those of the plans.
    """
    ids = list(input_ids)
    find = _find_tag_blocks if config.routing.decoder == "none" else _find_placeholder_blocks
    return Prompt(tuple(ids), find(tokenizer, config, ids, plans))


class _Writer:
    """Collects token ids. Text waits in `pending` until a special token, a placeholder or an isolated tag cuts it."""

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

    def flush(self) -> int:
        """Tokenises the pending text and returns the position after it."""
        self.ids += self.tokenizer.encode(self.pending)
        self.pending = ""
        return len(self.ids)

    def put(self, ids: Sequence[int]) -> Span:
        """Appends ids after the pending text and returns their span."""
        start = self.flush()
        self.ids += ids
        return start, len(self.ids)

    def image(self, plan: "TilePlan") -> None:
        """Appends an image's block."""
        first, tiles = _first_in_decoder(self.config, plan), []
        self.text(OPEN)
        for i, tag in enumerate(_decoder_tags(self.config, plan)):
            tag_ids = self.tokenizer.encode(tag)
            if self.isolate_tags:
                tag_span = self.put(tag_ids)
            else:
                self.text(tag)
            placeholders = self.put(_placeholders(self.tokenizer, self.config) if i >= first else ())
            if not self.isolate_tags:
                tag_span = (placeholders[0] - len(tag_ids), placeholders[0])
            tiles.append(TileSpan(tag_span, placeholders))
        self.text(CLOSE)
        self.blocks.append(_block(tiles))


def _write_chatml(
    writer: _Writer, turns: Sequence[Turn], plans: Sequence["TilePlan"], style: Style, generation: bool
) -> None:
    remaining = iter(plans)
    if writer.config.bos_token is not None:
        writer.special(writer.config.bos_token)
    for role, parts in turns:
        writer.special("<|im_start|>")
        writer.text(f"{role}\n")
        is_learned = role == "assistant" and not generation
        start = writer.flush() if is_learned else 0  # an answer is cut from its prefix, as a generated one is
        for part in parts:
            if part is IMAGE:
                writer.image(next(remaining))
            else:
                writer.text(part)
        writer.special("<|im_end|>")
        writer.text("\n" if style == "megatron" else "")
        if is_learned:
            writer.answers.append((start, writer.flush()))
    if generation:
        writer.special("<|im_start|>")
        writer.text("assistant\n")


def _write_template(
    writer: _Writer, turns: Sequence[Turn], plans: Sequence["TilePlan"], template: ChatTemplate, generation: bool
) -> None:
    """Looks for special tokens in the template's own text alone. Text joins its neighbours before it is tokenised."""
    remaining = iter(plans)
    for piece in template.render(turns, generation):
        if piece.text is IMAGE:
            writer.image(next(remaining))
        elif not piece.own:
            writer.text(piece.text)
        elif PLACEHOLDER in piece.text:
            raise ValueError(
                f"the chat template writes {PLACEHOLDER}, but only images may: remove it from the template"
            )
        else:
            for part in writer.tokenizer.split(piece.text):
                if isinstance(part, str):
                    writer.text(part)
                else:
                    writer.put((part,))


def _block(tiles: Sequence[TileSpan]) -> ImageBlock:
    return ImageBlock(tiles[0].tag[0], tiles[-1].placeholders[1], tuple(tiles))


def _first_in_decoder(config: NVLMConfig, plan: "TilePlan") -> int:
    """The tiles from this one on have placeholders. The one tile of a small image counts as its thumbnail."""
    return {"all": 0, "thumbnail": plan.num_tiles - 1, "none": plan.num_tiles}[config.routing.decoder]


def _decoder_tags(config: NVLMConfig, plan: "TilePlan") -> tuple[str, ...]:
    return tile_tags(plan, config.tile_tags if config.routing.tags == "decoder" else "none", config.thumbnail_tag)


def _placeholders(tokenizer: Tokenizer, config: NVLMConfig) -> tuple[int, ...]:
    return (tokenizer.special(PLACEHOLDER),) * config.tokens_per_tile


def _find_placeholder_blocks(
    tokenizer: Tokenizer, config: NVLMConfig, ids: list[int], plans: Sequence["TilePlan"]
) -> tuple[ImageBlock, ...]:
    size, pad = config.tokens_per_tile, tokenizer.special(PLACEHOLDER)
    positions = [i for i, token_id in enumerate(ids) if token_id == pad]
    num_tiles = sum(plan.num_tiles - _first_in_decoder(config, plan) for plan in plans)
    if len(positions) != num_tiles * size:
        raise ValueError(
            f"expected {num_tiles} tiles x {size} = {num_tiles * size} image placeholders, got {len(positions)}: "
            "the images must be those that input_ids were made for"
        )
    starts, blocks = iter(positions[::size]), []
    for number, plan in enumerate(plans, 1):
        first, tiles, start = _first_in_decoder(config, plan), [], next(starts)
        for i, tag in enumerate(_decoder_tags(config, plan)):
            if i > first:
                start = next(starts)
            end = start + size if i >= first else start
            if any(token_id != pad for token_id in ids[start:end]):
                raise ValueError(
                    f"image {number}: the {size} placeholders of tile {i + 1}, from position {start}, are not together"
                )
            tag_start = start - len(tokenizer.encode(tag))
            if not tokenizer.decode(ids[max(tag_start, 0) : start]).endswith(tag):
                tag_start = start  # the caller's ids are used as they are, tagged or not
            tiles.append(TileSpan((tag_start, start), (start, end)))
        blocks.append(_block(tiles))
    return tuple(blocks)


def _find_tag_blocks(
    tokenizer: Tokenizer, config: NVLMConfig, ids: list[int], plans: Sequence["TilePlan"]
) -> tuple[ImageBlock, ...]:
    tags = [tag_ids(tokenizer, plan, config) for plan in plans]
    found = _find_tag_runs(tokenizer, config, ids, plans)
    if [run for _, run in found] != [_run(each) for each in tags]:
        raise ValueError(
            f"expected {len(plans)} images with tags of {[len(_run(each)) for each in tags]} tokens, "
            f"got {len(found)} with {[len(run) for _, run in found]}: "
            "the images must be those that input_ids were made for"
        )
    blocks = []
    for (position, _), each in zip(found, tags, strict=True):
        tiles = []
        for tag in each:
            end = position + len(tag)
            tiles.append(TileSpan((position, end), (end, end)))
            position = end
        blocks.append(_block(tiles))
    return tuple(blocks)


def _find_tag_runs(
    tokenizer: Tokenizer, config: NVLMConfig, ids: list[int], plans: Sequence["TilePlan"]
) -> list[tuple[int, tuple[int, ...]]]:
    """Positions and token ids of all tags of an image between `<Image>` and `</Image>`, of any grid."""
    grids = {(c, r) for c in range(1, config.max_tiles + 1) for r in range(1, config.max_tiles // c + 1)}
    grids |= {(plan.cols, plan.rows) for plan in plans}
    known = [grid_tags(*grid, config.tile_tags, config.thumbnail_tag) for grid in sorted(grids)]
    runs = {_run([tokenizer.encode(tag) for tag in tags]) for tags in known}
    after_open = [i for i in range(len(ids) + 1) if tokenizer.decode(ids[max(0, i - len(OPEN)) : i]).endswith(OPEN)]
    return [(start, run) for start in after_open for run in runs if _stands_at(tokenizer, ids, start, run)]


def _run(tags: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(token_id for tag in tags for token_id in tag)


def _stands_at(tokenizer: Tokenizer, ids: list[int], start: int, run: tuple[int, ...]) -> bool:
    end = start + len(run)
    return tuple(ids[start:end]) == run and tokenizer.decode(ids[end : end + len(CLOSE)]).startswith(CLOSE)
