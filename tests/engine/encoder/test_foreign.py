"""Checkpoints as other projects write them, made from torchvision's networks."""

import argparse
import copy
import io
import random
from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import safetensors.torch
import torch
import torchvision
from torch import Generator, Tensor, nn

from engine.encoder.foreign import Foreign, match, read_state
from engine.encoder.foreign_files import read_tensors
from engine.encoder.torchvision_twin import stock_resnet
from engine.method.resnet import ResNet, ResNetConfig
from shards.errors import InputError
from shards.storage import files

State = dict[str, Tensor]
URL = "memory://others/checkpoint.pth"
SMALL = ResNetConfig(10, width=0.25, stem="cifar")
IMAGES = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=Generator().manual_seed(3))
OLD: dict[str, Any] = {"_use_new_zipfile_serialization": False}


def randomize(net: nn.Module, seed: int) -> nn.Module:
    """Draw every tensor anew, so that none can be taken for another."""
    generator = Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=generator)
        elif value.ndim == 1:
            low = 0.5 if "running_var" in name else -0.5
            value.uniform_(low, low + 1, generator=generator)
        else:
            value.fill_(seed + 7)
    return net.eval()


@cache
def theirs(depth: int = 18, seed: int = 0) -> nn.Module:
    """Torchvision's network. The ResNet-18 is a narrow one."""
    if depth == 50:
        return randomize(torchvision.models.resnet50(), seed)
    net = stock_resnet(ResNetConfig(18, width=0.125))
    net.fc = nn.Linear(64, 1000)
    return randomize(net, seed)


def named(depth: int = 18, seed: int = 0) -> State:
    return theirs(depth, seed).state_dict()


def indexed(depth: int = 18, seed: int = 0) -> State:
    return nn.Sequential(*list(theirs(depth, seed).children())[:-1]).state_dict()


def unnamed(depth: int = 18, seed: int = 0) -> State:
    return at_random(named(depth, seed))


def at_random(tensors: State) -> State:
    draw = random.Random(0)
    return {f"{draw.getrandbits(60):x}": value for value in tensors.values()}


def numbered(tensors: State) -> State:
    return {f"a.{i}": value for i, value in enumerate(tensors.values())}


def small(seed: int = 0, config: ResNetConfig = SMALL) -> State:
    return randomize(ResNet(config, views=1), seed).state_dict()


def under(prefix: str, tensors: State) -> State:
    return {prefix + name: value for name, value in tensors.items()}


def pair(online: str, target: str, make: Callable[..., State] = named) -> State:
    return under(online, make(seed=0)) | under(target, make(seed=1))


