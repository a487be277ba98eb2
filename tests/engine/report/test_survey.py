"""launch/evaluate.py runs: all runs below a URL, also the damaged ones, by few requests."""

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from engine.processes.identity import identity
from engine.report import survey
from engine.report.survey import RunSummary, survey_runs
from launch import evaluate
from shards.errors import InputError
from shards.storage import entries, files
from tests.helpers import leases


def write_run(url: str, steps: int = 5, total: int | None = 10, **fields: Any) -> str:
    """Write the recipe and the log of a run, and a checkpoint."""
    document = {"seed": 0, "batch.size": 64, "index_digest": "a", "run": url} | fields
    document |= {} if total is None else {"total_steps": total}
    files.write(f"{url}/recipe.json", json.dumps(document).encode())
    records = [{"step": i, "loss": 1 / i, "knn_top1": i / 10} for i in range(1, steps + 1)]
    files.write(f"{url}/metrics.jsonl", b"".join(json.dumps(r).encode() + b"\n" for r in records))
    files.write(f"{url}/checkpoints/step_00000005/commit.json", b"{}")
    return url


def found(url: str, depth: int = 3) -> dict[str, RunSummary]:
    """The runs below a URL, by what follows it."""
    runs = survey_runs(url, depth).runs
    return {run.url.removeprefix(url).lstrip("/"): run for run in runs}


def test_runs_are_found_on_every_store(store: str) -> None:
    write_run(f"{store}/a", seed=1)
    write_run(f"{store}/b/c/d", steps=10)
    write_run(f"{store}/b/c/d/inside")
    write_run(f"{store}/b/c/d/e/f/too_deep")
    files.write(f"{store}/data/train/index.json", b"{}")
    runs = found(store)
    assert list(runs) == ["a", "b/c/d"]
    assert list(found(store, 4)) == ["a", "b/c/d", "b/c/d/inside"]
    assert list(found(f"{store}/a", 0)) == [""]
    a, d = runs["a"], runs["b/c/d"]
    assert (a.step, a.total_steps, a.state, a.fields["seed"]) == (5, 10, "stopped", 1)
    assert (d.step, d.state, d.figures["loss"], d.figures["knn_top1"]) == (10, "done", 0.1, 1.0)
    assert a.age is not None
    assert 0 <= a.age < 60
    with pytest.raises(InputError, match=r"nothing: there is no run within 3 levels of folders: "):
        survey_runs(f"{store}/nothing", 3)


def test_checkpoints_are_never_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []

    def list_and_note(url: str) -> list[entries.Entry]:
        listed.append(url)
        return entries.list_entries(url)

    monkeypatch.setattr(survey, "list_entries", list_and_note)
    write_run(f"{tmp_path}/a")
    assert list(found(str(tmp_path))) == ["a"]
    assert listed == [str(tmp_path), f"{tmp_path}/a"]


def test_the_lease_tells_who_is_alive(tmp_path: Path) -> None:
    url = str(tmp_path)
    for name in ("held", "old", "released", "dead"):
        write_run(f"{url}/{name}")
    leases.leave(f"{url}/held", 3, period=10.0)
    leases.leave(f"{url}/old", 3, period=10.0)
    past = time.time() - 7500
    os.utime(f"{url}/old/lease/00000003.json", (past, past))
    leases.leave(f"{url}/released", 3, released=True)
    jobs = leases.Jobs()
    jobs.acquire(f"{url}/dead")
    try:
        states = {name: run.state for name, run in found(url).items()}
        assert states["dead"] == "trains"
    finally:
        jobs.close()
    assert states["held"] == "trains"
    assert states["old"] == "silent for 2 h 5 min"
    assert states["released"] == "stopped"
    before = sorted(tmp_path.rglob("*"))
    found(url)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written


