"""RUN/report.html: written on demand and at the end of a training, and never in its way."""

import json
import os
import shlex
import threading
from pathlib import Path

import pytest

from engine.report import report
from engine.report.report import write_at_end, write_report
from engine.state import layout
from engine.state.origin import describe_source
from launch import evaluate
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import files
from tests.engine.report.test_page import write_run
from tests.helpers import tiny
from tests.helpers.places import ROOT
from tests.helpers.training import finish, train, training
from tests.helpers.web_pages import read_page


def test_a_training_ends_with_its_report(
    tiny_data: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(tiny_data, tmp_path / "run")
    assert train(recipe)
    assert f"report        {tmp_path}/run/report.html\n" in capsys.readouterr().out
    page = read_page((tmp_path / "run" / "report.html").read_bytes())
    for text in (
        "of 20 steps (100%)",
        "done the run has reached",
        "kNN accuracy",
        "batch of step 20",
        "model.encoder.depth",
    ):
        assert text in page.text
    assert files.read_json(f"{tmp_path}/run/recipe.json")["total_steps"] == 20
    (tmp_path / "run" / "report.html").write_text("compared with others")
    assert train(recipe)  # it takes no step
    assert (tmp_path / "run" / "report.html").read_text() == "compared with others"
    (tmp_path / "run" / "report.html").unlink()
    with training(recipe) as trainer:  # the same recipe goes on, and at its end makes a new one
        assert trainer.step == 20
        assert finish(trainer)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_start_without_news_leaves_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    report_file = tmp_path / "run" / "report.html"
    (result,) = (tmp_path / "run").glob("evaluations/*/*/result.json")
    (sheet,) = (tmp_path / "run").glob("evaluations/*/*/neighbours.png")
    for news, age, left in ((False, -9, True), (True, -9, False), (False, 9, False)):
        report_file.write_text("mine")
        made = report_file.stat().st_mtime
        for path in (result, sheet):
            os.utime(path, (made + age, made + age))
        write_at_end(run, True, print, news)
        assert (report_file.read_text() == "mine") == left
        assert capsys.readouterr().out == f"report        {run}/report.html\n"
    report_file.unlink()
    write_at_end(run, True, print, news=False)
    assert report_file.exists()


def test_a_report_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "run" / "report.html").mkdir()
    write_at_end(run, True, print)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("report.html was not written: ")
    monkeypatch.setattr(report, "make_page", lambda _: 1 / 0)
    write_at_end(run, True, print)
    assert capsys.readouterr().out == "report.html was not written: division by zero\n"


def test_a_report_that_takes_long_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = threading.Event()
    monkeypatch.setattr(report, "write_report", lambda _, **__: gate.wait(60))
    monkeypatch.setattr(report, "PATIENCE", 0.05)
    write_at_end(str(tmp_path), True, print)
    gate.set()
    assert capsys.readouterr().out == "report.html was not written: it takes more than 0.05 s\n"


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    write_at_end(write_run(tmp_path / "run"), False, print)
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_link_in_its_place_is_replaced_and_not_followed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "other").write_text("mine")
    (tmp_path / "run" / layout.REPORT).symlink_to(tmp_path / "other")
    write_report(run)
    assert (tmp_path / "other").read_text() == "mine"


def test_the_command_compares_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (write_run(tmp_path / name, seed=name) for name in ("one", "two"))
    assert evaluate.main(["report", first, "--compare", second, "--out", f"{tmp_path}/a.html"]) == 0
    assert capsys.readouterr().out == f"report  {tmp_path}/a.html\n"
    page = read_page((tmp_path / "a.html").read_bytes())
    assert "Fields of the recipe that differ" in page.text
    assert page.text.count("two") >= 3
    assert not (tmp_path / "one" / "report.html").exists()
    assert evaluate.main(["report", first]) == 0
    assert (tmp_path / "one" / "report.html").exists()


def test_commands_on_the_page_are_right_in_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my runs" / "it's").mkdir(parents=True)
    (tmp_path / "my runs" / "it's" / "recipe.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert write_report("my runs/it's/") == "my runs/it's/report.html"
    page = read_page((tmp_path / "my runs" / "it's" / "report.html").read_bytes())
    monkeypatch.chdir("/")
    for protocol in ("neighbours", "linear"):
        (command,) = [text for text in page.texts if f"evaluate.py {protocol}" in text]
        run = f"{tmp_path}/my runs/it's"
        assert shlex.split(command) == ["python", f"{ROOT}/launch/evaluate.py", protocol, run]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{run}", "--compare", "{run}/evaluations"], "--compare {run}/evaluations: is no run"),
        (["{run}", "--compare", *["{run}"] * 8], "at most 7 runs, not 8"),
        (["{run}", "--out", "{run}/"], "is a folder: give the URL of a file"),
        (["{run}", "--out", "s3:/b/x"], "--out s3:/b/x"),
        (["{run}x"], "RUN {run}x: is no run"),
        (["{run}/checkpoints/step_00000020"], "give {run}, whose checkpoint it is"),
        ([""], "RUN is empty"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    run = write_run(tmp_path / "run")
    assert evaluate.main(["report", *(one.format(run=run) for one in arguments)]) == 1
    error = capsys.readouterr().err
    assert text.format(run=run) in error
    assert len(error.splitlines()) == 1


def test_runs_of_earlier_releases_have_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", total_steps=None)
    recipe = files.read_json(f"{run}/recipe.json")
    del recipe["total_steps"], recipe["branched_from"]
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    text = read_page(Path(write_report(run)).read_bytes()).text
    assert "steps logged" in text
    assert "Parent" not in text


def test_what_is_no_field_does_not_hinder_a_resume(tiny_data: DataConfig, tmp_path: Path) -> None:
    """recipe.json has it too, which is compared with the recipe at every start."""
    with training(tiny.recipe(tiny_data, tmp_path / "run", steps=2)) as trainer:
        trainer.run.source = describe_source("mine.py", {"steps": None})
        assert finish(trainer)
    assert files.read_json(f"{tmp_path}/run/recipe.json")["recipe_file"]["said"] == {"steps": None}
    assert train(tiny.recipe(tiny_data, tmp_path / "run", steps=4))


def test_every_store_takes_a_report(store: str, tmp_path: Path) -> None:
    local = write_run(tmp_path / "run")
    for path in Path(local).rglob("*"):
        if path.is_file():
            files.write(f"{store}/runs/a/{path.relative_to(local)}", path.read_bytes())
    assert write_report(f"{store}/runs/a/") == f"{store}/runs/a/report.html"
    page = read_page(files.read(f"{store}/runs/a/report.html"))
    for text in ("batch of step 50", "62.50%", "The loss rises"):
        assert text in page.text
    assert sum(tag == "img" for tag, name, _ in page.attributes if name == "src") == 2
    with pytest.raises(InputError, match="lists the runs below it"):
        write_report(f"{store}/runs")
