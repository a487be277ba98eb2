"""The online head: a mean over the labeled rows, and a learning rate of its own."""

import pytest
import torch
from torch import nn

from engine.method.adamw import AdamWConfig
from engine.method.head import count_labels, head_loss, set_apart, set_rates
from engine.method.lars import LARSConfig

LABELS = torch.tensor([2, -1, 0, -1, -1, 1, -1, 2])


def test_the_parts_add_up_to_the_mean_over_labeled_rows() -> None:
    logits = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = count_labels(LABELS)
    assert rows == 4
    parts = [head_loss(logits[at], LABELS[at], rows) for at in (slice(0, 3), slice(3, 8))]
    there = LABELS >= 0
    expected = nn.functional.cross_entropy(logits[there], LABELS[there])
    torch.testing.assert_close(sum(parts), expected, rtol=1e-14, atol=0)


def test_a_batch_without_labels_has_no_gradient() -> None:
    logits = torch.ones(2, 3, requires_grad=True)
    labels = torch.full((2,), -1)
    loss = head_loss(logits, labels, count_labels(labels))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0


def network() -> nn.ModuleDict:
    torch.manual_seed(0)
    made = {"encoder": nn.Linear(4, 3), "classifier": nn.Linear(3, 2)}
    return nn.ModuleDict(made)


@pytest.mark.parametrize("config", [LARSConfig(), AdamWConfig()], ids=["lars", "adamw"])
def test_the_head_has_its_own_rate(config: LARSConfig | AdamWConfig) -> None:
    """Encoder and head each move as in a network that has one rate for all, which is theirs."""
    moved = {}
    for rates in ((0.1, 0.1), (0.7, 0.7), (0.1, 0.7)):
        module = network()
        optimizer = config.build(module)
        if rates[0] != rates[1]:
            set_apart(optimizer, module["classifier"])
        for step in range(3):
            for number, p in enumerate(module.parameters()):
                p.grad = torch.full_like(p, 0.3 * (number + 1) * (step + 1))
            set_rates(optimizer, *rates)
            optimizer.step()
        moved[rates] = {name: p.detach() for name, p in module.named_parameters()}
    for name, value in moved[0.1, 0.7].items():
        rate = 0.7 if name.startswith("classifier") else 0.1
        assert torch.equal(value, moved[rate, rate][name]), name
        assert not torch.equal(moved[0.1, 0.1][name], moved[0.7, 0.7][name])
