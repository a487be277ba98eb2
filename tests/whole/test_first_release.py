"""What the first release wrote is still read: a packed set, and a run that goes on.

tests/golden/first_release.tar.gz has, written by the commit before the house was rebuilt: data/, 32
packed images; run/, two of the eight steps of a tiny network on them; tensors.json, the CRC32 of
each of its tensors.
"""

import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.method.byol import BYOLConfig
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from engine.recipe import Recipe
from shards import index as indexes
from shards.center_crops import CropReader
from shards.loader import DataConfig
from shards.order import BatchConfig
from shards.views import ViewsConfig
from tests.helpers.places import GOLDEN
from tests.helpers.training import finish, training

pytestmark = pytest.mark.versions


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files, in the current folder, as they were when they were written."""
    with tarfile.open(GOLDEN / "first_release.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(**changes: Any) -> Recipe:
    network = ResNetConfig(depth=10, width=1 / 64, stem="cifar")
    given: dict[str, Any] = {
        "batch": BatchConfig(size=8),
        "model": BYOLConfig(encoder=network, hidden=8, projection=8),
        "views": ViewsConfig(size=16),
        "schedule": ScheduleConfig(epochs=2, warmup="0.5 epochs"),
        "data": DataConfig(train="data", streams=4),
    }
    return Recipe(run="run", threads=1, compile=False, **given | changes)


def crcs(state: dict[str, Any], prefix: str = "") -> dict[str, int]:
    found: dict[str, int] = {}
    for name, value in state.items():
        if isinstance(value, dict):
            found |= crcs(value, f"{prefix}{name}/")
        else:
            content = value.detach().contiguous().numpy().tobytes()
            found[f"{prefix}{name}"] = zlib.crc32(content)
    return found


def test_a_packed_set_is_read(release: Path) -> None:
    index = indexes.load("data", "data.train")
    assert index.digest == json.loads((release / "data" / "index.json").read_text())["digest"]
    reader = CropReader(16, 1.0, threads=1, corrupt=0, report=pytest.fail)
    batches = list(reader.read(index))
    assert torch.cat([batch.ids for batch in batches]).tolist() == list(range(32))
    assert index.classes[0] == "stripes"


def test_a_run_goes_on(release: Path) -> None:
    written = json.loads((release / "tensors.json").read_text())
    with training(recipe()) as trainer:
        assert trainer.step == 2
        found = crcs(trainer.state())
        assert {name: found[name] for name in written} == written
        assert found.keys() == written.keys()
        assert finish(trainer)
    lines = (release / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines][:2] == [1, 2]
    assert (release / "run" / "checkpoints" / "step_00000008" / "commit.json").exists()
