"""Networks and functions are compiled where the machine has a compiler."""

import sysconfig
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import sympy
import torch
import torch.utils._triton
from torch._inductor.codegen.simd import SIMDKernel
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V

from engine.processes import compiling
from shards.loader import DataConfig
from tests.helpers import tiny
from tests.helpers.training import finish, open_trainer

pytestmark = pytest.mark.versions


def test_without_a_compiler_training_goes_on(
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    trainer = open_trainer(tiny.recipe(tiny_data, tmp_path, compile=True, steps=1))
    finish(trainer)
    output = capsys.readouterr().out
    line = "compile: no C++ compiler (no-such-compiler) found; going on without torch.compile"
    assert output.count(line) == 1
    assert not (tmp_path / "compile").exists()


@pytest.mark.parametrize(
    ("device", "commands", "missing"),
    [
        ("cuda", ["gcc"], ""),
        ("cuda", ["clang"], ""),
        ("cuda", ["g++"], "no C compiler (gcc or clang) found"),
        ("cpu", ["g++"], ""),
        ("cpu", ["gcc"], "no C++ compiler (g++) found"),
    ],
)
def test_each_device_needs_a_compiler_of_its_own(
    device: str,
    commands: list[str],
    missing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton starts its kernels by a C module, and takes these names (triton.runtime.build)."""
    for name in commands:
        (tmp_path / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CC", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(torch.utils._triton, "has_triton", lambda: True)
    assert compiling.find_missing_compiler(torch.device(device)) == missing


def test_a_machine_without_pythons_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Linux without its package of them: Triton and Inductor would fail in the first step."""
    monkeypatch.delenv("CXX", raising=False)
    cpu = torch.device("cpu")
    assert compiling.find_missing_compiler(cpu) == ""
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    assert compiling.find_missing_compiler(cpu).startswith("no Python.h found")
    (tmp_path / "Python.h").touch()
    assert compiling.find_missing_compiler(cpu) == ""


def test_a_partial_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the augmentation is one."""
    traced = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    double = compiling.compiled(partial(torch.mul, other=2))
    assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))


def test_a_tiling_that_does_not_fit_a_kernel_is_passed_over() -> None:
    """Also by torch 2.11, as in the augmentation of photos on a GPU."""
    compiling.compiled(torch.abs)
    sizes = SimpleNamespace(sizevars=SizeVarAllocator())
    with V.set_graph_handler(sizes):  # type: ignore[arg-type]
        for depth, fits in ((6, True), (7, False)):
            tiling = [sympy.Integer(size) for size in (4, depth, 5, 1)]
            assert SIMDKernel.is_compatible(tiling, ([sympy.Integer(120)], [])) == fits
