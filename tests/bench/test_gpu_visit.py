"""`python -m bench.gpu` on a CPU, whole, and what it does where steps are wrong, die and hang."""

import json
import os
import time

import pytest

from bench.gpu.__main__ import main
from bench.gpu.processes import run_steps
from bench.gpu.step import STEPS, Step, Visit
from bench.gpu.summary import is_right, write_results
from bench.proofs.cases import CASES

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("visit")
    assert main(["--device", "cpu", "--quick", "--out", str(out)]) == 0
    return out


def test_the_whole_visit_is_done_and_right(results):
    steps = json.loads((results / "gpu.json").read_text())["steps"]
    assert [step["name"] for step in steps] == [step.name for step in STEPS if not step.optional]
    assert all(step["status"] == "done" and step["rows"] and all(map(is_right, step["rows"])) for step in steps)
    assert {row["case"].split("-")[0] for row in steps[1]["rows"]} == {case.op for case in CASES}
    assert any(row["what"] == "input 3 afterwards" for row in steps[1]["rows"]), "caches are compared"


def test_its_files(results):
    names = {path.name for path in results.iterdir()}
    assert {"gpu.json", "gpu.md", "roofline.png", "gaps.png", "trace.json.gz"} <= names and len(names) <= 8
    assert all((results / name).read_bytes().startswith(PNG) for name in ("roofline.png", "gaps.png"))
    text = (results / "gpu.md").read_text()
    assert (
        text.startswith("# A trial of the script on a CPU") and "| answers | done |" in text and "## Wrong" not in text
    )


def planted(*names: str, seconds: float = 60) -> tuple[Step, ...]:
    return tuple(Step(name, f"tests.bench.gpu_steps.{name}", seconds) for name in names)


def test_what_is_wrong_or_dies_does_not_stop_the_next(tmp_path):
    visit, written = Visit("cpu", True, tmp_path), []
    wrong, dies = run_steps(planted("wrong", "dies"), visit, 60, lambda so_far: written.append(len(so_far)))
    assert written == [1, 2]
    assert [(row["part"], is_right(row)) for row in wrong.rows] == [
        ("wrong", False),
        ("raises", False),
        ("after", True),
    ]
    assert wrong.status == "done" and wrong.rows[1]["failed"] == "ValueError: this part fails"
    assert [(row["part"], is_right(row)) for row in dies.rows] == [("before", True), ("after", True), ("dies", False)]
    assert dies.status == "done" and dies.died == 1
    write_results(visit, [wrong, dies])
    assert "- wrong, raises: ValueError: this part fails" in (tmp_path / "gpu.md").read_text()


def test_what_hangs_is_ended_with_its_own_processes(tmp_path):
    (hangs,) = run_steps(planted("hangs", seconds=6), Visit("cpu", True, tmp_path), 60, lambda outcomes: None)
    assert hangs.status == "timed out" and hangs.rows == [{"part": "hangs", "right": True}]
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not is_alive(child):
            return
        time.sleep(0.05)
    raise AssertionError("its own process still runs")


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_no_step_begins_without_time(tmp_path):
    (outcome,) = run_steps(planted("hangs"), Visit("cpu", True, tmp_path), 1, lambda outcomes: None)
    assert outcome.status == "no time left" and not outcome.rows


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--device", "cpu"], "--device cpu needs --quick"),
        (["--device", "cpu", "--quick", "--budget", "0"], "--budget must be more than 0 seconds, got 0"),
        (["--device", "cpu", "--quick", "--budget", "nan"], "--budget must be more than 0 seconds, got nan"),
    ],
)
def test_arguments_that_cannot_be_meant(words, sentence, capsys, tmp_path):
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--out", str(tmp_path / "out")])
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()
