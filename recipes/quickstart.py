"""Watch an encoder learn in ten minutes on two CPU cores, on images drawn by code.

Paper        The paper has no such row. This is its method on a ResNet-10 of a quarter of the width,
             with AdamW in place of LARS, because LARS needs large batches and long schedules.
Data         The first start draws 8 classes of gray textures (shards/making/synthetic.py) and
             writes them to data/quickstart.
Command      torchrun launch/train.py recipes/quickstart.py
Hardware     two CPU cores, 2 GB of memory
Time         10 min 20 s on a server's CPU without AVX-512. A CPU that has bf16 instructions is
             faster with --precision bf16; one that lacks them takes hours with it.
Expected     kNN, k = 20: 89.3% (raw pixels 53.0%, untrained encoder 42.0%);
             linear --fast: 86.9% (raw pixels 14.5%, untrained encoder 30.6%)
"""

from engine.evaluation.during_training import ProbeConfig
from engine.log.metrics import LogConfig
from engine.method.adamw import AdamWConfig
from engine.method.byol import BYOLConfig
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from engine.recipe import Recipe
from engine.state.checkpoint import CheckpointConfig
from shards.loader import DataConfig
from shards.order import BatchConfig
from shards.views import ViewsConfig

recipe = Recipe(
    run="runs/quickstart",
    compile=False,
    precision="fp32",
    batch=BatchConfig(size=128),
    model=BYOLConfig(
        encoder=ResNetConfig(depth=10, width=0.25, stem="cifar"), hidden=256, projection=64
    ),
    views=ViewsConfig(size=32),
    schedule=ScheduleConfig(epochs=14, warmup="1 epoch", base_lr=4e-3, base_tau=0.97),
    optimizer=AdamWConfig(weight_decay=1e-4),
    data=DataConfig(train="data/quickstart/train", val="data/quickstart/val", draw=8000, streams=8),
    probe=ProbeConfig(every="5 epochs", neighbours=20, crop=1.0, baseline=True, head_lr=0.4),
    checkpoint=CheckpointConfig(every=500),
    log=LogConfig(every=25),
)
