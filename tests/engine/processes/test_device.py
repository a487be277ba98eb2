"""A machine whose GPU torch cannot use does not pass for one without a GPU."""

from pathlib import Path

import pytest
import torch

from engine.processes import world

CPU = torch.device("cpu")


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_a_gpu_that_torch_cannot_use_is_told(
    cuda: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "version"
    monkeypatch.setattr(world, "_NVIDIA_DRIVER", driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert world.find_unused_gpu(CPU) == ""
    driver.touch()
    told = world.find_unused_gpu(CPU)
    which = "has no CUDA" if cuda is None else "is built for CUDA 13.0"
    assert f"torch {torch.__version__}, which {which}, finds no GPU that it can use" in told
    assert "\n" not in told
    assert world.find_unused_gpu(torch.device("cuda", 0)) == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user wants the CPU
    assert world.find_unused_gpu(CPU) == ""
