"""Torchvision's networks as encoders: the same features, gradients and statistics as stock ones."""

from typing import Any

import pytest
import torch
import torchvision
from torch import Generator, Tensor, nn
from torchvision.ops import StochasticDepth

from engine.method.byol import BYOLConfig, build
from engine.method.encoders import initialize_encoder
from engine.method.lars import LARSConfig
from engine.method.norm import BatchNorm, RunningStatistics
from engine.method.torchvision_encoder import TorchvisionConfig, TorchvisionEncoder, list_names
from shards.errors import InputError

# Small members of the families: name, the place of the classifier, the size of the images.
SMALL = [
    ("mobilenet_v3_small", "classifier.3", 32),
    ("shufflenet_v2_x0_5", "fc", 32),
    ("mnasnet0_5", "classifier.1", 32),
    ("regnet_y_400mf", "fc", 32),
    ("efficientnet_b0", "classifier.1", 32),
    ("resnet18", "fc", 32),
]
LARGE = [
    ("mobilenet_v2", "classifier.1", 32),
    ("googlenet", "fc", 32),
    ("densenet121", "classifier", 32),
    ("resnext50_32x4d", "fc", 32),
    ("wide_resnet50_2", "fc", 32),
    ("efficientnet_v2_s", "classifier.1", 32),
    ("convnext_tiny", "classifier.2", 32),
    ("inception_v3", "fc", 80),
    ("swin_t", "head", 32),
    ("swin_v2_t", "head", 32),
    ("vit_b_16", "heads.head", 32),
    ("maxvit_t", "classifier.5", 224),
    ("vgg11_bn", "classifier.6", 32),
    ("alexnet", "classifier.6", 64),
]
CASES = [*SMALL, *(pytest.param(*case, marks=pytest.mark.slow) for case in LARGE)]
OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


def build_encoder(name: str, size: int, views: int = 2, seed: int = 0) -> TorchvisionEncoder:
    encoder = TorchvisionConfig(name).build(views, size)
    encoder.draw(seed)
    return encoder


def stock(name: str, head: str, size: int) -> nn.Module:
    """Torchvision's network in float64, without its classifier and without noise."""
    options = dict(OPTIONS.get(name, {}))
    if name.startswith("vit"):
        options["image_size"] = size
    network: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    above, _, last = head.rpartition(".")
    setattr(network.get_submodule(above), last, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.Dropout | StochasticDepth):
            module.p = 0.0
    return network.double()


def randomize(network: nn.Module) -> None:
    """Give norms and layer scales values that cannot be mistaken for each other."""
    generator = Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim not in (2, 4):
                parameter.add_(0.3 * torch.rand(parameter.shape, generator=generator).double())


def close(ours: Tensor, theirs: Tensor, least: float = 0.0) -> None:
    """Compare by the largest value, or by `least`, where all values are rounding around 0."""
    assert (ours - theirs).abs().max() <= 1e-8 * max(theirs.abs().max().item(), least)


@pytest.mark.parametrize(("name", "head", "size"), CASES)
def test_both_views_at_once_are_stock_networks_one_after_the_other(
    name: str, head: str, size: int
) -> None:
    ours, theirs = build_encoder(name, size).double(), stock(name, head, size)
    randomize(ours)
    theirs.load_state_dict(ours.stock_state(), strict=True)
    rows = 4
    images = torch.randn(2 * rows, 3, size, size, generator=Generator().manual_seed(1)).double()
    statistics = RunningStatistics([ours])

    found = ours.train()(images)
    expected = [theirs.train()(view) for view in images.chunk(2)]
    statistics.note()
    statistics.apply()
    assert found.shape == (2 * rows, ours.feature_dim)
    close(found, torch.cat(expected))

    weights = torch.randn(found.shape, generator=Generator().manual_seed(2)).double()
    (found * weights).sum().backward()
    (torch.cat(expected) * weights).sum().backward()
    gradients = [p.grad for p in theirs.parameters() if p.grad is not None]
    largest = max(gradient.abs().max().item() for gradient in gradients)
    for own, gradient in zip(ours.network.parameters(), gradients, strict=True):
        assert own.grad is not None
        close(own.grad, gradient, least=1e-3 * largest)
    for key, value in theirs.state_dict().items():
        close(ours.stock_state()[key].double(), value.double())
    close(ours.eval()(images), theirs.eval()(images))


def test_norms_keep_momentum_and_epsilon() -> None:
    found = {
        (norm.momentum, norm.eps, norm.views)
        for norm in build_encoder("mobilenet_v3_small", 32).modules()
        if isinstance(norm, BatchNorm)
    }
    assert found == {(0.01, 0.001, 2)}


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "mobilenet_v2", "convnext_tiny"])
def test_no_norm_noise_or_work_in_place_is_left(name: str) -> None:
    with torch.device("meta"):
        modules = list(TorchvisionConfig(name).build(2, 32).modules())
    assert not any(
        isinstance(one, nn.Dropout | StochasticDepth | nn.BatchNorm2d) for one in modules
    )
    assert not any(getattr(one, "inplace", False) for one in modules)


