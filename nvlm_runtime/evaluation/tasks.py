"""The benchmarks of the paper's tables: how the rows of a published file become prompts, gold answers and scores.

Prompts are Megatron-LM's (examples/multimodal, run_text_generation.py and evaluation_datasets.py) where it has them;
GSM8K's, MATH's and MMLU's are ours, for the paper does not give them. The system turn is the model's default.
HumanEval is not among them: its metric runs what the model wrote.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from nvlm_runtime.evaluation.choices import LETTERS, chosen_letter, open_answer_matches
from nvlm_runtime.evaluation.mathematics import gsm8k_answer, last_boxed, math_equal, mathvista_answer
from nvlm_runtime.evaluation.metrics import (
    anls,
    exact,
    normalise_answer,
    normalise_textvqa,
    ocrbench,
    relaxed_accuracy,
    vqa_accuracy,
)
from nvlm_runtime.evaluation.rows import Row, read_rows
from nvlm_runtime.evaluation.samples import Pictures, Sample, Score, Source, gold_letter, literal_list, options

LETTER = "Answer with the option's letter from the given choices directly."
PHRASE = "Answer the question using a single word or phrase."
NUMBER = "Answer the question using a single word, phrase, or number."
REASON = "Please reason step by step, and put your final answer within \\boxed{}."
HINTS = {  # MathVista's, evaluation/build_query.py
    "integer": "an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
    "float 1": "a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, "
    "at the end.",
    "float 2": "a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34, 1.45, "
    "at the end.",
    "list": "a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}


@dataclass(frozen=True)
class Task:
    """metric: its name. binary: whether every score is 0 or 1. files: the published ones that are read.

    sample: a row to a question. key: of the list of rows in a JSON object. answers_key: the same in the file of
    answers, where the benchmark has one of its own. folder: of the pictures, beside the data. columns: of a CSV.
    """

    metric: str
    binary: bool
    files: str
    sample: Callable[[Row, Pictures], Sample]
    max_new_tokens: int = 32
    key: str | None = None
    answers_key: str | None = None
    folder: str = ""
    columns: tuple[str, ...] | None = None


def read_samples(
    task: Task, data: Sequence[Path], answers: Path | None = None, images: Path | None = None
) -> list[Sample]:
    """Reads the questions of files or folders, in their order.

    Args:
        task: the benchmark.
        data: files or folders.
        answers: the file of VQAv2's annotations; None for other tasks.
        images: folder of the images; None is the task's own, beside the data.

    Returns:
        The questions.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a row cannot be asked or scored, or two have one id; names file and row.
    """
    if (answers is None) != (task.answers_key is None):
        wrong = "missing" if answers is None else "of no use here"
        raise ValueError(f"--answers is {wrong}: the task reads {task.files}")
    samples: list[Sample] = []
    for path in data:
        rows = read_rows(path, task.columns, task.key)
        if answers is not None:
            rows = _with_answers(rows, read_rows(answers, None, task.answers_key))
        beside = path if path.is_dir() else path.parent
        pictures = Pictures.of(rows, images or beside / task.folder)
        samples += (task.sample(row, pictures) for row in rows)
    first: dict[str, Sample] = {}
    for sample in samples:
        if sample.id in first:
            raise sample.row.error(f"the id {sample.id!r} is that of {first[sample.id].row.where} too")
        first[sample.id] = sample
    return samples


def _with_answers(rows: Sequence[Row], answers: Sequence[Row]) -> list[Row]:
    known = {row.need("question_id"): row.values for row in answers}
    joined = []
    for row in rows:
        if row.need("question_id") not in known:
            raise row.error(f"the file of answers has no question_id {row.values['question_id']!r}")
        joined.append(replace(row, values=known[row.values["question_id"]] | row.values))
    return joined


def _id(row: Row, *names: str) -> str:
    value = row.get(*names)
    return row.name if value is None else str(value)


def _categories(row: Row, *names: str, **given: Any) -> tuple[tuple[str, str], ...]:
    """Of those divisions that the row names; a list names several parts."""
    divisions = {name: row.values.get(name) for name in names} | given
    pairs = []
    for name, value in divisions.items():
        values = value if isinstance(value, list) else [value]
        pairs += [(name, str(one)) for one in values if isinstance(one, str | int) and str(one)]
    return tuple(pairs)


def _letters(question: str, choices: Sequence[str]) -> str:
    """A question and its options as Megatron-LM's evaluation_datasets.py writes them."""
    lines = "".join(f"{letter}. {choice}\n" for letter, choice in zip(LETTERS, choices))
    return f"{question}\n{lines}{LETTER}"


