"""Make a run that takes seconds: a small network on drawn images."""

import dataclasses
from pathlib import Path
from typing import Any

from engine.evaluation.during_training import ProbeConfig
from engine.log.metrics import LogConfig
from engine.method.byol import BYOLConfig
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from engine.recipe import Recipe
from engine.state.checkpoint import CheckpointConfig
from shards.loader import DataConfig
from shards.making import synthetic
from shards.order import BatchConfig
from shards.views import ViewsConfig

NO_PROBE = ProbeConfig()
SAMPLES = 104  # An epoch has 6 batches of 16, and 8 samples are left over.


def draw_data(folder: Path) -> DataConfig:
    """Draw a training and a validation set, and return the config that names their places."""
    synthetic.write(f"{folder}/train", SAMPLES, 32, seed=0)
    synthetic.write(f"{folder}/val", 40, 32, seed=1)
    return DataConfig(train=f"{folder}/train", val=f"{folder}/val", streams=4)


def recipe(data: DataConfig, run: Path | str, **changes: Any) -> Recipe:
    """Return a recipe of 20 steps of 16 images, evaluated every 5 steps and logged at each.

    Args:
        changes: Replace fields of the recipe.
    """
    base = Recipe(
        run=str(run),
        threads=1,
        compile=False,
        batch=BatchConfig(size=16),
        model=BYOLConfig(encoder=ResNetConfig(depth=10, width=0.125), hidden=32, projection=16),
        views=ViewsConfig(size=32),
        schedule=ScheduleConfig(epochs=20 * 16 / SAMPLES, warmup="0.5 epochs", base_lr=2.0),
        data=data,
        probe=ProbeConfig(every=5, neighbours=5),
        checkpoint=CheckpointConfig(every=4),
        log=LogConfig(every=1),
    )
    return dataclasses.replace(base, **changes)
