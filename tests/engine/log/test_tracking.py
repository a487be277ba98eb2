"""What a run tells trackers: nothing is lost, nothing comes twice, and nothing waits for them."""

import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.log import sending, tracking
from engine.log.metrics import LogConfig
from engine.log.sending import Sender, join_all
from engine.log.tracker_ids import TRACKERS, run_id
from engine.log.trackers import Description, Point, Tracker
from engine.log.visdom_tracker import MOST, VisdomTracker, parse, thin
from engine.recipe import shared_fields
from engine.run import _without_secrets
from shards.errors import InputError
from shards.fields import check_bounds
from shards.loader import DataConfig
from shards.storage import files
from tests.helpers import tiny


class Recorder(Tracker):
    """A tracker that keeps what it is shown, and fails or hangs when it is told to."""

    name = "Recorder"

    def __init__(self) -> None:
        self.starts, self.finished, self.failed = 0, False, False
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.pictures: list[tuple[str, int]] = []
        self.down, self.hang = False, threading.Event()
        self.hang.set()

    def start(self, history: Sequence[Point]) -> str:
        self._answer()
        self.starts += 1
        self.curves = {}
        self._add(history)
        return "http://recorder"

    def scalars(self, points: Sequence[Point]) -> None:
        self._answer()
        self._add(points)

    def picture(self, name: str, pixels: NDArray[np.uint8], step: int) -> None:  # noqa: ARG002
        self._answer()
        self.pictures.append((name, step))

    def finish(self, failed: bool) -> None:
        self._answer()
        self.finished, self.failed = True, failed

    def _add(self, points: Sequence[Point]) -> None:
        for values, step in points:
            for name, value in values.items():
                self.curves.setdefault(name, []).append((step, value))

    def _answer(self) -> None:
        self.hang.wait()
        if self.down:
            raise OSError("nobody answers")


class Run:
    """A log and the sender that tells a recorder of it."""

    def __init__(self) -> None:
        self.log: list[Point] = []
        self.said: list[str] = []
        self.recorder = Recorder()

    def begin(self) -> Sender:
        self.sender = Sender(self.recorder, lambda: list(self.log), self.said.append)
        return self.sender

    def write(self, *steps: int) -> None:
        for step in steps:
            point = Point({"train/loss": step / 7}, step)
            self.log.append(point)
            self.sender.scalars(point)

    def wanted(self) -> list[tuple[int, float]]:
        return [(point.step, point.values["train/loss"]) for point in self.log]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in ("PAUSE", "RETRY", "LONGEST"):
        monkeypatch.setattr(sending, name, 0.01)
    monkeypatch.setattr(sending, "UNSENT", 10.0)
    return Run()


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("failed", [True, False])
def test_a_tracker_is_told_of_a_failure(run: Run, *, failed: bool) -> None:
    run.begin()
    join_all([run.sender], failed)
    assert (run.recorder.finished, run.recorder.failed) == (True, failed)


def test_all_steps_arrive_once(run: Run) -> None:
    run.log = [Point({"train/loss": step / 7}, step) for step in range(5)]
    run.begin()
    run.write(*range(5, 50))
    wait_for(lambda: run.recorder.curves)
    run.write(*range(50, 70))
    join_all([run.sender], failed=False)
    assert run.recorder.curves["train/loss"] == run.wanted()
    assert run.recorder.finished
    assert run.said == ["Recorder: http://recorder"]


def test_a_step_that_is_logged_while_the_log_is_read_arrives_once(run: Run) -> None:
    def read() -> list[Point]:
        run.write(5)
        return list(run.log)

    ready = threading.Event()
    run.sender = Sender(run.recorder, lambda: read() if ready.wait() else [], run.said.append)
    ready.set()
    wait_for(lambda: run.recorder.curves)
    join_all([run.sender], failed=False)
    assert run.recorder.curves["train/loss"] == run.wanted()