def _letter_score(choices: Sequence[str], gold: str) -> Score:
    def score(answer: str) -> tuple[float, str | None]:
        letter = chosen_letter(answer, choices)
        return float(letter == gold), letter

    return score


def _vqav2(row: Row, pictures: Pictures) -> Sample:
    golds = [normalise_answer(text) for text in _annotations(row)]

    def score(answer: str) -> tuple[float, str | None]:
        parsed = normalise_answer(answer)
        return vqa_accuracy(parsed, golds), parsed

    if row.get("image") is None:
        name = f"COCO_{row.text('data_subtype')}_{_whole(row, 'image_id'):012}.jpg"
        row = replace(row, values=row.values | {"image": name})
    parts = (pictures.one(row, "image"), f"\n{row.text('question')}\n{PHRASE}")
    return Sample(row, _id(row, "question_id"), parts, score, _categories(row, "answer_type"))


def _whole(row: Row, name: str) -> int:
    value = row.need(name)
    if not isinstance(value, int):
        raise row.error(f"{name!r} must be a whole number, got {value!r:.60}")
    return value


def _annotations(row: Row) -> list[str]:
    """What the annotators said: texts, or objects that hold them under "answer"."""
    values = row.need("answers", "answer")
    if isinstance(values, list) and all(isinstance(one, dict) and "answer" in one for one in values):
        row = replace(row, values={"answers": [one["answer"] for one in values]})
    return row.texts("answers", "answer")


def _textvqa(row: Row, pictures: Pictures) -> Sample:
    golds = [normalise_textvqa(text) for text in _annotations(row)]

    def score(answer: str) -> tuple[float, str | None]:
        parsed = normalise_textvqa(answer)
        return vqa_accuracy(parsed, golds), parsed

    if row.get("image") is None:
        row = replace(row, values=row.values | {"image": f"{row.text('image_id')}.jpg"})
    parts = (pictures.one(row, "image"), f"\n{row.text('question')}\n{NUMBER}")
    return Sample(row, _id(row, "question_id"), parts, score)


def _docvqa(row: Row, pictures: Pictures) -> Sample:
    golds = row.texts("answers")
    parts = (pictures.one(row, "image"), f"\n{row.text('question')}\n{NUMBER}")
    categories = _categories(row, "question_types")
    return Sample(row, _id(row, "questionId"), parts, lambda answer: (anls(answer, golds), answer.strip()), categories)


def _chartqa(row: Row, pictures: Pictures) -> Sample:
    gold = row.texts("label")[0]
    parts = (pictures.one(row, "imgname"), f"\n{row.text('query')}\n{PHRASE}")
    return Sample(
        row,
        row.name,
        parts,
        lambda answer: (relaxed_accuracy(answer, gold), answer.strip()),
        _categories(row, file=row.path.stem),
    )


def _ocrbench(row: Row, pictures: Pictures) -> Sample:
    golds, dataset = row.texts("answers"), row.text("dataset_name")
    parts = (pictures.one(row, "image_path"), f"\n{row.text('question')}")
    return Sample(
        row,
        _id(row, "id"),
        parts,
        lambda answer: (ocrbench(answer, golds, dataset), answer.strip()),
        _categories(row, type=row.text("type")),
    )


def _mmmu(row: Row, pictures: Pictures) -> Sample:
    name = _id(row, "id", "index")
    subject = row.get("subject", "category") or re.sub(r"^[^_]+_|_\d+$", "", name).replace("_", " ")
    categories = _categories(row, "split", "topic_difficulty", subject=subject)
    question = row.text("question").strip()
    if row.get("question_type") == "open":
        golds = [str(gold) for text in row.texts("answer") for gold in literal_list(text) or [text]]

        def score(answer: str) -> tuple[float, str | None]:
            return float(open_answer_matches(answer, golds)), answer.strip()

        return Sample(row, name, _placed(row, f"{question}\n\n{PHRASE}", pictures), score, categories)
    choices = options(row, "options")
    lines = "".join(f"({letter}) {choice}\n" for letter, choice in zip(LETTERS, choices))
    text = f"{question}\n{lines}\n{LETTER}"
    gold = gold_letter(row, choices, "answer")
    return Sample(row, name, _placed(row, text, pictures), _letter_score(choices, gold), categories)


