"""Pictures and prompts to tokens, against plain PyTorch and transformers: python -m bench.generate [MODEL] [options]

First what the model weighs and what the machine can do; then milliseconds a tile, seconds to the first token (7 tiles
and a question of 100 tokens, the image new or as a handle), milliseconds a token at contexts, tokens a second of
batches, the memory a request takes, seconds from nothing to an answer of the command.

Contestants take turns within each round, over the same weights, tokens and pixels; medians with 20th and 80th
percentile. `--against d` instead times variants: the first token after encoding, and a token, behind 7 tiles.
`--tp N` times ours over N ranks of a group, a model of one rank's memory being too large or one rank too slow.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.peers.contestants import Contestant, Ours, contestants
from bench.reports.card import card
from bench.reports.chart import draw
from bench.reports.report import RESULTS, setting, table
from bench.setup.resident import peak_bytes
from bench.setup.synthetic import SHAPES, synthetic
from nvlm_runtime import NVLM
from nvlm_runtime.analysis.profile import check_matplotlib
from nvlm_runtime.checkpoint.bundled import BUNDLED
from nvlm_runtime.commands.loading import scheme_of_words
from nvlm_runtime.config import VARIANTS
from nvlm_runtime.engine.images import ImageHandle
from nvlm_runtime.engine.slots import cache_bytes
from nvlm_runtime.engine.step_bytes import step_bytes
from nvlm_runtime.inputs.image import open_image, plan_tiles
from nvlm_runtime.model.quantize import check_scheme
from nvlm_runtime.parallel.ranks import abandon, in_group, join, launch, leave, report

PARTS = ("vision", "first", "decode", "batches", "startup")
CONTEXTS, BATCHES, BATCH_CONTEXT = (128, 1024, 8192), (1, 2, 4, 8, 16), 128
QUESTION_TOKENS = 100
UNITS = {
    "tile_ms": "ms a tile, of pictures of so many tiles",
    "first_token_s": "s to the first token of tiles and a question of 100 tokens; the image new, or a handle",
    "token_ms": "ms a token behind so many tokens",
    "tokens_per_s": f"tokens a second of so many rows, each behind {BATCH_CONTEXT} tokens",
    "working_mb": "MB resident above weights and caches, at the most, from a new image to the first token",
    "startup_s": "s from nothing to a one-token answer of `nvlm ask`, its caches of compiled code empty or filled",
}


@dataclass(frozen=True)
class Plan:
    """What is asked for. steps: decoding steps a round. contexts, batches: those that fit the model."""

    parts: tuple[str, ...]
    rounds: int
    steps: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]


class Times:
    """Values by measure, contestant and place, gathered round by round."""

    def __init__(self):
        self._values: dict[tuple[str, str, int | str], list[float]] = {}

    def add(self, measure: str, contestant: str, at: int | str, *values: float) -> None:
        self._values.setdefault((measure, contestant, at), []).extend(values)

    def rows(self) -> list[dict[str, Any]]:
        """measure, contestant, at, p20, p50, p80 and how many values they are of."""
        found = []
        for (measure, contestant, at), values in self._values.items():
            cuts = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else values * 9
            row = {"measure": measure, "contestant": contestant, "at": at}
            found.append(row | {"p20": cuts[1], "p50": statistics.median(values), "p80": cuts[7], "num": len(values)})
        return found


def pictures(tiles: int, engine: NVLM, file: Path | None) -> Iterator[Image.Image]:
    """Pictures that were never seen, of 1 tile or of 6 and a thumbnail: noise, or a file with a pixel changed."""
    base = open_image(file).convert("RGB") if file and tiles > 1 else None
    image_size, seed = engine.config.vision.image_size, engine.model.group.agree(time.time_ns() % 2**32)
    while True:
        seed += 1
        if base is not None:
            picture = base.copy()
            picture.putpixel((0, 0), (seed & 255, seed >> 8 & 255, seed >> 16 & 255))
        else:
            size = (image_size, image_size, 3) if tiles == 1 else (2 * image_size, 3 * image_size, 3)
            picture = Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8))
        yield picture


def question(engine: NVLM) -> str:
    """A text of about QUESTION_TOKENS tokens."""
    words = "What is the total?"
    while len(engine.tokenizer.encode(words)) < QUESTION_TOKENS:
        words += " What is the total?"
    return words


def made_handle(engine: NVLM, picture: Image.Image) -> ImageHandle:
    """Of a picture's size, with random tokens: what comes after encoding costs the same."""
    config = engine.config
    plan = plan_tiles(*picture.size, config.vision.image_size, config.min_tiles, config.max_tiles)
    shape = plan.num_tiles, config.tokens_per_tile, config.text.hidden_size
    return engine.handle_from_embeds(torch.randn(shape, generator=torch.Generator().manual_seed(0)), *picture.size)