def test_a_late_key_of_a_step_arrives(run: Run) -> None:
    run.log = [Point({"train/loss": 1.0}, 4)]
    run.begin()
    wait_for(lambda: run.recorder.curves)
    run.sender.scalars(Point({"eval/knn_top1": 0.5}, 4))
    join_all([run.sender], failed=False)
    assert run.recorder.curves == {"train/loss": [(4, 1.0)], "eval/knn_top1": [(4, 0.5)]}


def test_an_outage_is_told_once_and_what_was_missed_is_sent_again(run: Run) -> None:
    run.begin()
    run.write(0)
    run.sender.picture("views/batch", np.zeros((2, 2, 3), np.uint8), 0)
    wait_for(lambda: run.recorder.pictures)
    run.recorder.down = True
    run.write(1, 2, 3)
    wait_for(lambda: len(run.said) == 2)
    time.sleep(0.1)
    run.write(4)
    run.recorder.down = False
    wait_for(lambda: len(run.said) == 3)
    join_all([run.sender], failed=False)
    assert run.recorder.curves["train/loss"] == run.wanted()
    assert run.recorder.starts == 2
    assert len(run.recorder.pictures) == 2
    assert [line.split(";")[0] for line in run.said] == [
        "Recorder: http://recorder",
        "Recorder: nobody answers",
        "Recorder: http://recorder",
    ]


def test_a_tracker_that_hangs_holds_up_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "UNSENT", 0.2)
    run.recorder.hang.clear()
    run.begin()
    began = time.monotonic()
    run.write(*range(3 * sending.MOST))
    join_all([run.sender], failed=False)
    assert time.monotonic() - began < 5  # not forever
    assert len(run.sender._waiting) <= sending.MOST
    assert "3,000 logged steps did not arrive (it takes too long)" in run.said[-1]
    run.recorder.hang.set()
    run.sender._thread.join(30)
    assert run.recorder.curves["train/loss"] == run.wanted()


def test_a_slow_tracker_gets_the_steps_that_could_not_wait(run: Run) -> None:
    run.begin()
    run.write(0)
    wait_for(lambda: run.recorder.curves)
    run.recorder.hang.clear()
    run.write(*range(1, 2 * sending.MOST))
    run.recorder.hang.set()
    join_all([run.sender], failed=False)
    assert run.recorder.curves["train/loss"] == run.wanted()


def test_what_did_not_arrive_is_told_in_the_end(run: Run) -> None:
    run.recorder.down = True
    run.begin()
    run.write(0, 1)
    wait_for(lambda: run.said)
    join_all([run.sender], failed=False)
    assert run.said[-1] == (
        "Recorder: 2 logged steps did not arrive (nobody answers); metrics.jsonl has them, and the "
        "next start sends them"
    )


@pytest.mark.parametrize("place", ["local", "memory", "s3"])
def test_a_run_keeps_its_id(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    url = {"local": str(tmp_path), "memory": f"memory://{secrets.token_hex(6)}"}.get(place)
    url = url or request.getfixturevalue("s3")
    said: list[str] = []
    first = run_id(f"{url}/a", said.append)
    assert run_id(f"{url}/a", said.append) == first
    assert run_id(f"{url}/b", said.append) != first
    for content in (b"{", b"[]", b'{"id": "../x"}'):
        files.write(f"{url}/a/{TRACKERS}", content)
        assert run_id(f"{url}/a", said.append) != first
    assert len(said) == 3
    assert json.loads(files.read(f"{url}/a/{TRACKERS}")) == {"id": run_id(f"{url}/a", print)}


def test_without_its_file_a_run_gets_an_id(tmp_path: Path) -> None:
    (tmp_path / TRACKERS).mkdir()
    said: list[str] = []
    first, second = (run_id(str(tmp_path), said.append) for _ in range(2))
    assert len(first) == len(second) == 8
    assert first != second
    assert len(said) == 2
    assert "trackers show this start of the run as a run of its own" in said[0]


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        ("http://localhost", ("http://localhost", 8097, "", "")),
        ("http://localhost:80/mine", ("http://localhost", 80, "", "mine")),
        ("https://host.example/env/my%20run/", ("https://host.example", 443, "", "my run")),
        ("http://[::1]:9/base/env/mine", ("http://[::1]", 9, "/base", "mine")),
    ],
)
def test_parts_of_a_servers_url(url: str, parts: tuple[str, int, str, str]) -> None:
    assert parse(url) == (*parts, "", "")


