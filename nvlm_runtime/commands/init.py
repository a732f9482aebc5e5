"""`nvlm init`: a new checkpoint from a text model and a vision encoder."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nvlm_runtime.checkpoint.assembly import assemble, check_empty
from nvlm_runtime.checkpoint.bundled import BUNDLED
from nvlm_runtime.checkpoint.tensors import parameter_counts

OPTIONS = ("every", "layers", "placement", "ffn", "positions")  # of the cross-attention, --cross-... each


def _cross_options(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: getattr(args, f"cross_{name}") for name in OPTIONS}
    given = {name: value for name, value in given.items() if value is not None}
    if args.variant == "d" and given:
        raise ValueError(f"NVLM-D has no cross-attention: leave --cross-{next(iter(given))} out")
    return given


def run(args: argparse.Namespace) -> int:
    """Writes a new model from a text model and a vision encoder (`nvlm init`).

    Args:
        args: the parsed command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: the output folder is not empty, or the two models do not fit the options.
        FileNotFoundError: a model does not exist.
    """
    out = Path(args.out)
    check_empty(out)
    bundled = (BUNDLED / args.vision / "config.json").is_file() and not Path(args.vision).exists()
    assembly = assemble(
        args.variant,
        args.text,
        BUNDLED / args.vision if bundled else args.vision,
        seed=args.seed,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        max_tiles=args.max_tiles,
        **_cross_options(args),
    )
    assembly.save(out)
    config = assembly.model.config
    values = {
        "out": str(out),
        "variant": f"NVLM-{config.variant.upper()}",
        "architecture": config.text.architecture,
        "dtype": str(next(assembly.model.parameters()).dtype).removeprefix("torch."),
        "cross_layers": list(config.cross.layers) if config.cross else [],
        "parameters": parameter_counts(config),
        "added_tokens": assembly.added,
        "new_rows": assembly.num_new_rows,
        "bos_token": config.bos_token,
        "chat_template": assembly.template is not None,
    }
    if args.json:
        print(json.dumps(values))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    counts = values["parameters"]
    console.print(f"{out}: {values['variant']} in {values['dtype']}, {counts['total']:,} parameters", markup=False)
    console.print(f"text     {args.text}: {values['architecture']}, {counts['decoder']:,}", markup=False)
    console.print(f"vision   {args.vision}: {counts['vision']:,}", markup=False)
    new = f"projector {counts['projector']:,}"
    if config.cross:
        new += f", cross-attention {counts['cross']:,} in layers {', '.join(map(str, config.cross.layers))}, gates 0"
    console.print(f"new      {new}; seed {args.seed}", markup=False)
    tokens = ", ".join(f"{name} = {number}" for name, number in assembly.added.items()) or "none"
    console.print(f"tokens   added: {tokens}; {assembly.num_new_rows} new rows in the embedding", markup=False)
    if assembly.template is None:
        console.print("template none: ask with --style hf, which is ChatML", markup=False)
    return 0
