"""Several gloo processes that hold one model give one process's answers and gradients."""

import pytest
import torch

from bench.setup.gloo import run_ranks
from nvlm_runtime.checkpoint.tensors import file_entries, fill
from nvlm_runtime.model.cache import KVCache
from nvlm_runtime.model.decoder import CrossView
from nvlm_runtime.model.model import NVLMModel
from nvlm_runtime.model.past import make_past
from nvlm_runtime.parallel.group import Group
from nvlm_runtime.parallel.shard import group_sizes
from nvlm_runtime.presets import PRESETS
from tests.parallel import work
from tests.parallel.small import TEXT_3, config, load, write

VARIANTS = ("d", "x", "h")
FFNS = ("none", "swiglu", "gelu4x")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = [tmp_path_factory.mktemp(variant) for variant in VARIANTS]
    for folder, variant, ffn in zip(made, VARIANTS, FFNS):
        write(folder, variant, **({} if variant == "d" else {"ffn": ffn}))
    return made


@pytest.fixture(scope="module")
def whole(folders):
    return [work.answers(load(folder, speculate=2)) for folder in folders]


@pytest.fixture(scope="module")
def learnt(folders):
    return [work.gradients(folder) for folder in folders]


@pytest.fixture(scope="module")
def two(folders):
    return run_ranks(2, work.everything, folders, ["tiles", "heads"])


@pytest.fixture(scope="module")
def four(folders):
    return run_ranks(4, work.everything, folders, ["heads"])


def check_answers(found, want):
    for (tokens, logits), (want_tokens, want_logits) in zip(found, want, strict=True):
        assert tokens == want_tokens
        assert (logits - want_logits).abs().max() < 1e-5


@pytest.mark.parametrize("split", ["tiles", "heads"])
def test_two_ranks_answer_as_one_process(two, whole, split):
    for rank in two:
        check_answers(rank["answers", split], whole)


def test_four_ranks_share_two_kv_heads(four, whole):
    for rank in four:
        check_answers(rank["answers", "heads"], whole)


def test_static_stages_answer_as_one_process(two, whole):
    """Those that a GPU would capture; their draws by top-k and top-p ask no rank's host."""
    for rank in two:
        check_answers(rank["static answers"], whole)


def test_three_ranks(tmp_path):
    write(tmp_path, "h", text=TEXT_3)
    want = [work.answers(load(tmp_path, speculate=2))]
    for rank in run_ranks(3, work.everything, [tmp_path, tmp_path], ["tiles"]):
        check_answers(rank["answers", "tiles"][:1], want)


def test_ranks_agree_on_a_seed(two, four):
    assert len({tuple(rank["free"]) for rank in two}) == len({tuple(rank["free"]) for rank in four}) == 1


def compare(found, want, variant, ffn, size):
    """Every rank's part of every parameter is that of one process; what is padding is zero. found: one a rank."""
    given = {} if variant == "d" else {"ffn": ffn}
    with torch.device("meta"):
        names = dict(file_entries(NVLMModel(config(variant, **given))))
    for rank, mine in enumerate(found):
        with torch.device("meta"):
            entries = file_entries(NVLMModel(config(variant, **given), Group(rank, size), "heads"))
        expected = {name: torch.zeros_like(tensor) for name, tensor in mine.items()}
        for name, entry in entries.items():
            whole = names[name]
            stored = want[whole.parameter]
            if whole.axis is not None:
                full = stored.new_zeros(whole.shape)
                for piece in whole.pieces:
                    part = stored.narrow(whole.axis, piece.at, piece.size)
                    full.narrow(whole.axis, piece.start, piece.size).copy_(part)
                stored = full
            fill(expected[entry.parameter], entry, stored, name, is_checked=False)
        for name, tensor in mine.items():
            error, scale = (tensor - expected[name]).abs().max(), want[name].abs().max()
            assert error <= 1e-9 * scale, f"{variant} rank {rank} {name}: {error} of {scale}"


@pytest.mark.parametrize("index", range(3), ids=VARIANTS)
@pytest.mark.parametrize("size", [2, 4])
def test_gradients_and_two_steps_are_one_process_s(request, learnt, size, index):
    found = request.getfixturevalue({2: "two", 4: "four"}[size])
    for part in (0, 1):
        mine = [rank["gradients"][index][part] for rank in found]
        assert all(tensor.abs().max() > 0 for tensor in learnt[index][0].values()), "a parameter is not used"
        compare(mine, learnt[index][part], VARIANTS[index], FFNS[index], size)