def test_damaged_runs_are_listed_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(f"{tmp_path}/good")
    write_run(f"{tmp_path}/no_recipe")
    (tmp_path / "no_recipe" / "recipe.json").unlink()
    write_run(f"{tmp_path}/half")
    (tmp_path / "half" / "recipe.json").write_text('{"seed"')
    write_run(f"{tmp_path}/list")
    (tmp_path / "list" / "recipe.json").write_text("[1]")
    write_run(f"{tmp_path}/no_lines")
    (tmp_path / "no_lines" / "metrics.jsonl").write_text("\x00\x00{")
    write_run(f"{tmp_path}/some_lines")
    with (tmp_path / "some_lines" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 1, "lo\n{"step": 2, "lo')
    leases.leave(f"{tmp_path}/begun", 1)
    leases.leave(f"{tmp_path}/nothing", 1, released=True)
    assert evaluate.main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "no_recipe: recipe.json is missing\n" in out
    assert re.search("^begun +- +starts ", out, re.MULTILINE)
    assert re.search("^nothing +- +began nothing ", out, re.MULTILINE)
    assert "begun:" not in out
    assert "nothing:" not in out
    assert "half: recipe.json cannot be read: " in out
    assert "list: recipe.json cannot be read: it is no JSON object\n" in out
    assert "no_lines: the log has no line that can be read\n" in out
    assert "some_lines: metrics.jsonl: 1 line that cannot be read is left out\n" in out
    assert len([line for line in out.splitlines() if line.startswith("good")]) == 1


def test_steps_are_those_of_checkpoints_and_evaluations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint may be newer than the last line, and a line newer than the last evaluation."""
    write_run(f"{tmp_path}/a", steps=4)
    write_run(f"{tmp_path}/b", steps=4)
    (tmp_path / "b" / "checkpoints" / "step_00000005" / "commit.json").unlink()
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.5}\n')
    assert evaluate.main(["runs", str(tmp_path)]) == 0
    _, a, b, *_ = capsys.readouterr().out.splitlines()
    assert re.search("^a +5 of 10 .* 40.0% at 4$", a)
    assert re.search("^b +6 of 10 .* 40.0% at 4$", b)


def test_the_same_knn_of_an_evaluation_counts(tmp_path: Path) -> None:
    """Of a run that measures none, or of a later step; not that of other neighbors."""
    measured: dict[str, Any] = {"probe.neighbours": 20, "probe.temperature": 0.07}
    for name, key, expected in (
        ("same", "knn_k20_t0.07_top1", (0.75, 5)),
        ("other", "knn_k200_t0.07_top1", (0.4, 4)),
    ):
        write_run(f"{tmp_path}/{name}", steps=4, **measured)
        with (tmp_path / name / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": 5, "loss": 0.5, "{key}": 0.75}}\n')
        run = found(str(tmp_path))[name]
        assert (run.figures["knn_top1"], run.steps["knn_top1"]) == expected


def test_the_table_shows_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(f"{tmp_path}/a", seed=1, note="x" * 500)
    write_run(f"{tmp_path}/b", steps=7, seed=2, note="\x1b[2J[red]\n")
    assert evaluate.main(["runs", f"{tmp_path}/", "--depth", "1"]) == 0
    head, row, other_row, a, b = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "step", "state", "health"]
    assert "5 of 10" in row
    assert "70.0%" in other_row
    assert (a[:3], b[:3]) == ("a: ", "b: ")
    assert "seed=1" in a
    assert "seed=2" in b
    assert "batch.size" not in a
    assert r"\x1b[2J[red]\n" in b
    assert f"{'x' * 60}..." in a


def test_fields_of_the_method_come_first_and_lines_are_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    health = '{"step": 6, "loss": 1.0, "health": "collapsing"}\n'
    for name, fields in (
        ("a", {"threads": 1, "log.every": 4, "schedule.epochs": 4, "seed": 1}),
        ("b", {"threads": 2, "log.every": 4.0, "schedule.epochs": 4.0, "seed": 2}),
    ):
        write_run(f"{tmp_path}/{name}", **fields)
        with (tmp_path / name / "metrics.jsonl").open("a") as file:
            file.write(health if name == "b" else "")
    assert evaluate.main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3:6] == [
        "a: seed=1",
        "b: seed=2",
        "--all-fields also lists what differs outside of the method: 1 field",
    ]
    assert ["collapsing" in line for line in lines[1:3]] == [False, True]
    assert all(line == line.rstrip() and len(line) < 120 for line in lines)
    assert evaluate.main(["runs", str(tmp_path), "--all-fields"]) == 0
    assert "\na: seed=1 threads=1\nb: seed=2 threads=2\n" in capsys.readouterr().out


def test_no_line_ends_with_blanks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leases.leave(f"{tmp_path}/a", 1, released=True)
    write_run(f"{tmp_path}/b", steps=0)
    assert evaluate.main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [line.rstrip() for line in lines]


def test_a_long_log_is_read_from_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(f"{tmp_path}/a", steps=500)
    monkeypatch.setattr(survey, "TAIL", 300)
    run = found(str(tmp_path))["a"]
    assert (run.step, run.figures["loss"]) == (500, 1 / 500)
    log = tmp_path / "a" / "metrics.jsonl"
    log.write_text(log.read_text() + "".join(f'{{"step": {i}}}\n' for i in range(501, 600)))
    assert "knn_top1" not in found(str(tmp_path))["a"].figures
    write_run(f"{tmp_path}/b", **{"probe.every": 1})
    (tmp_path / "b" / "metrics.jsonl").write_text(log.read_text())
    assert found(str(tmp_path))["b"].figures["knn_top1"] == 50


def test_a_loss_that_is_not_finite_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(f"{tmp_path}/a")
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": null, "health": "The loss is not finite."}\n')
    assert evaluate.main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "a: health: The loss is not finite.\n" in out
    assert "not finite" in out.splitlines()[1]


def test_too_many_folders_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}").mkdir()
    write_run(f"{tmp_path}/00")
    monkeypatch.setattr(survey, "MOST_FOLDERS", 11)
    assert survey_runs(str(tmp_path), 3).notes == ["10 folders or more were not searched"]


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    write_run(f"{tmp_path}/a")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert "a" in found(str(tmp_path), 8)


@pytest.mark.parametrize(
    "arguments", [["s3:/b"], [""], ["{0}", "--depth", "9"], ["{0}/nothing"], []]
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert evaluate.main(["runs", *(one.format(tmp_path) for one in arguments)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_job_that_ended_without_a_word_is_dead(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    ended = identity(process.pid)
    process.kill()
    process.wait()
    leases.leave(write_run(f"{tmp_path}/a"), 1, process=ended, agents=[ended])
    assert found(str(tmp_path))["a"].state == "dead"
