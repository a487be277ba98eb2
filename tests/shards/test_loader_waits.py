"""Loaders tell whether the next batch is there, and a process that has stopped does not stay."""

import os
import signal
import threading
import time
from contextlib import closing
from typing import Any

import pytest

from shards.index import Index
from shards.loader import Assignment, DataConfig, TrainLoader
from shards.loader_process import PATIENCE, ProcessLoader, _is_stopped
from shards.order import Order
from tests.shards.test_loader import SEED, VIEWS, ignore
from tests.shards.test_loader_process import assert_ends, is_alive, killed_parent, loading, take


def stop(process: int) -> None:
    """Stop a process, and wait until it is."""
    os.kill(process, signal.SIGSTOP)
    while not _is_stopped(process):
        time.sleep(0.01)


def test_a_stopped_process_ends_when_training_is_killed(packed: Index) -> None:
    with killed_parent(packed) as process:
        stop(process)
    assert_ends(process)


def test_a_thread_that_ends_does_not_end_the_process(packed: Index) -> None:
    """As in a notebook that opens a session in a thread."""
    loaders: list[ProcessLoader] = []
    config = DataConfig(train=packed.url)

    def open_there() -> None:
        order = Order(packed, SEED, 4, 16)
        loaders.append(ProcessLoader(Assignment(order, range(4), VIEWS, config, 1), ignore))

    thread = threading.Thread(target=open_there)
    thread.start()
    thread.join()
    with closing(loaders[0]) as loader:
        take(loader, 9)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_process_is_told_and_ended(packed: Index, processes: int) -> None:
    order = Order(packed, SEED, 4, 16)
    with loading(ProcessLoader, order, processes=processes) as loader:
        assert isinstance(loader, ProcessLoader)
        take(loader, 1)
        children = [child.pid for child in loader._children]
        for child in children:
            stop(child)
        while loader.wait(0.5):
            next(loader)  # what has come before
        told = loader.describe_wait()
        assert any(f"process {child} on " in told for child in children)
        assert "is stopped, and kill -CONT" in told
        begun = time.monotonic()
    assert time.monotonic() - begun < 2 * PATIENCE
    assert not any(map(is_alive, children))


@pytest.mark.parametrize("kind", [TrainLoader, ProcessLoader])
def test_a_wait_tells_whether_a_batch_is_there(packed: Index, kind: type[Any]) -> None:
    order = Order(packed, SEED, 4, 16)
    with loading(kind, order) as waited, loading(kind, order) as other:
        assert not waited.wait(0)
        for number in range(6):
            if number % 3:
                assert waited.wait(60)
                assert waited.wait(0)
            assert next(waited).ids.tolist() == next(other).ids.tolist()
        assert "answer?" in waited.describe_wait()
    assert waited.wait(0)  # for the end
    with pytest.raises(StopIteration):
        next(waited)
