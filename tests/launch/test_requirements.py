"""The packages that are needed: told in one line, and named in one place."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from launch import requirements
from tests.helpers.places import ROOT

pytestmark = pytest.mark.versions

PYPROJECT = (ROOT / "pyproject.toml").read_text()
OLDEST = re.search(r'"torch>=([0-9.]+)"', PYPROJECT)[1]  # type: ignore[index]


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> str:
    """The fault found where these packages have these versions, None: are not installed."""
    real = metadata.version

    def version(name: str) -> str:
        found = versions.get(name, real(name))
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return requirements.find_fault()


def test_what_is_installed_here_does() -> None:
    assert requirements.find_fault() == ""


@pytest.mark.parametrize("version", ["1.13.1", "2.9.1+cpu", "2.10.0", "2.10.0+cu128"])
def test_an_older_torch_is_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    told = installed(monkeypatch, torch=version)
    needed = f"torch>={OLDEST}"
    assert (
        told == f"torch {version} is installed, but {needed} is needed: run: pip install '{needed}'"
    )


@pytest.mark.parametrize("suffix", ["", ".0", ".0+cu130", ".1", ".0a0+nv26.1", ".0.dev20260101"])
def test_builds_of_the_oldest_torch_will_do(monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    assert installed(monkeypatch, torch=OLDEST + suffix) == ""


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed(monkeypatch, tyro=None).startswith("tyro is not installed: run: pip install")


def test_what_only_an_extra_needs_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert installed(monkeypatch, onnx=None, timm=None) == ""


@pytest.mark.parametrize("name", ["train", "pack", "evaluate", "export", "bench"])
def test_every_entry_point_refuses_before_it_imports(name: str, tmp_path: Path) -> None:
    """With a torch that is nothing but its version: any import from it would fail."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    record = tmp_path / "torch-2.10.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.10.0\n")
    for rank, lines in (("0", 1), ("1", 0)):
        ended = subprocess.run(
            [sys.executable, str(ROOT / "launch" / f"{name}.py"), "--help"],
            capture_output=True,
            text=True,
            timeout=60,
            env={"PYTHONPATH": str(tmp_path), "LOCAL_RANK": rank},
        )
        assert ended.returncode == 1
        assert ended.stdout == ""
        assert len(ended.stderr.splitlines()) == lines
        assert ended.stderr.startswith("error: torch 2.10.0 is installed, but") == bool(lines)


def test_the_oldest_torch_is_named_in_pyproject_alone() -> None:
    """.ci/run reads it there, and what the README says is the same."""
    run = (ROOT / ".ci" / "run").read_text()
    assert OLDEST not in run
    (line,) = re.findall(r"^oldest\(\) .*$", run, re.MULTILINE)
    for name in ("torch", "torchvision"):
        printed = subprocess.run(
            ["bash", "-c", f"{line}; oldest {name}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        lowest = Requirement(re.search(rf'"({name}>=.*?)"', PYPROJECT)[1])  # type: ignore[index]
        assert printed == f"{lowest}.*".replace(">=", "==")
    assert "pytest -m 'versions and not slow'" in run
    assert f"torch {OLDEST} or newer" in (ROOT / "README.md").read_text()
    for name in ("Dockerfile", "slurm.sbatch", "kubernetes.yaml"):
        assert "torch>=" not in (ROOT / "launch" / name).read_text()


def test_this_torch_is_supported() -> None:
    assert Version(Version(torch.__version__).base_version) >= Version(OLDEST)
