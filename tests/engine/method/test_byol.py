from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Generator

from engine.method.byol import (
    BYOLConfig,
    build,
    byol_loss,
    pair_parameters,
    regression_loss,
    update_target,
)
from engine.method.initialization import Initialization
from engine.method.resnet import ResNetConfig
from tests.helpers.golden_files import golden

SMALL = BYOLConfig(ResNetConfig(10, width=0.125, stem="cifar"), hidden=32, projection=16)
ZERO_GRADIENT = ("identical", "opposite", "scaled")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["n2", "n16", "n64", "small", *ZERO_GRADIENT])
def test_official_loss(case: str, dtype: torch.dtype) -> None:
    file = golden("loss")
    q1, q2, z1, z2 = (file[f"{case}/{name}"].to(dtype) for name in ("q1", "q2", "z1", "z2"))
    prediction = torch.cat((q1, q2)).requires_grad_()
    projection = torch.cat((z1, z2)).requires_grad_()
    loss = byol_loss(prediction, projection)
    torch.autograd.backward(loss.mean())
    gradients = prediction.grad
    assert gradients is not None
    assert projection.grad is None

    # float32 has 6e-8 for each of a few roundings of figures up to 4.
    tolerance = 1e-14 if dtype == torch.float64 else 1e-6
    rows = {"loss_q1z2": regression_loss(q1, z2), "loss_q2z1": regression_loss(q2, z1)}
    for name, value in rows.items():
        torch.testing.assert_close(
            value.double(), file[f"{case}/{name}"], rtol=tolerance, atol=tolerance
        )
    expected = pytest.approx(float(file[f"{case}/loss"]), rel=tolerance, abs=tolerance)
    assert loss.mean().item() == expected

    for value, name in zip(gradients.chunk(2), ("grad_q1", "grad_q2"), strict=True):
        exact = file[f"{case}/{name}"]
        if case in ZERO_GRADIENT:
            # Of figures near 1e-3 that cancel; official float32 stays below 1e-9, ours is 1.4e-9.
            assert value.abs().max() < (1e-10 if dtype == torch.float64 else 3e-9)
            continue
        # The n16 and n64 gradients are stored in float32; official float32 is off by 3e-7.
        limit = 6e-8 if exact.dtype == torch.float32 else 1e-13
        limit = limit if dtype == torch.float64 else 6e-7
        assert (value.double() - exact.double()).abs().max() <= limit * exact.abs().max()


def test_small_gradients_row_by_row() -> None:
    """Rows of norm 1e4 and 1e-8 in one tensor: each is held to its own size."""
    file = golden("loss")
    q1, z2 = file["small/q1"].double().requires_grad_(), file["small/z2"].double()
    torch.autograd.backward(regression_loss(q1, z2).mean())
    assert q1.grad is not None
    exact = file["small/grad_q1"]
    largest = exact.abs().amax(dim=1)
    assert ((q1.grad - exact).abs().amax(dim=1) <= 1e-12 * largest + 1e-13).all()


def test_loss_is_float32_under_autocast() -> None:
    x, y = torch.randn(4, 16), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        loss = byol_loss(x.bfloat16(), y.bfloat16())
        rounded = byol_loss(x.bfloat16().float(), y.bfloat16().float())
    assert loss.dtype == torch.float32
    assert torch.equal(loss, rounded)


@pytest.mark.parametrize("classes", [0, 10])
def test_shapes(classes: int) -> None:
    online, target = build(SMALL, classes, seed=0)
    images = torch.randn(8, 3, 16, 16)
    features, prediction, logits = online(images)
    assert features.shape == (8, 64)
    assert prediction.shape == (8, 16)
    assert (logits.shape == (4, 10)) if classes else (logits is None)
    projection = target(images)
    assert projection.shape == (8, 16)
    assert byol_loss(prediction, projection).shape == (4,)


