"""Every case on a GPU: bf16, torch.compile, CUDA graphs. Not one of these has run yet where none was at hand."""

import pytest
import torch

from bench.proofs.cases import CASES
from bench.proofs.cases.case import backward, tensors_in
from bench.proofs.errors import errors_of

pytestmark = pytest.mark.gpu
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


def build(case):
    return case.build(torch.bfloat16, "cuda", **case.small)


def results(fn, call) -> list[torch.Tensor]:
    output = fn(*call.inputs)
    made = [t.detach().clone() for t in tensors_in(output)]
    return made + list(backward(output, call.inputs) if call.backward_bytes is not None else ())


@each_case
def test_bf16(case):
    """Against fp64, at most twice eager's error: forward, every gradient, caches that are written."""
    wrong = [error for error in errors_of(build(case)) if not error.is_right]
    assert not wrong


@each_case
def test_same_bits_again_and_compiled(case):
    call = build(case)
    first, again = results(call.op, call), results(call.op, call)
    compiled = results(torch.compile(call.op, fullgraph=True), call)
    for one, two, three in zip(first, again, compiled, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(three, one)


@each_case
def test_graph_replay_gives_the_same_bits(case):
    call = build(case)
    with torch.no_grad():
        want = [t.clone() for t in tensors_in(call.op(*call.inputs))]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call.op(*call.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = call.op(*call.inputs)
        for t in tensors_in(output):
            t.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for got, expected in zip(tensors_in(output), want, strict=True):
            assert torch.equal(got, expected)