def _placed(row: Row, text: str, pictures: Pictures) -> tuple[str | Source, ...]:
    """Each <image 3> of a text becomes the third picture; without any, pictures stand before the text."""
    pieces = re.split(r"<image (\d+)>", text)
    numbers = [int(number) for number in pieces[1::2]]
    if row.path.suffix == ".tsv":
        given = dict(enumerate(pictures.all(row, "image", "image_path"), 1))
    else:
        given = {n: pictures.one(row, f"image_{n}") for n in numbers or [1]}
    if not numbers:
        return (*(part for source in given.values() for part in (source, "\n")), text)
    parts: list[str | Source] = []
    for piece, number in zip_longest(pieces[::2], numbers):
        if piece:
            parts.append(piece)
        if number is not None:
            if number not in given:
                raise row.error(f"the text asks for <image {number}>, but the row has {len(given)} pictures")
            parts.append(given[number])
    return tuple(parts)


def _ai2d(row: Row, pictures: Pictures) -> Sample:
    question = row.text("question")
    has_options = row.get("A", "options") is not None
    choices = options(row, "options") if has_options else _inline_options(question)
    if choices is None:
        raise row.error("expected 'options', the columns A, B, ..., or lines 'A. ...' in the question")
    text = _letters(question, choices) if has_options else question
    score = _letter_score(choices, gold_letter(row, choices, "answer"))
    parts = (pictures.one(row, "image", "image_path"), f"\n{text}")
    return Sample(row, _id(row, "question_id", "index"), parts, score, _categories(row, "category"))


def _inline_options(question: str) -> list[str] | None:
    """The texts of the lines "A. ...", "B. ..." of a question; None without two of them from A on."""
    found = re.findall(r"^([A-Z])[.)] *(.+)$", question, re.MULTILINE)
    named = "".join(letter for letter, _ in found)
    return [text for _, text in found] if len(named) > 1 and LETTERS.startswith(named) else None


def _realworldqa(row: Row, pictures: Pictures) -> Sample:
    question = row.text("question")
    picture = pictures.one(row, "image", "image_path")
    name = _id(row, "index", "id")
    has_options = row.get("A", "options", "choices") is not None
    choices = options(row, "options", "choices") if has_options else _inline_options(question)
    if choices is None:
        golds = row.texts("answer")
        return Sample(
            row,
            name,
            (picture, f"\n{question}"),
            lambda answer: (exact(answer, golds), normalise_answer(answer)),
            (("kind", "open"),),
        )
    text = _letters(question, choices) if has_options else question
    gold = gold_letter(row, choices, "correct_choice_index", "answer")
    return Sample(row, name, (picture, f"\n{text}"), _letter_score(choices, gold), (("kind", "choice"),))


def _mmlu(row: Row, pictures: Pictures) -> Sample:
    choices = options(row, "choices", "options")
    subject = row.get("subject") or re.sub(r"_(test|val|dev)$", "", row.path.stem)
    subject = str(subject).replace("_", " ")
    text = f"The following is a multiple choice question about {subject}.\n\n{_letters(row.text('question'), choices)}"
    gold = gold_letter(row, choices, "answer")
    return Sample(row, row.name, (text,), _letter_score(choices, gold), (("subject", subject),))


def _mathvista(row: Row, pictures: Pictures) -> Sample:
    kind, gold = row.text("answer_type"), row.texts("answer")[0]
    precision = int(float(row.get("precision"))) if row.get("precision") is not None else None
    metadata = row.values.get("metadata")
    categories = _categories(row, "question_type", "answer_type")
    if isinstance(metadata, dict):
        about = replace(row, values=metadata)
        categories += _categories(about, "task", "context", "grade", "skills")
    if row.text("question_type") == "multi_choice":
        choices = options(row, "choices")
        if gold not in choices:
            raise row.error(f"'answer' must be one of the choices, got {gold!r:.60}")
        text = _letters(row.text("question"), choices)
    else:
        choices = []
        hint = HINTS.get(f"float {precision}" if kind == "float" else kind)
        if hint is None:
            raise row.error(f"answer_type must be integer, float or list, precision 1 or 2, got {kind!r}, {precision}")
        unit = f" (Unit: {row.get('unit')})" if row.get("unit") else ""
        text = f"Please answer the question requiring {hint}\nQuestion: {row.text('question')}{unit}"

    def score(answer: str) -> tuple[float, str | None]:
        parsed = mathvista_answer(answer, choices, kind, precision)
        return float(parsed == gold), parsed

    return Sample(row, _id(row, "pid", "key"), (pictures.one(row, "image"), f"\n{text}"), score, categories)


