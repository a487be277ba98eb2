"""CIFAR-10 in an hour on two CPU cores: a quarter of ResNet-18's width, 20 epochs, AdamW.

Paper        no row; a real data set for those who have no GPU yet
Data         as recipes/cifar10.py
Command      torchrun launch/train.py recipes/cifar10_cpu.py
"""

from dataclasses import replace

from engine.byol import BYOLConfig
from engine.lars import AdamWConfig
from engine.resnet import ResNetConfig
from engine.schedule import ScheduleConfig
from recipes.cifar10 import recipe as base
from shards.order import BatchConfig

recipe = replace(
    base,
    run="runs/cifar10_cpu",
    compile=False,
    batch=BatchConfig(size=256),
    model=BYOLConfig(
        encoder=ResNetConfig(depth=18, width=0.25, stem="cifar"), hidden=512, projection=128
    ),
    schedule=ScheduleConfig(epochs=20, warmup_epochs=1, base_lr=2e-3, base_tau=0.98),
    optimizer=AdamWConfig(weight_decay=1e-4),
    probe=replace(base.probe, every=780, baseline=True),  # 4 epochs
)
