"""Train BYOL with lightly's parts, as lightly's example for plain PyTorch puts them together."""

import copy
import io
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from engine.encoder.torchvision_twin import stock_network
from engine.method.adamw import AdamWConfig
from engine.method.lars import LARSConfig
from engine.method.precision import autocast
from engine.recipe import Recipe
from launch.benchmarks.measuring import CUDA
from shards.errors import InputError

REMEDY = "pip install 'byol-engine[peers]'"
TINY = 32  # pixels; lightly's examples for CIFAR-10 blur no images that are as small


class LightlyBYOL:
    """lightly's heads, loss, optimizer and moving average around a recipe's torchvision network."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        """Build the networks and the optimizer. Raises ImportError without lightly."""
        from lightly.loss import NegativeCosineSimilarity
        from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
        from lightly.models.utils import deactivate_requires_grad, get_weight_decay_parameters

        model = recipe.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.backbone = stock_network(model.encoder, recipe.views.size)
            features = _count_features(self.backbone, recipe.views.size)
            projector = BYOLProjectionHead(features, model.hidden, model.projection)
            self.online = nn.Sequential(self.backbone, projector).to(device)
            self.target = copy.deepcopy(self.online)
            predictor = BYOLPredictionHead(model.projection, model.hidden, model.projection)
            self.prediction_head = predictor.to(device)
        deactivate_requires_grad(self.target)
        self.criterion = NegativeCosineSimilarity()
        self.autocast = partial(autocast, recipe.precision, device)
        decayed, others = get_weight_decay_parameters([self.online, self.prediction_head])
        self.optimizer = _build_optimizer(recipe, decayed, others)

    def step(self, view1: Tensor, view2: Tensor, lr: float, tau: float) -> Tensor:
        """Make one update on views [B, 3, S, S], and return the loss []."""
        from lightly.models.utils import update_momentum

        update_momentum(self.online, self.target, m=tau)
        with self.autocast():
            p1, p2 = (self.prediction_head(self.online(view)) for view in (view1, view2))
            with torch.no_grad():
                z1, z2 = self.target(view1), self.target(view2)
            loss: Tensor = 0.5 * (self.criterion(p1, z2) + self.criterion(p2, z1))
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def load_views(
    contents: list[bytes],
    order: Sampler[int],
    recipe: Recipe,
    device: torch.device,
    workers: int,
) -> Generator[tuple[Tensor, Tensor]]:
    """Yield both views [B, 3, S, S] of the images, by lightly's BYOLTransform in a DataLoader.

    Args:
        contents: Image files in memory.
        order: The places of the images, one after the other.
        workers: Number of worker processes.
    """
    from lightly.transforms.byol_transform import (
        BYOLTransform,
        BYOLView1Transform,
        BYOLView2Transform,
    )

    size = recipe.views.size
    blur = {"gaussian_blur": 0.0} if size <= TINY else {}
    transform = BYOLTransform(
        BYOLView1Transform(input_size=size, **blur), BYOLView2Transform(input_size=size, **blur)
    )
    for view1, view2 in DataLoader(
        _Images(contents, transform),
        recipe.batch.size,
        sampler=order,
        num_workers=workers,
        drop_last=True,
        pin_memory=CUDA,
        multiprocessing_context="fork",  # so that the images' bytes are shared and not sent
    ):
        yield view1.to(device, non_blocking=True), view2.to(device, non_blocking=True)


class _Images(Dataset[Any]):
    """Both views of image files that are in memory."""

    def __init__(self, contents: list[bytes], transform: Callable[[Image.Image], Any]) -> None:
        self.contents, self.transform = contents, transform

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, place: int) -> Any:
        return self.transform(Image.open(io.BytesIO(self.contents[place])).convert("RGB"))


def check_installed() -> None:
    """Raise InputError when lightly is not installed."""
    try:
        import lightly  # noqa: F401
    except ImportError as error:
        raise InputError(f"lightly is not installed ({error}): {REMEDY}") from None


def check_optimizer(recipe: Recipe) -> None:
    """Raise InputError when the recipe's optimizer is one that is not measured beside lightly."""
    if not isinstance(recipe.optimizer, LARSConfig | AdamWConfig):
        raise InputError(
            f"--recipe has the optimizer {type(recipe.optimizer).__name__}, and lightly is "
            "measured with LARS or AdamW: choose another recipe"
        )


def _build_optimizer(
    recipe: Recipe, decayed: list[Tensor], others: list[Tensor]
) -> torch.optim.Optimizer:
    from lightly.utils.lars import LARS

    check_optimizer(recipe)
    config, lr = recipe.optimizer, recipe.schedule.peak_lr(recipe.batch.size)
    decay = config.weight_decay
    groups: list[Any] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(groups, lr=lr, betas=config.betas, weight_decay=decay)
    assert isinstance(config, LARSConfig)
    found: torch.optim.Optimizer = LARS(groups, lr=lr, momentum=config.momentum, weight_decay=decay)
    return found


@torch.no_grad()
def _count_features(network: nn.Module, size: int) -> int:
    """Return the number of features of an image of `size` pixels."""
    count = network.eval()(torch.zeros(1, 3, size, size)).shape[1]
    network.train()
    return int(count)
