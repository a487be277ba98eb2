"""data.decode gpu in a run: refused without a GPU, else the run of data.decode cpu up to rounding.

The decoder is replaced by the CPU's, and the check for a GPU by none.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from engine import data as engine_data
from engine.evaluation.during_training import ProbeConfig
from launch.train import main
from shards import device_crops
from shards.errors import InputError
from shards.index import Index
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.places import RECIPES
from tests.helpers.training import open_trainer, train


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it is not refused")
def test_a_run_without_a_gpu_is_refused_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [f"--data.train={tmp_path}/train", f"--data.val={tmp_path}/val"]
    arguments = [str(RECIPES / "quickstart.py"), *places, f"--run={tmp_path}/run"]
    assert main([*arguments, "--data.decode", "gpu"]) == 1
    error = capsys.readouterr().err.strip()
    assert error.endswith("this process has none: give --data.decode cpu")
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_a_run_is_that_of_the_cpu_up_to_rounding(
    packed: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Tensor] = []

    def decode(encoded: list[Tensor], _: torch.device) -> list[Tensor]:
        decoded.extend(encoded)
        images: list[Tensor] = decode_jpeg(encoded, ImageReadMode.RGB)
        return images

    monkeypatch.setattr(device_crops, "decode_on_device", decode)
    monkeypatch.setattr(engine_data, "check_device", lambda _: None)
    data = DataConfig(train=packed.url, streams=4)
    recipe = tiny.recipe(data, tmp_path / "cpu", steps=4, probe=ProbeConfig())
    train(recipe)
    assert not decoded
    on_gpu = dataclasses.replace(
        recipe, run=str(tmp_path / "gpu"), data=dataclasses.replace(data, decode="gpu")
    )
    train(dataclasses.replace(on_gpu, steps=2))
    train(on_gpu)  # it continues
    assert decoded
    for ours, cpus in zip(lines(tmp_path / "gpu"), lines(tmp_path / "cpu"), strict=True):
        assert ours["data_digest"] == cpus["data_digest"]
        assert ours["loss"] == pytest.approx(cpus["loss"], rel=0.01)
    with pytest.raises(InputError, match=r"data\.decode: there gpu, here cpu"):
        open_trainer(dataclasses.replace(recipe, run=str(tmp_path / "gpu")))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
