"""Ops that are a matrix product with something fused to it."""

from bench.cases.case import Case

CASES: tuple[Case, ...] = ()
