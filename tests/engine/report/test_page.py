"""The report's page: complete, bounded, and nothing in it is taken for markup."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.log.curves import VIEWS
from engine.log.events import EventLog
from engine.report import page as page_module
from engine.report.facts import RunFacts, collect
from engine.report.html import tag
from engine.report.page import MOST_BYTES, make_page, name_runs
from engine.report.pictures import embed
from engine.report.views import find_views
from shards.errors import InputError
from shards.png import decode_png, encode_png
from tests.helpers import leases
from tests.helpers.clocks import stop_clock
from tests.helpers.web_pages import WebPage, read_page

TAGS = {
    *("html", "head", "meta", "title", "style", "body", "main", "section", "nav", "footer", "div"),
    *("h1", "h2", "h3", "p", "a", "b", "i", "span", "code", "ul", "li", "img", "figure"),
    *("figcaption", "svg", "g", "line", "path", "text", "table", "thead", "tbody", "tr", "th"),
    *("td", "details", "summary", "wbr"),
}
HOSTILE = (
    "</title></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'><!--&lt;\u202e\n"
)


def write_run(folder: Path, text: str = "", **more: Any) -> str:
    """Write a run that has everything a report shows. `text` stands in every text of it."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {"run": f"runs/{text}", "seed": 3, "batch.size": 64, f"field{text}": [text, 1]}
    recipe |= {"optimizer": f"LARSConfig{text}", "index_digest": f"abc{text}", "total_steps": 100}
    change = {"there": f"1{text}", "here": f"2{text}"}
    branch = {
        "url": f"parent{text}",
        "step": 7,
        "step_here": 3,
        "order": f"the order goes on{text}",
    }
    recipe["branched_from"] = branch | {"changed": {f"seed{text}": change}}
    (folder / "recipe.json").write_text(json.dumps(recipe | more))
    records: list[dict[str, Any]] = [{"step": 0, "knn_pixels": 0.25, "knn_untrained": 0.31}]
    for step in range(10, 60, 10):
        speeds = {"images_per_second": 100.0, "data_wait": 0.1, f"other{text}": 1.0 * step}
        records.append({"step": step, "loss": 4 / step, "lr": 0.1, "tau": 0.99} | speeds)
    records[-1] |= {"knn_top1": 0.5, "health": f"The loss rises.{text}", "skipped": 2}
    records[-2] |= {"evaluation_failed": f"a shard is gone{text}"}
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    name = text.replace("/", "").replace("\n", "")
    result = folder / "evaluations" / f"step_00000050{name}" / f"linear-online-1{name}"
    result.mkdir(parents=True)
    document = {"protocol": f"linear{text}", "network": f"online{text}", "step": 50}
    document |= {"metrics": {f"linear_top1{text}": 0.625}, "settings": {f"lr{text}": [text, 0.1]}}
    document["data"] = {"val": {"url": f"data/held{text}"}}
    (result / "result.json").write_text(json.dumps(document))
    (result / "neighbours.png").write_bytes(encode_png(np.zeros((40, 90, 3), np.uint8)))
    events = EventLog(str(folder), 0)
    noise = np.random.default_rng(0).integers(0, 255, (20, 40, 3), np.uint8)
    for step in (1, 50):
        events.scalars({"loss": 1.0}, step)
        events.picture(VIEWS, noise, step)
    events.picture("another", noise, 60)
    events.flush()
    return str(folder)


def page_of(*urls: str) -> WebPage:
    content = make_page([collect(url) for url in urls])
    assert len(content) < MOST_BYTES
    return read_page(content)


