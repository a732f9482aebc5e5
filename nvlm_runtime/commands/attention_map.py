"""`nvlm attention-map`: an answer, and the attention of its tokens to the images."""

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nvlm_runtime.analysis.attention_map import AttentionMap, attention_map
from nvlm_runtime.analysis.heat_map import draw_heat_map, stack
from nvlm_runtime.commands.loading import load_model
from nvlm_runtime.engine.sampling import GenerationParams
from nvlm_runtime.inputs.image import check_drawing, open_image


def run(args: argparse.Namespace) -> int:
    """Shows which tiles the tokens of an answer attend to (`nvlm attention-map`).

    Args:
        args: the parsed command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: an argument, an image or the checkpoint is invalid, or the answer has no token.
        FileNotFoundError: a file does not exist.
    """
    *images, prompt = args.words
    params = GenerationParams(max_new_tokens=args.max_new_tokens)
    if not images:
        raise ValueError("nvlm attention-map needs an image before the question")
    if args.png:
        check_drawing(args.png)
    model = load_model(args)
    pictures = [open_image(image) for image in images]
    prepared = model.prepare(prompt, pictures, style=args.style)
    stream = model.stream(prepared, params=params)
    for _ in stream:
        pass
    output = stream.output
    if not output.token_ids:
        raise ValueError("the answer has no token, so there is no attention to show")
    tokens = [model.tokenizer.decode([token]) for token in output.token_ids]
    if args.token is not None and not 1 <= args.token <= len(tokens):
        raise ValueError(f"--token must be from 1 to {len(tokens)}, the answer's tokens, got {args.token}")
    found = attention_map(model, [*prepared.input_ids, *output.token_ids], pictures, len(prepared.input_ids))
    if args.png:
        at = slice(None) if args.token is None else slice(args.token - 1, args.token)
        drawn = [
            draw_heat_map(picture, seen.plan, seen.weights[at].mean(0))
            for picture, seen in zip(pictures, found.images, strict=True)
        ]
        stack(drawn).save(args.png)
    if args.json:
        print(json.dumps({"text": output.text} | _values(found, tokens)))
        return 0
    console = Console()
    console.print(output.text, markup=False, highlight=False)
    _print(console, found, tokens)
    return 0


def _values(found: AttentionMap, tokens: list[str]) -> dict[str, Any]:
    """tiles: of each image, of each token, the tiles' shares."""
    return {
        "tokens": tokens,
        "tiles": [seen.weights.sum((2, 3)).tolist() for seen in found.images],
        "in_decoder": found.in_decoder,
        "decoder_share": found.decoder_share.tolist(),
        "gates": found.gates,
    }


def _print(console: Console, found: AttentionMap, tokens: list[str]) -> None:
    for number, seen in enumerate(found.images, 1):
        names = [f"tile {tile}" for tile in range(1, seen.plan.num_regular + 1)]
        names += ["thumbnail"] * seen.plan.has_thumbnail
        table = Table("token", *names, title=f"picture {number}" if len(found.images) > 1 else None)
        for column in table.columns[1:]:
            column.justify = "right"
        for token, shares in zip(tokens, seen.weights.sum((2, 3)).tolist(), strict=True):
            table.add_row(Text(repr(token)[1:-1]), *(f"{share:.0%}" for share in shares))
        console.print(table)
    if any(any(tiles) for tiles in found.in_decoder):
        console.print(
            f"{found.decoder_share.mean():.0%} of the decoder's attention fell on image tokens", highlight=False
        )
    for layer, (gate, ffn_gate) in found.gates.items():
        ffn = "" if ffn_gate is None else f", feed-forward {ffn_gate:+.3f}"
        console.print(f"layer {layer}: gate {gate:+.3f}{ffn}", highlight=False)
