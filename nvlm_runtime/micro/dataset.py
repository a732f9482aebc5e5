"""What the micro models train on, as `nvlm train` reads it: pictures of rendered documents, conversations about them.

Three files of rows: `short.jsonl`, documents of two or three tiles, and `transcribed.jsonl`, all of them, in which
every conversation ends with a transcription of the page; `asked.jsonl`, all of them, questions alone. A decoder that
has to find a glyph among 140 image tokens, or which tag is meant among seven, learns it sooner among 60 and four.
"""

import hashlib
import json
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from nvlm_runtime.micro.document import Document, draw, make_document
from nvlm_runtime.micro.questions import Question, questions, transcription

# Finding a thing by its look comes last: nothing in the question says where to search.
KIND_WEIGHTS = {"tile": 2, "read": 1, "position": 1, "colour": 4, "shape": 3, "field": 3}
QUESTIONS = 8  # of a conversation, at most
ROUNDS = 4  # conversations about a document, in each file it is in
FILES = ("short", "transcribed", "asked")
CHUNK = 100  # documents a task of the pool, and a folder of pictures


def document_at(seed: int, index: int) -> Document:
    """Draws a training document.

    Args:
        seed: of the dataset.
        index: of the document.

    Returns:
        The document.
    """
    return make_document(f"train:{seed}:{index}")


def documents_hash(seed: int) -> str:
    """Hashes the first 20 documents of a seed, to tell apart what versions of this package draw and ask.

    Args:
        seed: of the dataset.

    Returns:
        Eight hexadecimal digits.
    """
    digest = hashlib.sha256()
    for index in range(20):
        document = document_at(seed, index)
        digest.update(repr((document.tiles, conversations(document, seed, index))).encode() + draw(document).tobytes())
    return digest.hexdigest()[:8]


def _choose(rng: random.Random, document: Document) -> list[Question]:
    """Up to QUESTIONS questions, their kinds drawn by KIND_WEIGHTS."""
    kinds: dict[str, list[Question]] = {}
    for question in questions(document):
        kinds.setdefault(question.kind, []).append(question)
    chosen: list[Question] = []
    while kinds and len(chosen) < QUESTIONS:
        (kind,) = rng.choices(list(kinds), [KIND_WEIGHTS[kind] for kind in kinds])
        chosen.append(kinds[kind].pop(rng.randrange(len(kinds[kind]))))
        if not kinds[kind]:
            del kinds[kind]
    return chosen


def conversations(document: Document, seed: int, index: int) -> dict[str, list[list[Question]]]:
    """Chooses what is asked about a document, `ROUNDS` times per file it is in.

    Args:
        document: the document.
        seed: of the dataset.
        index: of the document.

    Returns:
        File names to conversations; those without a question are left out.
    """
    rng = random.Random(f"asked:{seed}:{index}")
    found = {}
    for name in FILES:
        if name == "short" and len(document.tiles) not in (2, 3):
            continue
        ends = [] if name == "asked" else [transcription(document)]
        found[name] = [chosen for _ in range(ROUNDS) if (chosen := _choose(rng, document) + ends)]
    return found


def row(picture: str, asked: Sequence[Question]) -> str:
    """Writes a line of JSON in the LLaVA/ShareGPT form.

    Args:
        picture: path of the image.
        asked: the questions of one conversation.

    Returns:
        The line, with its newline.
    """
    turns = []
    for number, question in enumerate(asked):
        turns.append({"from": "human", "value": question.text if number else f"<image>\n{question.text}"})
        turns.append({"from": "gpt", "value": question.answer})
    return json.dumps({"image": picture, "conversations": turns}) + "\n"


def _write_chunk(folder: Path, seed: int, num_documents: int, first: int) -> dict[str, list[str]]:
    """Draws a chunk's pictures. Returns its rows, a file."""
    rows: dict[str, list[str]] = {name: [] for name in FILES}
    pictures = Path("pictures") / f"{first:06d}"
    (folder / pictures).mkdir(parents=True)
    for index in range(first, min(first + CHUNK, num_documents)):
        document = document_at(seed, index)
        picture = pictures / f"{index:06d}.png"
        draw(document).save(folder / picture, compress_level=1)
        for name, found in conversations(document, seed, index).items():
            rows[name] += [row(str(picture), asked) for asked in found]
    return rows


def write_dataset(folder: Path, seed: int, num_documents: int, log: Callable[[str], None]) -> None:
    """Writes documents and questions, all or nothing, in several processes.

    Args:
        folder: the new folder.
        seed: of the dataset.
        num_documents: documents 0 to num_documents - 1 are written.
        log: called with a line per chunk of documents.
    """
    unfinished = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    starts = range(0, num_documents, CHUNK)
    files = {name: (unfinished / f"{name}.jsonl").open("w", encoding="utf-8") for name in FILES}
    quiet = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is this process's to answer
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=signal.signal, initargs=quiet) as pool:
        for first, rows in zip(starts, pool.map(partial(_write_chunk, unfinished, seed, num_documents), starts)):
            for name, lines in rows.items():
                files[name].writelines(lines)
            log(f"documents: {min(first + CHUNK, num_documents)}/{num_documents}")
    for file in files.values():
        file.close()
    unfinished.rename(folder)
