"""Drafts of what comes next: the tokens that followed the same words last, in what a row has read and written.

Answers about a document repeat it, so its own words are a draft that costs nothing to make. A draft is only a guess:
the model draws every token itself, at several places at once (`Runner.verify`), and wrong guesses are dropped.
Source: prompt lookup decoding (Saxena 2023), and vLLM's n-gram speculation.
"""

from collections.abc import Iterable

LONGEST, SHORTEST = 3, 2  # tokens that have to be alike


class NgramIndex:
    """Where each run of `SHORTEST` to `LONGEST` tokens of a row was seen last. O(1) a token."""

    def __init__(self, token_ids: Iterable[int]):
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # a run to the index behind it, the row's end left out
        for token in token_ids:
            self.add(token)

    def add(self, token: int) -> None:
        """The row's next token. What was its end until now may be looked up from here on."""
        for size in range(SHORTEST, LONGEST + 1):
            if len(self._ids) >= size:
                self._ends[tuple(self._ids[-size:])] = len(self._ids)
        self._ids.append(token)

    def draft(self, count: int) -> list[int]:
        """Up to `count` tokens that followed the longest run the row ends with; [] where it was never seen before."""
        for size in range(LONGEST, SHORTEST - 1, -1):
            end = self._ends.get(tuple(self._ids[-size:]))
            if end is not None and len(self._ids) >= size:
                return self._ids[end : end + count]
        return []