def test_parameter_names() -> None:
    online, target = build(SMALL, 10, seed=0)
    heads = {name for name, _ in online.named_parameters() if not name.startswith("encoder.")}
    mlp = ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight")
    expected = {f"{head}.{key}" for head in ("projector", "predictor") for key in mlp}
    assert heads == expected | {"classifier.weight", "classifier.bias"}
    kept = {n for n, _ in online.named_parameters() if n.startswith(("encoder.", "projector."))}
    assert {name for name, _ in target.named_parameters()} == kept


def test_classifier_does_not_teach_the_encoder() -> None:
    online, _ = build(SMALL, 10, seed=0)
    output = online(torch.randn(8, 3, 16, 16))
    torch.autograd.backward(F.cross_entropy(output.logits, torch.arange(4)))
    taught = {name for name, p in online.named_parameters() if p.grad is not None}
    assert taught == {"classifier.weight", "classifier.bias"}


def test_networks_start_apart_and_reproducibly() -> None:
    online, target = build(SMALL, 10, seed=5)
    again, _ = build(SMALL, 10, seed=5)
    unclassified, _ = build(SMALL, 0, seed=5)
    source = dict(online.named_parameters())
    for name, p in target.named_parameters():
        assert p.ndim < 2 or not torch.equal(p, source[name]), name
        assert not p.requires_grad
    assert target.training
    for other in (again, unclassified):
        assert all(torch.equal(p, source[name]) for name, p in other.named_parameters())


def test_a_target_that_begins_as_a_copy() -> None:
    config = replace(SMALL, target_start="copy")
    online, target = build(config, classes=5, seed=3)
    drawn, _ = build(SMALL, classes=5, seed=3)
    for name, value in target.state_dict().items():
        assert torch.equal(value, online.state_dict()[name])
    for name, value in online.state_dict().items():
        assert torch.equal(value, drawn.state_dict()[name])
    moved = {id(p) for p in target.parameters()}
    assert not moved & {id(p) for p in online.parameters()}
    assert not any(p.requires_grad for p in target.parameters())


@pytest.mark.parametrize("rule", ["official", "kaiming_normal"])
def test_bottlenecks_may_begin_with_all_scales_at_one(rule: Initialization) -> None:
    """The official code has zeros there, and the paper's figures came from ones."""
    config = BYOLConfig(ResNetConfig(50, width=1 / 64), 8, 4, initialization=rule)
    usual, ones = build(config, 3, seed=1), build(replace(config, last_gamma="one"), 3, seed=1)
    for one, other in zip(ones, usual, strict=True):
        theirs = dict(other.named_parameters())
        last = [name for name in theirs if name.endswith("bn3.weight")]
        assert len(last) == 3 + 4 + 6 + 3
        for name, value in one.named_parameters():
            if name in last:
                assert (value == 1).all(), name
                assert (theirs[name] == 0).all(), name
            else:
                assert torch.equal(value, theirs[name]), name


def test_target_moves_towards_online() -> None:
    online, target = build(SMALL, 10, seed=0)
    images = torch.randn(8, 3, 16, 16, generator=Generator().manual_seed(0))
    online(images)
    target(images)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    update_target(*pair_parameters(target, online), torch.tensor(1 - 0.75))
    source = online.state_dict()
    parameters = {name for name, _ in target.named_parameters()}
    for name, value in target.state_dict().items():
        moved = before[name] + 0.25 * (source[name] - before[name])
        expected = moved if name in parameters else before[name]  # buffers stay
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_target_needs_every_name() -> None:
    online, _ = build(SMALL, 10, seed=0)
    _, deeper = build(BYOLConfig(ResNetConfig(18, 0.125, "cifar"), 32, 16), 10, seed=0)
    with pytest.raises(KeyError, match=r"layer1\.1\.conv1\.weight"):
        pair_parameters(deeper, online)


def test_compiles_to_one_graph() -> None:
    online, _ = build(SMALL, 10, seed=0)
    images = torch.randn(8, 3, 16, 16)
    compiled = torch.compile(online, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), online(images))
