"""Every listed mutation still applies to the code as it is. Running them takes hours: python -m tests.mutations."""

from tests.mutations.__main__ import stale


def test_every_mutation_applies():
    assert not stale()
