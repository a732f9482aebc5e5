"""Rows, what is learnt of them, packing, and a stream that goes on where it was left."""

import itertools
import json
import random
import statistics
from collections import Counter

import pytest
import torch

from nvlm_runtime.training.documents import IGNORE, make_document
from nvlm_runtime.training.packing import fill_sequences
from nvlm_runtime.training.records import BadRecord, JsonLines
from nvlm_runtime.training.source import Dataset, Source
from tests.inputs.qwen import qwen_tokenizer
from tests.model.test_model import picture
from tests.small import CONFIGS, micro_tokenizer
from tests.training.data import datasets, turns, write_data, write_records


def document(folder, row, variant="d", tokenizer=None, seq_len=1000, style="hf", log=print):
    rows = JsonLines(write_records(folder / "one.jsonl", [row]))
    return make_document(rows[0], tokenizer or micro_tokenizer(), CONFIGS[variant], seq_len, style, "task", log)


@pytest.mark.parametrize("style", ["hf", "megatron"])
def test_what_is_learnt_in_qwens_vocabulary(tmp_path, style):
    """Answers and what ends them, in style "megatron" its newline too; ids from Qwen's published vocabulary."""
    start, end, line, user, assistant = 151644, 151645, 198, 872, 77091
    after = [line] if style == "megatron" else []
    row = {"conversations": [{"from": "system", "value": "Hi"}, *turns("Hi", "Yes.", "Hi", "\nYes")]}
    made = document(tmp_path, row, tokenizer=qwen_tokenizer(), style=style)
    ids = [start, 8948, line, 13048, end, *after, start, user, line, 13048, end, *after, start, assistant, line]
    labels = [IGNORE] * len(ids)
    ids += [9454, 13, end, *after]
    labels += [9454, 13, end, *after]
    asked = [start, user, line, 13048, end, *after, start, assistant, line]
    ids += asked
    labels += [IGNORE] * len(asked)
    # the answer's own newline stays apart from its prefix's, as when it is generated
    ids += [line, 9454, end, *after]
    labels += [line, 9454, end, *after]
    assert list(made.input_ids) == ids[:-1] and list(made.labels) == labels[1:]


@pytest.mark.parametrize("variant", ["d", "x", "h"])
def test_pictures_and_tags_are_never_learnt(tmp_path, variant):
    picture((96, 64)).save(tmp_path / "a.png")
    row = {"image": "a.png", "conversations": turns("<image>\nWhat is <|im_end|> it?", "An <|vision_pad|> thing.")}
    made = document(tmp_path, row, variant)
    tokenizer = micro_tokenizer()
    learnt = [label for label in made.labels if label != IGNORE]
    assert learnt == [*tokenizer.encode("An <|vision_pad|> thing."), tokenizer.special("<|im_end|>")]
    assert tokenizer.special("<|vision_pad|>") not in learnt, "text forges no token"
    for image in made.layout.images:
        first, last = image.span
        assert all(label == IGNORE for label in made.labels[first - 1 : last - 1])
    assert made.pixel_values().shape == (7, 3, 32, 32)


def test_tiles_are_lowered_until_a_row_fits(tmp_path):
    picture((96, 64)).save(tmp_path / "a.png")
    row = {"image": "a.png", "conversations": turns("What?", "A.")}
    whole, said = document(tmp_path, row), []
    assert len(whole.layout.images[0].placeholder_tiles) == 7
    shorter = document(tmp_path, row, seq_len=len(whole) - 1, log=said.append)
    assert shorter.images[0][1].num_tiles == 5 and len(shorter) < len(whole)  # 2 x 2 and the thumbnail
    where, fits = f"{tmp_path / 'one.jsonl'}, line 1", f"so that it fits into {len(whole) - 1} tokens"
    assert said == [f"{where}: at most 4 tiles a picture, {fits}"]
    two = document(tmp_path, row, seq_len=len(shorter) - 1)
    one = document(tmp_path, row, seq_len=len(two) - 1)
    assert [made.images[0][1].num_tiles for made in (two, one)] == [3, 1]
    with pytest.raises(BadRecord, match=r"one.jsonl, line 1: \d+ tokens, more than a row's 20, with the fewest tiles"):
        document(tmp_path, row, seq_len=20)


