"""BYOL as it is usually written in eager PyTorch. Our training step is measured against it."""

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from engine.encoder.torchvision_twin import stock_network
from engine.method import byol
from engine.method.adamw import AdamWConfig
from engine.method.byol import Online, Target, regression_loss
from engine.method.encoders import BackboneConfig
from engine.method.lars import LARS, LARSConfig
from engine.method.norm import BatchNorm
from engine.method.optimizer import parameter_groups
from engine.method.precision import autocast
from engine.method.sgd import SGDConfig
from engine.method.torch_optimizer import TorchOptimizerConfig
from engine.method.torch_options import find_optimizer, read_options
from engine.recipe import Recipe
from launch.benchmarks.stock_norm import synchronize_by_hand

_OptimizerConfig = LARSConfig | AdamWConfig | SGDConfig | TorchOptimizerConfig
_Outputs = tuple[Tensor, Tensor, Tensor]  # projection, prediction, logits


class Stock:
    """Trains BYOL one network, one view and one tensor at a time.

    When there is a process group, it uses DDP and torch's synchronized norm. Torch has none for
    CPUs, so there it is one that is written by hand in the usual way.
    """

    def __init__(self, recipe: Recipe, classes: int, device: torch.device) -> None:
        """Build the networks with the weights that a Trainer of the same recipe starts from."""
        online, target = byol.build(recipe.model, classes, recipe.seed, recipe.views.size)
        config, size = recipe.model.encoder, recipe.views.size
        self.online: nn.Module = _StockNetwork(online, config, size).to(device)
        self.target: nn.Module = (
            _StockNetwork(target, config, size).to(device).requires_grad_(False)
        )
        self.see: Callable[[Tensor], _Outputs] = self.online
        if dist.is_initialized():
            cuda = device.type == "cuda"
            convert = nn.SyncBatchNorm.convert_sync_batchnorm if cuda else synchronize_by_hand
            self.online, self.target = convert(self.online), convert(self.target)
            self.see = _ddp(self.online)
        self.optimizer = _stock_optimizer(recipe.optimizer, self.online)
        self.clip = recipe.clip
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
        self.autocast = partial(autocast, recipe.precision, device)

    def step(self, view1: Tensor, view2: Tensor, labels: Tensor, lr: float, tau: float) -> Tensor:
        """Make one update on views [B, 3, S, S], and return the loss [] before the update."""
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            with self.autocast():
                (_, q1, logits), (_, q2, _) = self.see(view1), self.see(view2)
                with torch.no_grad():
                    (z1, _, _), (z2, _, _) = self.target(view1), self.target(view2)
            loss = (regression_loss(q1, z2) + regression_loss(q2, z1)).mean()
            self.scaler.scale(loss + F.cross_entropy(logits, labels)).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._clip_gradients()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        online = dict(self.online.named_parameters())
        with torch.no_grad():
            for name, p in self.target.named_parameters():
                p.mul_(tau).add_(online[name], alpha=1 - tau)
        return loss.detach()

    def _clip_gradients(self) -> None:
        if self.clip.off:
            return
        self.scaler.unscale_(self.optimizer)
        if self.clip.value:
            nn.utils.clip_grad_value_(self.online.parameters(), self.clip.value)
        if self.clip.norm:
            nn.utils.clip_grad_norm_(self.online.parameters(), self.clip.norm)


def _ddp(network: nn.Module) -> DistributedDataParallel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch renames broadcast_buffers
        # Two forward passes come before the backward pass. By default each of them begins by
        # overwriting the running statistics. The first one has saved these for its backward pass,
        # so torch 2.11 raises (https://github.com/pytorch/pytorch/issues/175024, fixed later).
        return DistributedDataParallel(network, broadcast_buffers=False)


class _StockNetwork(nn.Module):
    """Our network with torch's batch norm, and with torchvision's encoder where it has the same."""

    def __init__(self, ours: Online | Target, config: BackboneConfig, size: int) -> None:
        super().__init__()
        self.encoder = stock_network(config, size)
        self.encoder.load_state_dict(ours.encoder.stock_state())
        self.projector = _use_torch_norm(ours.projector, nn.BatchNorm1d)
        self.predictor: nn.Module = nn.Identity()
        self.classifier: nn.Module = nn.Identity()
        if isinstance(ours, Online):
            assert ours.classifier is not None  # the drawn images have labels, so there is one
            self.predictor = _use_torch_norm(ours.predictor, nn.BatchNorm1d)
            self.classifier = ours.classifier

    def forward(self, images: Tensor) -> _Outputs:
        """Map images [B, 3, S, S] to projection, prediction and logits."""
        features = self.encoder(images)
        projection = self.projector(features)
        return projection, self.predictor(projection), self.classifier(features.detach())


def _use_torch_norm(module: nn.Module, norm: type[nn.BatchNorm1d | nn.BatchNorm2d]) -> nn.Module:
    """Replace our batch norms by torch's, in place, and return the module."""
    for name, child in module.named_children():
        if isinstance(child, BatchNorm):
            replacement = norm(len(child.weight), child.eps, child.momentum)
            replacement.load_state_dict(child.state_dict())
            setattr(module, name, replacement)
        else:
            _use_torch_norm(child, norm)
    return module


def _stock_optimizer(config: _OptimizerConfig, module: nn.Module) -> Optimizer:
    """Return torch's optimizer. It has none of LARS, nor any with LARS's adaptation around it."""
    groups = parameter_groups(module)
    if isinstance(config, LARSConfig):
        return StockLARS(groups, config.momentum, config.weight_decay, config.trust_coefficient)
    for group in groups:
        group.setdefault("weight_decay", config.weight_decay)
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas)
    if isinstance(config, SGDConfig):
        return torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov)
    options = read_options(config.name, config.options)
    return find_optimizer(config.name)(groups, lr=0.0, **options)  # type: ignore[call-arg]


class StockLARS(LARS):
    """LARS that makes the same update for one tensor after the other."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad.add(p, alpha=group["weight_decay"])
                if group["adapt"]:
                    length, step = p.norm(), update.norm()
                    ratio = group["trust_coefficient"] * length / step
                    update *= torch.where((length > 0) & (step > 0), ratio, 1.0)
                momentum = self.state[p]["momentum_buffer"]
                momentum.mul_(group["momentum"]).add_(update)
                p.add_(momentum, alpha=-group["lr"])