def test_the_page_has_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_clock(monkeypatch, page_module, datetime(2026, 1, 2, 3, 4, tzinfo=UTC))
    page = page_of(write_run(tmp_path / "mine"))
    assert page.tags <= TAGS
    for text in (
        *("mine", "of 100 steps (50%)", "50.0%", "raw pixels 25.0%", "untrained encoder 31.0%"),
        *("The loss rises. (step 50)", "a shard is gone", "2 steps were skipped", "Loss"),
        *(
            "batch of step 50",
            "branched from parent , step 7, as step 3 of",
            "order goes on",
            "seed",
            "Made on 2026-01-02 at 03:04 UTC",
        ),
        *("Fields", "All", "Images per second", "Time spent waiting for data", "Other figures"),
        *("measured on", "data/held"),
    ):
        assert text.lower() in page.text.lower(), text
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(pictures) == 2
    assert "No sheet" not in page.text


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "mine"))
    policy = next(v for _, name, v in page.attributes if name == "content" and "default" in v)
    assert "default-src 'none'" in policy
    assert "script" not in page.tags
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("data:image/", "#"))


def test_no_text_is_taken_for_markup(tmp_path: Path) -> None:
    """It stands in every text that a report shows; the same page comes out, with longer texts."""
    name = HOSTILE.replace("/", "").replace("\n", "")
    plain, hostile = (write_run(tmp_path / f"a{n}", t) for n, t in (("", ""), (name, HOSTILE)))
    first, second = page_of(plain, plain), page_of(hostile, hostile)
    assert second.tags == first.tags
    names = {(tag, name) for tag, name, _ in first.attributes}
    assert {(tag, name) for tag, name, _ in second.attributes} == names
    assert second.text.count("<script>alert(1)</script>") >= 15
    assert all(c.isprintable() or c == "\n" for c in second.text)
    assert "\u202e" not in second.text
    urls = {value for _, name, value in second.attributes if name in ("src", "href")}
    assert all(url.startswith(("data:image/", "#")) for url in urls)


def test_secrets_in_urls_are_left_out(tmp_path: Path) -> None:
    facts = collect(write_run(tmp_path / "run"))
    facts.url = "s3://KEY:SECRET@bucket/run"
    facts.recipe["branched_from"]["url"] = "s3://KEY:SECRET@bucket/parent"
    facts.recipe["data.train"] = "https://KEY:SECRET@host/data"
    content = make_page([facts, facts])
    assert b"SECRET" not in content
    assert b"bucket/parent" in content


def test_a_page_of_the_largest_runs_is_bounded() -> None:
    values = np.random.default_rng(0).normal(size=(20_000, 30)).tolist()
    records = [
        {"step": i, "loss": row[0], "knn_top1": row[1], "health": f"trouble {i}"}
        | {f"key{j}": value for j, value in enumerate(row)}
        for i, row in enumerate(values)
    ]
    recipe = {f"field{i}": "x" * 10_000 for i in range(5000)}
    runs = [RunFacts(f"run{i}", recipe | {"a": i}, records) for i in range(8)]
    content = make_page(runs)
    assert len(content) < MOST_BYTES
    page = read_page(content)
    assert "more rows are left out" in page.text
    assert "Loss" in page.text


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000])
def test_damaged_files_are_faults(tmp_path: Path, content: bytes) -> None:
    run = Path(write_run(tmp_path / "run"))
    for path in (run / "recipe.json", *run.glob("evaluations/*/*/*")):
        path.write_bytes(content)
    for path in run.glob("*.tfevents.*"):
        path.write_bytes(content)
    facts = collect(str(run))
    page = read_page(make_page([facts]))
    assert "result.json cannot be read" in page.text
    assert "no picture of its views" in page.text
    assert "Loss" in page.text
    if content != b'{"a": NaN}':
        assert "recipe.json cannot be read" in page.text


@pytest.mark.parametrize("damage", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\x89PNG\r\n\x1a\n" * 9])
def test_a_damaged_picture_is_said(tmp_path: Path, damage: bytes) -> None:
    run = Path(write_run(tmp_path / "run"))
    next(run.glob("evaluations/*/*/neighbours.png")).write_bytes(damage)
    assert "cannot be shown" in page_of(str(run)).text


def test_a_cut_off_picture_is_said() -> None:
    content = encode_png(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8))
    with pytest.raises(ValueError, match="damaged"):
        embed(content[:3000], "")
    large = content[:16] + (10**6).to_bytes(4, "big") * 2 + content[24:]
    with pytest.raises(ValueError, match="pixels"):
        embed(large, "")


