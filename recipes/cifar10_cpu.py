"""CIFAR-10 in forty minutes on two CPU cores, for users who have no GPU yet.

Paper        The paper has no such row. This trains a ResNet-10 of a quarter of the width with the
             small-image stem for 20 epochs, with AdamW.
Data         as in recipes/cifar10.py
Command      torchrun launch/train.py recipes/cifar10_cpu.py
Hardware     two CPU cores with bfloat16 instructions (otherwise use --precision fp32), 2 GB of
             memory
Time         37 min
Expected     kNN 53.1% (raw pixels 41.5%, untrained encoder 31.9%); linear --fast 59.2%
"""

from dataclasses import replace

from engine.method.adamw import AdamWConfig
from engine.method.byol import BYOLConfig
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from recipes.cifar10 import recipe as base
from shards.order import BatchConfig

recipe = replace(
    base,
    run="runs/cifar10_cpu",
    compile=False,
    batch=BatchConfig(size=128),
    model=BYOLConfig(
        encoder=ResNetConfig(depth=10, width=0.25, stem="cifar"), hidden=512, projection=128
    ),
    schedule=ScheduleConfig(epochs=20, warmup="1 epoch", base_lr=4e-3, base_tau=0.98),
    optimizer=AdamWConfig(weight_decay=1e-4),
    probe=replace(base.probe, every="5 epochs", baseline=True),
)