def test_a_user_and_a_password_come_from_the_url() -> None:
    assert parse("http://me:p%40ss@host")[-2:] == ("me", "p@ss")


@pytest.mark.parametrize(
    "url",
    ["localhost:8097", "ftp://host", "http://", "http://host:x", "http://me@host/", "http://a b"],
)
def test_other_texts_are_no_url_of_a_server(url: str) -> None:
    with pytest.raises(InputError, match=r"^log.visdom takes the URL of a Visdom server"):
        check_bounds(tiny.recipe(DataConfig(), "run", log=LogConfig(visdom=url)))


@pytest.mark.parametrize(
    "bad", ["http://me:SECRET@host:x/", "me:SECRET@host:8097", "//me:SECRET@host", "me:SEC/RET@h"]
)
def test_a_password_is_neither_told_nor_kept(bad: str) -> None:
    good = "http://me:SECRET@host"
    recipe = tiny.recipe(DataConfig(), "run", log=LogConfig(visdom=good))
    assert "SECRET" not in json.dumps(_without_secrets(recipe))
    assert "log.visdom" not in shared_fields(recipe)  # machines that differ list them
    with pytest.raises(InputError) as caught:
        check_bounds(tiny.recipe(DataConfig(), "run", log=LogConfig(visdom=bad)))
    assert "SEC" not in str(caught.value)


@pytest.mark.parametrize("project", ["a/b/c", "a%b", "/a", "a/", " ", "a\nb", "x" * 129])
def test_other_texts_are_no_project(project: str) -> None:
    with pytest.raises(InputError, match=r"^log.wandb takes a project of Weights & Biases"):
        check_bounds(tiny.recipe(DataConfig(), "run", log=LogConfig(wandb=project)))


@pytest.mark.parametrize("package", ["visdom", "wandb"])
def test_a_missing_package_is_one_line_with_the_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    tracking.check_trackers("", "")
    wanted = {"visdom": "", "wandb": "", package: "http://host"}
    with pytest.raises(InputError, match=rf"^log.{package} needs the package .*`pip install "):
        tracking.check_trackers(**wanted)


def test_a_server_that_never_answers(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("visdom", reason="visdom is not installed")
    monkeypatch.setattr("engine.log.visdom_tracker.ANSWER", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://me:SECRET@127.0.0.1:{server.getsockname()[1]}"
        tracker = VisdomTracker(address, Description("run", "1a2b", {}, 0))
        sender = Sender(tracker, list, run.said.append)
        sender.scalars(Point({"train/loss": 1.0}, 0))
        wait_for(lambda: run.said)
        join_all([sender], failed=False)
    assert "does not answer; training goes on" in run.said[0]
    assert "SECRET" not in "".join(run.said)


class _Page(BaseHTTPRequestHandler):
    """Answers every request with a page, as what asks for a login does."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html>Who are you?</html>")

    def log_message(self, *_: Any) -> None:
        pass


def test_a_server_of_something_else_is_told(run: Run) -> None:
    pytest.importorskip("visdom", reason="visdom is not installed")
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/mine"
        sender = Sender(
            VisdomTracker(address, Description("run", "1a2b", {}, 0)), list, run.said.append
        )
        sender.scalars(Point({"train/loss": 1.0}, 0))
        wait_for(lambda: run.said)
        join_all([sender], failed=False)
        server.shutdown()
    assert "is no Visdom server; training goes on" in run.said[0]
    assert not any("/env/mine" in line for line in run.said)


def test_long_curves_are_thinned_evenly() -> None:
    assert thin(list(range(MOST))) == list(range(MOST))
    found = thin(list(range(3 * MOST)))
    assert found == [*range(0, 3 * MOST - 1, 4), 3 * MOST - 1]