BAD = [
    ("{nonsense", "not valid JSON"),
    ([1], "expected a JSON object, got list"),
    ({"conversations": []}, "'conversations' must be a list of turns"),
    ({"conversations": turns("Hi")}, "the last turn must be an answer, and is from 'human'"),
    ({"conversations": turns("Hi", "Ho", "Hi", "")}, "turn 4, an answer, is empty"),
    ({"conversations": turns("Hi", "Ho")[::-1]}, "turn 1 is from 'gpt' where system or user's was expected"),
    ({"conversations": [*turns("Hi", "Ho"), *turns("", "Ho")[1:]]}, "turn 3 is from 'gpt' where user's was expected"),
    ({"conversations": [{"from": "dog", "value": "wuff"}]}, "turn 1 must have 'from'"),
    ({"conversations": [{"from": "human", "value": 3}]}, "turn 1 must have 'from'"),
    ({"image": "gone.png", "conversations": turns("Hi", "Ho")}, "gone.png does not exist"),
    ({"image": 3, "conversations": turns("Hi", "Ho")}, "'image' must be a path or a list of paths, got 3"),
    ({"image": "bad.png", "conversations": turns("Hi", "Ho")}, "bad.png is no picture that can be read"),
    ({"image": "0.png", "conversations": turns("<image><image>", "Ho")}, "2 places for images, but there are 1"),
]


@pytest.mark.parametrize(("row", "said"), BAD, ids=range(len(BAD)))
def test_a_bad_row_says_where_and_why(tmp_path, row, said):
    seen, _ = write_data(tmp_path, 4)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    good = seen.read_text().splitlines()
    write_records(seen, ["", *good[:2], row, *good[2:]])
    source = Source([Dataset("seen", JsonLines(seen))], micro_tokenizer(), CONFIGS["d"], rows=1, seq_len=400, window=8)
    with pytest.raises(BadRecord) as raised:
        for _ in range(9):
            next(source)
    assert str(raised.value).startswith(f"{seen}, line 4: ") and said in str(raised.value)
    with pytest.raises(BadRecord):
        next(source)
    source.close()
    told = []
    options = {"rows": 1, "seq_len": 400, "window": 30, "skip_bad": True, "log": told.append}
    source = Source([Dataset("seen", JsonLines(seen))], micro_tokenizer(), CONFIGS["d"], **options)
    while source.state()["window"] == 0:
        next(source)
    source.close()
    assert source.num_bad >= 4 and all(line.startswith(f"skipped: {seen}, line 4: ") for line in told)


def test_a_picture_that_breaks_off_is_found_in_the_thread(tmp_path):
    seen, _ = write_data(tmp_path, 4)
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    source = Source([Dataset("seen", JsonLines(seen))], micro_tokenizer(), CONFIGS["d"], rows=1, seq_len=400)
    with pytest.raises(BadRecord, match=r"seen.jsonl, line 3: .*2\.png"):
        for _ in range(50):
            next(source)
    source.close()


LENGTHS = {
    "of 20 to 300": lambda draw: draw.randint(20, 300),
    "short and long": lambda draw: draw.choice((30, 30, 30, 300)) + draw.randint(0, 60),
    "log-normal": lambda draw: min(1024, max(8, int(draw.lognormvariate(4.8, 0.8)))),
}


def in_random_order(lengths, seq_len, draw):
    """One after the other, in sequences that are closed when the next document does not fit: 81 to 89 % full."""
    rows, room = [[]], seq_len
    for i in draw.sample(range(len(lengths)), len(lengths)):
        if lengths[i] > room:
            rows.append([])
            room = seq_len
        rows[-1].append(i)
        room -= lengths[i]
    return rows


