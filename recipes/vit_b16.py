"""ViT-B/16 by AdamW, batch 1024, 300 epochs of ImageNet: BYOL on a vision transformer.

Paper        The paper trains ResNets only. That of MoCo v3 (arXiv 2104.02057) also trains ViT-B/16
             by BYOL, and has these rates in its figure 6: AdamW, 1e-4 at batch size 256 and weight
             decay 0.03. The 40 epochs of warm-up and tau from 0.99 are its own for all its
             transformers. Heads and loss are BYOL's.
Data         ImageNet in shards, made by launch/pack.py (one process for each machine)
Command      torchrun --nproc-per-node=8 launch/train.py recipes/vit_b16.py \\
                 --data.train URL --data.val URL --run-url URL
Hardware     8 GPUs of 80 GB, by calculation only: --explain tells what your GPUs hold, and
             --parallel.recompute makes it less
Time         It has not been measured here.
Expected     It is not known, because this recipe has not been run. In table 4 of that paper BYOL
             reaches 73.9 linear top-1 with ViT-B/16 after 300 epochs, by heads of its own and with
             the first layer as it was drawn, and MoCo v3 76.5. The paper of DINO (arXiv 2104.14294)
             has BYOL with ViT-S/16.

What is known of such trainings (MoCo v3, section 4): at large batches and rates transformers are
unstable, and then lose 1 to 3 points of accuracy without a visible fault. Batches of 1024 and 2048
train smoothly, and those of 4096 do not. The gradients of the first layer, the patch projection,
have spikes before those of other layers. MoCo v3 leaves that layer as it was drawn, also in its
experiments with BYOL, and finds that clipping its gradients does nearly the same. Here it is
trained, as torchvision draws it, with learned position embeddings. So look at grad_norm in the log,
and lower schedule.base_lr when it has spikes.
"""

from engine.evaluation.during_training import ProbeConfig
from engine.method.adamw import AdamWConfig
from engine.method.byol import BYOLConfig
from engine.method.schedule import ScheduleConfig
from engine.method.torchvision_encoder import TorchvisionConfig
from engine.recipe import Recipe
from shards.loader import DataConfig
from shards.order import BatchConfig

recipe = Recipe(
    run="runs/vit_b16",
    batch=BatchConfig(size=1024),
    model=BYOLConfig(encoder=TorchvisionConfig("vit_b_16"), hidden=4096, projection=256),
    schedule=ScheduleConfig(epochs=300, warmup="40 epochs", base_lr=1e-4, base_tau=0.99),
    optimizer=AdamWConfig(weight_decay=0.03),
    precision="bf16",
    data=DataConfig(train="data/imagenet/train", val="data/imagenet/val", streams=256),
    probe=ProbeConfig(every="5 epochs"),
)
