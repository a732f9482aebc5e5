"""A blend of datasets as an endless stream of batches, made ahead of the step in threads, left and gone on with.

Which dataset a document comes from, and in which order a dataset is read, depends on the seed alone; every dataset is
read to its end before a row of it comes again, in another order. Batches are made window by window, so a place in the
stream is two numbers and what each dataset has given: `state`.
"""

import random
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Full, Queue
from typing import Any

from torch import Tensor

from nvlm_runtime.config import NVLMConfig
from nvlm_runtime.inputs.layout import shuffle_tiles
from nvlm_runtime.inputs.tokenizer import Tokenizer
from nvlm_runtime.training.documents import Document, Log, make_document
from nvlm_runtime.training.packing import PackedBatch, fill_sequences, pack
from nvlm_runtime.training.records import BadRecord, JsonLines

AHEAD = 2  # batches that wait for the step
THREADS = 2  # that cut tiles; one more makes batches of them


@dataclass(frozen=True)
class Dataset:
    """One dataset of a blend.

    Attributes:
        task: its name.
        rows: its records.
        weight: its share of the documents, against the others' weights; 1 by default.
    """

    task: str
    rows: JsonLines
    weight: float = 1.0


class Source:
    """An endless stream of batches: `next(source)`. `close` ends its threads.

    Args:
        share: (index, number) of the readers of one stream. Each gets its own of every `number` batches; their states
            are the same.
        rows: sequences per batch.
        seq_len: tokens per sequence.
        packed: whether a sequence holds several documents or one.
        shuffled_tiles: share of the documents whose tiles `shuffle_tiles` reorders.
        window: documents that are packed together.
        skip_bad: whether a record that cannot be learnt from is passed to `log` and counted in `num_bad`; otherwise it
            ends the stream with BadRecord.
        state: a value of `state()`, to resume from there.

    Attributes:
        waited: seconds that `next` had to wait.

    Raises:
        ValueError: A weight is not positive, or no record of a whole window can be learnt from.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        tokenizer: Tokenizer,
        config: NVLMConfig,
        *,
        rows: int,
        seq_len: int,
        seed: int = 0,
        style: str = "hf",
        packed: bool = True,
        shuffled_tiles: float = 0.0,
        window: int = 128,
        skip_bad: bool = False,
        log: Log = lambda line: None,
        state: dict[str, Any] | None = None,
        share: tuple[int, int] = (0, 1),
    ):
        if not datasets or any(not dataset.weight > 0 for dataset in datasets):
            raise ValueError("a blend needs at least one dataset, and every weight must be above 0")
        self.datasets, self.tokenizer, self.config = datasets, tokenizer, config
        self.rows, self.seq_len, self.seed, self.style = rows, seq_len, seed, style
        self.packed, self.window, self.skip_bad, self.log = packed, window, skip_bad, log
        self.shuffled_tiles, self.share = shuffled_tiles, share
        self.waited = 0.0
        self._state = state or {"window": 0, "given": 0, "read": [0] * len(datasets), "num_bad": 0}
        if len(self._state["read"]) != len(datasets):
            raise ValueError(f"the state is of {len(self._state['read'])} datasets, the blend has {len(datasets)}")
        self._orders: dict[tuple[int, int], array] = {}
        self._queue: Queue[tuple[PackedBatch, dict[str, Any]] | BaseException] = Queue(AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, args=(dict(self._state),), daemon=True)
        self._thread.start()

    def state(self) -> dict[str, Any]:
        """Where the batch that `next` gave last ends, as JSON holds it."""
        return dict(self._state)

    @property
    def num_bad(self) -> int:
        """Rows that were skipped."""
        return self._state["num_bad"]

    def __iter__(self) -> Iterator[PackedBatch]:
        return self

    def __next__(self) -> PackedBatch:
        """Raises BadRecord, and what else the threads ended with."""
        began = time.perf_counter()
        found = self._queue.get()
        self.waited += time.perf_counter() - began
        if isinstance(found, BaseException):
            self._queue.put(found)  # for whoever asks again
            raise found
        batch, self._state = found
        return batch

    def close(self) -> None:
        """Ends the threads. Batches that wait are dropped."""
        self._closed.set()
        self._thread.join()

    def _produce(self, state: dict[str, Any]) -> None:
        try:
            with ThreadPoolExecutor(THREADS, "nvlm-tiles") as pool:
                mine = None
                for number, (batch, after) in enumerate(self._batches(state, pool)):
                    mine = batch or mine
                    if number % self.share[1] < self.share[1] - 1:
                        continue
                    if not self._put((mine, after)):
                        pool.shutdown(wait=False, cancel_futures=True)
                        return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> bool:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False

    def _batches(
        self, state: dict[str, Any], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[PackedBatch | None, dict[str, Any]]]:
        """Every batch of the stream, None in place of another reader's, and where it ends."""
        number, skip, read = state["window"], state["given"], list(state["read"])
        num_bad, turn, (index, readers) = state["num_bad"], 0, self.share
        while True:
            before = {"read": list(read), "num_bad": num_bad}
            documents, bad = self._documents(number, read)
            if not documents:
                raise ValueError(f"none of {self.window} rows can be learnt from: see the log")
            lengths = [len(document) for document in documents]
            drawn, sequences = random.Random(f"rows {self.seed} {number}"), [[i] for i in range(len(documents))]
            if self.packed:
                sequences = fill_sequences(lengths, self.seq_len, drawn)
            drawn.shuffle(sequences)
            groups = [sequences[i : i + self.rows] for i in range(0, len(sequences), self.rows)]
            cut: dict[int, Future[Tensor]] = {}
            first = turn - skip  # of the stream's batches, the one that begins this window
            for given, group in enumerate(groups[skip:], skip + 1):
                for ahead in range(given - 1, min(given + AHEAD * readers, len(groups))):
                    for i in (i for row in groups[ahead] for i in row if (first + ahead) % readers == index):
                        if documents[i].images and i not in cut:
                            cut[i] = pool.submit(documents[i].pixel_values)
                batch = None
                if turn % readers == index:
                    rows = [[(documents[i], cut.pop(i, None)) for i in row] for row in group]
                    batch = pack(rows, self.config, self.seq_len if self.packed else None)
                turn += 1
                after = {"window": number, "given": given, **before}
                if given == len(groups):
                    after = {"window": number + 1, "given": 0, "read": list(read), "num_bad": num_bad + bad}
                yield batch, after
            number, skip, num_bad = number + 1, 0, num_bad + bad

    def _documents(self, number: int, read: list[int]) -> tuple[list[Document], int]:
        """A window's documents, and how many rows were bad. read: rows taken of each dataset, which are counted on."""
        chooser, shuffler = (random.Random(f"{what} {self.seed} {number}") for what in ("blend", "tiles"))
        weights = [dataset.weight for dataset in self.datasets]
        found, bad = [], 0
        for index in chooser.choices(range(len(self.datasets)), weights, k=self.window):
            dataset = self.datasets[index]
            epoch, place = divmod(read[index], len(dataset.rows))
            read[index] += 1
            try:
                row = dataset.rows[self._order(index, epoch)[place]]
                document = make_document(
                    row, self.tokenizer, self.config, self.seq_len, self.style, dataset.task, self.log
                )
                if shuffler.random() < self.shuffled_tiles:
                    document = replace(document, layout=shuffle_tiles(self.config, document.layout, shuffler))
                found.append(document)
            except BadRecord as error:
                if not self.skip_bad:
                    raise
                bad += 1
                self.log(f"skipped: {error}")
        return found, bad

    def _order(self, index: int, epoch: int) -> array:
        if (index, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != index}
            order = array("q", range(len(self.datasets[index].rows)))
            random.Random(f"order {self.seed} {index} {epoch}").shuffle(order)
            self._orders[index, epoch] = order
        return self._orders[index, epoch]