def _gsm8k(row: Row, pictures: Pictures) -> Sample:
    gold = gsm8k_answer(row.text("answer")) if "####" in row.text("answer") else None
    if gold is None:
        raise row.error("'answer' must end with '#### ' and a number")

    def score(answer: str) -> tuple[float, str | None]:
        parsed = gsm8k_answer(answer)
        return float(parsed == gold), None if parsed is None else str(parsed)

    return Sample(row, row.name, (f"{row.text('question')}\n{REASON}",), score)


def _math(row: Row, pictures: Pictures) -> Sample:
    gold = row.text("answer") if row.get("answer") else last_boxed(row.text("solution"))
    if gold is None:
        raise row.error("'solution' must hold its answer in \\boxed{}")

    def score(answer: str) -> tuple[float, str | None]:
        parsed = last_boxed(answer)
        return float(math_equal(parsed, gold)), parsed

    categories = _categories(row, "level", subject=row.get("type", "subject"))
    return Sample(row, _id(row, "unique_id"), (f"{row.text('problem')}\n{REASON}",), score, categories)


TASKS = {
    "vqav2": Task(
        "VQA accuracy",
        False,
        "v2_OpenEnded_mscoco_val2014_questions.json, --answers v2_mscoco_val2014_annotations.json, the folder val2014",
        _vqav2,
        key="questions",
        answers_key="annotations",
        folder="val2014",
    ),
    "textvqa": Task(
        "VQA accuracy",
        False,
        "TextVQA_0.5.1_val.json and the folder train_images",
        _textvqa,
        key="data",
        folder="train_images",
    ),
    "docvqa": Task(
        "ANLS",
        False,
        "val_v1.0.json or val_v1.0_withQT.json and the folder documents",
        _docvqa,
        max_new_tokens=100,
        key="data",
    ),
    "chartqa": Task(
        "relaxed accuracy, 5 %",
        True,
        "test_human.json and test_augmented.json and the folder png",
        _chartqa,
        folder="png",
    ),
    "ocrbench": Task(
        "OCRBench score",
        True,
        "OCRBench.json and the folder OCRBench_Images",
        _ocrbench,
        max_new_tokens=100,
        folder="OCRBench_Images",
    ),
    "mmmu": Task(
        "accuracy",
        True,
        "VLMEvalKit's MMMU_DEV_VAL.tsv, or the data set's rows as JSONL, image_1 to image_7 the names of files",
        _mmmu,
        max_new_tokens=64,
    ),
    "ai2d": Task(
        "accuracy",
        True,
        "VLMEvalKit's AI2D_TEST.tsv (labels masked) or AI2D_TEST_NO_MASK.tsv, or JSONL with question, options, answer",
        _ai2d,
    ),
    "realworldqa": Task(
        "accuracy",
        True,
        "annotations.json and its pictures, VLMEvalKit's RealWorldQA.tsv, or JSONL with image, question, answer",
        _realworldqa,
    ),
    "mathvista": Task(
        "accuracy",
        True,
        "testmini.json and the folder images",
        _mathvista,
        max_new_tokens=512,
    ),
    "mmlu": Task(
        "accuracy",
        True,
        "the folder test of CSV files, one of them, or JSONL with question, subject, choices, answer",
        _mmlu,
        columns=("question", "A", "B", "C", "D", "answer"),
    ),
    "gsm8k": Task("exact answers", True, "test.jsonl", _gsm8k, max_new_tokens=1024),
    "math": Task(
        "equivalent answers",
        True,
        "the folder test of JSON files, or JSONL with problem, solution, level, type",
        _math,
        max_new_tokens=1024,
    ),
}
