"""The files of torch.compile: they are found again, and damaged or foreign ones are not used."""

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.log.terminal import Terminal
from engine.processes.world import World
from engine.recipe import Recipe
from engine.run import Run
from engine.state.artefacts import Artefacts
from launch import evaluate, export
from shards.errors import InputError
from shards.loader import DataConfig
from shards.storage import files
from tests.helpers import tiny
from tests.helpers.confined import call_apart
from tests.helpers.places import ROOT
from tests.helpers.training import train

pytestmark = pytest.mark.versions

ALONE = World(0, 1, 1, torch.device("cpu"))

# Compiles a line with artefacts of the run at argv[1]; prints Inductor's hits and misses.
SCRIPT = """
import sys
import torch
from torch._dynamo.utils import counters
from engine.run import Run
from engine.log.terminal import Terminal
from engine.processes.world import World
from shards.loader import DataConfig
from tests.helpers import tiny

recipe = tiny.recipe(DataConfig(), sys.argv[1])
alone = World(0, 1, 1, torch.device("cpu"))
artefacts = Run(recipe, "", alone, Terminal(main=True), None).artefacts("none")
artefacts.load(print)
torch.compile(lambda x: x.sin() + 1, fullgraph=True)(torch.randn(8))
artefacts.save(print)
found = counters["inductor"]
print("hits", found["fxgraph_cache_hit"], "misses", found["fxgraph_cache_miss"])
"""


def artefacts_of(recipe: Recipe, world: World = ALONE, strategy: str = "none") -> Artefacts:
    return Run(recipe, "", world, Terminal(main=True), None).artefacts(strategy)


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
    artefacts_of(tiny.recipe(DataConfig(), run)).save(print)
    (content,) = (run / "compile").glob("*.bin")
    content.write_bytes(content.read_bytes()[:-1] + b"?")
    reports: list[str] = []
    artefacts = artefacts_of(tiny.recipe(DataConfig(), run))
    artefacts.load(reports.append)
    assert not artefacts.loaded
    assert "is damaged; compiling again" in reports[0]