def test_weights_depend_on_the_seed_alone() -> None:
    first, second, other = (
        torch.cat(
            [p.flatten() for p in build_encoder("shufflenet_v2_x0_5", 32, seed=n).parameters()]
        )
        for n in (4, 4, 5)
    )
    before = torch.random.get_rng_state()
    build_encoder("shufflenet_v2_x0_5", 32, seed=9)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_weights_are_drawn_as_torchvision_draws_them() -> None:
    encoder = TorchvisionConfig("mobilenet_v2").build(1, 32)
    initialize_encoder(encoder, Generator().manual_seed(11))
    with torch.random.fork_rng():
        torch.manual_seed(11)
        expected = torchvision.models.mobilenet_v2(weights=None).state_dict()
    found = encoder.stock_state()
    assert expected.keys() - found.keys() == {"classifier.1.weight", "classifier.1.bias"}
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_online_and_target_are_drawn_on_their_own() -> None:
    config = BYOLConfig(TorchvisionConfig("shufflenet_v2_x0_5"), hidden=16, projection=8)
    online, target = build(config, 10, seed=0, size=32)
    assert not torch.equal(
        online.encoder.stock_state()["conv1.0.weight"],
        target.encoder.stock_state()["conv1.0.weight"],
    )
    assert online(torch.rand(4, 3, 32, 32)).features.shape == (4, 1024)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("resnet18", {"BasicBlock": 8}),
        ("vit_b_16", {"EncoderBlock": 12}),
        ("convnext_tiny", {"CNBlock": 18}),
        ("swin_t", {"SwinTransformerBlock": 12, "PatchMerging": 3}),
        ("densenet121", {"_DenseBlock": 4, "_Transition": 3}),
        ("mobilenet_v3_small", {"Conv2dNormActivation": 2, "InvertedResidual": 11}),
        ("vgg11", {"Sequential": 2}),
    ],
)
def test_blocks_are_the_outermost_repeated_modules(name: str, kinds: dict[str, int]) -> None:
    with torch.device("meta"):
        encoder = TorchvisionConfig(name).build(2, 32)
    blocks = encoder.blocks()
    found = [type(block).__name__ for block in blocks]
    assert {kind: found.count(kind) for kind in found} == kinds
    inner = [module for block in blocks for module in block.modules()]
    assert len(set(map(id, inner))) == len(inner)  # no block is in another one


def test_every_name_can_be_built() -> None:
    """On the meta device, where nothing is drawn: one of each family, and all RegNets' widths."""
    for name in ("regnet_x_400mf", "regnet_y_128gf", "inception_v3", "vit_h_14", "maxvit_t"):
        with torch.device("meta"):
            size = 224 if name != "inception_v3" else 75
            encoder = TorchvisionConfig(name).build(2, size)
        assert all(p.is_meta for p in encoder.parameters())
        assert name in list_names()


def test_only_weights_of_layers_are_decayed_and_adapted() -> None:
    with torch.device("meta"):
        networks = nn.ModuleList(
            TorchvisionConfig(name).build(2, 32) for name in ("vit_b_16", "convnext_tiny")
        )
        adapted, others = LARSConfig().build(networks).param_groups
    names = {id(parameter): name for name, parameter in networks.named_parameters()}
    plain = {names[id(p)].rpartition(".")[2] for p in others["params"]}
    assert plain == {
        *("bias", "weight", "class_token", "pos_embedding", "layer_scale", "in_proj_bias")
    }
    assert all(p.ndim in (2, 4) for p in adapted["params"])
    assert all(p.ndim == 1 for p in others["params"] if names[id(p)].endswith(".weight"))
    assert others["weight_decay"] == 0


@pytest.mark.parametrize(
    ("name", "size", "told"),
    [
        ("resnet18", 31, "views.size must be from 32 to 4096, not 31"),
        ("inception_v3", 74, "views.size must be from 75 to 4096, not 74"),
        ("vit_b_16", 100, "must be a multiple of 16 for vit_b_16, not 100: the nearest are 96 "),
        (
            "vit_b_32",
            40,
            "must be a multiple of 32 for vit_b_32, not 40: the nearest are 32 ",
        ),
        ("maxvit_t", 112, "must be a multiple of 224 for maxvit_t, not 112: the nearest is 224"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(name: str, size: int, told: str) -> None:
    with pytest.raises(InputError, match=told):
        TorchvisionConfig(name).check_size(size)


@pytest.mark.parametrize("name", ["vit_b_16", "maxvit_t", "inception_v3", "alexnet", "densenet121"])
def test_the_least_size_is_enough_and_one_less_is_not_offered(name: str) -> None:
    least = {"vit_b_16": 32, "maxvit_t": 224, "inception_v3": 75, "alexnet": 63}.get(name, 32)
    config = TorchvisionConfig(name)
    config.check_size(least)
    with torch.device("meta"):
        features = config.build(2, least)(torch.empty(4, 3, least, least))
    assert len(features) == 4
    with pytest.raises(InputError):
        config.check_size(least - 1)


def test_norms_of_several_momenta_update_their_own_statistics() -> None:
    config = BYOLConfig(TorchvisionConfig("mobilenet_v3_small"), hidden=16, projection=8)
    online, _ = build(config, 0, seed=0, size=32)
    statistics = RunningStatistics([online])
    online.train()(torch.rand(8, 3, 32, 32))
    statistics.note()
    statistics.apply()
    norms = [one for one in online.modules() if isinstance(one, BatchNorm)]
    assert {norm.momentum for norm in norms} == {0.1, 0.01}
    for norm in norms:
        m = norm.momentum
        for running, start, views in (
            (norm.running_mean, 0, norm.batch_mean),
            (norm.running_var, 1, norm.batch_var),
        ):
            one, two = views.double()
            expected = (1 - m) * ((1 - m) * start + m * one) + m * two
            torch.testing.assert_close(running.double(), expected, rtol=1e-5, atol=1e-6)
