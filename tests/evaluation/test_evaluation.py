"""`nvlm eval TASK`: published files to prompts, predictions that survive a kill, scores that need no model."""

import csv
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nvlm_runtime.commands.cli import main
from nvlm_runtime.evaluation.predictions import append, append_to, kept, read, scored
from nvlm_runtime.evaluation.report import report
from nvlm_runtime.evaluation.rows import read_rows
from nvlm_runtime.evaluation.run import answers
from nvlm_runtime.evaluation.samples import check_pictures
from nvlm_runtime.evaluation.tasks import TASKS, Task, read_samples
from tests.evaluation.benchmarks import COUNT, RECEIPT, ROOT, write_benchmark
from tests.small import small_engine


def run(capsys, *argv):
    code = main(["eval", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def samples_of(task: str, folder: Path, num: int = COUNT):
    words = write_benchmark(task, folder, num)
    answers_at = words.index("--answers") if "--answers" in words else len(words)
    paths = [Path(word) for word in words[1:answers_at]]
    return read_samples(TASKS[task], paths, Path(words[answers_at + 1]) if answers_at < len(words) else None)


RIGHT = {
    "vqav2": ("17.40", 1.0),
    "textvqa": ("17.40", 1.0),
    "docvqa": ("17.40", 1.0),
    "chartqa": ("17.9", 1.0),
    "ocrbench": ("It is 17.40.", 2 / 3),
    "mmmu": ("(B) 17.40", 1.0),
    "ai2d": ("B", 1.0),
    "realworldqa": ("B", 2 / 3),
    "mathvista": ("The answer is 17.4", 2 / 3),
    "mmlu": ("C.", 1.0),
    "gsm8k": ("#### 1,001", 1 / 3),
    "math": ("\\boxed{1/2}", 1 / 3),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_scores_its_rows(task, tmp_path):
    samples = samples_of(task, tmp_path)
    check_pictures(samples)
    answer, expected = RIGHT[task]
    values = report(task, TASKS[task], samples, [scored(sample, answer)["score"] for sample in samples])
    assert values["rows"] == len(samples) == COUNT * (1 + (task == "mmlu"))
    assert values["score"] == pytest.approx(expected)
    wrong = report(task, TASKS[task], samples, [scored(sample, "zzz")["score"] for sample in samples])
    assert wrong["score"] == 0


PROMPTS = {
    "vqav2": "<image>\nWhat is the total?\nAnswer the question using a single word or phrase.",
    "textvqa": "<image>\nWhat is the total?\nAnswer the question using a single word, phrase, or number.",
    "docvqa": "<image>\nWhat is the total?\nAnswer the question using a single word, phrase, or number.",
    "chartqa": "<image>\nWhat is the total?\nAnswer the question using a single word or phrase.",
    "ocrbench": "<image>\nWhat is the total?",
    "mmmu": "<image>\nWhat is the total?\n(A) the first\n(B) the second <image>\n\n",
    "ai2d": '<image>\nWhich letter?\nLook.\nA. a leaf\nB. roots, "all"\nAnswer with the option\'s letter',
    "realworldqa": "<image>\nWhere is it?\nA. Left\nB. Right\nAnswer with the letter only.",
    "mathvista": "<image>\nPlease answer the question requiring a floating-point number with two decimal places",
    "mmlu": "The following is a multiple choice question about abstract algebra.\n\nQuestion 0, of all?\nA. 1\nB. 2\n"
    "C. three\nD. 4, or 5\nAnswer with",
    "gsm8k": "What is 1,000 + 0?\nPlease reason step by step",
    "math": "What is $0/2$?\nPlease reason step by step, and put your final answer within \\boxed{}.",
}


@pytest.mark.parametrize("task", [task for task in TASKS if task != "mmmu"])
def test_prompts(task, tmp_path):
    assert samples_of(task, tmp_path)[0].prompt.startswith(PROMPTS[task])


def test_mmmu_places_its_pictures(tmp_path):
    first, second, third = samples_of("mmmu", tmp_path)
    assert first.prompt == (
        "What is the total?\n(A) the first\n(B) the second <image>\n\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert [path.name for path in second.pictures] == ["one.png", "two.png", "one.png"]
    assert second.prompt.startswith("Which is larger, <image> or <image>?\n(A)")
    assert third.prompt == "<image>\nWhat is the total?\n\nAnswer the question using a single word or phrase."
    assert dict(first.categories) == {"topic_difficulty": "Easy", "subject": "Accounting"}


def test_a_short_picture_names_another_row(tmp_path):
    samples = samples_of("ai2d", tmp_path)
    assert samples[1].pictures == samples[0].pictures == [RECEIPT.read_bytes()]


def test_categories_and_points(tmp_path):
    samples = samples_of("ocrbench", tmp_path)
    values = report("ocrbench", TASKS["ocrbench"], samples, [1.0, 0.0, 1.0])
    parts = values["categories"]["type"]
    assert values["points"] == 2 and values["interval_method"].startswith("Wilson")
    assert parts["Key Information Extraction"]["rows"] == 2 and parts["Key Information Extraction"]["score"] == 1
    assert parts["Handwritten Mathematical Expression Recognition"]["score"] == 0
    vqa = report("vqav2", TASKS["vqav2"], samples_of("vqav2", tmp_path), [0.3, 0.9, 0.9])
    assert vqa["interval_method"].startswith("bootstrap") and vqa["categories"]["answer_type"]["other"]["score"] == 0.6


@pytest.mark.parametrize("task", TASKS)
def test_run_and_rescore(capsys, tmp_path, task):
    """Every task on micro-d, from the shell's words; scored anew without the model it says the same."""
    words = write_benchmark(task, tmp_path / "data")
    file = tmp_path / "out.jsonl"
    options = ("--predictions", file, "--json")
    code, out, err = run(capsys, task, *words, *options, "--model", "micro-d", "--max-new-tokens", 6, "--batch", 2)
    assert (code, err) == (0, "")
    values = json.loads(out)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines[0] == {
        "task": task,
        "model": "micro-d",
        "lora": None,
        "style": "hf",
        "dtype": None,
        "quantize": [],
        "max_new_tokens": 6,
    }
    assert len(lines) == values["rows"] + 1 == COUNT * (1 + (task == "mmlu")) + 1
    assert {"id", "prompt", "answer", "parsed", "score", "finish_reason", "num_tokens"} == set(lines[1])
    assert values["score"] == pytest.approx(sum(line["score"] for line in lines[1:]) / values["rows"])
    if task == "ocrbench":
        assert values["points"] == 2 and lines[1]["answer"] == "17.40"
    before = file.read_bytes()
    code, out, err = run(capsys, task, *words, *options, "--rescore")
    assert (code, err) == (0, "") and json.loads(out) == values and file.read_bytes() == before


def test_rescore_sees_another_metric(capsys, tmp_path, monkeypatch):
    words = write_benchmark("chartqa", tmp_path)
    file = tmp_path / "out.jsonl"
    samples = samples_of("chartqa", tmp_path)
    with append_to(file, {"task": "chartqa"}) as opened:
        for sample in samples:
            append(opened, {**scored(sample, "17.40"), "score": 0.0, "mine": 1})
    code, out, _ = run(capsys, "chartqa", *words, "--predictions", file, "--rescore", "--json")
    assert code == 0 and json.loads(out)["score"] == 1
    assert [json.loads(line)["score"] for line in file.read_text().splitlines()[1:]] == [1.0] * COUNT
    assert json.loads(file.read_text().splitlines()[1])["mine"] == 1 and not list(tmp_path.glob("*.tmp"))


def test_table(capsys, tmp_path):
    words = write_benchmark("ocrbench", tmp_path)
    file = tmp_path / "out.jsonl"
    with append_to(file, {"task": "ocrbench"}) as opened:
        for sample in samples_of("ocrbench", tmp_path):
            append(opened, scored(sample, "17.40"))
    _, out, _ = run(capsys, "ocrbench", *words, "--predictions", file, "--rescore")
    assert "66.7%" in out and "2 points of 3" in out and "Wilson, 95 %" in out and "Key Information Extraction" in out


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_answers_are_those_of_single_requests(variant, tmp_path):
    """Any variant, more rows than the batch has, in the order of the questions."""
    samples = samples_of("mmmu", tmp_path, 5)
    model = small_engine(variant)
    found = list(answers(model, samples, batch=2, max_new_tokens=5))
    assert [sample.id for sample, _ in found] == [sample.id for sample in samples]
    for sample, output in found:
        assert (
            output.token_ids
            == model.generate(messages=sample.messages, images=sample.pictures, max_new_tokens=5).token_ids
        )


def test_a_prompt_that_is_too_long_names_its_row(tmp_path):
    samples = samples_of("gsm8k", tmp_path)
    samples[1] = replace(samples[1], parts=("word " * 600,))
    found = []
    with pytest.raises(ValueError, match=r"test\.jsonl:2: the prompt has \d+ tokens"):
        for sample, _ in answers(small_engine("d"), samples, batch=2, max_new_tokens=2):
            found.append(sample.id)
    assert found == [samples[0].id], "what came before is answered"


DIES = """
import json, os, signal, sys
from nvlm_runtime.commands.cli import main
from nvlm_runtime.commands import evaluate
whole = evaluate.append
def append(file, record):
    if record["id"] == "3":
        file.write(json.dumps(record)[:40])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    whole(file, record)
evaluate.append = append
sys.exit(main(sys.argv[1:]))
"""


def test_killed_and_resumed(capsys, tmp_path):
    """kill -9 in the middle of a line: the rest is answered, and the file is that of a whole run."""
    words = write_benchmark("ocrbench", tmp_path, 6)
    whole, file = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    options = ("--model", "micro-d", "--max-new-tokens", 8, "--batch", 2)
    assert run(capsys, "ocrbench", *words, *options, "--predictions", whole)[0] == 0
    command = [sys.executable, "-c", DIES, "eval", "ocrbench", *words, *options, "--predictions", file]
    assert subprocess.run(list(map(str, command)), cwd=ROOT).returncode == -signal.SIGKILL
    lines = file.read_bytes().split(b"\n")
    assert len(lines) == 5 and lines[:4] == whole.read_bytes().split(b"\n")[:4] and len(lines[4]) == 40
    before = file.read_bytes()
    code, _, err = run(capsys, "ocrbench", *words, *options, "--predictions", file)
    assert code == 2 and "--resume goes on" in err and file.read_bytes() == before, "nothing is written over"
    code, out, err = run(capsys, "ocrbench", *words, *options, "--predictions", file, "--resume", "--json")
    assert (code, err) == (0, "") and json.loads(out)["rows"] == 6
    assert file.read_bytes() == whole.read_bytes()
    code, again, _ = run(capsys, "ocrbench", *words, *options, "--predictions", file, "--resume", "--json")
    assert code == 0 and json.loads(again) == json.loads(out), "nothing is left to answer"


def test_ctrl_c_says_what_is_kept(capsys, tmp_path, monkeypatch):
    words = write_benchmark("gsm8k", tmp_path)
    file = tmp_path / "out.jsonl"

    def interrupted(model, samples, **options):
        output = next(answers(model, samples, batch=1, max_new_tokens=1))[1]
        yield samples[0], output
        raise KeyboardInterrupt

    monkeypatch.setattr("nvlm_runtime.commands.evaluate.answers", interrupted)
    code, _, err = run(capsys, "gsm8k", *words, "--model", "micro-d", "--predictions", file)
    assert code == 130 and "1 of 3 predictions are in" in err and len(file.read_text().splitlines()) == 2


def test_odd_line_ends_inside_an_answer(tmp_path):
    """U+2028 and U+0085 end lines for Python's splitlines, not for JSON."""
    samples = samples_of("gsm8k", tmp_path)
    file, settings = tmp_path / "out.jsonl", {"task": "gsm8k"}
    with append_to(file, settings) as opened:
        append(opened, scored(samples[0], "a\u2028b\x85c\r\nd é"))
    assert read(file, samples, settings, complete=False)[0]["answer"] == "a\u2028b\x85c\r\nd é"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", None),
        ('{"task": "gsm8k", "mo', None),
        ('{"task": "math", "model": "m"}\n', r":1: task was 'math', now it is 'gsm8k'"),
        ('{"task": "gsm8k", "model": "other"}\n', r":1: model was 'other', now it is 'm'"),
        ('{"id": 1}\n', r":1: expected a line that names the task"),
        ("[]\n", r":1: expected an object, got list"),
        ('{"task": "gsm8k", "model": "m"}\n{"id": }\n', r":2: not JSON"),
        ('{"task": "gsm8k", "model": "m"}\n{"id": "x"}\n', r":2: the prediction is for 'x', expected"),
        ('{"task": "gsm8k", "model": "m"}\nFIRST\n', r":2: expected a 'score'"),
    ],
)
def test_files_of_other_runs(tmp_path, content, message):
    samples, settings = samples_of("gsm8k", tmp_path), {"task": "gsm8k", "model": "m"}
    file = tmp_path / "out.jsonl"
    first = {key: value for key, value in scored(samples[0], "1").items() if key != "score"}
    content = content.replace("FIRST", json.dumps(first))
    file.write_text(content)
    if message is None:
        assert kept(file, settings, samples, resume=True) == []
        append_to(file, settings).close()
        assert file.read_text() == json.dumps(settings) + "\n"
    else:
        with pytest.raises(ValueError, match=message):
            kept(file, settings, samples, resume=True)
        assert file.read_text() == content


def test_more_or_other_predictions_than_questions(tmp_path):
    samples, settings = samples_of("gsm8k", tmp_path), {"task": "gsm8k"}
    file = tmp_path / "out.jsonl"
    with append_to(file, settings) as opened:
        for sample in samples:
            append(opened, scored(sample, "1"))
    assert len(read(file, samples, settings, complete=True)) == COUNT
    with pytest.raises(ValueError, match="has 3 predictions, but 2 are asked for"):
        read(file, samples[:2], settings, complete=True)
    with pytest.raises(ValueError, match=":2: the prediction is for"):
        read(file, samples[::-1], settings, complete=True)
    changed = replace(samples[2], parts=("another question",))
    with pytest.raises(ValueError, match=r":4: .*as asked in .*test\.jsonl:3"):
        read(file, [*samples[:2], changed], settings, complete=True)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    with pytest.raises(ValueError, match="has 2 of 3 predictions"):
        read(file, samples, settings, complete=True)


def test_limit_and_seed(capsys, tmp_path):
    words = write_benchmark("gsm8k", tmp_path, 8)
    ids = {}
    for name, more in {"first": (), "drawn": ("--seed", 1), "again": ("--seed", 1), "other": ("--seed", 2)}.items():
        file = tmp_path / f"{name}.jsonl"
        options = ("--model", "micro-d", "--max-new-tokens", 1, "--predictions", file)
        assert run(capsys, "gsm8k", *words, *options, "--limit", 3, *more)[0] == 0
        ids[name] = [json.loads(line)["id"].split(":")[1] for line in file.read_text().splitlines()[1:]]
    assert ids["first"] == ["1", "2", "3"] and ids["drawn"] == ids["again"] != ids["other"]
    assert all(found == sorted(found) and len(found) == 3 for found in ids.values())


def test_rows_of_every_form(tmp_path):
    values = [{"question": 'a\tb, "c"\nd', "answer": "1"}, {"question": "é", "answer": "2"}]
    (tmp_path / "a.json").write_text(json.dumps(values), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, values)) + "\n\n", encoding="utf-8")
    (tmp_path / "c.tsv").write_text('question\tanswer\n"a\tb, ""c""\nd"\t1\né\t2\n', encoding="utf-8")
    (tmp_path / "d.csv").write_text('"a\tb, ""c""\nd",1\né,2\n', encoding="utf-8")
    (tmp_path / "e.json").write_text(json.dumps({"data": values, "name": "x"}), encoding="utf-8")
    (tmp_path / "f.json").write_text(json.dumps({"1": values[0], "2": values[1]}), encoding="utf-8")
    for name in "a.json b.jsonl c.tsv d.csv e.json f.json".split():
        rows = read_rows(tmp_path / name, ("question", "answer"), "data")
        assert [{key: row.values[key] for key in values[0]} for row in rows] == values, name
    assert [row.where for row in read_rows(tmp_path / "b.jsonl")] == [f"{tmp_path}/b.jsonl:{n}" for n in (1, 2)]
    assert [row.number for row in read_rows(tmp_path / "c.tsv")] == [3, 4], "the line at which the row ends"
    assert [row.values.get("key") for row in read_rows(tmp_path / "f.json")] == ["1", "2"]
    assert len(read_rows(tmp_path, ("question", "answer"), "data")) == 12


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "{", r"a\.json:1: not JSON"),
        ("a.json", "[]", "has no rows"),
        ("a.json", "3", "expected a list of rows, got int"),
        ("a.json", "[{}, 4]", r"a\.json, row 2: expected an object"),
        ("a.json", '{"data": {"x": 1}}', "expected a list of rows, got dict"),
        ("a.jsonl", '{"x": 1}\n{"x": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl:1: expected an object"),
        ("a.jsonl", b"\xff\n", "is not UTF-8"),
        ("a.tsv", "x\ty\n1\n", r"a\.tsv:2: expected 2 columns, got 1"),
        ("a.tsv", "", "has no rows"),
        ("a.parquet", "PAR1", r"expected a file in .json, .jsonl, .tsv, .csv; write other forms, as Parquet, as JSONL"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_rows(path, None, "data")


def test_a_byte_order_mark_is_no_name(tmp_path):
    for name, content in (("a.json", '[{"x": "1"}]'), ("a.jsonl", '{"x": "1"}'), ("a.tsv", "x\n1\n")):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert read_rows(tmp_path / name)[0].values == {"x": "1"}


def test_a_picture_as_large_as_published(tmp_path):
    """Base64 longer than csv's default cell, and the limit that others set stays theirs."""
    (tmp_path / "a.tsv").write_text("index\timage\n1\t" + "A" * 300_000 + "\n")
    before = csv.field_size_limit(1000)
    try:
        assert len(read_rows(tmp_path / "a.tsv")[0].values["image"]) == 300_000
        assert csv.field_size_limit() == 1000
    finally:
        csv.field_size_limit(before)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_rows(tmp_path / "none.json")


GSM = {"question": "q", "answer": "#### 5"}
CHOICE = {"image": "p.png", "question": "q", "options": ["a", "b"], "answer": "A"}
VISTA = {"pid": "1", "image": "p.png", "question": "q", "answer": "5", "answer_type": "integer"}
VISTA |= {"question_type": "free_form"}


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("gsm8k", {"question": "q"}, r":1: expected 'answer', the row has question"),
        ("gsm8k", {"question": "", "answer": "#### 5"}, "expected 'question'"),
        ("gsm8k", {"question": "q", "answer": "5"}, "must end with '#### '"),
        ("gsm8k", {"question": 3, "answer": "#### 5"}, "'question' must be a text, got 3"),
        ("math", {"problem": "q", "solution": "5"}, "must hold its answer in"),
        ("mmlu", {"question": "q", "choices": ["a", "b"], "answer": 2}, "'answer' must be one of A, B"),
        ("mmlu", {"question": "q", "choices": ["a"], "answer": 0}, "expected 2 to 26 options, got 1"),
        ("mmlu", {"question": "q", "choices": "a, b", "answer": 0}, "must be a list of texts"),
        ("ai2d", {**CHOICE, "image": None}, "expected 'image' or 'image_path'"),
        ("ai2d", {**CHOICE, "image": 5}, "must be the name of a picture's file"),
        ("ai2d", {**CHOICE, "image": ["a.png", "b.png"]}, "expected one picture, got 2"),
        ("ai2d", {**CHOICE, "options": None}, "expected 'options', the columns A, B"),
        ("ai2d", {**CHOICE, "answer": "a"}, None),
        ("ai2d", {**CHOICE, "answer": "C"}, "must be one of A, B or a number from 0, got 'C'"),
        ("docvqa", {"questionId": 1, "question": "q", "image": "p.png"}, "expected 'answers'"),
        ("docvqa", {"questionId": 1, "question": "q", "image": "p.png", "answers": [{}]}, "a list of texts"),
        ("mathvista", {**VISTA, "answer_type": "float", "precision": 3}, "precision 1 or 2"),
        ("mathvista", {**VISTA, "question_type": "multi_choice", "choices": ["a", "b"]}, "one of the choices"),
        ("mmmu", {**CHOICE, "id": "v_A_1", "question": "see <image 2>", "image_1": "p.png"}, "expected 'image_2'"),
        ("textvqa", {"question": "q", "answers": ["a"] * 10}, "expected 'image_id'"),
    ],
)
def test_bad_rows(tmp_path, task, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    if message is None:
        assert scored(read_samples(TASKS[task], [path])[0], "A")["score"] == 1
    else:
        with pytest.raises(ValueError, match=message) as caught:
            read_samples(TASKS[task], [path])
        assert str(caught.value).startswith(f"{path}:1: ")


def test_bad_pictures(tmp_path):
    (tmp_path / "p.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(RECEIPT.read_bytes()[:20])
    rows = [{**CHOICE, "image": "none.png"}, CHOICE, {**CHOICE, "image": "cut.png"}]
    messages = (r"none\.png does not exist \(--images FOLDER", r"p\.png cannot be read", r"cut\.png cannot be read")
    for row, message in zip(rows, messages):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(row) + "\n")
        with pytest.raises(ValueError, match=rf"rows\.jsonl:1: the picture .*{message}"):
            check_pictures(read_samples(TASKS["ai2d"], [path]))
    table = tmp_path / "rows.tsv"
    for encoded, message in (
        ("no base64!", "not a picture in base64"),
        ("eHl6" * 30, "the picture in 'image' cannot be"),
    ):
        table.write_text(f"index\timage\tquestion\tA\tB\tanswer\n1\t{encoded}\tq\ta\tb\tA\n")
        with pytest.raises(ValueError, match=rf"rows\.tsv:2: .*{message}"):
            check_pictures(read_samples(TASKS["ai2d"], [table]))


def test_two_questions_with_one_id(tmp_path):
    rows = [{"id": 7, "type": "t", "dataset_name": "svt", "question": "q", "image_path": "p", "answers": ["a"]}] * 2
    (tmp_path / "a.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"row 2: the id '7' is that of .*row 1 too"):
        read_samples(TASKS["ocrbench"], [tmp_path / "a.json"])


def test_annotations_that_do_not_fit(tmp_path):
    words = write_benchmark("vqav2", tmp_path)
    short = tmp_path / "short.json"
    short.write_text(json.dumps({"annotations": json.loads(Path(words[3]).read_text())["annotations"][:-1]}))
    with pytest.raises(ValueError, match=r"questions\.json, row 1: the file of answers has no question_id 0"):
        read_samples(TASKS["vqav2"], [Path(words[1])], short)
    with pytest.raises(ValueError, match="--answers is missing"):
        read_samples(TASKS["vqav2"], [Path(words[1])])
    with pytest.raises(ValueError, match="--answers is of no use here"):
        read_samples(TASKS["textvqa"], [Path(words[1])], short)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing", "--data", "x"], "unknown task 'nothing': expected micro or one of vqav2"),
        (["gsm8k", "--model", "micro-d"], "eval gsm8k needs --data: test.jsonl"),
        (["gsm8k", "--data", "x.jsonl"], "needs --model, or --rescore"),
        (["gsm8k", "--data", "x.jsonl", "--model", "micro-d"], "x.jsonl does not exist"),
        (["gsm8k", "--data", "x.jsonl", "--rescore"], "--rescore needs --predictions"),
        (["gsm8k", "--data", "x", "--model", "m", "--limit", "0"], "--limit must be at least 1"),
        (["gsm8k", "--data", "x", "--model", "m", "--seed", "1"], "--seed draws the rows of --limit"),
        (["gsm8k", "--data", "x", "--model", "m", "--variant", "d"], "--variant is of no use to gsm8k"),
        (["gsm8k", "--data", "x", "--model", "m", "--samples", "0"], "--samples is of no use to gsm8k"),
        (["micro", "--variant", "d", "--data", "x"], "--data is of no use to micro"),
        (["micro"], "needs --variant"),
    ],
    ids=lambda v: " ".join(v)[-40:] if isinstance(v, list) else "",
)
def test_bad_words(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2 and message in err and err.count("\n") == 1 and out == ""


def test_nothing_is_written_where_the_run_cannot_begin(capsys, tmp_path):
    words = write_benchmark("gsm8k", tmp_path)
    file = tmp_path / "out.jsonl"
    for options, message in (
        (("--model", "micro-z", "--predictions", file), "unknown model 'micro-z'"),
        (("--model", "micro-d", "--predictions", tmp_path / "no" / "out.jsonl"), "expected the folder"),
        (("--model", "micro-d", "--predictions", file, "--max-new-tokens", "0"), "max_new_tokens"),
    ):
        code, _, err = run(capsys, "gsm8k", *words, *options)
        assert code == 2 and message in err and not file.exists()


def test_pictures_are_looked_at_before_the_model(capsys, tmp_path):
    words = write_benchmark("ocrbench", tmp_path)
    (tmp_path / "OCRBench_Images" / "2.png").unlink()
    code, _, err = run(capsys, "ocrbench", *words, "--model", "micro-z", "--predictions", tmp_path / "out.jsonl")
    assert code == 2 and "row 3: the picture" in err and "does not exist" in err and "micro-z" not in err


def test_help_names_every_task(capsys):
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert ", ".join(TASKS) in out and all(isinstance(task, Task) for task in TASKS.values())
