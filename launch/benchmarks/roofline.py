"""Compute what a training step must move and calculate, and how long a device needs for that."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from engine.method import byol
from engine.method.augment import augment
from engine.method.byol import VIEWS, Online, Target, update_target
from engine.method.head import whole_loss
from engine.method.precision import autocast, parameter_dtype
from engine.recipe import Recipe, load
from launch.benchmarks.measuring import require_positive
from launch.benchmarks.results import Report, Row, check_out
from shards.errors import InputError
from shards.views import COLUMNS

CPU = torch.device("cpu")

# Operations that a compiler writes into the loops beside them, where they cost no bytes of their
# own. Of an addition the second operand remains to be read, and of a ReLU's backward its output.
FUSED = {"relu": 0, "relu_": 0, "cat": 0, "threshold_backward": 1, "add": 1, "add_": 1}
KINDS = {
    "convolution": "convolutions",
    "convolution_backward": "convolutions",
    "native_batch_norm": "norms",
    "native_batch_norm_backward": "norms",
    "cat": "joining the views",
    **dict.fromkeys(("relu", "threshold_backward", "add", "add_"), "ReLU and additions"),
    **dict.fromkeys(("mm", "addmm"), "linear layers"),
}
# A norm's kernels read their inputs once for the sums and once more to apply them.
PASSES = {"native_batch_norm": 2, "native_batch_norm_backward": 2}
# These make no kernel: they return views of memory, or memory that nobody has written.
FREE = {"detach", "empty", "empty_like", "new_empty", "alias", "lift_fresh"}


@dataclass(frozen=True)
class Work:
    """Some of the work of a step."""

    bytes: float = 0.0  # read and written, one operation after the other
    fused: float = 0.0  # the same with neighboring operations in one kernel
    flops: float = 0.0
    seconds: float = 0.0  # of the device, operation by operation
    fused_seconds: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.bytes + other.bytes,
            self.fused + other.fused,
            self.flops + other.flops,
            self.seconds + other.seconds,
            self.fused_seconds + other.fused_seconds,
        )


@dataclass(frozen=True)
class Device:
    """What a device can do in a second."""

    bytes: float
    flops: float

    def work(self, bytes: float, fused: float, flops: float) -> Work:
        """Make the work of one operation, whose bytes and FLOPs overlap."""
        calculating = flops / self.flops
        seconds, fused_seconds = (max(b / self.bytes, calculating) for b in (bytes, fused))
        return Work(bytes, fused, flops, seconds, fused_seconds)


def bench_roofline(
    *,
    recipe: str = "r50_4096",
    batch: int = 64,
    gbs: float = 3350.0,
    tflops: float = 989.0,
    host_gbs: float = 50.0,
    classes: int = 1000,
    out: str = "",
) -> Report:
    """Compute what a training step must move and calculate, and how long a device needs for that.

    A step of one process is taken on tensors without memory. Each operation counts the bytes that
    it reads and writes, and its FLOPs. It takes as long as the slower of the two at the device's
    peaks, so the sums are bounds that no device reaches. Beside what operations cost one after
    the other ("eager") stands what remains when a compiler fuses ReLU, additions and copies with
    their neighbors. Latency, caches and the communication of several processes are left out.

    Args:
        recipe: Recipe file whose networks, views, precision and optimizer are used.
        batch: Images of one device in a step.
        gbs: The device's memory bandwidth in GB/s. By default it is an H100's.
        tflops: The device's peak in TFLOP/s. By default it is an H100's, dense in bf16.
        host_gbs: Bandwidth from the host to the device in GB/s.
        classes: Number of classes, for the online classifier. 0 leaves the classifier out.
        out: File that the rows are also written to, as JSON.
    """
    check_out(out)
    if batch < 2:  # a norm needs two rows of each view
        raise InputError(f"--batch must be at least 2, not {batch}")
    require_positive(gbs=gbs, tflops=tflops, host_gbs=host_gbs)
    config = load(recipe)
    device = Device(gbs * 1e9, tflops * 1e12)
    parts = count_step(config, batch, classes, device)
    size = config.views.size
    images = VIEWS * batch * 3 * size**2  # bytes of uint8
    copied = Device(host_gbs * 1e9, device.flops).work(images, images, 0)
    title = [
        f"roofline: {config.model.encoder.describe()}, {size} px, {batch} images a device, "
        f"{config.precision}, {gbs:g} GB/s, {tflops:g} TFLOP/s"
    ]
    rows = [_row(name, work, device) for name, work in parts.items()]
    whole = sum(parts.values(), Work())
    rows.append(_row("step", whole, device))
    at_once, eager = batch / whole.fused_seconds, batch / whole.seconds
    rows.append(Row("most images of a device", at_once, "images/s", eager, "eager"))
    row = _row("copies to the device, beside the step", copied, device)
    rows.append(replace(row, note=f"{images / 1e9:.3g} GB, decided by the host's link"))
    return Report(title, rows, out)


def _row(name: str, work: Work, device: Device) -> Row:
    moving, calculating = work.fused / device.bytes, work.flops / device.flops
    decides = "bytes" if moving >= calculating else "FLOPs"
    note = f"{work.fused / 1e9:.3g} GB (eager {work.bytes / 1e9:.3g}), "
    note += f"{work.flops / 1e9:.4g} GFLOP, decided by {decides}"
    return Row(name, work.fused_seconds * 1e3, "ms", work.seconds * 1e3, "eager", note=note)


def count_step(recipe: Recipe, batch: int, classes: int, device: Device) -> dict[str, Work]:
    """Return the work of one process's step by part and kind."""
    size, dtype = recipe.views.size, parameter_dtype(recipe.precision)
    with torch.device("meta"):
        online, target = Online(recipe.model, classes, size), Target(recipe.model, size)
    count = Count(device)
    with count:
        count.part = "views"
        # Tensors of the meta device take the way of a GPU, in which no row is chosen by its values.
        crops = torch.empty(VIEWS * batch, 3, size, size, dtype=torch.uint8, device="meta")
        params = torch.empty(VIEWS * batch, COLUMNS, device="meta")
        augment(crops, params, blur=recipe.views.ever_blur)
    fake = FakeTensorMode()
    with fake:
        for network in (online, target):
            network._apply(lambda held: torch.empty(held.shape, dtype=dtype))
        images = torch.empty(crops.shape).to(memory_format=torch.channels_last)
        labels = torch.zeros(batch, dtype=torch.int64)
    with fake, count:
        with autocast(recipe.precision, CPU):
            count.part = "online forward"
            output = online(images)
            count.part = "target forward"
            with torch.no_grad():
                projection = target(images)
        count.part = "loss"
        loss = whole_loss(output, projection, labels)
        count.part = "backward"
        loss.backward()
        moved, towards = byol.pair_parameters(target, online)
        count.part = "target update"
        update_target(moved, towards, torch.zeros((), dtype=dtype))
    found = dict(count.found)
    found["views"] = _views_work(found["views"], crops.nbytes, 4 * crops.numel(), device)
    held = sum(p.numel() for p in online.parameters()) * dtype.itemsize
    # LARS reads weights and gradients for the norms, then both and the momentum, and writes
    # weights and momentum. Eager, each of its four steps has a kernel: decay, scale, momentum, add.
    found["optimizer"] = device.work(13 * held, 7 * held, 0)
    return found


