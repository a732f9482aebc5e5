import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm_kernels import draw_tile_mask, tile_mask, tile_mask_from_ids, to_dense
from nvlm_kernels.ops.attention import mask as module

TAG = {1: [10, 11], 2: [10, 12], 3: [10, 13, 14], "thumbnail": [15]}
OPEN, CLOSE, WORD = [20, 21], [22, 21], 30
THUMBNAIL = 3
PATTERNS = torch.tensor([[10, 11, -1], [10, 12, -1], [10, 13, 14], [15, -1, -1]])


class Row:
    """A prompt built token by token, and by the rule read literally what every token sees."""

    def __init__(self):
        self.ids, self.sees, self.tags, self.images, self.documents = [], [], [], [], []
        self.key, self.since, self.seen = 0, 0, 0

    def text(self, num: int, ids=None) -> "Row":
        ids = [WORD] * num if ids is None else ids
        self.ids += ids
        self.sees += [(self.since, self.seen)] * len(ids)
        return self

    def image(self, regular: int, size: int) -> "Row":
        self.text(0, OPEN)
        for tile in [*range(1, regular + 1), "thumbnail"]:
            ids = TAG[tile]
            self.tags.append((len(self.ids), len(self.ids) + len(ids), self.key, self.key + size))
            self.ids += ids
            self.sees += [(self.key, self.key + size)] * len(ids)
            self.key += size
            self.text(1 if tile == 1 else 0)  # an ordinary token between two tags sees the images before
        self.seen = self.key
        self.images.append((len(self.ids), self.key))
        return self.text(0, CLOSE)

    def document(self) -> "Row":
        self.key += 2  # keys may be padded between documents
        self.documents.append((len(self.ids), self.key))
        self.since = self.seen = self.key
        return self


def mask_of(rows: list[Row], length: int, packed: bool) -> torch.Tensor:
    def padded(name: str, width: int) -> torch.Tensor:
        most = max(len(getattr(row, name)) for row in rows)
        filler = [length, length, 0, 0] if width == 4 else [length, 0]
        spans = [getattr(row, name) + [tuple(filler)] * (most - len(getattr(row, name))) for row in rows]
        return torch.tensor(spans, dtype=torch.int64).view(len(rows), most, width)

    return tile_mask(padded("tags", 4), padded("images", 2), length, padded("documents", 2) if packed else None)


def assert_sees(intervals: torch.Tensor, row: Row) -> None:
    assert (intervals[:, 0] <= intervals[:, 1]).all(), "an empty interval is [x, x)"
    got = [(s, e) if e > s else None for s, e in intervals[: len(row.sees)].tolist()]
    assert got == [(s, e) if e > s else None for s, e in row.sees]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("text"), st.integers(1, 4)),
        st.tuples(st.just("image"), st.integers(0, 3)),
        st.tuples(st.just("document"), st.just(0)),
    ),
    max_size=8,
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(STEPS, min_size=1, max_size=3), st.integers(1, 5))
def test_any_prompt(batch, size):
    rows = [Row() for _ in batch]
    for row, steps in zip(rows, batch):
        for what, number in steps:
            if what == "document":
                row.document()
            else:
                row.text(number) if what == "text" else row.image(number, size)
    length = max(len(row.ids) for row in rows)
    intervals = mask_of(rows, length, packed=True)
    assert intervals.shape == (len(rows), length, 2) and intervals.dtype == torch.int64
    for row, mine in zip(rows, intervals):
        assert_sees(mine, row)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.lists(STEPS, min_size=1, max_size=3), st.integers(1, 5))
def test_token_ids_say_the_same_as_spans(batch, size):
    rows = [Row() for _ in batch]
    for row, steps in zip(rows, batch):
        for what, number in steps:
            if what != "document":  # ids do not show where packed documents part
                row.text(number) if what == "text" else row.image(number, size)
    length = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (length - len(row.ids)) for row in rows], dtype=torch.int64)
    intervals = tile_mask_from_ids(ids, PATTERNS, THUMBNAIL, size)
    assert torch.equal(intervals, mask_of(rows, length, packed=False))


def test_a_chunk_is_the_same_rows():
    row = Row().text(2).image(2, 4).text(3).image(1, 4).text(2)
    whole = mask_of([row], len(row.ids), packed=False)
    longer = mask_of([row], len(row.ids) + 5, packed=False)
    assert torch.equal(longer[:, : len(row.ids)], whole)
    assert longer[0, -1].tolist() == [0, 20], "what comes later sees every image"


def test_text_before_any_image_sees_nothing_and_without_images_all_rows():
    assert not to_dense(mask_of([Row().text(5)], 5, packed=False), 7).any()
    row = Row().text(3).image(1, 2)
    assert not to_dense(mask_of([row], len(row.ids), packed=False), 4)[0, :5].any()


def test_picture_is_the_docstring():
    tags = torch.tensor([[[2, 3, 0, 2], [3, 4, 2, 4], [4, 5, 4, 6]]])
    intervals = tile_mask(tags, torch.tensor([[[5, 6]]]), 7)[0]
    picture = draw_tile_mask(intervals, 6, 1, ["What", "is", "tag1", "tag2", "tagT", "here", "?"])
    shown = [line.strip() for line in module.__doc__.splitlines()]
    for line in picture.splitlines():
        label, *cells = line.split()
        assert any(text.split()[0] == label and text.split()[-6:] == cells for text in shown if text), line


def test_picture_marks_a_part_of_a_tile():
    assert draw_tile_mask(torch.tensor([[0, 3], [0, 0]]), 4, 2) == "0 # +\n1 . ."


@pytest.mark.parametrize(
    "tags, images, documents, name",
    [
        (torch.zeros(1, 2, 3, dtype=torch.int64), torch.zeros(1, 0, 2, dtype=torch.int64), None, "tags"),
        (torch.zeros(1, 2, 4), torch.zeros(1, 0, 2, dtype=torch.int64), None, "tags"),
        (torch.zeros(1, 2, 4, dtype=torch.int64), torch.zeros(2, 0, 2, dtype=torch.int64), None, "images"),
        (
            torch.zeros(1, 2, 4, dtype=torch.int64),
            torch.zeros(1, 0, 2, dtype=torch.int64),
            torch.zeros(1, 2, dtype=torch.int64),
            "documents",
        ),
    ],
    ids=["width", "dtype", "batch", "rank"],
)
def test_rejects(tags, images, documents, name):
    with pytest.raises(ValueError, match=f"tile_mask: {name} must be int64"):
        tile_mask(tags, images, 5, documents)


def test_from_ids_rejects():
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="tile_mask_from_ids: tag_ids must be int64 of rank 2"):
        tile_mask_from_ids(ids, ids[0], 0, 4)
    with pytest.raises(ValueError, match="last must be one of 4 tags, got 4"):
        tile_mask_from_ids(ids, PATTERNS, 4, 4)
    with pytest.raises(ValueError, match="tokens_per_tile must be at least 1, got 0"):
        tile_mask_from_ids(ids, PATTERNS, THUMBNAIL, 0)


@pytest.mark.gpu
def test_no_host_sync(device):
    row = Row().text(2).image(2, 4).text(3)
    tags, images = torch.tensor([row.tags], device=device), torch.tensor([row.images], device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tile_mask(tags, images, len(row.ids))
    finally:
        torch.cuda.set_sync_debug_mode("default")
