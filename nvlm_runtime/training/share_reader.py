"""Reads the shares of a ranks' checkpoint without running code that the files name.

torch.distributed.checkpoint keeps the index of a checkpoint as a pickle (`.metadata`) and unpickles it, and every entry
that is not a tensor, without restrictions. Here the index may name the classes of an index only, its files lie in the
checkpoint's folder, and every entry is a tensor, which torch reads with `weights_only=True`.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint import metadata as index
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem

INDEX = ".metadata"
CLASSES = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        index.Metadata,
        index.MetadataIndex,
        index.TensorStorageMetadata,
        index.BytesStorageMetadata,
        index.ChunkStorageMetadata,
        index.TensorProperties,
        index._MEM_FORMAT_ENCODING,
        index.StorageMeta,
        _StorageInfo,
        torch.Size,
    )
}
DTYPES = {
    ("torch", str(kind).removeprefix("torch.")): kind for kind in vars(torch).values() if type(kind) is torch.dtype
}
LAYOUTS = ("torch.serialization", "_get_layout")
PATHS = {
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
}


def _layout(name: str) -> torch.layout:
    if name != "torch.strided":
        raise pickle.UnpicklingError(f"the layout {name!r}")
    return torch.strided


class _IndexUnpickler(pickle.Unpickler):
    """Finds the classes of an index, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == LAYOUTS:
            return _layout
        if (module, name) in PATHS:  # where the checkpoint was written: kept as text, never opened
            return _text
        found = CLASSES.get((module, name)) or DTYPES.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of a checkpoint needs")
        return found


def _text(*parts: str) -> str:
    return "/".join(parts)


class ShareReader(FileSystemReader):
    """A `FileSystemReader` whose index runs no code and whose entries are tensors in the checkpoint's own files.

    Args:
        folder: The checkpoint's folder, as torch.distributed.checkpoint wrote it.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> index.Metadata:
        """The index.

        Raises:
            ValueError: The index is damaged, or names another class than those of an index, a file outside the
                folder, or a transformed file.
        """
        raw = (self._folder / INDEX).read_bytes()
        try:
            metadata = _IndexUnpickler(io.BytesIO(raw)).load()
        except Exception as error:  # a damaged pickle raises anything
            raise ValueError(f"{INDEX} is not the index of a checkpoint: {error}") from error
        self._check(metadata)
        metadata.storage_meta = index.StorageMeta(load_id=self.load_id)
        return metadata

    def _check(self, metadata: Any) -> None:
        places = getattr(metadata, "storage_data", None)
        if type(metadata) is not index.Metadata or type(places) is not dict:
            raise ValueError(f"{INDEX} is not the index of a checkpoint")
        names = {path.name for path in self._folder.iterdir()}
        for place in places.values():
            if type(place) is not _StorageInfo or place.relative_path not in names:
                raise ValueError(
                    f"{INDEX}: a tensor lies in {getattr(place, 'relative_path', place)!r}, which is no file there"
                )
            if place.transform_descriptors:
                raise ValueError(f"{INDEX}: {place.relative_path!r} is transformed by {place.transform_descriptors}")


class TensorPlanner(DefaultLoadPlanner):
    """A plan that reads tensors; torch's own would unpickle other entries without restrictions."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Refuses an entry that is no tensor; it is never unpickled.

        Args:
            read_item: the entry.
            value: its bytes, unread.

        Raises:
            ValueError: always; names the entry.
        """
        raise ValueError(f"the entry {read_item.dest_index.fqn!r} is not a tensor")

    def create_local_plan(self) -> LoadPlan:
        """As torch's; a state that holds anything but tensors is our own bug."""
        assert all(isinstance(value, torch.Tensor) for value in self.state_dict.values())
        return super().create_local_plan()
