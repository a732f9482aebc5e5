"""How answers and tile plans are printed."""

from dataclasses import asdict
from typing import Any

from rich.console import Console

from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.engine.generator import TextStream
from nvlm_runtime.engine.request import Output
from nvlm_runtime.inputs.image import TilePlan
from nvlm_runtime.inputs.prompt import tile_tags


def plan_values(plan: TilePlan, config: NVLMConfig) -> dict[str, Any]:
    """Describes a plan for `--json`.

    Args:
        plan: how the image is cut.
        config: the model's configuration.

    Returns:
        Width, height, grid, tiles, tags and numbers of image tokens, as JSON values.
    """
    routing, tokens = config.routing, config.tokens_per_tile
    count = {"none": 0, "thumbnail": 1, "all": plan.num_tiles, "regular": plan.num_tiles - 1}
    return {
        "width": plan.width,
        "height": plan.height,
        "cols": plan.cols,
        "rows": plan.rows,
        "tiles": plan.num_tiles,
        "tags": list(tile_tags(plan, config.tile_tags, config.thumbnail_tag)),
        "decoder_image_tokens": count[routing.decoder] * tokens,
        "cross_image_tokens": count[routing.cross] * tokens,
    }


def print_plan(console: Console, plan: TilePlan, config: NVLMConfig) -> None:
    """Prints a plan: its size, its grid, its image tokens and the tags row by row.

    Args:
        console: where to print.
        plan: how the image is cut.
        config: the model's configuration.
    """
    values = plan_values(plan, config)
    thumbnail = " + thumbnail" if plan.has_thumbnail else ""
    console.print(
        f"{plan.width} x {plan.height} pixels, {plan.cols} x {plan.rows} tiles of {plan.image_size}{thumbnail}; "
        f"{values['decoder_image_tokens']} image tokens in the decoder, "
        f"{values['cross_image_tokens']} in cross-attention",
        highlight=False,
        soft_wrap=True,
    )
    for row in range(plan.rows if plan.has_thumbnail else 0):
        tags = values["tags"][row * plan.cols : (row + 1) * plan.cols]
        console.print("  " + " ".join(tag or "-" for tag in tags), highlight=False, markup=False, soft_wrap=True)


def output_values(output: Output, config: NVLMConfig) -> dict[str, Any]:
    """Describes an output for `--json`.

    Args:
        output: of one request.
        config: the model's configuration.

    Returns:
        The output's fields, its plans as `plan_values`.
    """
    values = asdict(output)
    values["plans"] = [plan_values(plan, config) for plan in output.plans]
    return values


def show_stream(stream: TextStream) -> None:
    """Prints an answer as it comes. Ctrl-C leaves what was printed, and goes on to the caller.

    Args:
        stream: of one request; it is read to its end.
    """
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
