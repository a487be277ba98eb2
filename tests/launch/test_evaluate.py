"""launch/evaluate.py: figures and where they go, live runs, interruptions, processes, errors."""

import json
import os
import re
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig
from torchvision.models import resnet18

from engine.log import journal
from engine.log.metrics import TIMINGS
from engine.processes.preemption import Preemption
from engine.state import lease
from launch import evaluate, export
from shards.loader import DataConfig
from shards.making import synthetic
from shards.storage import files
from tests.conftest import PackFiles, draw_photo
from tests.helpers import tiny
from tests.helpers.jobs import until
from tests.helpers.ranks import Ranks
from tests.helpers.training import finish, train, training

LINEAR = ["--epochs", "3", "--batch", "16", "--lr", "0.4", "0.05", "--threads", "1"]


@pytest.fixture(scope="module")
def run(whole_run: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of 20 steps, checkpoints at 12, 16 and 20."""
    return copied(str(whole_run), tmp_path_factory.mktemp("evaluate"))


def copied(run: str, where: Path) -> str:
    """The run again, for a test that adds to it."""
    subprocess.run(["cp", "-r", run, str(where / "run")], check=True)
    return str(where / "run")


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Output of a call that succeeds."""
    assert evaluate.main(list(arguments)) == 0
    return capsys.readouterr().out


def result(url: str, name: str) -> dict[str, Any]:
    """The only result of that name below a folder."""
    found = list(Path(url).glob(f"**/{name}-*/result.json"))
    assert len(found) == 1, found
    document: dict[str, Any] = json.loads(found[0].read_text())
    return document


def test_figures_go_everywhere(
    run: str, tmp_path: Path, tiny_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(run, tmp_path)
    before = journal.read(run)
    assert "linear: online network" in told(capsys, "linear", run, *LINEAR)
    table = told(capsys, "knn", run, "--k", "5", "20", "--temperature", "0.07", "1")
    assert table.count("%") == 8
    # metrics.jsonl: the step's own line has them, nothing else has changed
    after = journal.read(run)
    assert after[:-1] == before[:-1]
    knn = {f"knn_k{k}_t{t}_top1" for k in (5, 20) for t in ("0.07", "1")}
    assert after[-1].keys() - before[-1].keys() == knn | {"linear_top1", "linear_top5"}
    lines = Path(run, "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == after
    assert not list(Path(run, "metrics").glob("*"))
    # JSON, and tensorboard
    linear = result(f"{run}/evaluations", "linear-online")
    assert linear["metrics"]["linear_top1"] == after[-1]["linear_top1"]
    assert (linear["step"], linear["network"]) == (20, "online")
    events = EventAccumulator(f"{run}/evaluations")
    events.Reload()
    assert {"eval/linear_top1", "eval/knn_k5_t1_top1"} <= set(events.Tags()["scalars"])
    assert events.Scalars("eval/linear_top1")[0].step == 20
    # the same again takes what stands there
    again = told(capsys, "linear", run, *LINEAR)
    assert "measured before" in again
    assert journal.read(run) == after
    head = load_file(next(Path(run).glob("**/head.safetensors")))
    assert head["fc.weight"].shape == (len(synthetic.CLASSES), 64)
    # and a training that goes on there leaves the log whole
    assert train(tiny.recipe(tiny_data, run))
    assert journal.read(run) == after


def test_knn_equals_the_training_s_own(run: str, tmp_path: Path) -> None:
    """The probe's figure of step 20, from the same weights."""
    there = journal.read(run)[-1]["knn_top1"]
    arguments = ["--k", "5", "--temperature", "0.07", "--threads", "1", "--out", str(tmp_path)]
    assert evaluate.main(["knn", run, *arguments]) == 0
    assert result(str(tmp_path), "knn")["metrics"]["knn_k5_t0.07_top1"] == there


def test_checkpoints_networks_and_folders(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path), "--threads", "1"]
    before = sorted(Path(run).glob("**/*"))
    for arguments, there in (
        ((run, "--checkpoint", "16"), "online network of .*step_00000016"),
        ((f"{run}/checkpoints/step_00000012",), "online network of .*step_00000012"),
        ((run, "--network", "target"), "target network of .*step_00000020"),
        ((run, "--network", "untrained"), "untrained network of .*step_00000020"),
        ((run, "--network", "pixels"), "pixels network of .*step_00000020"),
    ):
        text = told(capsys, "knn", *arguments, *out)
        assert re.search(there, text)
    assert sorted(Path(run).glob("**/*")) == before  # --out leaves the run alone
    found = [json.loads(p.read_text()) for p in tmp_path.glob("**/result.json")]
    names = {name for document in found for name in document["metrics"]}
    assert {"knn_k20_t0.07_top1", "knn_target_k20_t0.07_top1", "knn_pixels_k20_t0.07_top1"} < names
    assert len(found) == 5


def test_the_choice_is_made_on_held_out_images(run: str, tmp_path: Path) -> None:
    """The others have no figure on data.val, by which nobody could choose them."""
    rates = ["--lr", "1e-7", "0.01", "0.1", "1", "10"]
    few = ["--fast", "--seed", "3", "--batch", "16", "--threads", "1", "--out", str(tmp_path)]
    assert evaluate.main(["linear", run, *rates, *few]) == 0
    found = result(str(tmp_path), "linear")
    held_out = [row["held-out top-1"] for row in found["table"]]
    assert len(set(held_out)) > 2
    best = held_out.index(max(held_out))
    assert [row["top-1"] != "" for row in found["table"]] == [i == best for i in range(5)]
    assert found["table"][best]["top-1"] == found["metrics"]["linear_fast_top1"]


def test_logistic_regression(
    run: str, tmp_path: Path, tiny_data: DataConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its classifier is on disk, and gives the figures."""
    few = ["--strengths", "5", "--l2", "10", "1e-3", "--threads", "1", "--out", str(tmp_path)]
    assert "held-out top-1" in told(capsys, "logistic", run, *few)
    found = result(str(tmp_path), "logistic-online")
    assert [row["l2"] for row in found["table"]] == ["10", "1", "0.1", "0.01", "0.001"]
    assert found["metrics"].keys() == {"logistic_top1", "logistic_top5"}
    chosen = [row for row in found["table"] if row["top-1"] != ""]
    assert [row["held-out top-1"] for row in chosen] == [
        max(row["held-out top-1"] for row in found["table"])
    ]
    head = load_file(next(tmp_path.glob("**/head.safetensors")))
    assert head["fc.weight"].dtype == torch.float32
    assert evaluate.main(["features", run, tiny_data.val, f"{tmp_path}/val.npz"]) == 0
    val = np.load(tmp_path / "val.npz")
    scores = val["features"] @ head["fc.weight"].numpy().T + head["fc.bias"].numpy()
    right = float((scores.argmax(axis=1) == val["labels"]).mean())
    assert right == pytest.approx(found["metrics"]["logistic_top1"], abs=1e-9)
    assert evaluate.main(["logistic", run, *few, "--iterations", "1"]) == 0
    assert "6 of 6 fits were not done after 1 iterations" in capsys.readouterr().out


def test_fast_linear_and_finetuning(run: str, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), "--threads", "1", "--batch", "16", "--epochs", "2"]
    assert evaluate.main(["linear", run, "--fast", *out]) == 0
    assert evaluate.main(["finetune", run, "--lr", "0.1", *out]) == 0
    few = ["--fraction", "0.3", "--lr", "0.1"]
    assert evaluate.main(["semi-supervised", run, *few, *out]) == 0
    assert "linear_fast_top1" in result(str(tmp_path), "linear")["metrics"]
    assert "finetune_top5" in result(f"{tmp_path}/step_00000020", "finetune")["metrics"]
    wild = f"{tmp_path}/wild"  # a second rate, which diverges, changes nothing
    assert evaluate.main(["finetune", run, "--lr", "0.1", "1e9", *out[:1], wild, *out[2:]]) == 0
    good, bad = result(wild, "finetune")["table"]
    assert (bad["held-out top-1"], bad["top-1"]) == ("diverged", "")
    first, second = tmp_path.glob("**/finetune-*/model.safetensors")
    assert first.read_bytes() == second.read_bytes()
    assert good["top-1"] == result(f"{tmp_path}/step_00000020", "finetune")["table"][0]["top-1"]
    semi = result(str(tmp_path), "semi-supervised-0.3-online")
    assert "semi_supervised_0.3_top1" in semi["metrics"]
    model = load_file(next(tmp_path.glob("**/finetune-*/model.safetensors")))
    assert model["fc.weight"].shape == (8, 64)
    assert "layer4.0.bn2.running_var" in model
    assert not list(tmp_path.glob("**/checkpoints"))  # states go when the result is there


def test_a_picture_and_the_projector(run: str, tmp_path: Path) -> None:
    run = copied(run, tmp_path)
    few = ["--queries", "3", "--neighbours", "4", "--points", "10", "--threads", "1"]
    assert evaluate.main(["neighbours", run, *few]) == 0
    sheet = PillowImage.open(next(Path(run).glob("**/neighbours.png")))
    assert sheet.size == (5 * 112, 3 * 112)
    folder = Path(run, "evaluations")
    features = np.frombuffer((folder / "features.bytes").read_bytes(), "<f4")
    assert len(features) == 10 * 64
    assert len((folder / "labels.tsv").read_text().splitlines()) == 11
    assert PillowImage.open(folder / "sprite.png").size == (4 * 48, 4 * 48)
    config = ProjectorConfig()
    text_format.Parse((folder / "projector_config.pbtxt").read_text(), config)
    assert list(config.embeddings[0].tensor_shape) == [10, 64]


def test_an_image_among_others_is_its_own_neighbour(
    run: str, tmp_path: Path, tiny_data: DataConfig
) -> None:
    """Beside each query stands itself, in green; of the others some are of another class."""
    same = ["--data.train", tiny_data.val, "--data.val", tiny_data.val, "--points", "0"]
    few = ["--queries", "4", "--neighbours", "6", "--threads", "1", "--out", str(tmp_path)]
    assert evaluate.main(["neighbours", run, *same, *few]) == 0
    sheet = np.array(PillowImage.open(next(tmp_path.glob("**/neighbours.png"))))
    tiles = sheet.reshape(4, 112, 7, 112, 3).swapaxes(1, 2)  # [row, column, 112, 112, 3]
    inner, border = tiles[:, :, 8:-8, 8:-8], tiles[:, :, 4, 4]
    assert np.array_equal(inner[:, 0], inner[:, 1])
    assert not np.array_equal(inner[:, 0], inner[:, 2])
    assert np.unique(inner[:, 0], axis=0).shape[0] == 4
    assert (border[:, 1] == (46, 160, 67)).all()
    assert (border[:, 2:] == (207, 34, 46)).all(-1).any()


def test_a_live_run_is_not_disturbed(
    whole_run: Path, tiny_data: DataConfig, tmp_path: Path
) -> None:
    """An evaluation in the middle of training; the run's log has both in the end."""
    url, calm = str(tmp_path / "run"), str(tmp_path / "calm")
    knn = ["--checkpoint", "8", "--k", "5", "--threads", "1"]
    train(tiny.recipe(tiny_data, calm, steps=8))
    assert evaluate.main(["knn", calm, *knn, "--out", f"{tmp_path}/out"]) == 0
    statuses: list[int] = []
    with training(tiny.recipe(tiny_data, url)) as trainer:
        step = trainer.train_step

        def step_and_evaluate(batch: Any) -> Any:
            if trainer.step == 10:  # the save of step 8 is under way, or over
                commit = f"{url}/checkpoints/step_00000008/commit.json"
                until(lambda: files.exists(commit))
                measure = lambda: statuses.append(evaluate.main(["knn", url, *knn]))  # noqa: E731
                other = threading.Thread(target=measure)
                other.start()
                other.join()
                assert not lease.is_free(url)
            return step(batch)

        trainer.train_step = step_and_evaluate  # type: ignore[method-assign]
        assert finish(trainer)
    assert statuses == [0]
    found, expected = journal.read(url), journal.read(str(whole_run))
    apart = result(f"{tmp_path}/out", "knn")["metrics"]
    assert found[7].pop("knn_k5_t0.07_top1") == apart["knn_k5_t0.07_top1"]
    for ours, theirs in zip(found, expected, strict=True):
        assert {k: v for k, v in ours.items() if k not in TIMINGS} == {
            k: v for k, v in theirs.items() if k not in TIMINGS
        }
    lines = Path(url, "metrics.jsonl").read_text().splitlines()
    assert "knn_k5_t0.07_top1" in json.loads(lines[7])


@pytest.mark.parametrize(
    ("protocol", "rates", "stop"),
    [
        (["linear"], ["0.2", "0.02"], 7),
        (["linear", "--fast"], ["0.2", "0.02"], 7),
        (["finetune"], ["0.2", "1e9"], 30),  # the first training is over, and is the best
    ],
    ids=["linear", "fast", "finetune"],
)
def test_a_stopped_evaluation_goes_on(
    protocol: list[str],
    rates: list[str],
    stop: int,
    run: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its figures are those of one that was never stopped."""
    options = [run, "--epochs", "4", "--batch", "16", "--threads", "1", "--lr", *rates]
    assert evaluate.main([*protocol, *options, "--out", f"{tmp_path}/calm"]) == 0
    agreed = Preemption.agreed
    steps = []

    def stop_then(self: Preemption) -> bool:
        steps.append(1)
        if len(steps) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
            self.told.wait(10)
        return agreed(self)

    monkeypatch.setattr(Preemption, "agreed", stop_then)
    stopped = [*protocol, *options, "--out", f"{tmp_path}/stopped"]
    assert evaluate.main(stopped) == 0
    assert f"stopped after step {stop} by SIGTERM" in capsys.readouterr().out
    assert not list(tmp_path.glob("stopped/**/result.json"))
    assert evaluate.main(stopped) == 0
    assert f"resumed at step {stop}" in capsys.readouterr().out
    name = f"{protocol[0]}-online"
    calm, after = (result(f"{tmp_path}/{folder}", name) for folder in ("calm", "stopped"))
    assert after["table"] == calm["table"]
    weights = [next(tmp_path.glob(f"{f}/**/*.safetensors")) for f in ("calm", "stopped")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_two_processes_find_the_same(run: str, tmp_path: Path, ranks: Ranks) -> None:
    """Heads from random crops, and kNN."""
    for protocol, options in (("linear", LINEAR), ("knn", ["--threads", "1"])):
        one = [protocol, run, *options, "--precision", "fp64"]
        assert evaluate.main([*one, "--out", f"{tmp_path}/one"]) == 0
        assert ranks.run(evaluate.main, [*one, "--out", f"{tmp_path}/two"], size=2) == [0, 0]
        found = [result(f"{tmp_path}/{folder}", protocol)["table"] for folder in ("one", "two")]
        assert found[0] == found[1]
    heads = [load_file(next(tmp_path.glob(f"{f}/**/head.safetensors"))) for f in ("one", "two")]
    torch.testing.assert_close(heads[0]["fc.weight"], heads[1]["fc.weight"], rtol=1e-9, atol=1e-12)


def test_on_a_bucket(run: str, s3: str, tmp_path: Path, tiny_data: DataConfig) -> None:
    """Run, data and results there."""
    for name in ("train", "val"):
        folder = Path(getattr(tiny_data, name))
        for path in folder.iterdir():
            files.write(f"{s3}/data/{name}/{path.name}", path.read_bytes())
    for file in Path(run).glob("**/*"):
        if file.is_file():
            files.write(f"{s3}/run/{file.relative_to(run)}", file.read_bytes())
    data = ["--data.train", f"{s3}/data/train", "--data.val", f"{s3}/data/val", "--threads", "1"]
    assert evaluate.main(["linear", f"{s3}/run", *LINEAR, *data]) == 0
    here = [*LINEAR, "--out", str(tmp_path)]
    assert evaluate.main(["linear", run, *here]) == 0
    found = journal.read(f"{s3}/run")[-1]
    assert found["linear_top1"] == result(str(tmp_path), "linear")["metrics"]["linear_top1"]
    assert b"linear_top1" in files.read(f"{s3}/run/metrics.jsonl")
    formats = ["--format", "safetensors", "torchscript"]
    assert export.main([f"{s3}/run", f"{s3}/export", *formats, *data[2:4]]) == 0
    exported = ["card.json", "config.json", "encoder.safetensors", "encoder.ts"]
    assert files.list_names(f"{s3}/export") == exported
    knn = ["--size", "32", "--k", "5", *data, "--out", f"{s3}/of_file"]
    assert evaluate.main(["knn", f"{s3}/export/encoder.safetensors", *knn]) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["linear", "RUN", "--lr", "0"], "--lr must be from 1e-12"),
        (["linear", "RUN", "--batch", "4096"], "4096 is more than the 104 images to learn from"),
        (["linear", "RUN", "--epochs", "0.01", "--batch", "64"], "less than one step of --batch"),
        (["linear", "RUN", "--epochs", "nan"], "--epochs must be from"),
        (
            ["linear", "RUN", "--checkpoint", "5"],
            "checkpoint of step 5; there are: 12, 16, 20",
        ),
        (["linear", "RUN", "--checkpoint", "newest"], "latest, best or the number of a step"),
        (["linear", "RUN/checkpoints/step_00000012", "--checkpoint", "5"], "there are: none"),
        (["linear", "RUN", "--prefix", "a."], "--prefix is for files that others made"),
        (["linear", "FILE", "--checkpoint", "5"], "--checkpoint 5 is for runs"),
        (["knn", "--k", "5", "RUN"], "put CHECKPOINT right behind knn"),
        (["linear", "RUN", "--holdout", "1", "--fast"], "is held out to choose"),
        (["finetune", "RUN", "--holdout", "1", "--batch", "8"], "is held out to choose"),
        (["semi-supervised", "RUN", "--files", "RUN"], "no such file"),
        (["linear", "RUN/nothing"], "nothing there; give the URL of a run"),
        (["linear", "RUN/lease"], "no committed checkpoint there"),
        (["linear", "s3:/run"], "a URL has two slashes"),
        (["linear", "RUN", "--data.val", "RUN"], "no images there"),
        (["linear", "RUN", "--data.val", "RUN/none"], "no such folder; give shards"),
        (["linear", "RUN", "--data.val", "OTHER"], "data.val has other classes than data.train"),
        (["linear", "RUN", "--data.train", "PLAIN"], "has no labels, which an evaluation needs"),
        (["knn", "RUN", "--data.val", "PLAIN"], "has no labels, which an evaluation needs"),
        (["knn", "RUN", "--k", "0"], "--k must be from 1"),
        (["knn", "RUN", "--threads", "0"], "--threads must be from 1"),
        (["knn", "FILE"], "data.train is not set"),
        (["knn", "FILE", "--network", "target"], "target"),
        (["finetune", "RUN", "--network", "pixels"], "nothing to fine-tune"),
        (["finetune", "RUN", "--precision", "fp16"], "fp16 is not supported"),
        (
            ["semi-supervised", "RUN", "--fraction", "2"],
            "--fraction must be more than 0 and",
        ),
        (["semi-supervised", "RUN", "--files", "RUN/none"], "no such file"),
        (["linear", "RUN", "--epoch", "3"], "--epoch"),
        (["quadratic", "RUN"], "PROTOCOL is one of linear, logistic, knn"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(
    arguments: list[str],
    text: str,
    run: str,
    tmp_path: Path,
    pack_files: PackFiles,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"RUN": run, "OTHER": f"{tmp_path}/other", "PLAIN": f"{tmp_path}/plain"}
    places["FILE"] = f"{tmp_path}/encoder.safetensors"
    if "OTHER" in arguments:
        pack_files(places["OTHER"], {"ant/a.jpg": draw_photo(0, 40, 40)})
    if "PLAIN" in arguments:
        index = pack_files(places["PLAIN"], {"ant/a.jpg": draw_photo(0, 40, 40)})
        index.classes = []
        index.save()
    if "FILE" in arguments:
        save_file(resnet18().state_dict(), places["FILE"])
    given = []
    for argument in arguments:
        head, slash, tail = argument.partition("/")
        given.append(places.get(head, head) + slash + tail)
    assert evaluate.main([*given, "--out", f"{tmp_path}/out"]) == 1
    output = capsys.readouterr()
    lines = output.err.strip().splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("error: ")
    assert text in lines[0]
