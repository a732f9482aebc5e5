"""`nvlm info`: what a model is, and how it tiles a picture."""

import argparse
import json
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from nvlm_runtime.checkpoint.bundled import checkpoint_folder
from nvlm_runtime.checkpoint.tensors import parameter_counts
from nvlm_runtime.checkpoint.weights import read_json
from nvlm_runtime.commands.answers import plan_values, print_plan
from nvlm_runtime.config import from_hf
from nvlm_runtime.inputs.image import check_drawing, draw_plan, open_image, plan_tiles
from nvlm_runtime.presets import PRESETS


def run(args: argparse.Namespace) -> int:
    """Describes a model, and how it would cut images (`nvlm info`).

    Args:
        args: the parsed command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: the name, an image or the file to draw to is invalid.
        FileNotFoundError: a file does not exist.
    """
    if args.name in PRESETS and not args.name.startswith("micro-"):
        config = PRESETS[args.name]
    else:
        config = from_hf(read_json(checkpoint_folder(args.name) / "config.json"))
    if args.draw:
        check_drawing(args.draw)
    counts = parameter_counts(config)
    plans = []
    for path in args.images:
        picture = open_image(path)
        plan = plan_tiles(*picture.size, config.vision.image_size, config.min_tiles, config.max_tiles)
        if args.draw and not plans:
            draw_plan(picture, plan).save(args.draw)
        plans.append(plan)
    if args.draw and not plans:
        raise ValueError("--draw needs a picture to draw on")
    values = {
        "name": args.name,
        "variant": f"NVLM-{config.variant.upper()}",
        "config": asdict(config),
        "parameters": counts,
        "bytes_bfloat16": 2 * counts["total"],
        "plans": [plan_values(plan, config) for plan in plans],
    }
    if args.json:
        print(json.dumps(values))
        return 0
    console = Console()
    vision, text = config.vision, config.text
    table = Table("part", "what", "parameters", title=f"{args.name}: NVLM-{config.variant.upper()}")
    table.columns[2].justify = "right"
    what = {
        "vision": f"InternViT, {vision.num_hidden_layers} layers, {vision.hidden_size} wide, "
        f"{vision.num_attention_heads} heads, tiles of {vision.image_size}, patches of {vision.patch_size}",
        "projector": f"{config.tokens_per_tile} tokens a tile, pixel shuffle {config.ps_version}",
        "decoder": f"{text.architecture}, {text.num_hidden_layers} layers, {text.hidden_size} wide, "
        f"{text.num_attention_heads}/{text.num_key_value_heads} heads, context {text.context}",
        "cross": "gated cross-attention in layers " + ", ".join(map(str, config.cross.layers))
        if config.cross
        else "none",
    }
    for part, words in what.items():
        table.add_row(part, words, f"{counts[part]:,}")
    table.add_row("total", f"{2 * counts['total'] / 1e9:.3g} GB in bfloat16", f"{counts['total']:,}")
    console.print(table)
    for plan in plans:
        print_plan(console, plan, config)
    return 0
