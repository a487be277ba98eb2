"""CIFAR-10 in four minutes on one CPU core: what a smaller batch costs, with the rule and without.

Paper        The paper has no such row. Its ablation of the batch size and its appendix have batches
             of 64 to 4096 on ImageNet. Here the batch of 1024 stands for the paper's 4096.
Data         as in recipes/cifar10.py
Command      python launch/train.py recipes/small_batches.py --threads 1
Hardware     one CPU core, 4 GB of memory. With 3, 6 or 7 threads the process crashes where the CPU
             has AVX-512, by an error of oneDNN in torch 2.14.1: give --threads 1, 2 or 4.
Time         4 min
Expected     kNN 32.6% (raw pixels 41.7%, untrained encoder 28.2%): 3 epochs are far too few for
             good features. recipes/README.md compares 33 such trainings, under "Few GPUs and small
             batches".
"""

from dataclasses import replace

from engine.method.byol import BYOLConfig
from engine.method.lars import LARSConfig
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from recipes.cifar10 import recipe as base
from shards.order import BatchConfig

recipe = replace(
    base,
    run="runs/small_batches",
    compile=False,
    precision="fp32",
    batch=BatchConfig(size=1024),
    model=BYOLConfig(
        encoder=ResNetConfig(depth=10, width=0.125, stem="cifar"), hidden=256, projection=64
    ),
    views=replace(base.views, size=24),
    schedule=ScheduleConfig(
        epochs=3, warmup="0.3 epochs", base_lr=1.0, base_tau=0.97, paper_batch=1024
    ),
    optimizer=LARSConfig(weight_decay=1e-6),
    probe=replace(base.probe, every="1 epoch", baseline=True),
)
