"""In which floating-point format a step computes, and what becomes of one that is not finite.

Parameters, statistics, the loss, LARS norms and the moving average are float32 (float64 to verify).
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from engine.method.local_shards import local

Precision = Literal["fp64", "fp32", "bf16", "fp16"]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 2.0**8  # of a row's loss: what 2**16 makes of a mean over 256 rows
GROWTH_STEPS = 2000  # finite ones, until the scale doubles
MOST_SKIPS = 20  # skipped steps in a row: a row's loss is then scaled by less than 2**-10


def parameter_dtype(precision: Precision) -> torch.dtype:
    """The dtype of parameters, statistics, optimizer state and of what is sent into the network."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context of the forward passes: half precision where it is safe, or nothing."""
    half = _HALF.get(precision)
    return torch.autocast(device.type, half, enabled=half is not None)


class StepGuard:
    """Counts skipped steps and, in fp16, keeps the factor on the loss that suits the gradients.

    Everything stays on the device: the host never waits for the step that is under way. The loss
    scale halves at a skipped step and doubles after 2000 others (Micikevicius et al.,
    arXiv 1710.03740). What overflows does not depend on the number of processes.
    """

    def __init__(
        self, precision: Precision, device: torch.device, batch: int, processes: int
    ) -> None:
        """`scale` [] float32, of the mean over the global batch, is None where none is needed.

        Args:
            batch: Rows of the global batch.
            processes: That gradients are averaged over.
        """
        self._processes = processes
        self.scale: Tensor | None = None
        if precision == "fp16":
            power_of_2 = 2 ** (batch - 1).bit_length()  # scaling then rounds nothing
            self.scale = torch.full((), FIRST_SCALE * power_of_2, device=device)
        self._finite = torch.zeros((), dtype=torch.int32, device=device)  # since the scale grew
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._seen_at: torch.cuda.Event | None = None

    def state(self) -> dict[str, Tensor]:
        """The tensors to save and, in place, to load."""
        tensors = {"finite": self._finite, "skipped": self.skipped, "in_a_row": self._in_a_row}
        return tensors if self.scale is None else tensors | {"scale": self.scale}

    def scaled(self, loss: Tensor) -> Tensor:
        """What to call `backward` on, where `loss` is this process's share of the mean.

        Shares add up, but gradients are averaged over the processes. That is made good here; in
        fp16, where a larger factor could overflow, by `divisor`.
        """
        return loss * (self._processes if self.scale is None else self.scale)

    @torch.no_grad()
    def divisor(self, parameters: Iterable[Tensor]) -> Tensor | None:
        """What averaged gradients are still to be divided by: [] float32, or None for nothing.

        nan, which has the step skipped, where the sum over the processes is more than half
        precision holds. Each of them holds its own part of it in half precision, and the smaller
        the parts, the later they overflow: without this, skips and scale would depend on how many
        processes share the batch.
        """
        if self.scale is None:
            return None
        held = [g for g in local(p.grad for p in parameters if p.grad is not None) if g.numel()]
        divisor = self.scale / self._processes
        if not held:  # of a shard of so few rows
            return divisor
        largest = torch.stack(torch._foreach_norm(held, torch.inf)).max() * self._processes
        return torch.where(largest <= torch.finfo(torch.float16).max, divisor, torch.nan)

    @torch.no_grad()
    def update(self, skip: Tensor) -> None:
        """Note whether a step was skipped: [] 1 or 0."""
        if self.scale is not None:
            torch._amp_update_scale_(self.scale, self._finite, skip, 2.0, 0.5, GROWTH_STEPS)
        skipped = skip.to(torch.int64)
        self.skipped += skipped
        self._in_a_row += 1
        self._in_a_row *= skipped

    def in_a_row(self) -> int:
        """How many steps on end were skipped, as of this function's last call."""
        if self._seen_at is not None:
            self._seen_at.synchronize()
        count = int(self._seen)
        self._seen.copy_(self._in_a_row, non_blocking=True)
        if self._in_a_row.is_cuda:
            self._seen_at = torch.cuda.Event()
            self._seen_at.record()
        return count
