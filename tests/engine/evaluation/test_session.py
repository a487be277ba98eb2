"""Results: measured once, by one job, whole or not at all, without secrets."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from PIL import Image

from engine.evaluation.during_training import ProbeConfig
from engine.evaluation.session import Evaluation
from engine.log import journal
from engine.state import lease
from launch import evaluate, export, pack
from shards import index
from shards.loader import DataConfig
from shards.storage import files
from tests.helpers import tiny
from tests.helpers.labels import draw_some
from tests.helpers.training import train
from tests.launch.test_evaluate import result

KNN = ["--k", "5", "--threads", "1"]


@pytest.fixture
def run(tiny_data: DataConfig, tmp_path: Path) -> str:
    url = str(tmp_path / "run")
    assert train(tiny.recipe(tiny_data, url, steps=2, probe=tiny.NO_PROBE))
    return url


@pytest.fixture
def unlabeled(tmp_path: Path) -> DataConfig:
    draw_some(tmp_path / "unlabeled", tiny.SAMPLES, lambda _: False)
    return DataConfig(train=f"{tmp_path}/unlabeled", streams=4)


def test_results_do_not_leave_the_run(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A link in place of the results' folder leads to another run's results, or anywhere."""
    (tmp_path / "other").mkdir()
    (tmp_path / "run" / "evaluations").symlink_to(tmp_path / "other")
    assert evaluate.main(["knn", run, *KNN]) == 1
    error = capsys.readouterr().err
    assert f"{run}/evaluations is a link to {tmp_path}/other, out of the run" in error
    assert "or give --out" in error
    assert not list((tmp_path / "other").iterdir())
    assert evaluate.main(["knn", run, *KNN, "--out", f"{tmp_path}/other"]) == 0


