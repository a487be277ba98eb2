"""The device's augmentation against the official implementation's figures, and its contracts."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.method import augment as ops
from engine.method.augment import augment, distort, flip, gaussian_blur, normalize
from engine.processes import compiling
from shards.views import COLUMNS, Column, ViewsConfig, draw_views
from tests.helpers.golden_files import golden

pytestmark = pytest.mark.versions

SIZES = [32, 128, 224]
# The stored figures are rounded to 16 bits (up to 1.6e-5 beyond +-1); the rest is float32's.
TOLERANCE = 3e-5
# A float32 mean over 224 x 224 pixels, summed in another order, and ten operations after it.
ROUNDING = 2e-6

OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": ops.brightness,
    "contrast": ops.contrast,
    "saturation": ops.saturation,
    "hue": ops.hue,
    "blur": ops.gaussian_blur,
    "solarize": lambda x, threshold: ops.solarize(x, threshold[:, None, None, None]),
    "clip": lambda x, factor: ops.contrast(x, factor).clamp(0, 1),
}


def _golden(name: str) -> Tensor:
    return golden("augment")[name]


def _assert_golden(size: int, name: str, x: Tensor) -> None:
    """Compare the stored pixels of x [N, 3, size, size] with the array `name`."""
    rows, cols = _golden(f"s{size}/rows"), _golden(f"s{size}/cols")
    expected = _golden(f"s{size}/{name}").to(x.dtype)
    torch.testing.assert_close(x[..., rows, :][..., cols], expected, rtol=0, atol=TOLERANCE)


def _rows(size: int, view: str) -> tuple[Tensor, Tensor]:
    """The official cases of a view: uint8 images [C, 3, size, size] and parameters for them."""

    def case(name: str) -> Tensor:
        return _golden(f"s{size}/{view}/{name}")

    params = torch.zeros(len(case("image")), COLUMNS)
    params[:, Column.FLIP] = case("flip").float()
    params[:, Column.JITTER] = case("jitter").float()
    params[:, Column.GRAYSCALE] = case("gray").float()
    params[:, Column.SOLARIZE] = case("solarize").float()
    params[:, Column.FACTORS : Column.FACTORS + 4] = case("factors")
    params[:, Column.ORDER : Column.ORDER + 4] = case("order").float()
    params[:, Column.SIGMA] = torch.where(case("blur") > 0, case("sigma"), 0)
    return _golden(f"s{size}/images")[case("image").long()], params


def _batch(rows: int, size: int) -> tuple[Tensor, Tensor]:
    """Random uint8 images, and the parameters of view 2 with many a blur among them."""
    generator = torch.Generator().manual_seed(rows)
    images = torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=generator)
    draws = draw_views(0, 0, np.arange(rows), ViewsConfig())
    params = torch.from_numpy(draws.params[1])
    params[::2, Column.SIGMA] = 1.5
    return images, params


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("operation", [*OPERATIONS, "grayscale", "jitter"])
def test_operation(operation: str, size: int, dtype: torch.dtype) -> None:
    images = _golden(f"s{size}/images").to(dtype) / 255
    for number, image in enumerate(images):
        key = f"{operation}/img{number}"
        out = _golden(f"s{size}/{key}/out")
        x = image.expand(len(out), -1, -1, -1)
        if operation == "grayscale":
            result = ops.grayscale(x)
        elif operation == "jitter":
            factors = _golden(f"s{size}/{key}/factors").to(dtype)
            result = ops.jitter(x, factors, _golden(f"s{size}/{key}/order").to(dtype))
        else:
            result = OPERATIONS[operation](x, _golden(f"s{size}/{key}/param").to(dtype))
        assert result.dtype == dtype
        _assert_golden(size, f"{key}/out", result)


@pytest.mark.parametrize("way", [ops.distort_chosen, ops.distort_together])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("view", ["view1", "view2"])
def test_whole_view(view: str, size: int, way: Callable[..., Tensor]) -> None:
    images, params = _rows(size, view)
    result = way(images, params, blur=True)
    assert result.dtype == torch.float32
    _assert_golden(size, f"{view}/out", result)

    precise = way(images.double() / 255, params.double(), blur=True)
    assert precise.dtype == torch.float64
    _assert_golden(size, f"{view}/out", precise)
    torch.testing.assert_close(result.double(), precise, rtol=0, atol=ROUNDING)


def test_every_array_of_the_golden_file_is_used() -> None:
    operations = {name.split("/")[1] for name in golden("augment")}
    tested = {*OPERATIONS, "grayscale", "jitter", "view1", "view2"}
    assert operations - tested == {"images", "rows", "cols"}


def test_normalization_and_memory_format() -> None:
    images, params = _batch(4, 24)
    result = augment(images, params)
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(result, (distort(images, params) - mean) / std)
    for rows in (1, 4):
        x = augment(images[:rows], params[:rows])
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert x.stride() == torch.empty(x.shape, memory_format=torch.channels_last).stride()


def test_compiles_into_one_graph_for_every_batch() -> None:
    compiled = torch.compile(augment, fullgraph=True, backend="aot_eager", dynamic=False)
    images, params = _batch(6, 64)
    torch.testing.assert_close(compiled(images, params), augment(images, params))
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(
            compiled(~images, params.flip(0)), augment(~images, params.flip(0))
        )


@pytest.mark.parametrize("size", [32, 64, 240])
def test_rows_are_independent(size: int) -> None:
    """Bit for bit on one thread, whatever rows are chosen and processed together."""
    images, params = _batch(12, size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        together = augment(images, params)
        alone = torch.cat([augment(images[i : i + 1], params[i : i + 1]) for i in range(12)])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("size", [32, 240])
def test_a_cpu_chooses_rows_and_gets_what_a_gpu_gets(size: int) -> None:
    """Of many rows that need different operations, in float64 and with what a caller keeps."""
    images, params = _batch(24, size)
    assert len({tuple(row) for row in (params[:, :4] > 0).tolist()}) >= 8
    precise = images.double() / 255
    kept = precise.clone()
    expected = ops.distort_together(precise, params.double(), blur=True)
    torch.testing.assert_close(distort(precise, params), expected, rtol=0, atol=1e-12)
    assert torch.equal(precise, kept)
    found = distort(images, params).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(
        augment(images, params).double(), normalize(expected), rtol=0, atol=ROUNDING / min(ops.STD)
    )


def test_unblurred_rows_are_left_exactly() -> None:
    images, params = _batch(8, 64)
    x = images.float() / 255
    for row in (x, x.double()):
        assert torch.equal(gaussian_blur(row, row.new_zeros(8)), row)
    params[:, Column.SIGMA] = 0
    assert torch.equal(augment(images, params), augment(images, params, blur=False))


def test_rows_that_are_meant_to_be_are_mirrored() -> None:
    images, params = _batch(8, 32)
    params[:, Column.FLIP] = torch.tensor([1, 0, 0, 1, 1, 0, 1, 0])
    found = flip(images, params).numpy()
    for row, whole, mirrored in zip(found, images.numpy(), params[:, Column.FLIP], strict=True):
        assert np.array_equal(row, whole[:, :, ::-1] if mirrored else whole)
    params[:, [Column.JITTER, Column.GRAYSCALE, Column.SOLARIZE, Column.SIGMA]] = 0
    assert torch.equal(distort(images, params), torch.from_numpy(found) / 255)


def test_nothing_drawn_changes_nothing() -> None:
    images, params = _batch(8, 64)
    for column in (Column.FLIP, Column.JITTER, Column.GRAYSCALE, Column.SOLARIZE, Column.SIGMA):
        params[:, column] = 0
    assert torch.equal(distort(images, params), images / 255)


def test_autocast_does_not_reach_it() -> None:
    images, params = _batch(8, 64)
    expected = augment(images, params)
    with torch.autocast("cpu", torch.bfloat16):
        result = augment(images, params)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_under_tf32_and_autocast_without_synchronization() -> None:
    images, params = (tensor.cuda() for tensor in _batch(8, 224))
    images = images.contiguous(memory_format=torch.channels_last)  # as the loader's are
    compiled = compiling.compiled(augment)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            compiled(images, params)  # a graph is made anew for other settings of these two
            torch.cuda.set_sync_debug_mode("error")
            results = [augment(images, params), compiled(images, params)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision(precision)
    expected = normalize(distort(images.cpu().double() / 255, params.cpu())).float()
    for result in results:
        torch.testing.assert_close(result.cpu(), expected, rtol=0, atol=ROUNDING / min(ops.STD))
