"""Attention over image tokens and over the cache."""

from bench.cases.case import Case

CASES: tuple[Case, ...] = ()