def _views_work(eager: Work, read: int, written: int, device: Device) -> Work:
    """Replace the fused bytes, because where the kernels end does not show in single operations.

    The crops are read and the images written. Between, an image is written and read again six
    times: for the mean that the contrast needs in each of its four places, and for the two
    directions of the blur.
    """
    fused = read + 2 * 6 * written + written
    return replace(eager, fused=fused, fused_seconds=fused / device.bytes)


class Count(TorchDispatchMode):
    """Add up the work of every operation while it is entered, by part and kind."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self.device, self.part = device, ""
        self.found: dict[str, Work] = {}
        self.names: dict[str, int] = {}  # how often each operation was seen

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        inputs, outputs = _tensors((args, kwargs)), _tensors(made)
        if name in FREE or _is_view(func, inputs, outputs):
            return made
        read, written = (sum(t.nbytes for t in tensors) for tensors in (inputs, outputs))
        if name in PASSES:  # of their inputs, the large ones have the shape of the first
            large = [t for t in inputs if t.shape == inputs[0].shape]
            read += (PASSES[name] - 1) * sum(t.nbytes for t in large)
        elif name == "convolution_backward":  # both gradients are made of the output's
            read += inputs[0].nbytes
        flops = 0
        if count := flop_registry.get(func._overloadpacket):
            flops = count(*args, **kwargs, out_val=made)
        fused: float = read + written
        if name in FUSED:
            fused = FUSED[name] * max((t.nbytes for t in outputs), default=0)
        kind = KINDS.get(name, "rest")
        whole = self.part in ("views", "loss", "target update")
        key = self.part if whole else f"{self.part}: {kind}"
        self.names[name] = self.names.get(name, 0) + 1
        work = self.device.work(read + written, fused, flops)
        self.found[key] = self.found.get(key, Work()) + work
        return made


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _is_view(func: OpOverload, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> bool:
    """Return whether the operation only looks at memory in another way."""
    if func._schema.is_mutable:
        return False
    known = {t.untyped_storage()._cdata for t in inputs}
    return all(t.untyped_storage()._cdata in known for t in outputs)
