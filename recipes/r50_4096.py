"""ResNet-50, batch 4096, 1000 epochs of ImageNet. This is the paper's main result.

Paper        table 1: 74.3 linear top-1
Data         python launch/pack.py IMAGENET_FOLDER s3://bucket/imagenet   (its train/ and val/)
Command      export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
             torchrun --nnodes=8 --nproc-per-node=8 --max-restarts=3
                 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 --rdzv-id=r50
                 --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
                 launch/train.py recipes/r50_4096.py
                 --data.train s3://bucket/imagenet/train --data.val s3://bucket/imagenet/val
                 --run-url s3://bucket/runs/r50_4096
Hardware     The paper used 512 TPU v3 cores. Here any number of GPUs up to 512 works, for instance
             64 GPUs with 64 images each. With fewer GPUs use --batch.micro, which changes which
             images share norm statistics.
Time         The paper took about 8 hours for 1000 epochs. It has not been measured here.
Expected     74.3 linear top-1, 91.6 top-5. The README of the official code has 74.0 to 74.5.
             --model.last-gamma one is how the networks of the paper's figures began. Its authors
             found no difference for this encoder.

The shorter schedules are in r50_4096_300ep.py, r50_4096_100ep.py and r50_4096_40ep.py.
"""

from dataclasses import replace

from engine.evaluation.during_training import ProbeConfig
from engine.method.byol import BYOLConfig
from engine.method.lars import LARSConfig
from engine.method.resnet import ResNetConfig
from engine.method.schedule import ScheduleConfig
from engine.recipe import Recipe
from engine.state.checkpoint import CheckpointConfig
from shards.loader import DataConfig
from shards.order import BatchConfig
from shards.views import ViewsConfig

recipe = Recipe(
    run="runs/r50_4096",
    precision="bf16",
    batch=BatchConfig(size=4096),
    model=BYOLConfig(encoder=ResNetConfig(depth=50), hidden=4096, projection=256),
    views=ViewsConfig(size=224),
    schedule=ScheduleConfig(epochs=1000, warmup="10 epochs", base_lr=0.2, base_tau=0.996),
    optimizer=LARSConfig(weight_decay=1.5e-6),
    data=DataConfig(train="data/imagenet/train", val="data/imagenet/val", streams=512),
    probe=ProbeConfig(every="20 epochs"),
    checkpoint=CheckpointConfig(every=1000),
)


def shortened(epochs: int, base_lr: float, base_tau: float) -> Recipe:
    """Return this recipe with one of the shorter schedules, whose weight decay is 1e-6."""
    return replace(
        recipe,
        run=f"runs/r50_4096_{epochs}ep",
        schedule=replace(recipe.schedule, epochs=epochs, base_lr=base_lr, base_tau=base_tau),
        optimizer=LARSConfig(weight_decay=1e-6),
    )
