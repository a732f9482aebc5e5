"""The bundled models' logits keep their bits; on a CPU kind without digests they are close to the reference."""

import pytest
import torch

from tests import digests

VALUES, KIND = digests.read(), digests.fingerprint()


@pytest.mark.parametrize("name", digests.CASES)
def test_logits_are_what_they_were(name, library):
    case = digests.CASES[name]
    for key, record in zip(digests.names(name), digests.run(case, library.path.parent), strict=True):
        allowed = digests.tolerance_of(case)
        away = digests.distance(record, VALUES["reference"][key], allowed)
        wanted = VALUES["digests"].get(KIND, {}).get(key)
        if wanted is None:
            assert away <= allowed, f"{key}: a logit is {away:.2g} from the reference"
        else:
            assert record.digest == wanted, f"{key}: other bits on {KIND}; a logit is {away:.2g} from the reference"


def test_every_request_is_stored():
    keys = [key for name in digests.CASES for key in digests.names(name)]
    assert len(keys) == 20 and set(VALUES["reference"]) == set(keys)
    assert all(set(found) <= set(keys) for found in VALUES["digests"].values())
    assert digests.FILE.stat().st_size < 300_000


def made_of(reference):
    """A record with the reference's logits, the others zero."""
    ids, values = torch.tensor(reference["ids"]), torch.tensor(reference["values"])
    logits = torch.zeros(len(ids), 512).scatter(1, ids, values)
    return digests.Record(tuple(reference["token_ids"]), logits[:4], logits[4:])


def test_the_reference_tells_answers_apart():
    """What an unknown CPU is held to: another logit and another token are seen."""
    case, (key, *_) = digests.CASES["micro-x-graphs"], digests.names("micro-x-graphs")
    reference, allowed = VALUES["reference"][key], digests.tolerance_of(case)
    record = made_of(reference)
    assert digests.distance(record, reference, allowed) == 0
    record.steps[3, reference["ids"][7][0]] += 0.01
    assert digests.distance(record, reference, allowed) == pytest.approx(0.01, rel=1e-3)
    other = made_of(reference | {"token_ids": [reference["ids"][4][1], *reference["token_ids"][1:]]})
    assert digests.distance(other, reference, allowed) == float("inf")
