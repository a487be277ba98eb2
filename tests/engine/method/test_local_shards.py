"""Norms of parts of parameters, of which a process may hold no row."""

import pytest
import torch
from torch import Tensor

from engine.method.local_shards import foreach_norms


@pytest.mark.parametrize("empty", [(), (0,), (1, 3), (0, 1, 2, 3)], ids=str)
def test_empty_parts_have_norm_zero_and_move_no_other(
    empty: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's kernel for GPUs may take such a tensor for the next one, so it must not get any."""
    stock = torch._foreach_norm

    def norms(tensors: list[Tensor]) -> tuple[Tensor, ...]:
        assert tensors
        assert all(tensor.numel() for tensor in tensors)
        return tuple(stock(tensors))

    monkeypatch.setattr(torch, "_foreach_norm", norms)
    tensors = [torch.full((0 if n in empty else 2, 3), float(n + 1)) for n in range(4)]
    expected = torch.stack([tensor.double().norm() for tensor in tensors])
    torch.testing.assert_close(foreach_norms(tensors).double(), expected)
