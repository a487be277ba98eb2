"""The synchronized batch norm that one writes by hand where torch has none: on CPUs."""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class HandMadeSyncNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm of [B, C] or [B, C, H, W] over the rows of all processes, each with equally many.

    An all-reduce of autograd sums the mean and the mean square of the processes, and its backward
    sums their gradients.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def _check_input_dim(self, x: Tensor) -> None:
        """Any shape will do."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        over = [0, *range(2, x.ndim)]
        channels = (1, -1, *(1 for _ in over[1:]))
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        moments = torch.cat([wide.mean(over), wide.square().mean(over)])  # [2C]
        size = dist.get_world_size()
        mean, square = (all_reduce(moments) / size).chunk(2)
        variance = square - mean.square()
        with torch.no_grad():
            rows = size * x.numel() // x.shape[1]
            momentum = 0.1 if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.to(self.running_mean), momentum)
            unbiased = variance * rows / (rows - 1)
            self.running_var.lerp_(unbiased.to(self.running_var), momentum)
            self.num_batches_tracked.add_(1)
        scale = (variance + self.eps).rsqrt() * self.weight
        shift = self.bias - mean * scale
        normalized = torch.addcmul(shift.view(channels), wide, scale.view(channels))
        return normalized.to(x.dtype)


def synchronize_by_hand(module: nn.Module) -> nn.Module:
    """Replace torch's batch norms by hand-made ones, in place, and return the module."""
    # Torch recommends functional collectives, which the engine uses. Stock is what is usual.
    warnings.filterwarnings("ignore", message=r"torch\.distributed\.nn\.functional")
    for name, child in module.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            replacement = HandMadeSyncNorm(child.num_features, child.eps, child.momentum)
            replacement.load_state_dict(child.state_dict())
            setattr(module, name, replacement)
        else:
            synchronize_by_hand(child)
    return module
