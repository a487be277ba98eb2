"""Imagenette (or any ten-class ImageNet subset) at 128 pixels, with the official small setting.

Paper        The paper has no such row. The official code has this setting for a single machine.
Data         imagenette2-160, whose images have 160 pixels on their shorter side:
             python launch/pack.py IMAGENETTE_FOLDER data/imagenette   (its train/ and val/)
Command      torchrun launch/train.py recipes/imagenette.py
Hardware     one GPU of 16 GB or more
Time         It has not been measured on a GPU yet.
Expected     about 92.3 top-1 on val, as reported for the official code, of the online head: the
             linear classifier that learns along with the encoder

Decay        The weight decay of this setting is 1e-6, and not that of 1000 epochs of ImageNet.
Crop         Its instructions replace 224 by 128 everywhere, so that the central crop of evaluations
             has 128 / (128 + 32) of the shorter side. At 224 pixels that is 0.875.
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
    optimizer=LARSConfig(weight_decay=1e-6),
    data=DataConfig(train="data/imagenette/train", val="data/imagenette/val", streams=32),
    probe=ProbeConfig(every="50 epochs", crop=0.8),
)