def file(content: object, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def read(content: bytes, url: str = URL) -> State:
    files.write(url, content)
    return read_tensors(url)


@cache
def expected_features(depth: int, seed: int) -> Tensor:
    net = copy.deepcopy(theirs(depth, seed)).double()
    net.fc = nn.Identity()
    features: Tensor = net(IMAGES)
    return features


@torch.no_grad()
def assert_equals(found: Foreign, depth: int = 18, seed: int = 0) -> None:
    """The features are those of torchvision's network."""
    with torch.device("meta"):
        net = found.config.build(1, 64).eval()
    net.load_state_dict(found.state, strict=True, assign=True)
    expected = expected_features(depth, seed)
    torch.testing.assert_close(net.double()(IMAGES), expected, rtol=1e-12, atol=1e-12)
    assert {value.dtype for value in found.state.values()} == {torch.float32, torch.int64}


def same(found: Foreign, expected: State) -> bool:
    tensors = found.state.items()
    return len(tensors) == len(expected) and all(torch.equal(v, expected[n]) for n, v in tensors)


@pytest.mark.parametrize(
    "content",
    [
        named,
        indexed,
        unnamed,
        lambda: {"state_dict": under("module.", named()), "epoch": 3},
        lambda: OrderedDict(under("model.", named())),
        lambda: {n.replace("layer1.", "layer1._orig_mod."): v for n, v in named().items()},
        lambda: under("net._orig_mod.", named()),
        lambda: {"models": [named(), {"weight": torch.zeros(3)}]},
        lambda: {"args": argparse.Namespace(lr=1.0, names=["a"]), "model": named()},
        lambda: {n: nn.Parameter(v) if v.ndim else v for n, v in named().items()},
    ],
)
def test_one_network(content: Callable[[], object]) -> None:
    assert_equals(match(read(file(content())), "online", "file"))


@pytest.mark.parametrize(
    "content",
    [
        lambda: {  # MoCo
            "state_dict": pair("module.encoder_q.", "module.encoder_k.")
            | {"module.queue": torch.zeros(8, 4), "module.queue_ptr": torch.zeros(1).long()},
            "optimizer": torch.optim.SGD(theirs().parameters(), 0.1).state_dict(),
        },
        lambda: pair("module.base_encoder.", "module.momentum_encoder."),  # MoCo v3
        lambda: {"state_dict": pair("backbone.", "backbone_momentum.", indexed)},  # lightly
        lambda: {  # solo-learn
            "state_dict": pair("backbone.", "momentum_backbone."),
            "hyper_parameters": {"mean": torch.zeros(3)},
        },
        lambda: pair("module.online_backbone.", "module.target_backbone."),
        lambda: pair("module.online_backbone.", "module.target_backbone.", indexed),
        lambda: pair("online_network.encoder.", "target_network.encoder."),
        lambda: {  # DINO
            "student": under("module.backbone.", named()),
            "teacher": under("backbone.", named(seed=1)),
        },
        lambda: {"state_dict": named(), "state_dict_ema": named(seed=1)},
        lambda: pair("query_encoder.", "key_encoder."),
        lambda: pair("a.", "b.momentum.", unnamed),
        lambda: dict(reversed(OrderedDict(a=unnamed(), target=unnamed(seed=1)).items())),
    ],
)
def test_online_and_target(content: Callable[[], object]) -> None:
    tensors = read(file(content()))
    assert_equals(match(tensors, "online", "file"), seed=0)
    assert_equals(match(tensors, "target", "file"), seed=1)


@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors", "safetensors by content"])
def test_kinds_of_files(kind: str) -> None:
    if "safe" in kind:
        content, url = safetensors.torch.save(named(50)), f"{URL}.safetensors"
        tensors = read(content, url if kind == "safetensors" else URL)
        assert list(tensors) == sorted(named(50))
    else:
        tensors = read(file(named(50), **(OLD if kind == "pickle" else {})))
        assert list(tensors) == list(named(50))
    assert_equals(match(tensors, "online", "file"), 50)


@pytest.mark.parametrize("counters", [True, False])
@pytest.mark.parametrize("shortcut_first", [True, False])
@pytest.mark.parametrize("depth", [18, 50])
def test_by_position(depth: int, shortcut_first: bool, counters: bool) -> None:
    names = [name for name in named(depth) if counters or "num_batches" not in name]
    for name in [n for n in names if shortcut_first and n.endswith(".0.conv1.weight")]:
        moved = [n for n in names if n.startswith(name.replace("conv1.weight", "downsample"))]
        names = [n for n in names if n not in moved]
        names[names.index(name) : names.index(name)] = moved
    values = [named(depth)[name] for name in names]
    values.insert(3, torch.zeros(1, dtype=torch.int64))
    tensors = {"queue": torch.zeros(3, 5)} | {f"a.{i}": value for i, value in enumerate(values)}
    found = match(tensors, "online", "file")
    assert_equals(found, depth)
    assert found.state["bn1.num_batches_tracked"] == (7 if counters else 0)


def by_module(tensors: State) -> State:
    """By names as 10.weight, which as text stand in another order than the network's."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))
    split = ((name.rpartition("."), value) for name, value in tensors.items())
    return {f"{modules.index(module)}.{last}": value for (module, _, last), value in split}


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("depth", [10, 18, 34, 50, 101, 152, 200])
def test_every_architecture_is_told(depth: Any, stem: Any, projection: bool) -> None:
    expected = small(config=ResNetConfig(depth, 0.125, stem, projection))
    in_order = by_module(expected)
    for tensors in (expected, at_random(expected), in_order, dict(sorted(in_order.items()))):
        found = match(tensors, "online", "file")
        assert found.config == ResNetConfig(depth, 0.125, stem, projection and depth < 50)
        assert same(found, expected)


@pytest.mark.parametrize(
    ("content", "report"),
    [
        (
            lambda: under("module.encoder_q.", named(50)),
            "ResNet-50, matched by name under 'module.encoder_q.': 318 tensors; left out 2 "
            "(module.encoder_q.fc.weight, module.encoder_q.fc.bias)",
        ),
        (indexed, "ResNet-18 x0.125, matched by name: 120 tensors"),
        (
            lambda: numbered(named(50)) | {"b": torch.zeros(2), "c": torch.zeros(())},
            "ResNet-50, matched by position and shape from 'a.0' on: 318 tensors; left out 4 "
            "(a.318, a.319, b, ...)",
        ),
        (small, "ResNet-10 x0.25, cifar stem, matched by name: 72 tensors"),
        (
            lambda: small(config=ResNetConfig(18, 0.125, projection_shortcut=True)),
            "ResNet-18 x0.125, projection shortcut, matched by name: 126 tensors",
        ),
    ],
)
def test_report(content: Callable[[], State], report: str) -> None:
    assert match(content(), "online", "file").report == report


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_other_precisions(dtype: torch.dtype) -> None:
    tensors = {name: v.to(dtype) if v.ndim else v for name, v in small().items()}
    found = match(read(file(tensors)), "online", "file")
    assert same(found, {n: v.float() if v.ndim else v for n, v in tensors.items()})


@pytest.mark.parametrize("count", [torch.ones(2), torch.ones(0), torch.tensor(1j)])
def test_odd_counters_of_norms_count_as_none(count: Tensor) -> None:
    """Nothing depends on how many batches a norm has seen."""
    name = next(name for name in small() if "num_batches" in name)
    assert read_state({name: count}, [name], {name: name}, "file") == {name: torch.tensor(0)}


def test_a_number_format_that_torch_cannot_convert() -> None:
    packed = torch.zeros(16, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    tensors = small()
    name = next(name for name, v in tensors.items() if v.ndim == 1)
    text = f"^file: {name} is torch.float4_e2m1fn_x2: save it in float32$"
    with pytest.raises(InputError, match=text):
        read_state(tensors | {name: packed}, [name], {name: name}, "file")


def test_prefix() -> None:
    tensors = under("a.", small(0)) | under("b._orig_mod.", small(1)) | under("ema.", small(2))
    for prefix, seed in (("a.", 0), ("b", 1), ("b._orig_mod.", 1), ("ema.", 2)):
        assert same(match(tensors, "online", "file", prefix), small(seed))
    by_order = numbered(small(0) | under("second.", small(1)))
    first = f"a.{len(small())}"
    assert same(match(by_order, "online", "file", first), small(1))
    assert same(match(under("ema.", small()), "online", "file"), small())  # there is no other


def test_shared_and_recursive_containers() -> None:
    levels: list[object] = [small()]
    for _ in range(40):
        levels = [levels] * 10
    content: dict[str, object] = {"first": list(small().values()), "second": levels}
    content["itself"] = content
    assert len(read(file(content))) == 2 * len(small())


def message(call: Callable[[], object]) -> str:
    """The one line that an InputError tells."""
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("whole", [small(), numbered(small())])
def test_no_tensor_can_be_missing_or_of_another_shape(whole: State) -> None:
    for name, value in whole.items():
        if value.ndim:
            without = {n: v for n, v in whole.items() if n != name}
            for tensors in (without, whole | {name: torch.cat([value, value])}):
                with pytest.raises(InputError, match=r"^file: no ResNet (found|of this engine)"):
                    match(tensors, "online", "file")


def on_meta(name: str, *args: Any) -> State:
    """The shapes of a torchvision network."""
    with torch.device("meta"):
        tensors: State = getattr(torchvision.models, name)(*args).state_dict()
    return tensors


def longer_18() -> State:
    return on_meta("ResNet", torchvision.models.resnet.BasicBlock, [2, 2, 2, 3])


def several(*prefixes: str) -> State:
    parts = (under(prefix, small(seed)) for seed, prefix in enumerate(prefixes))
    return {name: value for part in parts for name, value in part.items()}


def spoilt(name: str, value: float, dtype: torch.dtype = torch.float32) -> State:
    tensors = small()
    return tensors | {name: torch.full(tensors[name].shape, value, dtype=dtype)}


def norms_of_another_order() -> State:
    names = list(small())
    for i, name in enumerate(names):
        if name.endswith("running_var"):  # in its place stands what was the bias
            names[i - 3 : i + 1] = [names[i - 3], names[i], names[i - 1], names[i - 2]]
    return numbered({name: small()[name] for name in names})


NOT_FOUND = "no ResNet found (of depth 10, 18, 34, 50, 101, 152, 200), neither by names such as"


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        (
            lambda: {n: v for n, v in on_meta("resnet50").items() if "4.2.bn3.running" not in n},
            "no ResNet of this engine under '': nearest is ResNet-50: 2 tensors missing "
            "(layer4.2.bn3.running_mean, layer4.2.bn3.running_var)",
        ),
        (
            lambda: under("a.", longer_18()),
            "under 'a.': nearest is ResNet-18: 12 tensors too many (layer4.2.conv1.weight, "
            "layer4.2.bn1.weight, layer4.2.bn1.bias, ...)",
        ),
        (
            lambda: numbered(longer_18()),
            f"{NOT_FOUND} layer1.0.conv1.weight nor by the order of shapes: nearest is ResNet-18: "
            "100 tensors from 'a.0' on fit, not 'a.120'",
        ),
        (
            lambda: small() | {"conv1.weight": torch.zeros(16, 1, 3, 3)},
            "nearest is ResNet-10 x0.25, cifar stem: 1 tensor of another shape (conv1.weight: "
            "[16, 1, 3, 3], not [16, 3, 3, 3])",
        ),
        (lambda: small() | {"conv1.weight": torch.zeros(())}, "(conv1.weight: [], not [64, 3, "),
        (
            lambda: small() | {"layer1.0.conv1.bias": torch.zeros(16)},
            "too many (layer1.0.conv1.bias)",
        ),
        (lambda: on_meta("resnext50_32x4d"), "nearest is ResNet-50: "),
        (lambda: on_meta("wide_resnet50_2"), "nearest is ResNet-50: "),
        (lambda: on_meta("vgg11_bn"), NOT_FOUND),
        (lambda: {"a": torch.empty(10**9, 3, 3, 3, device="meta")}, NOT_FOUND),
        (lambda: on_meta("vit_b_32"), NOT_FOUND),
        (
            lambda: several("a.", "remains.", "ema."),
            "several networks may be the online one: give --prefix PREFIX, one of 'a.', "
            "'remains.', 'ema.'",
        ),
        (lambda: several("ema.", "teacher."), "several networks may be the online one: "),
        (lambda: spoilt("bn1.bias", float("nan")), "bn1.bias has values that are not finite"),
        (lambda: spoilt("bn1.bias", 1e300, torch.float64), "that are not finite in float32"),
        (lambda: spoilt("bn1.bias", 1, torch.int8), "bn1.bias is torch.int8: only floating point"),
        (lambda: spoilt("bn1.running_var", -0.1), "bn1.running_var, in the place of bn1.running_v"),
        (norms_of_another_order, "a.4, in the place of bn1.running_var, has negative values"),
    ],
)
def test_no_match(tensors: Callable[[], State], expected: str) -> None:
    told = message(lambda: match(tensors(), "online", "s3://b/file"))
    assert told.startswith("s3://b/file: ")
    assert expected in told


def test_no_target_and_no_such_prefix() -> None:
    for tensors in (several("a."), numbered(small())):
        told = message(partial(match, tensors, "target", "file"))
        assert told.startswith("file: no network is named as a target network is (target, ")
        assert ": give --prefix PREFIX, one of '" in told
    told = message(lambda: match(several("a.", "b."), "online", "file", "c."))
    assert told == "file: --prefix c. is of no network there: give one of 'a.', 'b.'"
    told = message(lambda: match(named(), "online", "file", "c."))
    assert told == "file: --prefix c. is of no network there: leave it out, there is one only"


def test_a_network_that_stands_there_twice() -> None:
    """As a module that shares its part with another; the copy is no second network."""
    twice = {**under("net.", named()), **under("online_encoder.net.", named())}
    assert_equals(match(twice, "online", "file"))
    twice["online_encoder.net.bn1.bias"] = twice["online_encoder.net.bn1.bias"] + 1
    told = message(partial(match, twice, "online", "file"))
    assert "several networks may be the online one" in told
