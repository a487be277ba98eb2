"""What is logged: the log file, tensorboard, outages, digests, collapse signals."""

import io
import json
import secrets
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from engine.log import events, journal
from engine.log.figures import StepSums, data_digest, effective_rank
from engine.log.metrics import MetricsLog
from engine.log.terminal import Terminal
from engine.method.augment import MEAN, STD
from engine.processes.world import World
from engine.run import Run
from engine.state.lease import Lease
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import files
from tests.engine.log.test_events import pictures, points, read
from tests.helpers import tiny


def record(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "loss": 0.1 + 0.2, "images_per_second": 1.0, **more}


def open_log(run: str, start: int, output: io.StringIO | None = None) -> MetricsLog:
    terminal = Terminal(main=True)
    terminal.console = Console(file=output or io.StringIO(), width=999)
    return MetricsLog(run, start, 9, terminal)


def close(log: MetricsLog) -> None:
    log.stop()
    log.finish()


@pytest.fixture(params=["local", "memory", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, memory: str) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('s3')}/run"
    return {"local": str(tmp_path / "run"), "memory": memory}[request.param]


@pytest.fixture
def memory() -> str:
    return f"memory://{secrets.token_hex(6)}/run"


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush is always due."""
    for module in (journal, events):
        monkeypatch.setattr(module, "pause", lambda _: 0)


def test_reopened_log_drops_what_comes_again(tmp_path: Path) -> None:
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = open_log(str(tmp_path), start)
        for step in steps:
            log.write(record(step))
        close(log)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [record(step) for step in (1, 2, 3, 4)]  # floats in full precision


def test_a_log_whose_checkpoints_are_gone(tmp_path: Path) -> None:
    """Its steps are not overwritten without a word."""
    for start, told in ((0, False), (2, False), (0, True), (0, False)):
        output = io.StringIO()
        log = open_log(str(tmp_path), start, output)
        text = "metrics.jsonl has steps up to 3, but there is no checkpoint"
        assert (text in output.getvalue()) == told
        if not told:
            log.write(record(3))
        close(log)


def test_garbage_in_the_log_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\ngarbage\n[]\n{"step": 2}\n{"st')
    close(open_log(str(tmp_path), 2))
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_killed_and_resumed(run: str) -> None:
    """Where a checkpoint was, nothing before it is missing or double, and nothing behind it stays.

    Tensorboard's scalars of the first process were not in storage yet, the second completes them.
    """
    views = torch.zeros(2, 4, 3, 8, 8)
    first = open_log(run, 0)
    for step in range(1, 7):
        if step == 2:
            first.pictures(views, step)
        first.write(record(step))
        if step in (3, 4):  # before a checkpoint
            first.flush()
            first.compact()
    second = open_log(run, 4)
    assert second.last == record(4)
    second.pictures(views, 5)
    for step in (5, 6):
        second.write(record(step, head_loss=0.5))
    close(second)
    expected = [*map(record, (1, 2, 3, 4)), *(record(step, head_loss=0.5) for step in (5, 6))]
    assert journal.read(run) == expected
    lines = files.read(f"{run}/metrics.jsonl").splitlines()
    assert [json.loads(line) for line in lines] == expected
    folder = run
    assert [step for step, _ in points(folder, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert points(folder, "train/online_head_loss") == [(5, 0.5), (6, 0.5)]
    assert pictures(folder) == [2, 5]


@pytest.mark.parametrize("images", [3, 16, 20, 64])
def test_pictures_look_as_before_the_normalization(memory: str, images: int) -> None:
    pixels = torch.randint(256, (2, images, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    views = (pixels / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    log = open_log(memory, 0)
    log.pictures(views, 1)
    close(log)
    (picture,) = read(memory).Images("views/batch")
    grid = np.asarray(Image.open(io.BytesIO(picture.encoded_image_string)))
    for view in range(2):
        for n in range(images):
            row, column = 2 * (n // 16) + view, n % 16  # two rows for each 16 images
            top, left = 10 * row + 2, 10 * column + 2
            shown = grid[top : top + 8, left : left + 8].transpose(2, 0, 1)
            np.testing.assert_array_equal(shown, pixels[view, n].numpy())


@pytest.mark.parametrize("flushed", ["lines", "all"])
def test_a_record_completed_by_the_next_process(memory: str, flushed: str) -> None:
    """The evaluation was interrupted; killed once more right after a checkpoint."""
    first = open_log(memory, 0)
    for step in (1, 2):
        first.write(record(step))
    if flushed == "all":
        close(first)
    first.flush()
    second = open_log(memory, 2)
    assert second.last == record(2)
    second.write(record(2, knn_top1=0.5))
    second.write(record(3))
    second.flush()
    close(open_log(memory, 3))
    assert journal.read(memory) == [record(1), record(2, knn_top1=0.5), record(3)]
    folder = memory
    assert [step for step, _ in points(folder, "train/loss")] == [1, 2, 3]
    assert points(folder, "eval/knn_top1") == [(2, 0.5)]


def test_curves_come_back_when_their_files_were_removed(run: str) -> None:
    first = open_log(run, 0)
    first.write(record(1))
    close(first)
    for name in files.list_names(run):
        if ".tfevents." in name:
            files.remove(f"{run}/{name}")
    second = open_log(run, 1)
    second.write(record(2))
    close(second)
    assert [step for step, _ in points(run, "train/loss")] == [1, 2]


def test_a_local_log_is_there_at_once(tmp_path: Path) -> None:
    log = open_log(str(tmp_path), 0)
    for step in (1, 2, 3):
        log.write(record(step))
        assert journal.read(str(tmp_path))[-1] == record(step)
        assert points(str(tmp_path), "train/loss")[-1][0] == step


@pytest.mark.usefixtures("hurried")
def test_a_remote_log_is_written_on_the_way(memory: str) -> None:
    log = open_log(memory, 0)
    for step in (1, 2, 3):
        log.write(record(step))
    while len(journal.read(memory)) < 3 or len(points(memory, "train/loss")) < 3:
        log.write(record(3))
    assert journal.read(memory) == [record(1), record(2), record(3)]


@pytest.mark.usefixtures("hurried")
def test_training_does_not_wait_for_storage(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write, answer = files.write, threading.Event()

    def slow(url: str, content: bytes) -> None:
        answer.wait()
        write(url, content)

    monkeypatch.setattr(files, "write", slow)
    log = open_log(memory, 0)
    for step in range(1, 6):
        log.write(record(step))  # if one waited, the answer would never come
    assert journal.read(memory) == []
    answer.set()
    close(log)
    assert journal.read(memory) == [record(step) for step in range(1, 6)]


@pytest.mark.usefixtures("hurried")
def test_an_outage_is_told_once_and_costs_nothing(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write = io.StringIO(), files.write
    attempts: list[str] = []

    def fail(url: str, _: bytes) -> None:
        attempts.append(url)
        raise OSError(f"{url}: gave up after 8 tries")

    log = open_log(memory, 0, output)
    monkeypatch.setattr(files, "write", fail)
    for step in (1, 2, 3):
        log.write(record(step))
    while len(attempts) < 5:
        log.write(record(3))
    told = [line for line in output.getvalue().splitlines() if "gave up" in line]
    assert len(told) == 1
    assert "training goes on" in told[0]
    monkeypatch.setattr(files, "write", write)
    close(log)
    assert journal.read(memory) == [record(step) for step in (1, 2, 3)]
    assert [step for step, _ in points(memory, "train/loss")] == [1, 2, 3]
    assert "not written" not in output.getvalue()


def test_what_could_not_be_written_is_told_in_the_end(
    memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(url: str, _: bytes) -> None:
        raise OSError(f"{url}: gave up after 8 tries")

    output = io.StringIO()
    log = open_log(memory, 0, output)
    for step in (1, 2, 3):
        log.write(record(step))
    monkeypatch.setattr(files, "write", fail)
    close(log)
    told = [line for line in output.getvalue().splitlines() if not line.startswith("step ")]
    assert len(told) == 1
    assert "gave up" in told[0]
    assert "3 lines of metrics.jsonl, 3 events of tensorboard" in told[0]


def test_another_jobs_run_is_left_alone(memory: str) -> None:
    """This process was taken for dead and is late; another one goes on with the run."""

    class Taken(Lease):
        def __init__(self) -> None:
            pass

        def confirm(self) -> None:
            raise InputError("taken over")

    recipe, here = tiny.recipe(DataConfig(), memory), World(0, 1, 1, torch.device("cpu"))
    run = Run(recipe, "", here, Terminal(main=True), None, Taken())
    with run.open_log(0, 9) as late:
        late.write(record(1))
        late.flush()
        other = open_log(memory, 1)
        other.write(record(2, head_loss=0.5))
        other.flush()
        late.write(record(2))
        with pytest.raises(InputError, match="taken over"):
            run.compact(late)
    assert journal.read(memory) == [record(1), record(2, head_loss=0.5)]
    assert points(memory, "train/loss") == []


def test_digest_is_order_free_and_tells_samples_apart() -> None:
    ids, crcs = np.arange(100) * 7919, np.zeros(100, np.uint32)
    digest = data_digest(ids, crcs)
    assert data_digest(ids[::-1], crcs) == digest
    assert data_digest(ids[:50], crcs[:50]) + data_digest(ids[50:], crcs[50:]) == digest
    swapped = ids.copy()
    swapped[3] = swapped[4]
    assert data_digest(swapped, crcs) != digest
    crcs[5] = 1
    assert data_digest(ids, crcs) != digest


def step_sums(features: Tensor) -> StepSums:
    """Take the last 48 numbers of the features, in reversed order, for projections."""
    zero = torch.zeros(())
    views = features.unflatten(0, (2, -1))  # [2, B, F]
    # As two processes with different numbers of rows add them up.
    parts_of_views = [part.flatten(0, 1) for part in views.split(len(views[0]) * 2 // 3, dim=1)]
    both = [
        (part, part.flip(1)[:, :48], part[:, :48].reshape(-1, 3, 4, 4)) for part in parts_of_views
    ]
    parts = [StepSums.of(zero, zero, *vectors).values for vectors in both]
    return StepSums(torch.stack(parts).sum(0), features.shape[1])


def feature_std(features: Tensor) -> float | None:
    return step_sums(features).feature_std


def test_feature_std_from_collapse_to_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(4096, 64, generator=generator)
    unit = torch.nn.functional.normalize(spread.double(), dim=1)
    exact = (unit.std(dim=0).mean() * 8).item()
    assert feature_std(spread) == pytest.approx(exact, rel=1e-12)
    assert feature_std(spread) == pytest.approx(1, abs=0.02)
    assert feature_std(spread[:1].expand(4096, -1)) == pytest.approx(0, abs=1e-6)
    assert feature_std(spread * float("nan")) is None
    last = torch.nn.functional.normalize(spread[:, -48:].double(), dim=1)
    exact = (last.std(dim=0).mean() * 48**0.5).item()
    assert step_sums(spread).projection_std == pytest.approx(exact, rel=1e-12)


def test_views_are_compared_with_each_other_and_with_one_color() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(4096, 64, generator=generator)
    noise = torch.randn(4096, 64, generator=generator)
    for share in (0.0, 0.6, 1.0):  # of what the views have in common
        second = share * first + (1 - share**2) ** 0.5 * noise
        means = torch.ones(64), torch.arange(64) / 64  # those of a view do not count
        sums = step_sums(torch.cat([first + 2 * means[0], second + 2 * means[1]]))
        unit = torch.nn.functional.normalize
        centered = [unit(x.double(), dim=1) for x in (first + 2 * means[0], second + 2 * means[1])]
        centered = [x - x.mean(0) for x in centered]
        norms = [x.square().sum().sqrt() for x in centered]
        exact = (centered[0] * centered[1]).sum() / (norms[0] * norms[1])
        assert sums.view_correlation == pytest.approx(exact.item(), rel=1e-9, abs=1e-12)
        assert sums.view_correlation == pytest.approx(share, abs=0.1)

    pixels = torch.cat([first, noise])[:, :48].reshape(2, 4096, 3, 16)
    deviations = pixels.double().numpy().std(axis=3)  # [2, 4096, 3]
    least = np.sqrt((deviations**2).mean(axis=2)).min(axis=0)
    found = step_sums(torch.cat([first, noise])).view_std
    assert found == pytest.approx(np.exp(np.log(least).mean()), rel=1e-6)
    flat = torch.ones(8, 64)
    flat[:4] = first[:4]
    assert step_sums(flat).view_std == pytest.approx(0.001)


@pytest.mark.parametrize("directions", [1, 3, 8])
def test_effective_rank_counts_directions(directions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    inside = torch.randn(10_000, directions, generator=generator)
    basis, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator))
    features = inside @ basis[:directions] + 5  # the mean does not count
    assert effective_rank(features).item() == pytest.approx(directions, rel=0.01)


def test_the_terminal_has_the_signs_of_a_collapse(memory: str) -> None:
    output = io.StringIO()
    log = open_log(memory, 0, output)
    log.write(record(1, feature_std=0.91234, grad_norm=1.5e-5))
    log.write({"step": 2, "loss": None, "feature_std": None, "grad_norm": None})
    log.write(record(3, feature_std=0.5, grad_norm=1.0, knn_top1=0.5, feature_rank=17.26))
    close(log)
    lines = [line for line in output.getvalue().splitlines() if line.startswith("step ")]
    first, second, third = lines
    assert "loss 0.3000  std 0.912  grad 1.5e-05  1 images/s" in first
    assert "loss not finite  std not finite  grad not finite" in second
    assert "std 0.5  grad 1  1 images/s  kNN 50.0%  rank 17.3" in third


def test_keys_and_steps_of_strangers(memory: str) -> None:
    """A log that somebody else has left, of which a step is evaluated now."""
    line = json.dumps({"step": 1, "\ud800\x1b[2J\n[/x]": 0.5, "big": 1e300, "huge": -(10**400)})
    files.write(f"{memory}/metrics.jsonl", line.encode())
    output = io.StringIO()
    log = open_log(memory, 1, output)
    assert log.last is not None
    log.write({"step": 1, "knn_top1": 0.5})
    close(log)
    assert "step 1  kNN 50.0%" in output.getvalue()
    assert "\x1b" not in output.getvalue()
    assert points(memory, "train/\\ud800\\x1b[2J\\n[/x]") == [(1, 0.5)]