def measure_vision(players: dict[str, Contestant], engine: NVLM, rounds: int, file: Path | None, times: Times) -> None:
    single = pictures(1, engine, file)
    for player in players.values():
        player.see(next(single))
    for _ in range(rounds):
        for name, player in players.items():
            times.add("tile_ms", name, 1, 1e3 * player.see(next(single)))


def measure_first(players: dict[str, Contestant], engine: NVLM, rounds: int, file: Path | None, times: Times) -> None:
    """Also the tiles' part of it, and the memory the first round takes."""
    config, words = engine.model.shard, question(engine)
    new = pictures(7, engine, file)
    handles = {name: made_handle(player.engine, next(new)) for name, player in players.items() if type(player) is Ours}
    for index in range(rounds):
        for name, player in players.items():
            picture, found = next(new), []

            def run(player=player, picture=picture, found=found) -> None:
                found.append(player.first(picture, words))

            # only the first time does a contestant allocate its caches, which are taken off the peak
            peak = peak_bytes(run, engine.device) if index == 0 else run()
            seconds, seen = found[0]
            prepared = engine.prepare(words, [picture])
            tiles = prepared.plans[0].num_tiles
            times.add("first_token_s", name, f"{tiles} tiles, new", seconds)
            times.add("tile_ms", name, tiles, 1e3 * seen / tiles)
            if peak is not None:
                caches = cache_bytes(config, 1, len(prepared.input_ids), prepared.layout.cross_length, engine.dtype)
                times.add("working_mb", name, f"{tiles} tiles, new", max(0, peak - caches) / 1e6)
            if name in handles:
                times.add("first_token_s", name, f"{tiles} tiles, handle", player.first(handles[name], words)[0])


def measure_steps(
    players: dict[str, Contestant], places: Sequence[tuple[int, int]], plan: Plan, add: Callable[..., None]
) -> None:
    """places: (rows, context). The first step of each turn warms and is not counted."""
    for batch, context in places:
        for _ in range(plan.rounds):
            for name, player in players.items():
                add(name, batch, context, list(player.steps(batch, context, plan.steps + 1))[1:])
        for player in players.values():
            if type(player) is Ours:
                player.forget()