def test_collectives_are_those_the_docstrings_name(two):
    """Two all-reduces a layer; in the vision encoder two and one of two numbers a row, and never a gather of q or k."""
    for rank in two:
        found = rank["collectives", "heads"]
        assert found["encode"] == {("all_reduce", 100): 2 * 2, ("all_reduce", 2): 2}
        assert found["project"] == {("all_reduce", 64): 1}
        assert found["embed"] == {("all_reduce", 64): 1}
        assert found["prefill"] == {("all_reduce", 64): 2 * 4}
        assert found["logits"] == {("all_gather", 258): 1}
        assert rank["collectives", "tiles"]["encode"] == {("all_gather", 100): 1}


def test_ranks_refuse_checkpoints_that_differ(two):
    for rank in two:
        assert rank["refused"] == "the checkpoint of rank 1 is not rank 0's: every rank needs the same"


PUBLISHED = [name for name in PRESETS if not name.startswith("micro-")]


@pytest.mark.parametrize(("name", "split"), [*((name, "heads") for name in PUBLISHED), ("nvlm-d-72b", "tiles")])
def test_ranks_hold_the_published_models_between_them(name, split):
    """Pieces of every tensor cover it once: counted at 1, 2, 4 and 8 ranks, and against the published total."""
    for size in (1, 2, 4, 8):
        covered: dict[str, int] = {}
        for rank in range(size):
            with torch.device("meta"):
                entries = file_entries(NVLMModel(PRESETS[name], Group(rank, size), split))
            for tensor, entry in entries.items():
                if entry.axis is not None:
                    across = torch.Size(entry.shape).numel() // entry.shape[entry.axis]
                    covered[tensor] = covered.get(tensor, 0) + across * sum(piece.size for piece in entry.pieces)
        for tensor, entry in entries.items():
            if entry.axis is None:
                continue
            across = torch.Size(entry.shape).numel() // entry.shape[entry.axis]
            real = across * (entry.shape[entry.axis] - sum(end - start for start, end in entry.padding))
            copies = size if split == "tiles" and tensor.startswith("vision_model") else 1
            assert covered[tensor] == copies * real, tensor
        total = sum(torch.Size(entry.shape).numel() for entry in entries.values())
        if name == "nvlm-d-72b":
            assert total == 79_379_593_344  # as published, the vision encoder's 7 dummy heads among them
        assert group_sizes(PRESETS[name])[:4] == [1, 2, 4, 8] if "72b" in name else True


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_run_in_shape(name):
    """Seven tiles, a prompt that sees them and a step behind its cache, of the last of 1, 2, 4 and 8 ranks, on the meta
    device.
    """
    config_, dtype, meta = PRESETS[name], torch.bfloat16, torch.device("meta")
    width, keys = config_.text.hidden_size, 7 * 256
    for size in (1, 2, 4, 8):
        with meta, torch.inference_mode():
            model = NVLMModel(config_, Group(size - 1, size), "heads").to(dtype).eval()
            decoder = model.language_model
            tokens = model.project(model.encode(torch.empty(7, 3, 448, 448, dtype=dtype)))
            cache = KVCache.allocate(model.shard.text, 1, 64, meta, dtype)
            seen = [None, None]
            if config_.cross is not None:
                kv = decoder.cross_kv(tokens.flatten(0, 1)[None], torch.arange(keys))
                seen = [CrossView(kv, torch.empty(1, num, 2, dtype=torch.int64)) for num in (40, 1)]
            x, positions = torch.empty(1, 41, width, dtype=dtype), torch.arange(41)[None]
            hidden = decoder(x[:, :40], positions[:, :40], make_past(positions[:, :40], "sdpa", cache, 40), seen[0])
            step = decoder(x[:, 40:], positions[:, 40:], make_past(positions[:, 40:], "sdpa", cache, 41), seen[1])
            logits = decoder.logits(step)
        assert tokens.shape == (7, 256, width) and hidden.shape == (1, 40, width)
        assert logits.shape == (1, 1, config_.text.vocab_size)


def test_refuses_sizes_that_cannot_share_the_heads():
    with (
        torch.device("meta"),
        pytest.raises(ValueError, match="5 ranks cannot share 8 heads and 2 kv heads evenly: this"),
    ):
        NVLMModel(config("d"), Group(0, 5))
    with torch.device("meta"), pytest.raises(ValueError, match="can be split over 1, 2, 4, 8$"):
        NVLMModel(config("d"), Group(0, 3))
    with pytest.raises(ValueError, match=r"the rank must be from 0 to 1 \(a group of 2\), got 2"):
        Group(2, 2)
