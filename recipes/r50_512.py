"""ResNet-50, batch 512, 1000 epochs of ImageNet. This is the paper's setting for smaller batches.

Paper        appendix G: 73.7 linear top-1, with base learning rate 0.4, tau 0.9995 and weight decay
             1.5e-6, beside 74.3 at batch 4096
Data         python launch/pack.py IMAGENET_FOLDER data/imagenet   (its train/ and val/)
Command      torchrun --nproc-per-node=4 launch/train.py recipes/r50_512.py
                 --data.train data/imagenet/train --data.val data/imagenet/val
Hardware     GPUs with memory for 512 images together, for instance four with 128 images each
Time         The paper took about 4 days on 64 TPU v3 cores. It has not been run here.
Expected     73.7 linear top-1
"""

from dataclasses import replace

from recipes.r50_4096 import recipe as base
from shards.order import BatchConfig

recipe = replace(
    base,
    run="runs/r50_512",
    batch=BatchConfig(size=512),
    schedule=replace(base.schedule, base_lr=0.4, base_tau=0.9995),
    data=replace(base.data, streams=64),
    checkpoint=replace(base.checkpoint, every="1 epoch"),
)
