"""A loader in a process of its own: the same batches, the same errors, and an end in any case."""

import importlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shards import loader_process
from shards.errors import InputError
from shards.index import Index
from shards.loader import Assignment, Batch, DataConfig, TrainLoader
from shards.loader_child import _portable
from shards.loader_process import Loader, ProcessLoader, _pack_arguments, open_loader
from shards.order import Order
from shards.views import ViewsConfig
from tests.conftest import Files, PackFiles
from tests.helpers.places import ROOT
from tests.shards.test_loader import SEED, VIEWS, ignore

# A process that trains, which prints the other process's number and then waits to be ended.
PARENT = """
import pickle, sys, time
from shards.loader_process import ProcessLoader
loader = ProcessLoader(pickle.loads(sys.stdin.buffer.read()), print)
print(loader._children[0].pid, flush=True)
time.sleep(600)
"""


@contextmanager
def loading(kind: type[Any], order: Order, **options: Any) -> Iterator[Loader]:
    """Open a loader of that kind. The options are those of the assignment and of the loader."""
    corrupt = options.pop("corrupt", 0.01)
    config = DataConfig(train=order.index.url, audit=True, corrupt=corrupt, prefetch=2)
    report = options.pop("report", ignore)
    assigned: dict[str, Any] = {"streams": range(order.streams), "threads": 1}
    assigned |= {name: options.pop(name) for name in Assignment._fields if name in options}
    loader = kind(Assignment(order, views=VIEWS, config=config, **assigned), report, **options)
    try:
        yield loader
    finally:
        loader.close()


