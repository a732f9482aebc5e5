"""Resuming a ranks' checkpoint runs no code that its files name."""

import io
import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint import metadata as index

from nvlm_runtime.parallel.group import Mesh
from nvlm_runtime.training.checkpoint import _read_shares, _write_shares

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


class Command:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def state(value):
    moments = {"exp_avg": torch.full((2, 3), value), "step": torch.tensor(value)}
    return {
        "step": 3,
        "random": torch.full((4,), int(value), dtype=torch.uint8),
        "optimizer": {"masters": {"weight": torch.full((2, 3), value)}, "moments": {"weight": moments}},
    }


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "step-00000003"
    made.mkdir()
    _write_shares(made, state(7.0), Mesh())
    return made


def change(folder, function):
    """The index, changed by `function` and written again."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(function(metadata) or metadata))


def test_it_reads_what_was_written(folder):
    read = _read_shares(folder, state(0.0), Mesh())
    want = state(7.0)
    assert torch.equal(read["random"], want["random"])
    assert torch.equal(read["optimizer"]["masters"]["weight"], want["optimizer"]["masters"]["weight"])
    assert read["optimizer"]["moments"]["weight"]["step"] == 7


@pytest.mark.parametrize("place", ["whole", "inside"])
def test_an_index_that_names_a_function_is_refused(folder, tmp_path, place):
    bomb = Command(tmp_path / "ran")
    if place == "whole":
        (folder / ".metadata").write_bytes(pickle.dumps(bomb))
    else:
        change(folder, lambda metadata: metadata.state_dict_metadata.update(bomb=bomb))
    with pytest.raises(ValueError, match="names posix.mkdir, which no index"):
        _read_shares(folder, state(0.0), Mesh())
    assert not (tmp_path / "ran").exists()


def test_an_entry_that_is_a_pickle_is_refused(folder, tmp_path):
    raw = io.BytesIO()
    torch.save(Command(tmp_path / "ran"), raw)
    (folder / "bomb.distcp").write_bytes(raw.getvalue())

    def plant(metadata):
        name = "part-0.masters.weight"
        metadata.state_dict_metadata[name] = index.BytesStorageMetadata()
        (key,) = [key for key in metadata.storage_data if key.fqn == name]
        place = metadata.storage_data.pop(key)
        place.relative_path, place.offset, place.length = "bomb.distcp", 0, len(raw.getvalue())
        metadata.storage_data[index.MetadataIndex(name)] = place

    change(folder, plant)
    with pytest.raises(ValueError, match=r"'part-0.masters.weight' is not a tensor"):
        _read_shares(folder, state(0.0), Mesh())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../elsewhere.distcp", "missing.distcp"])
def test_tensors_lie_in_the_folder_s_own_files(folder, name):
    (file,) = folder.glob("*.distcp")
    (folder.parent / "elsewhere.distcp").write_bytes(file.read_bytes())

    def move(metadata):
        for place in metadata.storage_data.values():
            place.relative_path = name

    change(folder, move)
    with pytest.raises(ValueError, match="which is no file there"):
        _read_shares(folder, state(0.0), Mesh())


def test_every_cut_of_the_index_is_refused(folder):
    path = folder / ".metadata"
    raw = path.read_bytes()
    for length in range(0, len(raw), 37):
        path.write_bytes(raw[:length])
        with pytest.raises(ValueError, match="is not the index of a checkpoint"):
            _read_shares(folder, state(0.0), Mesh())