def test_a_large_picture_becomes_small() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (2000, 4000, 3), np.uint8)
    assert len(embed(encode_png(noise), "")) < 2_500_000


def test_the_newest_views_are_found_beside_a_half_written_event(tmp_path: Path) -> None:
    run = Path(write_run(tmp_path / "run"))
    (path,) = run.glob("*.tfevents.*")
    whole = find_views(str(run))
    assert whole is not None
    assert whole[0] == 50
    path.write_bytes(path.read_bytes()[:-100])
    assert find_views(str(run)) == whole
    EventLog(str(run), 50).flush()
    assert find_views(str(run)) == whole


def test_views_of_earlier_releases_are_found(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (20, 40, 3), np.uint8)
    events = EventLog(f"{tmp_path}/tensorboard", 0)
    events.picture("views", noise, 7)
    events.flush()
    found = find_views(str(tmp_path))
    assert found is not None
    assert (found[0], decode_png(found[1]).tolist()) == (7, noise.tolist())


def test_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"RUN .*/nothing: is no run.*: give the URL of a run"):
        collect(str(tmp_path / "nothing"))
    write_run(tmp_path / "runs" / "mine")
    with pytest.raises(InputError, match="lists the runs below it"):
        collect(str(tmp_path / "runs"))
    with pytest.raises(InputError, match="s3:/x"):
        collect("s3:/x/y")


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    text = page_of(str(tmp_path)).text
    assert "Nothing has been logged yet" in text


def test_names_are_short_and_differ() -> None:
    assert name_runs(["s3://b/runs/a", "s3://b/runs/c"]) == ["a", "c"]
    assert name_runs(["runs/1/a", "runs/2/a"]) == ["1/a", "2/a"]
    assert name_runs(["a", "a"]) == ["a (1)", "a (2)"]


def test_only_void_elements_have_no_end() -> None:
    assert tag("td") == "<td></td>"
    assert tag("td", "<", title='"') == '<td title="&quot;">&lt;</td>'


def test_the_page_names_the_recipe_file_and_what_the_command_line_changed(tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    source: dict[str, Any] = {"file": "/home/me/<b>.py", "said": {}}
    recipe: dict[str, Any] = {"run": "here", "batch.size": 64, "recipe_file": source}
    path.write_text(json.dumps(recipe))
    text = page_of(str(tmp_path)).text
    assert "took the recipe <b>.py , which is /home/me/<b>.py . The command line changed no" in text
    assert "recipe_file" not in text  # it is no field
    source["said"] = {"batch.size": 128, "run": "there", "unknown": 3}
    path.write_text(json.dumps(recipe))
    text = page_of(str(tmp_path)).text
    assert "changed these fields of it: field value in the recipe file batch.size 64 128" in text
    assert "there" not in text
    for odd in (3, {"file": 3, "said": {}}, {"file": "a", "said": []}):
        path.write_text(json.dumps(recipe | {"recipe_file": odd}))
        assert "took the recipe" not in page_of(str(tmp_path)).text


def test_the_page_names_what_a_run_began_from(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"checkpoint.resume": "runs/first"}')
    assert "full state of runs/first . The method is the same" in page_of(str(tmp_path)).text
    (tmp_path / "recipe.json").write_text('{"model.start": "weights.pth", "branched_from": 3}')
    assert "the weights of weights.pth" in page_of(str(tmp_path)).text
    (tmp_path / "recipe.json").write_text('{"seed": 3}')
    assert "began" not in page_of(str(tmp_path)).text


def test_the_page_explains_what_is_wrong_with_the_training(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    records = [
        {"step": i, "loss": 1.0, "health": "collapsing" if 2 < i < 5 else "healthy"}
        for i in range(9)
    ]
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (tmp_path / "run" / "metrics.jsonl").write_text(lines)
    text = page_of(run).text
    assert "collapsing (2 logged steps from 3 to 4): the projections of different" in text
    assert "Try first lower --schedule.base-lr" in text
    assert "healthy again" in text
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(records[0]))
    assert "Nothing was reported: the only judged step was healthy" in page_of(run).text
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}')
    assert "No logged step has been judged" in page_of(run).text


