"""Loading a sharded checkpoint against a plain read of its files: python -m bench.loading [--ranks 1 2]

Tensors of NVLM-D-72B's true shapes in bfloat16, fewer of them: two of the vision encoder's 45 layers, the projector,
one of the decoder's 80 layers, embedding and head; 8.6 GB in the published layout, dummy heads among them. In every
round the files leave the page cache, are read from end to end by one plain loop, leave it again, and are loaded by one
process, and by ranks that each read their own slices at the same time. Seconds until the slowest has all; bytes a
second as a share of the plain read's in that round; and the most memory that belonged to a rank alone (RssAnon, looked
at every 5 ms; a file's own mapped pages are the page cache's) above what it had before, beside the bytes of its share.
Linux only.
"""

import argparse
import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.reports.report import table, write
from bench.setup.gloo import run_ranks
from bench.setup.resident import field_bytes
from bench.train_step import percentiles
from nvlm_runtime.checkpoint.weights import load, save
from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.parallel.group import Group
from nvlm_runtime.presets import PRESETS

CHUNK = 1 << 24
SHARD = 2 << 30


def large_config() -> NVLMConfig:
    config = PRESETS["nvlm-d-72b"]
    return replace(
        config,
        vision=replace(config.vision, num_hidden_layers=2),
        text=replace(config.text, num_hidden_layers=1),
    )


def write_checkpoint(config: NVLMConfig, folder: Path) -> None:
    """Every tensor is the same random numbers over and over: a disk does not look at them."""
    with torch.device("meta"):
        model = NVLMModel(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    block = torch.randn(1 << 20).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for at in range(0, len(flat), len(block)):
                part = flat[at : at + len(block)]
                part.copy_(block[: len(part)])
    save(model, folder, shard_bytes=SHARD)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def leave_cache(folder: Path) -> None:
    """Asks the kernel to forget the files' pages."""
    for path in files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_plainly(folder: Path) -> float:
    """Seconds of one read of every file, in order, in pieces of 16 MiB."""
    buffer, began = bytearray(CHUNK), time.perf_counter()
    for path in files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


class Highest:
    """The most of RssAnon while it is open, bytes."""

    def __enter__(self) -> "Highest":
        self.bytes, self._ended = field_bytes("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._ended.wait(0.005):
            self.bytes = max(self.bytes, field_bytes("RssAnon"))

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self.bytes = max(self.bytes, field_bytes("RssAnon"))


def measure(group: Group, folder: Path) -> dict[str, int | float]:
    before = field_bytes("RssAnon")
    group.wait()
    began = time.perf_counter()
    with Highest() as highest:
        model, _ = load(folder, group=group)
        seconds = time.perf_counter() - began
    share = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    return {"seconds": seconds, "memory": highest.bytes - before, "share": share, "largest": largest}


def compare(config: NVLMConfig, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    plain: list[float] = []
    found: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(config, folder)
        total = sum(path.stat().st_size for path in files(folder))
        for _ in range(rounds):
            leave_cache(folder)
            plain.append(read_plainly(folder))
            for size in sizes:
                leave_cache(folder)
                ranks = run_ranks(size, measure, folder, timeout=1800)
                found[size].append({key: max(rank[key] for rank in ranks) for key in ranks[0]})
    rows = [_row("plain read", total, plain, plain)]
    for size, turns in found.items():
        row = _row(f"{size} rank{'s' * (size > 1)}", total, [turn["seconds"] for turn in turns], plain)
        rows.append(row | {key: max(turn[key] for turn in turns) for key in ("memory", "share", "largest")})
    return rows


def _row(name: str, total: int, seconds: list[float], plain: list[float]) -> dict[str, Any]:
    shares = [theirs / ours for ours, theirs in zip(seconds, plain, strict=True)]
    spread = {"seconds": seconds, "share_of_plain_read": shares}
    found = {
        key: dict(zip(("p20", "p50", "p80"), percentiles(values) if len(values) > 1 else 3 * values))
        for key, values in spread.items()
    }
    return {"reader": name, "bytes": total, "rounds": len(seconds), **found}


def show(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        gigabytes = [row[key] / 1e9 if key in row else None for key in ("share", "largest", "memory")]
        seconds, share = row["seconds"], row["share_of_plain_read"]
        cells.append(
            [
                row["reader"],
                "{p50:.1f} ({p20:.1f}-{p80:.1f})".format(**seconds),
                f"{row['bytes'] / seconds['p50'] / 1e9:.2f}",
                "{p50:.0%} ({p20:.0%}-{p80:.0%})".format(**share),
                *gigabytes,
            ]
        )
    head = ("", "seconds", "GB/s", "of a plain read", "a rank's share GB", "its largest tensor GB", "memory at most GB")
    return table(head, cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.loading", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(PRESETS), help="a bundled or published model instead, whole")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="default: bench/results/loading.json, of the large checkpoint")
    args = parser.parse_args(argv)
    if min(*args.ranks, args.rounds) < 1:
        parser.error("--ranks and --rounds must be at least 1")
    rows = compare(PRESETS[args.model] if args.model else large_config(), args.ranks, args.rounds)
    print(f"{rows[0]['bytes'] / 1e9:.2f} GB")
    print(show(rows))
    write(args.json, "loading", rows, args.model is not None)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
