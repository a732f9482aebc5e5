"""`nvlm quantize`: a checkpoint whose weights are in 8 or 4 bits."""

import argparse
import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch

from nvlm_runtime.checkpoint.assembly import check_empty
from nvlm_runtime.checkpoint.composite import whole_folder
from nvlm_runtime.checkpoint.weights import DTYPES, load, open_tensors, save
from nvlm_runtime.commands.loading import scheme_of_words
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.model.quantize import check_scheme, quantize, scheme_of

BESIDE = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json", "generation_config.json")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _stored(folder: Path) -> torch.dtype | None:
    """What a checkpoint's tensors are stored in, which a model may be run in another than; None where they differ."""
    with ExitStack() as stack:
        kinds = {tensor.get_dtype() for tensor in open_tensors(folder, stack).values()}
    return DTYPES[kinds.pop()] if len(kinds) == 1 else None


def run(args: argparse.Namespace) -> int:
    """Writes a quantised copy of a checkpoint (`nvlm quantize`).

    Args:
        args: the parsed command line.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: the output folder is not empty, or a part or a method is unknown.
        FileNotFoundError: a file does not exist.
    """
    out, scheme = Path(args.out), scheme_of_words(args.quantize)
    check_empty(out)
    check_scheme(scheme)
    folder = whole_folder(args.model)
    tokenizer = Tokenizer.load(folder)
    model, _ = load(folder, dtype=getattr(torch, args.dtype) if args.dtype else None)
    quantize(model, scheme)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    for name in BESIDE:
        if (folder / name).is_file():
            shutil.copy(folder / name, out / name)
    # last: its config.json says that all is there
    save(model, out, dtype=None if args.dtype else _stored(folder), run_dtype=next(model.parameters()).dtype)
    found = {"out": str(out), "quantization": scheme_of(model), "bytes": _bytes(out), "bytes_before": _bytes(folder)}
    if args.json:
        print(json.dumps(found))
    else:
        print(f"{out}: {found['bytes'] / 1e6:,.1f} MB, {args.model} has {found['bytes_before'] / 1e6:,.1f} MB")
    return 0
