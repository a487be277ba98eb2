"""What is compiled, and what it made when it is met again."""

import hashlib
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from engine import compiling
from engine.artefacts import Artefacts
from engine.fit import fit
from engine.trainer import Trainer
from engine.world import World
from shards.loader import DataConfig
from tests import tiny

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
ROOT = Path(__file__).parent.parent

# Compiles a line with artefacts of the run at argv[1]; prints Inductor's hits and misses.
SCRIPT = """
import sys
import torch
from torch._dynamo.utils import counters
from engine.artefacts import Artefacts
from engine.world import World
from shards.loader import DataConfig
from tests import tiny

recipe = tiny.recipe(DataConfig(), sys.argv[1])
artefacts = Artefacts(recipe, World(0, 1, 0, 1, torch.device("cpu")), "none")
artefacts.load(print)
torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.randn(8))
artefacts.save(print)
found = counters["inductor"]
print("hits", found["fxgraph_cache_hit"], "misses", found["fxgraph_cache_miss"])
"""


def compile_somewhere(run: Path, cache: Path) -> str:
    """In a process of its own, with a local cache of its own."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(run)],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
        cwd=ROOT,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
    ).stdout.strip()


@pytest.mark.slow
def test_artefacts_are_met_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = compile_somewhere(run, tmp_path / "a")
    hits, misses = (int(word) for word in first.split()[1::2])
    assert hits == 0
    assert misses > 0
    assert compile_somewhere(run, tmp_path / "b") == f"hits {misses} misses 0"


def test_damaged_artefacts_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", None))
    Artefacts(tiny.recipe(DataConfig(), run), ALONE, "none").save(print)
    (content,) = (run / "compile").glob("*.bin")
    content.write_bytes(content.read_bytes()[:-1] + b"?")
    reports: list[str] = []
    artefacts = Artefacts(tiny.recipe(DataConfig(), run), ALONE, "none")
    artefacts.load(reports.append)
    assert not artefacts.loaded
    assert "is damaged; compiling again" in reports[0]


def test_artefacts_of_another_run_are_not_taken(tmp_path: Path) -> None:
    here = Artefacts(tiny.recipe(DataConfig(), tmp_path / "here"), ALONE, "none")
    (tmp_path / "there" / "compile").mkdir(parents=True)
    name = Path(here._url).name
    (tmp_path / "there" / "compile" / name).write_bytes(b"code")
    digest = hashlib.sha256(b"code").hexdigest()
    (tmp_path / "there" / "compile" / name.replace(".bin", ".sha256")).write_text(digest)
    here.load(print)
    assert not here.loaded


def test_other_machines_and_strategies_have_their_own(tmp_path: Path) -> None:
    recipe = tiny.recipe(DataConfig(), tmp_path)
    two = World(0, 2, 0, 2, torch.device("cpu"))
    places = [(ALONE, "none"), (ALONE, "ddp"), (two, "ddp"), (two, "fsdp")]
    urls = {Artefacts(recipe, world, strategy)._url for world, strategy in places}
    assert len(urls) == len(places)


def test_without_a_compiler_training_goes_on(
    tiny_data: DataConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    trainer = Trainer(tiny.recipe(tiny_data, tmp_path, compile=True, steps=1))
    fit(trainer)
    output = capsys.readouterr().out
    line = "compile: no C++ compiler (no-such-compiler) found; going on without torch.compile"
    assert output.count(line) == 1
    assert not (tmp_path / "compile").exists()


def test_a_partial_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the augmentation is one."""
    traced = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    double = compiling.compiled(partial(torch.mul, other=2))
    assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