def spread(pack, length):
    """Over 100 windows: how full sequences are, and of a sequence's lengths the mean's spread, and their own."""
    full, means, within = [], [], []
    for seed in range(100):
        draw = random.Random(seed)
        lengths = [length(draw) for _ in range(128)]
        rows = pack(lengths, 1024, draw)
        full.append(sum(lengths) / 1024 / len(rows))
        found = [[lengths[i] for i in row] for row in rows]
        means += map(statistics.mean, found)
        within += [statistics.pstdev(row) for row in found if len(row) > 1]
    return statistics.mean(full), statistics.pstdev(means), statistics.mean(within)


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_mix_in_sequences_as_in_random_order(name):
    full, means, within = spread(fill_sequences, LENGTHS[name])
    _, random_means, random_within = spread(in_random_order, LENGTHS[name])
    assert full >= 0.95
    assert 0.75 * random_means < means < 1.4 * random_means
    assert 0.9 * random_within < within < 1.25 * random_within


def test_every_document_is_in_one_sequence_that_has_room():
    for seed in range(20):
        draw = random.Random(seed)
        lengths = [draw.randint(1, 100) for _ in range(draw.randint(1, 60))]
        rows, again = (fill_sequences(lengths, 100, random.Random(seed)) for _ in range(2))
        assert rows == again
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(row and row == sorted(row) and sum(lengths[i] for i in row) <= 100 for row in rows)


def stream(folder, state=None, **options):
    given = {"rows": 2, "seq_len": 300, "window": 12, "seed": 3, "state": state, **options}
    return Source(datasets(folder), micro_tokenizer(), CONFIGS["h"], **given)


def same(a, b):
    pixels = zip(a.pixel_values, b.pixel_values, strict=True)
    return (
        torch.equal(a.input_ids, b.input_ids)
        and torch.equal(a.labels, b.labels)
        and a.documents == b.documents
        and all(torch.equal(x.intervals, y.intervals) and x.images == y.images for x, y in zip(a.layouts, b.layouts))
        and all(torch.equal(x, y) for x, y in pixels)
    )


@pytest.mark.parametrize("packed", [True, False])
def test_goes_on_where_it_was_left(tmp_path, packed):
    """Left after any batch, in the middle of a window, at its end, and in another epoch."""
    source = stream(tmp_path, packed=packed)
    batches, states = [], [source.state()]
    for batch in itertools.islice(source, 24):
        batches.append(batch)
        states.append(json.loads(json.dumps(source.state())))
    source.close()
    assert states[-1]["window"] > 1 and max(states[-1]["read"]) > 15, "an epoch has ended"
    for left in (0, 1, 4, 9, 17):
        again = stream(tmp_path, states[left], packed=packed)
        for want in batches[left : left + 5]:
            assert same(next(again), want), f"after {left}"
        again.close()
    other = stream(tmp_path, packed=packed, seed=4)
    assert not all(same(a, b) for a, b in zip(batches[:3], other))
    other.close()


def test_every_row_of_a_dataset_comes_once_an_epoch_and_the_blend_keeps_its_weights(tmp_path):
    source = stream(tmp_path, window=100)
    tasks: Counter = Counter()
    texts: Counter = Counter()
    while source.state()["window"] < 4:
        batch = next(source)
        for row, (spans, names) in enumerate(zip(batch.documents, batch.tasks, strict=True)):
            for (start, end), name in zip(spans, names, strict=True):
                tasks[name] += 1
                texts[name, tuple(batch.input_ids[row, start:end].tolist())] += 1
    source.close()
    assert 0.6 < tasks["seen"] / sum(tasks.values()) < 0.8
    counts = [count for (name, _), count in texts.items() if name == "text"]
    assert len(counts) == 14 and max(counts) - min(counts) <= 1


def test_refuses_an_empty_blend_and_another_state(tmp_path):
    with pytest.raises(ValueError, match="at least one dataset"):
        Source([], micro_tokenizer(), CONFIGS["d"], rows=1, seq_len=10)
    with pytest.raises(ValueError, match="the state is of 1 datasets, the blend has 2"):
        stream(tmp_path, {"window": 0, "given": 0, "read": [0], "num_bad": 0})
    empty = write_records(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match="empty.jsonl is empty"):
        JsonLines(empty)
    with pytest.raises(FileNotFoundError, match="gone.jsonl does not exist"):
        JsonLines(tmp_path / "gone.jsonl")
