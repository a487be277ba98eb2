"""Imagenette (or any ten-class ImageNet subset) at 128 pixels, with the official small setting.

Paper        The paper has no such row. The official code has this setting for a single machine.
Data         python launch/pack.py IMAGENETTE_FOLDER data/imagenette   (its train/ and val/)
Command      torchrun launch/train.py recipes/imagenette.py
Hardware     one GPU of 16 GB or more
Time         It has not been measured on a GPU yet.
Expected     about 92.3 top-1 on val, as reported for the official code, of the online head: the
             linear classifier that learns along with the encoder
"""

from engine.evaluation.during_training import ProbeConfig
from engine.method.byol import BYOLConfig
from engine.method.lars import LARSConfig
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from engine.recipe import Recipe
from shards.loader import DataConfig
from shards.order import BatchConfig
from shards.views import ViewsConfig

recipe = Recipe(
    run="runs/imagenette",
    batch=BatchConfig(size=256),
    model=BYOLConfig(encoder=ResNetConfig(depth=18, projection_shortcut=True)),
    views=ViewsConfig(size=128),
    schedule=ScheduleConfig(epochs=1000, base_lr=2.0, base_tau=0.996),
    optimizer=LARSConfig(weight_decay=1.5e-6),
    data=DataConfig(train="data/imagenette/train", val="data/imagenette/val", streams=32),
    probe=ProbeConfig(every="50 epochs"),
)