def all_cpus() -> None:
    """OMP_PROC_BIND ties this process to one core, and a child would inherit that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count()))


def measure_startup(model: str, times: Times) -> None:
    """The command as a user starts it. Compiled code goes to an empty folder first, and is found there after."""
    picture = Path(__file__).parents[1] / "examples" / "receipt.png"
    command = [sys.executable, "-m", "nvlm_runtime", "ask", str(picture), "What is the total?"]
    command += ["--model", model, "--max-new-tokens", "1"]
    with tempfile.TemporaryDirectory() as folder:
        caches = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "TRITON_CACHE_DIR")
        environment = os.environ | {name: str(Path(folder) / name) for name in caches}
        for at in ("cold", "warm"):
            began = time.perf_counter()
            subprocess.run(
                command,
                check=True,
                capture_output=True,
                env=environment,
                cwd=picture.parents[1],
                preexec_fn=all_cpus,
            )
            times.add("startup_s", "ours", at, time.perf_counter() - began)


def measure(
    engine: NVLM, players: dict[str, Contestant], plan: Plan, file: Path | None, bundled: str | None
) -> list[dict[str, Any]]:
    """Rows of every part that is asked for."""
    times = Times()
    if "vision" in plan.parts:
        measure_vision(players, engine, plan.rounds, file, times)
    if "first" in plan.parts:
        measure_first(players, engine, plan.rounds, file, times)
    if "decode" in plan.parts:
        places = [(1, context) for context in plan.contexts]
        measure_steps(players, places, plan, lambda n, b, c, t: times.add("token_ms", n, c, *(1e3 * s for s in t)))
    if "batches" in plan.parts:
        places = [(batch, BATCH_CONTEXT) for batch in plan.batches]
        measure_steps(players, places, plan, lambda n, b, c, t: times.add("tokens_per_s", n, b, *(b / s for s in t)))
    if "startup" in plan.parts and bundled:
        measure_startup(bundled, times)
    return times.rows()


def measure_variants(engines: dict[str, NVLM], plan: Plan, file: Path | None) -> list[dict[str, Any]]:
    """The same picture of 7 tiles, encoded before the clock starts, in each variant; only ours plays."""
    times = Times()
    any_engine = next(iter(engines.values()))
    picture, words = next(pictures(7, any_engine, file)), question(any_engine)
    plan_of_it = any_engine.prepare(words, [picture]).plans[0]
    players = {name: Ours(engine) for name, engine in engines.items()}
    handles, requests = {}, {}
    for name, engine in engines.items():
        handles[name] = made_handle(engine, picture)
        requests[name] = engine.prepare(words, [handles[name]])
    for _ in range(plan.rounds):
        for name, player in players.items():
            # a text before the image that changes, so that no prefix is found again
            other = f"{time.time_ns()} <image> {words}"
            at = f"{plan_of_it.num_tiles} tiles, handle"
            times.add("first_token_s", name, at, player.first(handles[name], other)[0])
    for _ in range(plan.rounds):
        for name, player in players.items():
            seconds = list(player.steps_of([requests[name]], plan.steps + 1))[1:]
            times.add("token_ms", name, f"{plan_of_it.num_tiles} tiles", *(1e3 * s for s in seconds))
    return times.rows()


def add_limits(rows: list[dict[str, Any]], players: dict[str, Contestant], bandwidth: float) -> None:
    """What memory allows at each place: `limit` beside every time of text, by the weights a contestant reads."""
    reads = {name: step_bytes(player.engine.model) for name, player in players.items()}
    for row in rows:
        mine = reads[row["contestant"]]
        if row["measure"] == "token_ms" and isinstance(row["at"], int):
            row["limit"] = 1e3 * mine.total(row["at"]) / bandwidth
        if row["measure"] == "tokens_per_s":
            row["limit"] = row["at"] * bandwidth / mine.total(BATCH_CONTEXT, rows=row["at"])


def show(rows: list[dict[str, Any]]) -> str:
    """A table a measure: a line a place, the contestants side by side."""
    blocks = []
    for name, words in UNITS.items():
        mine = [row for row in rows if row["measure"] == name]
        if not mine:
            continue
        names = list(dict.fromkeys(row["contestant"] for row in mine))
        by_place = {(row["at"], row["contestant"]): row for row in mine}
        limited = any(row.get("limit") is not None for row in mine)
        lines = []
        for at in dict.fromkeys(row["at"] for row in mine):
            found = [by_place.get((at, contestant)) for contestant in names]
            cells = [row and _cell(row) for row in found]
            limit = [next((row["limit"] for row in found if row and row.get("limit")), None)] if limited else []
            lines.append((at, *cells, *limit))
        head = (name, *names, *(["memory's limit"] if limited else []))
        blocks.append(f"{words}\n{table(head, lines)}")
    return "\n\n".join(blocks)


def _cell(row: dict[str, Any]) -> str:
    spread = f" ({row['p20']:.4g}-{row['p80']:.4g})" if row["num"] > 1 else ""
    return f"{row['p50']:.4g}{spread}"


def show_card(values: dict[str, Any]) -> str:
    weights = ", ".join(f"{part} {size / 1e6:,.1f}" for part, size in values["weight_bytes"].items())
    return (
        f"weights, MB: {weights}\n"
        f"keys and values: {values['kv_bytes_a_token']:,} bytes a token, {values['image_key_bytes']:,} an image of "
        f"{values['image_tiles']} tiles\n"
        f"memory reads {values['read_gb_per_s']:.1f} GB/s, a step reads {values['step_bytes'] / 1e6:,.0f} MB: at best "
        f"{values['floor_ms']:.3g} ms, {values['ceiling_tokens_per_s']:.4g} tokens/s\n"
        f"bf16 products: {values['gemm_gflop_per_s']:,.0f} GFLOP/s"
    )


def save(path: Path, model: str, parts: Sequence[str], result: dict[str, Any]) -> None:
    """One file a model: a part that is measured again replaces what the file held of it.

    Raises ValueError where the file holds another model's.
    """
    held = json.loads(path.read_text()) if path.exists() else {"bench": "generate", "model": model, "parts": {}}
    if held.get("bench") != "generate" or held.get("model") != model:
        raise ValueError(f"{path} holds {held.get('model')!r}, not {model!r}: give another --json")
    for part in parts:
        rows = [row for row in result["rows"] if row["part"] == part]
        if rows:
            held["parts"][part] = {**{key: result[key] for key in result if key != "rows"}, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held, indent=1) + "\n")


def part_of(row: dict[str, Any], variants: bool) -> str:
    if variants:
        return "variants"
    if row["measure"] == "tile_ms":
        return "vision" if row["at"] == 1 else "first"
    parts = {"first_token_s": "first", "working_mb": "first", "token_ms": "decode", "tokens_per_s": "batches"}
    return parts.get(row["measure"], "startup")


def fitting(args: argparse.Namespace, engine: NVLM, steps: int) -> tuple[int, ...]:
    """The contexts asked for, or those of CONTEXTS that the model holds. ValueError for one that it does not."""
    room = engine.config.text.context - steps - 8
    if args.contexts is None:
        return tuple(context for context in CONTEXTS if context <= room)
    if wrong := [context for context in args.contexts if not 1 <= context <= room]:
        raise ValueError(f"--contexts must be from 1 to {room} for this model, got {wrong[0]}")
    return tuple(args.contexts)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(prog="python -m bench.generate", description=__doc__.splitlines()[0])
    options.add_argument("model", nargs="?", help="bundled name or checkpoint folder")
    options.add_argument("--shape", choices=SHAPES, help="random weights at this shape instead")
    options.add_argument("--variant", choices=VARIANTS, default="d", help="of --shape (default: %(default)s)")
    options.add_argument("--against", choices=VARIANTS, nargs="+", help="time --variant against these, on --shape")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: its own; bfloat16 with --shape")
    options.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    options.add_argument("--tp", type=int, metavar="N", help="ours alone, the model split over N processes")
    options.add_argument("--image", type=Path, help="the picture of several tiles (default: noise of 7)")
    options.add_argument("--peers", nargs="*", default=[], metavar="PEER", help="transformers")
    options.add_argument(
        "--quantize",
        nargs="+",
        action="append",
        default=[],
        metavar="PART=METHOD",
        help="ours again, quantised as by `nvlm ask --quantize`; may be repeated",
    )
    options.add_argument("--contexts", type=int, nargs="+", help=f"default: those of {CONTEXTS} that fit")
    options.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    options.add_argument("--rounds", type=int, default=2, help="turns a contestant takes (default: %(default)s)")
    options.add_argument("--steps", type=int, default=8, help="decoding steps a turn (default: %(default)s)")
    options.add_argument("--only", nargs="+", choices=PARTS, help="parts to measure (default: all)")
    options.add_argument("--quick", action="store_true", help="micro-d, little of everything: that it runs")
    options.add_argument("--json", type=Path, help="file the measured parts are put into, those it holds kept")
    options.add_argument("--results", action="store_true", help="--json and --png in bench/results, named")
    options.add_argument("--png", type=Path, help="ms against context, tokens/s against batch (needs matplotlib)")
    return options


def check(args: argparse.Namespace) -> None:
    """Fills in what --quick means. Raises ValueError for words that do not fit together."""
    if args.quick:
        args.model, args.rounds, args.steps = args.model or "micro-d", 1, 3
        args.contexts, args.batches = args.contexts or [32, 128], [1, 2]
        args.only = args.only or [part for part in PARTS if part != "startup"]
    if (args.model is None) == (args.shape is None):
        raise ValueError("give a model or --shape, one of them")
    if args.against and args.shape is None:
        raise ValueError("--against needs --shape: variants are compared on one backbone")
    if args.rounds < 1 or args.steps < 1 or min(args.batches) < 1:
        raise ValueError("--rounds, --steps and --batches must be at least 1")
    if args.model and args.variant != "d":
        raise ValueError("--variant belongs to --shape: a checkpoint is what it is")
    if ((args.tp or 1) > 1 or in_group()) and args.shape:
        raise ValueError("--tp splits a checkpoint: give a model, not --shape or --against")
    for words in args.quantize:
        check_scheme(scheme_of_words(words))
    if args.quantize and args.against:
        raise ValueError("--quantize goes with contestants, not with --against")
    if args.png or (args.results and not args.against):
        check_matplotlib()


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What `main` prints and saves. Raises ValueError for what does not fit together, before anything is measured."""
    check(args)
    name = args.model or f"{args.shape}-{args.variant}"
    name = "-against-".join([Path(name).name, *args.against]) if args.against else Path(name).name
    group, device = join(args.device, args.tp)
    if group.size > 1:
        name = f"{name}-tp{group.size}"
    if args.results:
        args.json = args.json or RESULTS / f"generate-{name}.json"
        args.png = args.png or (None if args.against else args.json.with_suffix(".png"))
    dtype = getattr(torch, args.dtype) if args.dtype else "auto"
    if args.shape:
        engines = {
            f"nvlm-{variant}": synthetic(args.shape, variant, dtype or torch.bfloat16, device)
            for variant in dict.fromkeys((args.variant, *(args.against or ())))
        }
        engine = engines[f"nvlm-{args.variant}"]
    else:
        engine = NVLM.load(args.model, device=device, dtype=dtype, group=group)
    contexts, batches = fitting(args, engine, args.steps), tuple(dict.fromkeys(args.batches))
    plan = Plan(tuple(args.only or PARTS), args.rounds, args.steps, contexts, batches)
    size = engine.config.vision.image_size
    tiles = plan_tiles(3 * size, 2 * size, size, engine.config.min_tiles, engine.config.max_tiles)
    load = os.getloadavg()[0]  # of a minute before: who else was at work
    values = card(engine.model, engine.tokenizer, tiles, engine.dtype)
    where = f"{name}, {engine.dtype}, {torch.get_num_threads()} threads, load {load:.1f} before"
    print(f"{where}\n{show_card(values)}\n", flush=True)
    if args.against:
        rows = measure_variants(engines, plan, args.image)
    else:
        is_bundled = args.model and (BUNDLED / args.model).is_dir() and group.size == 1
        bundled = args.model if is_bundled and engine.device.type == "cpu" else None
        players = contestants(engine, args.peers, [scheme_of_words(words) for words in args.quantize])
        rows = measure(engine, players, plan, args.image, bundled)
        add_limits(rows, players, 1e9 * values["read_gb_per_s"])
    for row in rows:
        row["part"] = part_of(row, bool(args.against))
    result = {"setting": setting(), "dtype": str(engine.dtype).removeprefix("torch."), "card": values}
    result |= {"load": load, "rounds": plan.rounds, "steps": plan.steps, "rows": rows}
    print(show(rows))
    if group.rank:
        return {}
    if args.json:
        save(args.json, name, ("variants",) if args.against else plan.parts, result)
    if args.png:
        held = json.loads(args.json.read_text())["parts"].values() if args.json else [result]
        drawn = [row for part in held for row in part["rows"]]
        draw(drawn, f"{name}, {result['dtype']}, {setting()['cpu']}, {torch.get_num_threads()} threads", args.png)
    return {"bench": "generate", "model": name, **result}


def main(argv: Sequence[str] | None = None) -> int:
    options, argv = parser(), sys.argv[1:] if argv is None else argv
    args = options.parse_args(argv)
    if int(os.environ.get("RANK", "0")):
        sys.stdout = open(os.devnull, "w")  # rank 0 speaks for all
    try:
        if (args.tp or 1) > 1 and not in_group():
            check(args)
            return launch(argv, args.tp, "bench.generate")
        result = run(args)
    except (ValueError, OSError) as error:
        words = " ".join(str(error).split())
        if in_group():
            report(words)
            abandon(2)
        options.exit(2, f"bench.generate: {words}\n")
    print(json.dumps(result))
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
