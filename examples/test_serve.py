"""The example on Ray Serve: replicas answer, one that is killed is replaced, and the other answers meanwhile.

    pip install -e '.[test,serve]' && pytest examples

Not among the tests of the package, which does not need Ray.
"""

import base64
import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import ray
from ray import serve

from examples.serve import build, read_request

RECEIPT = Path("examples/receipt.png")
QUESTION = "What is the total?"


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level="error")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def ask(handle, **options):
    return handle.answer.remote(QUESTION, [RECEIPT.read_bytes()], {"max_new_tokens": 8, **options})


def post(address, request):
    asked = urllib.request.Request(address, json.dumps(request).encode())
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def processes(handle, least):
    """Of as many replicas as answer, at least so many: {its process: its ranks' processes}."""
    found = {}
    end = time.monotonic() + 60
    while len(found) < least and time.monotonic() < end:
        first, *ranks = handle.processes.remote().result(timeout_s=30)
        found[first] = ranks
    assert len(found) >= least, found
    return found


def answered_again(handle, seconds=90):
    """The first right answer, whatever comes before it while a replica is replaced."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return ask(handle).result(timeout_s=60)["text"]
        except Exception:
            time.sleep(0.5)
    raise AssertionError(f"no answer after {seconds} s")


def test_a_killed_replica_is_replaced_and_the_other_answers(cluster):
    handle = serve.run(build("micro-d", 1, "cpu", num_replicas=2, ray_actor_options={"num_cpus": 1}), name="alone")
    assert {ask(handle).result(timeout_s=60)["text"] for _ in range(4)} == {"17.40"}
    with pytest.raises(ValueError, match="temperature"):
        ask(handle, temperature=-1).result(timeout_s=60)
    before = processes(handle, least=2)
    victim = next(iter(before))
    os.kill(victim, signal.SIGKILL)
    assert answered_again(handle) == "17.40"
    end = time.monotonic() + 90
    while len(now := set(processes(handle, least=2)) - {victim}) < 2 and time.monotonic() < end:
        time.sleep(0.5)
    assert len(now) == 2 and len(now & set(before)) == 1, "the killed one was not replaced"
    status, said = post(cluster, {"prompt": QUESTION, "images": [base64.b64encode(RECEIPT.read_bytes()).decode()]})
    assert (status, said["text"], said["finish_reason"]) == (200, "17.40", "stop")
    assert post(cluster, {"prompt": ""}) == (400, {"error": "the prompt is empty"})
    assert post(cluster, {})[0] == 400
    serve.delete("alone")


def test_a_group_that_lost_a_rank_is_replaced(cluster):
    handle = serve.run(build("micro-h", 3, "cpu", num_replicas=1), name="group")
    output = ask(handle).result(timeout_s=60)
    assert (output["text"], output["finish_reason"]) == ("17.40", "stop")
    with pytest.raises(ValueError, match="image 1 is not one that Pillow reads"):
        handle.answer.remote(QUESTION, [b"no picture"], {}).result(timeout_s=60)
    ((first, ranks),) = processes(handle, least=1).items()
    assert len({first, *ranks}) == 4
    os.kill(ranks[1], signal.SIGKILL)
    assert answered_again(handle) == "17.40"
    ((_, others),) = processes(handle, least=1).items()
    assert not set(others) & set(ranks)
    serve.delete("group")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], 'expected a JSON object with a "prompt"'),
        ({"prompt": 1}, 'expected a JSON object with a "prompt"'),
        ({"prompt": "What?", "images": "a"}, '"images" must be a list'),
        ({"prompt": "What?", "images": ["%"]}, '"images" must be base64'),
        (
            {"prompt": "What?", "colour": 1, "top_k": 2},
            "unknown colour: a request takes prompt, images, max_new_tokens",
        ),
    ],
)
def test_what_is_no_request(given, message):
    with pytest.raises(ValueError, match=message):
        read_request(given)


def test_a_request():
    data = RECEIPT.read_bytes()
    given = {"prompt": QUESTION, "images": [base64.b64encode(data).decode()], "top_k": 2}
    assert read_request(given) == (QUESTION, [data], {"top_k": 2})
