import torch

from nvlm_runtime.model.features import Features


def features_of(num: int) -> Features:
    return Features(torch.randn(num, 4, 8), torch.randn(num, 4, 2))


def test_split_and_cat_are_by_tiles_and_keep_statistics_beside_their_patches():
    whole = features_of(7)
    for sizes in ([1, 0, 4, 2], 3):
        parts = whole.split(sizes)
        for name in ("patches", "statistics"):
            wanted = getattr(whole, name).split(sizes)
            assert all(torch.equal(getattr(part, name), want) for part, want in zip(parts, wanted, strict=True))
        again = Features.cat(parts)
        assert torch.equal(again.patches, whole.patches) and torch.equal(again.statistics, whole.statistics)


def test_without_statistics():
    parts = Features(torch.randn(3, 4, 8)).split(2)
    assert [len(part.patches) for part in parts] == [2, 1] and all(part.statistics is None for part in parts)
    assert Features.cat(parts).statistics is None


def test_one_part_is_not_copied():
    one = features_of(2)
    assert Features.cat([one]) is one