def take(loader: Loader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def is_alive(process: int) -> bool:
    """Return whether a process is there and has not ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        return False
    return fields[0] != "Z"


def assert_ends(process: int) -> None:
    deadline = time.monotonic() + 30
    while is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(process)


@contextmanager
def killed_parent(index: Index) -> Iterator[int]:
    """Start a process that trains, give the number of the one that loads, and kill the first."""
    order = Order(index, SEED, 4, 16)
    given = pickle.dumps(Assignment(order, range(4), VIEWS, DataConfig(train=index.url), 1))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    try:
        with parent.stdin as stdin:
            stdin.write(given)
        process = int(parent.stdout.readline())
        assert is_alive(process)
        time.sleep(0.2)  # it asks the system for its end first of all
        yield process
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def describe(batch: Batch) -> list[Any]:
    """Return all that a batch is, as plain values."""
    tensors = [batch.views, batch.params, batch.labels]
    layout = [(t.dtype, t.shape, t.stride(), t.is_inference()) for t in tensors]
    values = [t.tolist() for t in tensors] + [batch.ids.tolist(), batch.crcs.tolist()]
    return [layout, values, batch.ids.dtype, batch.crcs.dtype]


@pytest.mark.parametrize(
    ("options", "processes"),
    [
        ({"micro": 2, "threads": 0}, 1),
        ({"start": 3, "streams": range(1, 3), "threads": 3}, 1),
        ({"micro": 2}, 3),
        ({"start": 3, "streams": range(1, 4)}, 2),
    ],
    ids=str,
)
def test_batches_are_those_of_a_loader_in_this_process(
    packed: Index, options: dict[str, Any], processes: int
) -> None:
    order = Order(packed, SEED, 4, 16)  # 5 steps an epoch
    with (
        loading(TrainLoader, order, **options) as here,
        loading(ProcessLoader, order, processes=processes, **options) as there,
    ):
        assert there.assignment == here.assignment
        assert here.assignment.block_memory > 0
        for _ in range(7):
            assert describe(next(there)) == describe(next(here))


def test_faults_of_the_data_are_told_and_counted(
    pack_files: PackFiles, photos: Files, tmp_path: Path
) -> None:
    spoiled = {
        path: content[:90] if path in sorted(photos)[5:8] else content
        for path, content in photos.items()
    }
    order = Order(pack_files(str(tmp_path / "bad"), spoiled), SEED, 4, 16)
    told: dict[type[Any], list[str]] = {TrainLoader: [], ProcessLoader: []}
    counts = []
    for kind, messages in told.items():
        with loading(kind, order, report=messages.append) as loader:
            batches = take(loader, 6)
            counts.append(loader.undecodable)
    assert counts[0] == counts[1] == 3
    assert told[ProcessLoader] == told[TrainLoader]
    assert len(told[TrainLoader]) == 3
    assert len(batches) == 6


def test_two_processes_count_the_faults_of_the_data_together(
    pack_files: PackFiles, photos: Files, tmp_path: Path
) -> None:
    """Each of them meets every image in some epoch."""
    bad = dict.fromkeys(list(photos)[:12], b"no image at all, but text")
    order = Order(pack_files(str(tmp_path / "bad"), photos | bad), SEED, 4, 16)
    told: list[str] = []
    options: dict[str, Any] = {"processes": 2, "report": told.append}
    with loading(ProcessLoader, order, **options, corrupt=0.5) as loader:
        take(loader, 30)  # 6 epochs
        assert loader.undecodable == 12
    assert len(told) == len(set(told)) == 12
    told.clear()
    with (
        loading(ProcessLoader, order, **options) as loader,
        pytest.raises(InputError, match=r"11 samples were left out.* allows \(10\)"),
    ):
        take(loader, 30)
    assert len(told) == len(set(told)) == 10


def test_a_missing_shard_is_the_same_error(packed: Index) -> None:
    Path(packed.shard_url(1)).unlink()
    errors = []
    for kind in (TrainLoader, ProcessLoader):
        with loading(kind, Order(packed, SEED, 4, 16)) as loader:
            with pytest.raises(
                InputError, match=r"shard-000001\.tar: the shard is missing"
            ) as error:
                take(loader, 9)
            errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_an_error_travels_as_it_is_or_as_text() -> None:
    class Local(Exception):
        pass

    assert str(_portable(MemoryError("unable to allocate 5 bytes"))) == "unable to allocate 5 bytes"
    sent = _portable(Local("of a kind that only this process knows"))
    assert isinstance(pickle.loads(pickle.dumps(sent)), RuntimeError)
    assert "of a kind that only this process knows" in str(sent)


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_is_killed_is_told(packed: Index, number: int) -> None:
    with loading(ProcessLoader, Order(packed, SEED, 4, 16), processes=2) as loader:
        assert isinstance(loader, ProcessLoader)
        next(loader)
        loader._children[number].kill()
        with pytest.raises(
            ChildProcessError, match=r"by signal 9 \(SIGKILL\): when memory is short"
        ) as error:
            take(loader, 999)  # some wait in the pipe
        # An evaluation that trains has --threads alone.
        assert (
            "a lower --threads takes less, in a training also a lower --data.prefetch, or"
            in str(error.value)
        )


def test_a_process_that_cannot_start_is_told(
    packed: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        loading(ProcessLoader, Order(packed, SEED, 4, 16)) as loader,
        pytest.raises(ChildProcessError, match="with exit status 1"),
    ):
        next(loader)


def test_the_end_by_a_signal_without_a_name_is_told(packed: Index) -> None:
    with loading(ProcessLoader, Order(packed, SEED, 4, 16)) as loader:
        assert isinstance(loader, ProcessLoader)
        loader._children[0].send_signal(40)
        with pytest.raises(ChildProcessError, match=r"by signal 40 \(a signal of real time\)"):
            take(loader, 9)


def test_no_module_comes_from_the_working_folder(
    packed: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that trains may not look there either."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name in ("pickle", "torch", "shards"):
        (folder / f"{name}.py").write_text("raise SystemExit('of the working folder')")
    monkeypatch.chdir(folder)
    with loading(ProcessLoader, Order(packed, SEED, 4, 16)) as loader:
        next(loader)


def test_modules_come_from_where_the_training_has_them(
    packed: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PYTHONPATH need not name this package, nor a folder that was added since the start."""
    (tmp_path / "added.py").write_text(
        "from shards.views import ViewsConfig as Base\nclass Views(Base): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    views = importlib.import_module("added").Views(size=16)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    order, config = Order(packed, SEED, 4, 16), DataConfig(train=packed.url)
    assignment = Assignment(order, range(4), views, config, 1)
    with closing(ProcessLoader(assignment, ignore)) as loader:
        assert next(loader).views.shape == (2, 16, 3, 16, 16)


@pytest.mark.parametrize("sent", [0, 7, -1])
def test_the_process_ends_without_a_word_when_its_arguments_do(sent: int) -> None:
    """As when training is killed while it sends them."""
    done = subprocess.run(
        [sys.executable, ROOT / "shards" / "loader_child.py", "1"],
        input=_pack_arguments(None)[:sent],
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_nothing_stays_when_the_process_cannot_be_started(
    packed: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    before = set(os.listdir("/proc/self/fd"))
    with (
        pytest.raises(FileNotFoundError, match="missing"),
        loading(ProcessLoader, Order(packed, SEED, 4, 16)),
    ):
        pass
    assert set(os.listdir("/proc/self/fd")) <= before


def test_its_module_can_be_imported_without_effects() -> None:
    assert signal.getsignal(signal.SIGUSR2) is not signal.SIG_IGN


def test_signals_are_for_the_process_that_trains(packed: Index) -> None:
    with loading(ProcessLoader, Order(packed, SEED, 4, 16)) as loader:
        assert isinstance(loader, ProcessLoader)
        first = next(loader)
        assert os.getsid(loader._children[0].pid) != os.getsid(0)  # a Ctrl-C does not reach it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(loader._children[0].pid, number)
        rest = take(loader, 9)
        assert len({tuple(batch.ids.tolist()) for batch in [first, *rest]}) == 10


@pytest.mark.parametrize("taken", [0, 1])
def test_close_ends_the_processes(packed: Index, taken: int) -> None:
    with loading(ProcessLoader, Order(packed, SEED, 4, 16), processes=2) as loader:
        assert isinstance(loader, ProcessLoader)
        take(loader, taken)
        processes = [child.pid for child in loader._children]
        assert list(map(is_alive, processes)) == [True, True]
    assert list(map(is_alive, processes)) == [False, False]
    with pytest.raises(StopIteration):
        next(loader)


@pytest.mark.parametrize("stuck", [False, True])
def test_the_process_ends_when_training_is_killed(packed: Index, stuck: bool) -> None:
    """Also while it waits for a store that does not answer."""
    silent = socket.create_server(("127.0.0.1", 0))
    if stuck:
        packed = replace(packed, base=f"http://127.0.0.1:{silent.getsockname()[1]}/shards")
    with killed_parent(packed) as process:
        pass
    assert_ends(process)
    silent.close()


def test_who_loads_in_a_process_of_its_own(packed: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(kind: str) -> Any:
        return lambda *_, **options: (kind, options["pin_memory"], options.get("processes"))

    for kind in ("TrainLoader", "ProcessLoader"):
        monkeypatch.setattr(loader_process, kind, name(kind))

    def choose(device: str, base: str = "", **fields: Any) -> object:
        order = Order(replace(packed, base=base), SEED, 4, 16)
        assignment = Assignment(order, range(4), ViewsConfig(size=16), DataConfig(**fields), 4)
        return open_loader(assignment, torch.device(device), ignore)

    assert choose("cpu") == ("TrainLoader", False, None)
    assert choose("cuda") == ("ProcessLoader", True, 2)  # of small images
    assert choose("cpu", own_process=True) == ("ProcessLoader", False, 2)
    assert choose("cuda", own_process=False) == ("TrainLoader", True, None)
    assert choose("cuda", decode="gpu") == ("TrainLoader", True, None)
    assert choose("cuda", base="memory://data") == ("TrainLoader", True, None)
    with pytest.raises(InputError, match="own_process: memory://data is in the memory of the"):
        choose("cpu", base="memory://data", own_process=True)


def test_an_order_is_sent_without_what_it_keeps(packed: Index) -> None:
    order = Order(packed, SEED, 4, 16)
    before = len(pickle.dumps(order))
    expected = [order.batch_segments(step, 1) for step in range(12)]
    assert len(pickle.dumps(order)) == before
    sent = pickle.loads(pickle.dumps(order))
    assert sent.index.digest == packed.digest
    for step, segments in enumerate(expected):
        for mine, theirs in zip(segments, sent.batch_segments(step, 1), strict=True):
            np.testing.assert_array_equal(mine.ids, theirs.ids)
