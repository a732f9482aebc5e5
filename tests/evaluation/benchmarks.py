"""Three rows of every benchmark in its published form, about pictures that the micro models can read."""

import base64
import csv
import json
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
RECEIPT = ROOT / "examples" / "receipt.png"
COUNT = 3


def write_benchmark(task: str, folder: Path, num: int = COUNT) -> list[str]:
    """Writes `num` rows and their pictures. Returns the arguments of `nvlm eval` that name them."""
    folder.mkdir(exist_ok=True)
    return [str(word) for word in globals()[f"_{task}"](folder, num)]


def _pictures(folder: Path, names: list[str]) -> None:
    with Image.open(RECEIPT) as receipt:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            receipt.save(folder / name)


def _json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def _lines(path: Path, values: list[dict]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def _tsv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _encoded() -> str:
    return base64.b64encode(RECEIPT.read_bytes()).decode()


def _vqav2(folder, num):
    names = [f"COCO_val2014_{i:012}.jpg" for i in range(num)]
    _pictures(folder / "val2014", names)
    questions = [{"image_id": i, "question": "What is the total?", "question_id": 10 * i} for i in range(num)]
    golds = [{"answer": "17.40" if k < 9 else "two", "answer_id": k} for k in range(10)]
    annotations = [
        {"image_id": i, "question_id": 10 * i, "answers": golds, "answer_type": "number" if i % 2 else "other"}
        for i in reversed(range(num))
    ]
    data = _json(folder / "questions.json", {"data_subtype": "val2014", "questions": questions})
    return ["--data", data, "--answers", _json(folder / "annotations.json", {"annotations": annotations})]


def _textvqa(folder, num):
    _pictures(folder / "train_images", [f"{i}.jpg" for i in range(num)])
    rows = [
        {"question": "What is the total?", "image_id": str(i), "question_id": i, "answers": ["17.40"] * 10}
        for i in range(num)
    ]
    return ["--data", _json(folder / "val.json", {"dataset_name": "textvqa", "data": rows})]


def _docvqa(folder, num):
    _pictures(folder / "documents", [f"{i}.png" for i in range(num)])
    rows = [
        {
            "questionId": i,
            "question": "What is the total?",
            "image": f"documents/{i}.png",
            "answers": ["17.40", "$17.40"],
            "question_types": ["form", "table/list"][: 1 + i % 2],
        }
        for i in range(num)
    ]
    return ["--data", _json(folder / "val_v1.0_withQT.json", {"dataset_split": "val", "data": rows})]


def _chartqa(folder, num):
    _pictures(folder / "png", [f"{i}.png" for i in range(num)])
    rows = [{"imgname": f"{i}.png", "query": "What is the total?", "label": "17.40"} for i in range(num)]
    return [
        "--data",
        _json(folder / "test_human.json", rows[:1]),
        _json(folder / "test_augmented.json", rows[1:]),
    ]


def _ocrbench(folder, num):
    _pictures(folder / "OCRBench_Images", [f"{i}.png" for i in range(num)])
    rows = [
        {
            "id": i,
            "dataset_name": "SROIE" if i != 1 else "HME100k",
            "type": "Key Information Extraction" if i != 1 else "Handwritten Mathematical Expression Recognition",
            "question": "What is the total?",
            "image_path": f"{i}.png",
            "answers": ["17.40"] if i != 2 else ["\\frac"],
        }
        for i in range(num)
    ]
    return ["--data", _json(folder / "OCRBench.json", rows)]


def _mmmu(folder, num):
    _pictures(folder, ["one.png", "two.png"])
    rows = [
        {
            "id": f"validation_Accounting_{i}",
            "question": "Which is larger, <image 1> or <image 2>?" if i % 2 else "What is the total?",
            "options": "['the first', 'the second <image 1>']" if i != 2 else "[]",
            "question_type": "multiple-choice" if i != 2 else "open",
            "answer": "B" if i != 2 else "['17.40', '17.4']",
            "image_1": "one.png",
            "image_2": "two.png",
            "topic_difficulty": "Easy",
        }
        for i in range(num)
    ]
    return ["--data", _lines(folder / "validation.jsonl", rows)]


def _ai2d(folder, num):
    rows = [
        {
            "index": i,
            "image": _encoded() if i != 1 else "0",
            "question": "Which letter?\nLook.",
            "A": "a leaf",
            "B": 'roots, "all"',
            "C": "C" if i else "",
            "answer": "B",
            "category": "food web",
        }
        for i in range(num)
    ]
    return ["--data", _tsv(folder / "AI2D_TEST_NO_MASK.tsv", rows)]


def _realworldqa(folder, num):
    _pictures(folder, [f"{i}.webp" for i in range(num)])
    rows = [
        {
            "image": f"{i}.webp",
            "question": "How many wheels?"
            if i == 1
            else "Where is it?\nA. Left\nB. Right\nAnswer with the letter only.",
            "answer": "3" if i == 1 else "B",
        }
        for i in range(num)
    ]
    return ["--data", _json(folder / "annotations.json", rows)]


def _mathvista(folder, num):
    _pictures(folder / "images", [f"{i}.jpg" for i in range(num)])
    kinds = ({"answer_type": "float", "precision": 2, "answer": "17.4", "choices": None, "question_type": "free_form"},)
    kinds += ({"answer_type": "text", "answer": "b", "choices": ["a", "b"], "question_type": "multi_choice"},)
    rows = {
        str(i): {
            "pid": str(i),
            "question": "What is the total?",
            "image": f"images/{i}.jpg",
            "unit": "$" if i == 0 else None,
            "metadata": {"task": "figure question answering", "skills": ["arithmetic", "statistical"]},
            **kinds[i % 2],
        }
        for i in range(num)
    }
    return ["--data", _json(folder / "testmini.json", rows)]


def _mmlu(folder, num):
    for subject in ("abstract_algebra", "anatomy"):
        with (folder / f"{subject}_test.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([[f"Question {i}, of all?", 1, 2, "three", "4, or 5", "C"] for i in range(num)])
    return ["--data", folder]


def _gsm8k(folder, num):
    rows = [{"question": f"What is 1,000 + {i}?", "answer": f"It is <<1000+{i}>>.\n#### 1,00{i}"} for i in range(num)]
    return ["--data", _lines(folder / "test.jsonl", rows)]


def _math(folder, num):
    for i in range(num):
        problem = {"problem": f"What is ${i}/2$?", "level": f"Level {i}", "type": "Algebra"}
        _json(folder / "algebra" / f"{i}.json", {**problem, "solution": f"It is $\\boxed{{\\dfrac{{{i}}}{{2}}}}$."})
    return ["--data", folder]
