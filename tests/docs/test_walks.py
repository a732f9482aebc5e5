"""The walks of docs/architecture.md: at most 10 hops, none twice, and called in that order when a value walks."""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, contextmanager

import pytest

from nvlm_runtime import NVLM
from nvlm_runtime.training.recipe import read_recipe
from nvlm_runtime.training.trainer import Trainer
from tests.docs.pages import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text()
WALKS = dict(re.findall(r"^### Walk: ([^\n]+)\n(.*?)(?=^##)", TEXT, re.MULTILINE | re.DOTALL))
HOP = re.compile(r"^\d+\. `([\w/]+\.py)`: `([\w.]+)`", re.MULTILINE)
RECEIPT = str(ROOT / "examples" / "receipt.png")


@contextmanager
def calls():
    """(path in the tree, function) of every call, in order of the first, on every thread that starts inside."""
    found: dict[tuple[str, str], None] = {}
    prefix = f"{ROOT}{os.sep}"

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_filename.startswith(prefix):
            found.setdefault((frame.f_code.co_filename.removeprefix(prefix), frame.f_code.co_qualname))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def load_and_answer(folder):
    """Loads a model and asks it about an image."""
    with calls() as found:
        NVLM.load("micro-h", native=False).generate("What is the total?", images=[RECEIPT], max_new_tokens=3)
    return found


def decode(folder):
    """Draws a token after the first ones."""
    stream = NVLM.load("micro-h", native=False).stream("What is the total?", images=[RECEIPT], max_new_tokens=8)
    pieces = iter(stream)
    next(pieces)
    with calls() as found:
        for _ in pieces:
            pass
    return found


def train(folder):
    """Takes one step on one record."""
    record = {"image": RECEIPT, "conversations": [{"from": "human", "value": "<image>\nTotal?"}]}
    record["conversations"].append({"from": "gpt", "value": "3.10"})
    (folder / "data.jsonl").write_text(json.dumps(record))
    data = f'data=[{{task="vqa", file="{folder / "data.jsonl"}"}}]'
    changes = ["model=micro-x", f"out={folder / 'run'}", "steps=1", "warmup=0", "accumulate=1", "seq_len=256", data]
    with calls() as found:
        trainer = Trainer(read_recipe("sft-x", [*changes, "plot=false", "precision=float32"]), log=lambda line: None)
        with closing(trainer.source):
            while ("nvlm_runtime/training/packing.py", "pack") not in found:  # its thread reads ahead of the step
                time.sleep(0.01)
            trainer.step()
    return found


WALKED: dict[str, Callable[..., dict]] = {
    "an image, from a path to the decoder": load_and_answer,
    "a training record, from a line to a gradient": train,
    "a checkpoint tensor, from a file to a parameter": load_and_answer,
    "a decode step, from the last token to the next": decode,
}


def test_there_are_four_walks():
    assert set(WALKS) == set(WALKED)


@pytest.mark.parametrize("title", WALKED)
def test_a_value_walks_as_it_is_written(title, tmp_path):
    text = WALKS[title]
    hops = HOP.findall(text)
    assert len(hops) == len(re.findall(r"^\d+\.", text, re.MULTILINE)), "a hop is a file and a function"
    assert 2 <= len(hops) <= 10 and len(set(hops)) == len(hops)
    found = WALKED[title](tmp_path)
    assert not [hop for hop in hops if hop not in found], "a hop that nobody calls"
    order = list(found)
    places = [order.index(hop) for hop in hops]
    assert places == sorted(places), [hops[i] for i in sorted(range(len(hops)), key=places.__getitem__)]


def test_an_image_passes_every_file_once():
    files = [file for file, _ in HOP.findall(WALKS["an image, from a path to the decoder"])]
    assert len(set(files)) == len(files)
