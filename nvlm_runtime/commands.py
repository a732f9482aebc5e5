"""What the subcommands do, once their arguments are parsed. Each returns an exit code."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nvlm_runtime.config import NVLMConfig, from_hf
from nvlm_runtime.engine import NVLM, Stream, checkpoint_folder
from nvlm_runtime.image import TilePlan, draw_plan, open_image, plan_tiles
from nvlm_runtime.presets import PRESETS
from nvlm_runtime.profile import StageTime, check_matplotlib, draw_stages, profile_request
from nvlm_runtime.prompt import tile_tags
from nvlm_runtime.request import Output
from nvlm_runtime.sampling import GenerationParams
from nvlm_runtime.weights import parameter_counts, read_json


def _load(args: argparse.Namespace, **options: Any) -> NVLM:
    return NVLM.load(
        args.model,
        args.device,
        getattr(torch, args.dtype) if args.dtype else None,
        native=False if args.no_compile else None,
        graphs=args.graphs,
        check=args.check,
        quantize=_scheme(args.quantize),
        **options,
    )


def _scheme(entries: Sequence[str]) -> dict[str, str]:
    """`--quantize PART=METHOD ...` as `quantize.quantize` takes it."""
    if wrong := [entry for entry in entries if entry.count("=") != 1]:
        raise ValueError(f"--quantize takes PART=METHOD, got {wrong[0]!r}")
    return dict(entry.split("=") for entry in entries)


def _params(args: argparse.Namespace) -> GenerationParams:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    return GenerationParams(**{name: getattr(args, name) for name in names})


def _plan_values(plan: TilePlan, config: NVLMConfig) -> dict[str, Any]:
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


def _print_plan(console: Console, plan: TilePlan, config: NVLMConfig) -> None:
    values = _plan_values(plan, config)
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


def _print_timings(console: Console, output: Output) -> None:
    table = Table("stage", "ms", "share")
    for column in table.columns[1:]:
        column.justify = "right"
    total = output.timings["total"]
    for stage, seconds in output.timings.items():
        table.add_row(stage, f"{1e3 * seconds:.1f}", f"{seconds / max(total, 1e-9):.0%}")
    per_token = output.timings["decode"] / max(1, len(output.token_ids))
    console.print(table)
    console.print(
        f"{output.num_prompt_tokens} prompt tokens, {len(output.token_ids)} new, {1e3 * per_token:.1f} ms each",
        highlight=False,
    )


def _values(output: Output, config: NVLMConfig) -> dict[str, Any]:
    values = asdict(output)
    values["plans"] = [_plan_values(plan, config) for plan in output.plans]
    return values


def _show(stream: Stream) -> None:
    """Prints an answer as it comes. Ctrl-C leaves what was printed, and goes on to the caller."""
    try:
        for piece in stream:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)


def ask(args: argparse.Namespace) -> int:
    *images, prompt = args.words
    params = _params(args)
    model, console = _load(args), Console()
    prepared = model.prepare(prompt, images, style=args.style)
    stream = model.complete(prepared, params)
    if args.json:
        for _ in stream:
            pass
        print(json.dumps(_values(stream.output, model.config)))
        return 0
    if args.plan:
        for plan in prepared.plans:
            _print_plan(console, plan, model.config)
    _show(stream)
    if args.timings:
        _print_timings(console, stream.output)
    return 0


def chat(args: argparse.Namespace) -> int:
    params = _params(args)
    model = _load(args)
    messages: list[dict[str, Any]] = []
    images: list[Any] = []
    waiting = [open_image(path) for path in args.images]
    interactive = sys.stdin.isatty() and not args.json
    if interactive:
        print("A question a line. /image FILE adds a picture, /quit leaves.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return 0
        if line == "/quit":
            return 0
        if not line:
            continue
        try:
            if line.startswith("/image "):
                waiting.append(open_image(line.removeprefix("/image ").strip()))
                continue
            content = [{"type": "image"}] * len(waiting) + [{"type": "text", "text": ("\n" if waiting else "") + line}]
            turn = [*messages, {"role": "user", "content": content}]
            prepared = model.prepare(messages=turn, images=images + waiting, style=args.style)
            stream = model.complete(prepared, params)
        except (ValueError, OSError) as error:
            if not interactive:
                raise
            print(f"nvlm: {error}", file=sys.stderr)
            continue
        try:
            if args.json:
                for _ in stream:
                    pass
                print(json.dumps(_values(stream.output, model.config)), flush=True)
            else:
                _show(stream)
        except KeyboardInterrupt:
            if not interactive:
                raise
        answer = {"role": "assistant", "content": [{"type": "text", "text": stream.output.text}]}
        messages, images, waiting = [*turn, answer], images + waiting, []


def info(args: argparse.Namespace) -> int:
    if args.name in PRESETS and not args.name.startswith("micro-"):
        config = PRESETS[args.name]
    else:
        config = from_hf(read_json(checkpoint_folder(args.name) / "config.json"))
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
        "plans": [_plan_values(plan, config) for plan in plans],
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
        _print_plan(console, plan, config)
    return 0


def _print_stages(console: Console, stages: tuple[StageTime, ...]) -> None:
    table = Table("stage", "ms", "share", "eager's ms", "times faster", "most of it in")
    for column in table.columns[1:5]:
        column.justify = "right"
    for stage in stages:
        table.add_row(
            stage.stage,
            f"{1e3 * stage.seconds:.1f}",
            f"{stage.share:.0%}",
            f"{1e3 * stage.plain_seconds:.1f}",
            f"{stage.ratio:.2f}" if stage.ratio else "-",
            ", ".join(f"{name} {share:.0%}" for name, share in stage.ops[:2]),
        )
    ours, plain = (sum(getattr(stage, name) for stage in stages) for name in ("seconds", "plain_seconds"))
    table.add_row("total", f"{1e3 * ours:.1f}", "100%", f"{1e3 * plain:.1f}", f"{plain / ours:.2f}", "")
    console.print(table)


def profile_stages(args: argparse.Namespace) -> int:
    *images, prompt = args.words
    params = GenerationParams(max_new_tokens=args.max_new_tokens)
    if args.png:
        check_matplotlib()
    model = _load(args, reuse=False, image_cache_bytes=0)
    result = profile_request(model, prompt, images, params, args.rounds)
    if args.trace:
        result.trace.export_chrome_trace(args.trace)
    if args.png:
        draw_stages(result.stages, f"{args.model}, {args.rounds} rounds", Path(args.png))
    if args.json:
        values = _values(result.output, model.config)
        values["stages"] = [asdict(stage) | {"ratio": stage.ratio} for stage in result.stages]
        print(json.dumps(values))
        return 0
    _print_stages(Console(), result.stages)
    return 0


def train(args: argparse.Namespace) -> int:
    from nvlm_runtime.micro.train import Recipe, train_micro

    given = {"steps": args.steps, "tower_steps": args.tower_steps, "num_documents": args.documents}
    recipe = replace(Recipe(), **{name: value for name, value in given.items() if value is not None})
    if args.threads:
        torch.set_num_threads(args.threads)
    train_micro(args.variant, args.seed, Path(args.out), Path(args.work), recipe, lambda line: print(line, flush=True))
    return 0


def evaluate(args: argparse.Namespace) -> int:
    from nvlm_runtime.micro.evaluate import evaluate as evaluate_micro

    model = NVLM.load(args.model or f"micro-{args.variant}")
    if model.config.variant != args.variant:
        raise ValueError(f"{args.model} is NVLM-{model.config.variant.upper()}, not -{args.variant.upper()}")
    report = evaluate_micro(model, args.seed, args.samples, open_mask=args.open_mask, blank_tiles=args.blank_tiles)
    if args.json:
        print(json.dumps(report))
        return 0
    table = Table("kind", "asked", "exact")
    for kind, (asked, right) in report["kinds"].items():
        table.add_row(kind, str(asked), f"{right / asked:.1%}")
    table.add_row("all", str(report["samples"]), f"{report['accuracy']:.1%}")
    Console().print(table)
    return 0
