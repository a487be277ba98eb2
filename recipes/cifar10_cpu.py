"""CIFAR-10 in three quarters of an hour on two CPU cores: for those who have no GPU yet.

Paper        none. A quarter of ResNet-18's width with the ImageNet stem (at 32 px eight times
             as fast as the small-image one), 40 epochs, AdamW
Data         as recipes/cifar10.py
Command      torchrun launch/train.py recipes/cifar10_cpu.py
Hardware     two CPU cores, 3 GB of memory
Time         see the README's results
Expected     see the README's results
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
    model=BYOLConfig(encoder=ResNetConfig(depth=18, width=0.25), hidden=512, projection=128),
    schedule=ScheduleConfig(epochs=40, warmup_epochs=2, base_lr=2e-3, base_tau=0.99),
    optimizer=AdamWConfig(weight_decay=1e-4),
    probe=replace(base.probe, every=780, baseline=True),  # 4 epochs
)