def test_artefacts_of_another_run_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though they are whole and of the same recipe, and that run itself takes them."""
    (content,) = craft(INSIDE[:1])
    here, there = (artefacts_of(tiny.recipe(DataConfig(), tmp_path / n)) for n in ("here", "there"))
    assert Path(here._url).name == Path(there._url).name
    files.write(there._url, content)
    files.write(there._digest_url, hashlib.sha256(content).hexdigest().encode())
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    for artefacts in (here, there):
        artefacts.load(print)
    assert (here.loaded, there.loaded) == (False, True)


def test_other_machines_and_strategies_have_their_own(tmp_path: Path) -> None:
    recipe = tiny.recipe(DataConfig(), tmp_path)
    two = World(0, 2, 2, torch.device("cpu"))
    places = [(ALONE, "none"), (ALONE, "ddp"), (two, "ddp"), (two, "fsdp")]
    urls = {artefacts_of(recipe, world, strategy)._url for world, strategy in places}
    assert len(urls) == len(places)


# What a file may hold ----------------------------------------------------------------------------

LEADING_OUTSIDE = [
    *("inductor {outside}/a", "inductor ../../a", "inductor a..b", "inductor a/{outside}/b"),
    *("aot_autograd {outside}/a", "aot_autograd ../a", "aot_autograd x/yz"),
    *("autotune {outside}/a.best_config", "autotune ../a.best_config", "autotune ab/../../a"),
    *("autotune ab//a", "autotune /ab", "autotune a.best_config/", "autotune ab/."),
    *("precompile {outside}/a", "precompile ../a", "precompile a/../../b", "inductor "),
    *("pgo ../a", "pgo a\\b", "inductor a b", "inductor \u00e4"),
]
INSIDE = ["inductor fabcdef23", "aot_autograd a2b3c4d5", "autotune ab/cabc2.best_config"]


def craft(lines: list[str]) -> list[bytes]:
    """Files of artifacts, each with one of a `kind key`, from a process that compiles nothing."""
    return call_apart(_craft, lines)  # type: ignore[no-any-return]


def _craft(lines: list[str]) -> list[bytes]:
    import torch._dynamo.package
    import torch._dynamo.pgo
    import torch._functorch._aot_autograd.autograd_cache
    import torch._inductor.codecache
    import torch._inductor.runtime.autotune_cache  # noqa: F401
    from torch.compiler._cache import CacheArtifactFactory, CacheArtifactManager

    made = []
    for line in lines:
        kind, key = line.split(" ", 1)
        CacheArtifactManager.clear()
        artifact = CacheArtifactFactory._get_artifact_type(kind)(key, b"1")
        CacheArtifactManager._new_cache_artifacts[kind].append(artifact)
        found = CacheArtifactManager.serialize()
        assert found is not None
        made.append(found[0])
    return made


def test_artifacts_that_lead_outside_of_torchs_cache_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, outside, run = tmp_path / "cache", tmp_path / "outside", tmp_path / "run"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    keys = [key.format(outside=outside) for key in LEADING_OUTSIDE]
    for key, content in zip([*INSIDE, *keys], craft([*INSIDE, *keys]), strict=True):
        artefacts = artefacts_of(tiny.recipe(DataConfig(), run))
        files.write(artefacts._url, content)
        files.write(artefacts._digest_url, hashlib.sha256(content).hexdigest().encode())
        reports: list[str] = []
        artefacts.load(reports.append)
        assert artefacts.loaded == (key in INSIDE), key
        assert len(reports) == (key not in INSIDE), key
    found = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"cache", "run"}
    assert len(list(run.rglob("*"))) == 3
    assert len([path for path in cache.rglob("*") if path.is_file()]) == len(INSIDE)


@pytest.mark.parametrize("content", [b"code", b"\xff" * 100, b"\x00" * 23])
def test_a_file_of_no_artifacts_is_compiled_again(tmp_path: Path, content: bytes) -> None:
    artefacts = artefacts_of(tiny.recipe(DataConfig(), tmp_path))
    files.write(artefacts._url, content)
    files.write(artefacts._digest_url, hashlib.sha256(content).hexdigest().encode())
    reports: list[str] = []
    artefacts.load(reports.append)
    assert not artefacts.loaded
    assert "is damaged; compiling again" in reports[0]


def test_artifacts_that_torch_cannot_take_are_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    (content,) = craft(INSIDE[:1])
    artefacts = artefacts_of(tiny.recipe(DataConfig(), tmp_path))
    files.write(artefacts._url, content)
    files.write(artefacts._digest_url, hashlib.sha256(content).hexdigest().encode())
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", fail)
    reports: list[str] = []
    artefacts.load(reports.append)
    assert not artefacts.loaded
    assert reports[0].endswith("could not be taken: [Errno 28] No space left on device")


def test_a_local_folder_in_place_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"code", None))
    folder = tmp_path / "folder"
    recipe = tiny.recipe(DataConfig(), tmp_path / "run", compile_folder=str(folder))
    artefacts_of(recipe).save(print)
    assert sorted(path.suffix for path in folder.iterdir()) == [".bin", ".sha256"]
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"^compile_folder s3://b/c: must be on a local disk"):
        replace(recipe, data=DataConfig(train="-", val="-"), compile_folder="s3://b/c").check()


def test_evaluations_and_exports_take_no_artifacts(
    tiny_data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    train(tiny.recipe(tiny_data, run, steps=1))
    monkeypatch.setattr(Artefacts, "load", lambda *_: pytest.fail("artifacts were asked for"))
    taken = lambda _: pytest.fail("artifacts were taken")  # noqa: E731
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", taken)
    few = ["--threads", "1", "--batch", "16", "--epochs", "1"]
    assert evaluate.main(["linear", str(run), *few]) == 0
    assert evaluate.main(["finetune", str(run), "--lr", "0.1", *few]) == 0
    assert evaluate.main(["knn", str(run), "--threads", "1"]) == 0
    assert export.main([str(run), str(tmp_path / "out")]) == 0
