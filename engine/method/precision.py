"""Choose the floating-point format of a step, and handle steps that are not finite.

Parameters, statistics, the loss, LARS norms and the moving average are float32. With precision
fp64, which serves to verify, they are float64.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from engine.method.local_shards import local_gradients

Precision = Literal["fp64", "fp32", "bf16", "fp16"]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
FIRST_SCALE = 2.0**8  # of one row's loss; equals 2**16 on the mean of 256 rows
GROWTH_STEPS = 2000  # finite steps until the scale doubles
MOST_SKIPS = 20  # skipped steps in a row; they take FIRST_SCALE below 2**-10


def parameter_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of the parameters, statistics, optimizer state and network inputs."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of the forward passes: half precision where it is safe, or no autocast."""
    half = _HALF.get(precision)
    return torch.autocast(device.type, half, enabled=half is not None)


def slow_on(device: torch.device, precision: Precision) -> str:
    """Return a warning if the device has no instructions for `precision`, else ""."""
    if device.type == "cuda" and precision == "bf16":
        # Those before Ampere (V100, T4) compute it in fp32, and torch.compile leaves it to eager.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ""
        return "bf16 is emulated on this GPU and slow there: use --precision fp16 or fp32"
    if device.type != "cpu" or precision not in _HALF:
        return ""
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{precision}_supported", None)
    if torch.backends.mkldnn.is_available() and supported is not None and supported():
        return ""
    return f"{precision} is emulated on this CPU and very slow there: use --precision fp32"


class StepGuard:
    """Count the skipped steps and, in fp16, adapt the loss scale to the gradients.

    All figures stay on the device, so the host never waits for the current step. The loss scale
    halves at a skipped step and doubles after 2000 finite ones in a row (Micikevicius et al.,
    arXiv 1710.03740). Which steps overflow does not depend on the number of processes.
    """

    def __init__(
        self, precision: Precision, device: torch.device, batch: int, processes: int
    ) -> None:
        """Start the counters at 0 and, in fp16, the loss scale at FIRST_SCALE times the batch.

        `scale` [] float32 multiplies the mean over the global batch. It is None outside fp16.

        Args:
            precision: The number format of the forward passes.
            device: The device of the counters and the scale.
            batch: Rows of the global batch. The scale uses the next power of two.
            processes: The number of processes that gradients are averaged over.
        """
        self._processes = processes
        self.scale: Tensor | None = None
        if precision == "fp16":
            power_of_2 = 2 ** (batch - 1).bit_length()  # scaling by a power of 2 is exact
            self.scale = torch.full((), FIRST_SCALE * power_of_2, device=device)
        self._finite = torch.zeros((), dtype=torch.int32, device=device)  # steps since it changed
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._seen_at: torch.cuda.Event | None = None

    def state(self) -> dict[str, Tensor]:
        """Return the tensors to save; a checkpoint is loaded into them in place."""
        tensors = {"finite": self._finite, "skipped": self.skipped, "in_a_row": self._in_a_row}
        return tensors if self.scale is None else tensors | {"scale": self.scale}

    def scale_loss(self, loss: Tensor) -> Tensor:
        """Scale `loss`, this process's share of the global mean, for the backward pass.

        The shares of all processes add up to the mean, but gradients are averaged over the
        processes. So the loss is multiplied by the number of processes. In fp16, where that could
        overflow, `divisor` corrects for it instead.
        """
        return loss * (self._processes if self.scale is None else self.scale)

    @torch.no_grad()
    def divisor(self, parameters: Iterable[Tensor]) -> Tensor | None:
        """Return the number that the averaged gradients must be divided by, None outside fp16.

        The divisor is nan when a gradient, summed over the processes, exceeds the range of fp16.
        The optimizer then skips the step. Each process computes only its part of that sum in half
        precision, and parts overflow less often the more processes share the batch. Without this
        check, the skips and the scale would depend on the number of processes.

        Returns:
            [] float32, or None when nothing is to be divided.
        """
        if self.scale is None:
            return None
        held = [g for g in local_gradients(parameters) if g.numel()]
        divisor = self.scale / self._processes
        if not held:  # a process may hold no rows of any gradient
            return divisor
        largest = torch.stack(torch._foreach_norm(held, torch.inf)).max() * self._processes
        return torch.where(largest <= torch.finfo(torch.float16).max, divisor, torch.nan)

    @torch.no_grad()
    def update(self, skip: Tensor) -> None:
        """Update the counters and the scale after a step; `skip` [] is 1 when it was skipped."""
        if self.scale is not None:
            torch._amp_update_scale_(self.scale, self._finite, skip, 2.0, 0.5, GROWTH_STEPS)
        skipped = skip.to(torch.int64)
        self.skipped += skipped
        self._in_a_row += 1
        self._in_a_row *= skipped

    @property
    def in_a_row(self) -> int:
        """Return how many steps in a row were skipped up to now; the host waits for the last."""
        return int(self._in_a_row)

    def count_skips(self) -> int:
        """Return how many steps in a row were skipped, as of the previous call of this function.

        The count is one call old so that the host need not wait for the current step.
        """
        if self._seen_at is not None:
            self._seen_at.synchronize()
        count = int(self._seen)
        self._seen.copy_(self._in_a_row, non_blocking=True)
        if self._in_a_row.is_cuda:
            # The host sleeps while it waits for this event. It would spin for any other, and take
            # a core from the threads that decode.
            self._seen_at = torch.cuda.Event(blocking=True)
            self._seen_at.record()
        return count
