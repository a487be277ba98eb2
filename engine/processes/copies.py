"""Copies batches to the device while it still computes what came before."""

import torch
from torch import Tensor


class Copies:
    """Copy tensors to a device, to a GPU in a stream of their own.

    A host starts the kernels of a step long before a GPU has run them. A copy in their stream would
    wait for them, and the next step for the copy. In another stream it runs beside them, if it
    comes from pinned memory. A step of ResNet-50 takes 38 MB of uint8 a view for 256 images.
    """

    def __init__(self, device: torch.device) -> None:
        """Make the stream, if the device is a GPU."""
        self._device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, *tensors: Tensor) -> list[Tensor]:
        """Return the tensors on the device; what is there already is not copied.

        No host waits, except for a copy from memory that is not pinned.
        """
        if self.stream is None:
            return [tensor.to(self._device) for tensor in tensors]
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self.stream):
            taken = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        current.wait_stream(self.stream)
        for tensor in taken:  # else the next copy could overwrite what a kernel has yet to read
            tensor.record_stream(current)
        return taken