def test_another_job_at_the_same_evaluation(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["knn", run, *KNN]) == 0
    place = str(next(Path(run).glob("**/result.json")).parent)
    files.remove(f"{place}/result.json")
    other = lease.acquire(place, ["another job"], 0.2, lambda _: None)
    assert evaluate.main(["knn", run, *KNN]) == 1
    assert "another job is at this evaluation: wait for it" in capsys.readouterr().err
    other.release()
    assert evaluate.main(["knn", run, *KNN]) == 0


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"{}", b'{"metrics": {}, "table": []}', b"[" * 10**6),
        *(b'{"metrics": [], "table": [{}]}', b'{"metrics": {}, "table": [{"a": [1]}]}'),
        b'{"metrics": {"a": "b"}, "table": [{"a": 1}]}',
    ],
)
def test_a_damaged_result_is_measured_again(
    content: bytes, run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(["knn", run, *KNN]) == 0
    path = next(Path(run).glob("**/result.json"))
    expected = path.read_bytes()
    path.write_bytes(content)
    assert evaluate.main(["knn", run, *KNN]) == 0
    (line,) = [t for t in capsys.readouterr().out.splitlines() if "result.json is damaged (" in t]
    assert line.endswith("; measured again")
    assert path.read_bytes() == expected


def test_nothing_is_lost_where_storage_fails(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between the log and the result, or before both; the same command makes up for it."""
    add, write = journal.add, files.write

    def refuse(*_: Any) -> None:
        raise OSError("no space left")

    def refuse_result(url: str, content: bytes) -> None:
        (refuse if url.endswith("result.json") else write)(url, content)

    for module, name, broken, whole in (
        (journal, "add", refuse, add),
        (files, "write", refuse_result, write),
    ):
        monkeypatch.setattr(module, name, broken)
        assert evaluate.main(["knn", run, *KNN]) == 1
        assert capsys.readouterr().err == "error: no space left\n"
        monkeypatch.setattr(module, name, whole)
    assert evaluate.main(["knn", run, *KNN]) == 0
    assert journal.read(run)[-1]["knn_k5_t0.07_top1"] == result(run, "knn")["table"][0]["top-1"]


def test_what_was_learned_outlasts_a_failure_to_measure(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["linear", run, "--epochs", "1", "--batch", "16", "--threads", "1"]
    write = files.write

    def refuse_result(url: str, content: bytes) -> None:
        if url.endswith("result.json"):
            raise OSError("no space left")
        write(url, content)

    monkeypatch.setattr(files, "write", refuse_result)
    assert evaluate.main(few) == 1
    monkeypatch.setattr(files, "write", write)
    capsys.readouterr()
    assert evaluate.main(few) == 0
    told = capsys.readouterr().out
    assert "resumed at step 6 of 6" in told
    assert not list(Path(run).glob("evaluations/**/checkpoints"))


def test_other_data_have_another_name(run: str, tmp_path: Path, tiny_data: DataConfig) -> None:
    assert evaluate.main(["knn", run, *KNN, "--data.val", tiny_data.train]) == 0
    digest = json.loads(Path(tiny_data.train, "index.json").read_text())["digest"]
    assert journal.read(run)[-1][f"knn_k5_t0.07_top1_on_{digest[:6]}"] > 0.9  # themselves
    copy = str(tmp_path / "copy")
    Path(copy).mkdir()
    for path in Path(tiny_data.val).iterdir():
        Path(copy, path.name).write_bytes(path.read_bytes())
    assert evaluate.main(["knn", run, *KNN, "--data.val", copy]) == 0
    assert "knn_k5_t0.07_top1" in journal.read(run)[-1]


def test_a_run_of_unlabeled_images_owns_its_probe_sets(
    unlabeled: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other images must not take the place of figures on those that a run is measured on."""
    labeled, other = make_set(tmp_path / "labeled"), make_set(tmp_path / "other", moved=2)
    run, key = str(tmp_path / "run"), "knn_k1_t0.07_top1"
    probe = ProbeConfig(every=1, train=labeled, val=other, neighbours=2)
    assert train(tiny.recipe(unlabeled, run, steps=1, probe=probe))
    knn = ["knn", run, "--k", "1", "--threads", "1"]
    assert evaluate.main(knn) == 0
    own = journal.read(run)[-1][key]
    assert evaluate.main([*knn, "--data.train", other, "--data.val", labeled]) == 0
    assert evaluate.main([*knn, "--data.train", labeled, "--data.val", labeled]) == 0
    assert "are the same images, so each one finds itself" in capsys.readouterr().out
    digest = index.load(labeled, "data.val").digest[:6]
    last = journal.read(run)[-1]
    assert last[f"{key}_on_{digest}"] == 1  # themselves
    assert last[key] == own
    assert own < 1
    assert evaluate.main([*knn, "--data.train", labeled, "--data.val", other]) == 0
    assert "measured before" in capsys.readouterr().out  # they are the run's own, however given


def test_a_run_without_any_labels_owns_none(unlabeled: DataConfig, tmp_path: Path) -> None:
    labeled = make_set(tmp_path / "labeled")
    run = str(tmp_path / "run")
    assert train(tiny.recipe(unlabeled, run, steps=1, probe=tiny.NO_PROBE))
    given = ["--data.train", labeled, "--data.val", labeled]
    assert evaluate.main(["knn", run, "--k", "1", "--threads", "1", *given]) == 0
    assert all("top1" not in name or "_on_" in name for name in journal.read(run)[-1])


def make_set(folder: Path, moved: int = 0) -> str:
    """Pack 12 images of two classes; the labels of the first `moved` ones are swapped."""
    for i in range(12):
        path = folder / "photos" / "ab"[(i + (i < moved)) % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (20 * i, 250 * (i % 2), 9)).save(path)
    pack.main((f"{folder}/photos", f"{folder}/set"), threads=1)
    return f"{folder}/set"


def test_sets_of_equal_sizes_are_told_apart(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After labels were mended, an index has the same samples, sizes and blocks as before."""
    before, after = make_set(tmp_path / "before"), make_set(tmp_path / "after", moved=2)
    ones = [index.load(url, "data.val") for url in (before, after)]
    assert ones[0].digest == ones[1].digest
    assert ones[0].content != ones[1].content
    for url in (before, after, before):
        options = ["--data.train", before, "--data.val", url, "--out", f"{tmp_path}/out"]
        assert evaluate.main(["knn", run, "--k", "1", "--threads", "1", *options]) == 0
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("**/result.json")]
    assert sorted(one["data"]["val"]["url"] for one in found) == [after, before]
    top1 = {
        one["data"]["val"]["url"]: value
        for one in found
        for name, value in one["metrics"].items()
        if "_top1_on_" in name
    }
    assert top1[after] < top1[before]
    assert capsys.readouterr().out.count("measured before") == 1
    features = ["--threads", "1", "--size", "8"]
    assert evaluate.main(["features", run, before, f"{tmp_path}/f.npz", *features]) == 0
    assert evaluate.main(["features", run, after, f"{tmp_path}/f.npz", *features]) == 1
    assert "holds something else (images_from: there" in capsys.readouterr().err
    about = Path(f"{tmp_path}/f.npz.json")  # as an earlier release wrote it
    document = json.loads(about.read_text())
    del document["settings"]["content"]
    about.write_text(json.dumps(document))
    assert evaluate.main(["features", run, before, f"{tmp_path}/f.npz", *features]) == 0


def test_results_of_earlier_releases_are_found(
    run: str,
    tmp_path: Path,
    tiny_data: DataConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Their folders have a name in which the content of the sets has no part."""
    with monkeypatch.context() as earlier:
        earlier.setattr(index.Index, "content", property(lambda self: self.digest))
        earlier.setattr(Evaluation, "_is_result_of_these_sets", lambda *_: True)
        assert evaluate.main(["knn", run, *KNN]) == 0
    assert evaluate.main(["knn", run, *KNN]) == 0
    assert capsys.readouterr().out.count("measured before") == 1
    other = str(shutil.copytree(tiny_data.val, tmp_path / "other"))
    assert evaluate.main(["knn", run, *KNN, "--data.val", other]) == 0
    assert "measured before" not in capsys.readouterr().out  # an earlier result of other sets?


def test_no_secret_is_told_or_written(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    secret = "memory://user:c4n4ry@evaluated"
    for path in Path(run).glob("**/*"):
        if path.is_file():
            files.write(f"{secret}/run/{path.relative_to(run)}", path.read_bytes())
    files.write(f"{secret}/list.txt", b"nobody.jpg")
    few = ["--lr", "0.1", "--epochs", "1", "--batch", "8", "--threads", "1"]
    there = f"{secret}/run"
    half = ["--fraction", "0.5", "--out", f"{secret}/out"]
    assert evaluate.main(["semi-supervised", there, *half, *few]) == 0
    assert evaluate.main(["semi-supervised", there, "--files", f"{secret}/list.txt", *few]) == 1
    assert evaluate.main(["knn", there, *KNN]) == 0
    assert export.main([there, f"{secret}/export", "--format", "safetensors"]) == 0
    assert export.main([there, " "]) == 1
    told = capsys.readouterr()
    assert "c4n4ry" not in told.out + told.err
    assert "nobody.jpg is not in data.train" in told.err
    assert "OUT is empty" in told.err
    filesystem = fsspec.filesystem("memory")
    written = {path: filesystem.cat_file(path) for path in filesystem.find("/")}
    assert any(path.endswith("export/card.json") for path in written)
    assert not [path for path, content in written.items() if b"c4n4ry" in content]