def test_the_time_of_a_branch_begins_where_it_left_its_parent() -> None:
    speeds: list[dict[str, Any]] = [
        {"step": step, "images_per_second": 64.0} for step in (910, 960, 1020)
    ]
    first: dict[str, Any] = {"step": 900, "branched_from": "a checkpoint"}
    point = {"branched_from": {"step_here": 900}}
    for recipe, records, minutes in (
        ({}, speeds, "17.0 min"),
        ({}, [first, *speeds], "2.0 min"),
        (point, speeds, "2.0 min"),
        ({"checkpoint.resume": "runs/first"}, speeds, "2.8 min"),  # 55 steps for the unknown first
    ):
        run = RunFacts("run", {"batch.size": 64} | recipe, records)
        assert minutes in read_page(make_page([run])).text


def test_the_page_tells_what_the_run_was_trained_on(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "training images" not in page_of(run).text
    commit = {"origin": {"samples": 1234}, "packages": {"torch": "2.9.9<i>"}}
    for name, content in (("step_00000040", {}), ("step_00000050", commit)):
        folder = tmp_path / "run" / "checkpoints" / name
        folder.mkdir(parents=True)
        (folder / "commit.json").write_text(json.dumps(content))
    (tmp_path / "run" / "checkpoints" / "step_00000060").mkdir()  # it is being written
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 60, "images_per_second": 99.0, "images_per_second_device": 12.375}\n')
    text = page_of(run).text
    for tile in ("1,234 training images", "8 processes", "2.9.9<i> version of torch"):
        assert tile in text
    for odd in (b"[]", b"{", b'{"origin": 3, "packages": {"torch": 3}}'):
        (tmp_path / "run" / "checkpoints" / "step_00000050" / "commit.json").write_bytes(odd)
        assert "training images" not in page_of(run).text


def test_the_tiles_tell_how_the_run_is_and_how_sure_its_knn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    log, saved = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "checkpoints"
    assert "standard errors" not in page_of(run).text  # of a log without the number of images
    assert "stopped ended without finishing" in page_of(run).text
    text = log.read_text()
    line = {"step": 60, "loss": 1.0, "knn_top1": 0.36, "knn_images": 900}
    log.write_text(text + json.dumps(line))
    (saved / "step_00000050").mkdir(parents=True)
    (saved / "step_00000050" / "commit.json").write_text('{"step": 50}')
    found = page_of(run).text
    assert "36.0% kNN \u00b1 3.2% (two standard errors on 900 images)" in found
    assert "50 step of the newest checkpoint" in found
    for odd in (0, -1, True, "x", None, 1e300):
        log.write_text(text + json.dumps(line | {"knn_images": odd}))
        assert "36.0% kNN" in page_of(run).text
    leases.leave(run, 3, period=10.0)
    assert "trains a job trained the run when" in page_of(run).text
    at_end = read_page(make_page([collect(run, left=True)])).text
    assert "stopped ended without finishing" in at_end
    log.write_text(text + json.dumps(line | {"stopped_early": "enough"}))
    assert "stopped early a figure" in read_page(make_page([collect(run, left=True)])).text
    log.write_text(text + json.dumps(line | {"step": 100}))
    assert "done the run has" in read_page(make_page([collect(run, left=True)])).text


def test_the_speed_of_a_single_device_is_drawn_once() -> None:
    for devices in (1, 2):
        speeds = {"images_per_second": 64.0, "images_per_second_device": 64.0 / devices}
        run = RunFacts("run", {}, [{"step": step} | speeds for step in (1, 2)])
        text = read_page(make_page([run])).text
        assert ("Images per second and device" in text) == (devices == 2)


def test_what_is_absent_is_not_shown(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "images_per_second": 9.0}')
    text = page_of(str(tmp_path), str(tmp_path)).text
    assert "nan" not in text
    assert "not finite" not in text
    assert "spent in" not in text
    assert "online_top1" not in text
