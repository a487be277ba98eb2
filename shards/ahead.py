"""Takes items from a source ahead of need, and tells whether the next one is there."""

import threading
from typing import Any, Generic, TypeVar

from torchdata.nodes import BaseNode, Prefetcher

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Iterates over the items of a source, of which a thread takes up to `count` ahead of need.

    The thread starts with the first wait or the first item, and ends when this is dropped.
    """

    def __init__(self, source: BaseNode[Item], count: int) -> None:
        self._noted: _Noted[Item] = _Noted(source)
        self._items: Prefetcher[Item] = Prefetcher(
            self._noted, prefetch_factor=count, snapshot_frequency=0
        )
        self._begun = False

    def wait(self, seconds: float) -> bool:
        """Wait until the next item is there, or the end. Return False when it takes longer."""
        if not self._begun:
            self._begun = True
            self._items.reset()
        there = self._noted.there.acquire(timeout=seconds)
        if there:
            self._noted.there.release()  # it is there until somebody takes it
        return there

    def __iter__(self) -> "Ahead[Item]":
        return self

    def __next__(self) -> Item:
        self._begun = True
        item: Item = next(self._items)
        self._noted.there.acquire(blocking=False)
        return item


class _Noted(BaseNode[Item]):
    """Counts the items that have come and that nobody has taken; the end counts as one."""

    def __init__(self, source: BaseNode[Item]) -> None:
        super().__init__()
        self.source = source
        self.there = threading.Semaphore(0)

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        try:
            self.source.reset()
        except BaseException:
            self.there.release()
            raise

    def next(self) -> Item:
        try:
            item: Item = next(self.source)
            return item
        finally:
            self.there.release()

    def get_state(self) -> dict[str, Any]:
        return {}  # A position is a step number, so nodes have nothing to save.
