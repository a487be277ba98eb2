"""Your own images, from some hundred to a hundred thousand, on one GPU or on CPU cores.

Copy this file and change what your images need: python launch/train.py my_images.py. Or use it as
it is, with fields on the command line.

Paper        The paper has no such row. The network is that of the official small setting, and the
             optimizer is AdamW, because LARS needs large batches.
Data         python launch/pack.py IMAGES data/mine   (train/ and val/, or --data.train data/mine)
Command      torchrun launch/train.py recipes/own_images.py --data.train data/mine/train
                 --data.val data/mine/val --run-url runs/mine
             Images without labels need --data.val '', or labeled sets of yours for the
             evaluations: --probe.train LABELED/train --probe.val LABELED/val.
Hardware     one GPU of 8 GB or more. On CPU cores add --model.encoder.depth 10
             --model.encoder.width 0.25 --model.hidden 512 --model.projection 128
             --views.size 64 --schedule.epochs 50.
Time         It has not been measured on a GPU yet.
Expected     It depends on the images. Compare kNN with the untrained encoder and with raw pixels,
             which --probe.baseline measures. kNN first falls below the untrained encoder, and takes
             some hundred steps to rise above it: with 1,000 images, which have 15 steps an epoch,
             that is 20 epochs or more. recipes/README.md has figures of 1,500 images.

Size         --views.size is the side of what the network sees. Take the side at which you can still
             tell the classes apart: 32 for icons, 128 for objects, 224 for photographs with detail.
Stem         The usual stem halves the image twice. For images of 32 to 64 pixels take
             --model.encoder.stem cifar, which keeps their detail and costs several times the time.
Epochs       The network sees about 2.5 million images, in at most 1000 epochs. Fewer epochs are
             quicker and worse; the schedule always fits the length. A run is evaluated and saved
             after each tenth of its epochs, also of those that --schedule.epochs gives.
Batch        An epoch has at least 8 batches of at most 256 images. Larger batches are better where
             memory allows.
"""

from engine import (
    AdamWConfig,
    BatchConfig,
    BYOLConfig,
    CheckpointConfig,
    DataConfig,
    ProbeConfig,
    Recipe,
    ResNetConfig,
    ScheduleConfig,
    ViewsConfig,
)

SEEN = 2_500_000  # images that the network sees in the whole training, each as two views


def recipe_for(images: int, epochs: float | None = None) -> Recipe:
    """Return the recipe for this number of training images, and of epochs where it is given."""
    batch = 2
    while batch < 256 and batch * 2 * 8 <= images:
        batch *= 2
    if epochs is None:
        epochs = min(1000, max(20, SEEN // images))
    tenth = f"{max(1, epochs // 10):.0f} epochs"
    return Recipe(
        run="runs/own_images",
        compile=False,
        batch=BatchConfig(size=batch),
        model=BYOLConfig(encoder=ResNetConfig(depth=18)),
        views=ViewsConfig(size=128),
        schedule=ScheduleConfig(
            epochs=epochs,
            warmup=f"{min(5, epochs / 4):.4f} epochs",
            base_lr=2e-3,
            base_tau=0.99,
        ),
        optimizer=AdamWConfig(weight_decay=1e-4),
        data=DataConfig(train="data/mine/train", val="data/mine/val", streams=min(16, batch)),
        probe=ProbeConfig(every=tenth, neighbours=20),
        checkpoint=CheckpointConfig(every=tenth),
    )


recipe = recipe_for(images=4000)
