"""CIFAR-10 at 32 pixels: ResNet-18 with the small-image stem.

Paper        The paper has no such row. This is its method with the usual small-image changes: a
             3x3 stem without max pooling, no blur (at 32 px it removes the detail), batch 512.
Data         python launch/pack.py CIFAR10_FOLDER data/cifar10   (class folders in train/ and test/)
Command      torchrun launch/train.py recipes/cifar10.py
Hardware     one GPU of 16 GB or more
Time         An epoch takes about 4 s on an H100 with 16 CPU cores, by 180 steps. The first start
             compiles for 80 s. It has not been run to its end.
Expected     Published figures for the same data and network are solo-learn's 92.6 top-1 of its
             online head at 1000 epochs, and lightly's 86.8 kNN at 200 epochs of batch 512.
"""

from engine.evaluation.during_training import ProbeConfig
from engine.method.byol import BYOLConfig
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from engine.recipe import Recipe
from shards.loader import DataConfig
from shards.order import BatchConfig
from shards.views import ViewConfig, ViewsConfig

recipe = Recipe(
    run="runs/cifar10",
    precision="bf16",
    batch=BatchConfig(size=512),
    model=BYOLConfig(encoder=ResNetConfig(depth=18, stem="cifar")),
    views=ViewsConfig(
        size=32,
        view1=ViewConfig(blur=0.0, solarize=0.0),
        view2=ViewConfig(blur=0.0, solarize=0.2),
    ),
    schedule=ScheduleConfig(epochs=1000, base_lr=2.0, base_tau=0.996),
    data=DataConfig(train="data/cifar10/train", val="data/cifar10/test", streams=32),
    probe=ProbeConfig(every="20 epochs", crop=1.0),
)
