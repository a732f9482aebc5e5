"""`nvlm ask --tp`: real ranks, and what the others do when one dies or hangs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nvlm_runtime.commands.cli import main
from tests.evaluation.benchmarks import write_benchmark

ASK = [sys.executable, "-m", "nvlm_runtime", "ask", "examples/receipt.png"]
# a thousand tokens, as nearly every token is as likely as every other
ENDLESS = [*ASK, "What is it?", "--tp", "3", "--temperature", "1e6", "--max-new-tokens", "1800"]
ENDLESS += ["--seed", "30"]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def test_three_ranks_answer_and_one_speaks():
    done = subprocess.run([*ASK, "What is the total?", "--tp", "3"], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, "17.40\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tp", "2"], "2 ranks cannot share 6 heads and 3 kv heads evenly: this model can be split over 1, 3, 6"),
        (["--tp", "3", "--tp-timeout", "0"], "--tp-timeout must be above 0 seconds, got 0.0"),
    ],
)
def test_bad_input_is_said_once(words, said):
    done = subprocess.run([*ASK, "What?", *words], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"nvlm: {said}\n")


def test_three_ranks_score_what_one_process_does(tmp_path):
    words = [str(word) for word in write_benchmark("docvqa", tmp_path / "data")]
    base = [sys.executable, "-m", "nvlm_runtime", "eval", "docvqa", *words, "--model", "micro-d", "--json"]
    base += ["--max-new-tokens", "6", "--no-native"]
    said = {}
    for name, more in {"one": [], "three": ["--tp", "3"]}.items():
        done = subprocess.run(
            [*base, *more, "--predictions", str(tmp_path / name)], capture_output=True, text=True, env=environment()
        )
        assert (done.returncode, done.stderr) == (0, "")
        said[name] = json.loads(done.stdout) | {"predictions": ""}
    assert said["one"] == said["three"] and (tmp_path / "one").read_text() == (tmp_path / "three").read_text()
    again = subprocess.run(
        [*base, "--tp", "3", "--rescore", "--predictions", str(tmp_path / "one")],
        capture_output=True,
        text=True,
        env=environment(),
    )
    said = "nvlm: --rescore needs --predictions FILE, and excludes --resume and --tp\n"
    assert (again.returncode, again.stdout, again.stderr) == (2, "", said)


def test_the_ranks_end_quietly_with_their_reader():
    process = subprocess.Popen(ENDLESS, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout.read(20)
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_a_rank_that_gives_up_ends_with_its_code():
    """In a group whose thread waits in a collective for ever; an ordinary exit aborts there, now and then or always."""
    program = """
import os, sys, threading, time
import torch, torch.distributed as dist
from nvlm_runtime.commands import cli
from nvlm_runtime.parallel import ranks
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
class Waits(threading.Thread):
    def run(self): time.sleep(60)
Waits().start()
os.environ["RANK"] = "0"
def run(*args): raise ValueError("no such thing")
cli.importlib.import_module("nvlm_runtime.commands.info").run = run
sys.exit(cli.main(["info", "micro-d"]))
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "nvlm: no such thing\n")
    assert time.monotonic() - began < 50, "it waited for the thread"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_under_torchrun_rank_0_says_what_is_wrong(rank, monkeypatch, capsys):
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which a rank other than 0 closes
    assert main(["ask", "examples/receipt.png", "What?", "--tp-timeout", "0"]) == 2
    said = "nvlm: --tp-timeout must be above 0 seconds, got 0.0\n"
    assert capsys.readouterr().err == (said if rank == "0" else "")


@pytest.mark.parametrize("size", ["0", "-3"])
def test_a_size_below_one_is_refused(size, capsys):
    assert main(["ask", "examples/receipt.png", "What?", "--tp", size]) == 2
    assert capsys.readouterr().err == f"nvlm: --tp must be at least 1, got {size}\n"


def test_commands_of_one_process_are_refused_in_a_group(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["chat"]) == 2
    assert capsys.readouterr().err == "nvlm: nvlm chat runs in one process, and torchrun started several\n"
    assert main(["ask", "examples/receipt.png", "What?", "--tp", "1"]) == 2
    assert "--tp 1 in a group of 2 processes" in capsys.readouterr().err


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank to process, of a launcher's children."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1]) == launcher:
                entries = (folder / "environ").read_bytes().split(b"\0")
                found[int(next(e for e in entries if e.startswith(b"RANK=")).removeprefix(b"RANK="))] = int(folder.name)
        except (OSError, StopIteration):
            continue
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def endless():
    """Three ranks in the middle of an answer."""
    process = subprocess.Popen(
        [*ENDLESS, "--tp-timeout", "6"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    )
    assert process.stdout.read(20), process.stderr.read()
    ranks = ranks_of(process.pid)
    assert sorted(ranks) == [0, 1, 2]
    yield process, ranks
    for pid in ranks.values():
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate()


def wait_for(condition, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all(endless, victim):
    process, ranks = endless
    os.kill(ranks[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    # the agent may see the others end before it looks at the one that was killed
    first = rf"rank {victim} of 3 ended with signal 9|rank \d: another rank is gone or hangs"
    assert re.fullmatch(rf"nvlm: ({first}); all ranks are stopped\n", err.decode())
    assert not any(is_running(pid) for pid in ranks.values()), "an orphan"


@pytest.mark.skipif(not Path("/proc").exists(), reason="reads /proc")
def test_a_hung_rank_ends_all(endless):
    process, ranks = endless
    os.kill(ranks[1], signal.SIGSTOP)
    assert wait_for(lambda: not is_running(ranks[0]) and not is_running(ranks[2]), 30)
    os.kill(ranks[1], signal.SIGCONT)  # the agent would kill it half a minute later
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(r"nvlm: rank [02]: another rank is gone or hangs; all ranks are stopped\n", err.decode())
    assert not is_running(ranks[1]), "an orphan"
