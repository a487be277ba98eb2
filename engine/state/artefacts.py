"""Keep the code that torch.compile made beside the run, for the next start."""

import json
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler._cache import CacheArtifactManager

from engine.processes.world import World
from shards.digest import digest
from shards.storage import files

_KEY = r"[\w:-][\w.:-]*"
_KEYS = {"autotune": f"{_KEY}/{_KEY}"}  # keys of an artifact's kind, when they are not plain names


class Artefacts:
    """Save and load the code that torch.compile made, in RUN/compile or a local folder.

    Loading runs this code, so whoever can write to the folder can run code in the next start. Only
    training loads it, from the folder of its own run or from `compile_folder`, and only when its
    digest matches. There is a separate file for every recipe, kind of machine, number of processes
    and strategy.
    """

    def __init__(
        self, folder: str, method: dict[str, Any], strategy: str, recompute: bool, world: World
    ) -> None:
        """Find the files for this kind of start.

        `folder` is a URL. `method` has the recipe's method fields by dotted names.
        """
        facts = [method, torch.__version__, torch.version.cuda, world.size, strategy]
        facts += [recompute, _machine(world.device)]
        text = json.dumps(facts, sort_keys=True)
        key = digest(text)
        self._url = files.join(folder, f"{key}.bin")
        self._digest_url = files.join(folder, f"{key}.sha256")
        self._main = world.main
        self.loaded = False

    def load(self, report: Callable[[str], None]) -> None:
        """Fill torch's local caches. torch compiles again what is missing or damaged."""
        try:
            expected = files.read(self._digest_url).decode()
            content = files.read(self._url)
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as error:
            report(f"compile: {files.redact(self._url)} could not be read: {error}")
            return
        if digest(content, 64) != expected or not _stays_inside(content):
            report(f"compile: {files.redact(self._url)} is damaged; compiling again")
            return
        try:
            torch.compiler.load_cache_artifacts(content)
        except Exception as error:  # torch raises many kinds, for instance when a disk is full
            reason = " ".join(str(error).split()) or type(error).__name__
            report(f"compile: {files.redact(self._url)} could not be taken: {reason}")
            return
        self.loaded = True

    def save(self, report: Callable[[str], None]) -> None:
        """Save what the first process has compiled since the start. The digest is written last."""
        found = torch.compiler.save_cache_artifacts() if self._main and not self.loaded else None
        if found is None:
            return
        content = found[0]
        try:
            files.write(self._url, content)
            files.write(self._digest_url, digest(content, 64).encode())
        except OSError as error:  # the run continues without them
            report(f"compile: artefacts could not be kept: {error}")


def _stays_inside(content: bytes) -> bool:
    """Return whether torch will write the artifacts in `content` only below its own caches.

    torch makes paths of their keys. Inductor's and AOTAutograd's go below a folder named by the
    key's second and third letter. Those of tuned kernels go to a folder of their own, unchanged.
    """
    artifacts = CacheArtifactManager.deserialize(content)  # runs no code; None if it has none
    return artifacts is not None and all(
        re.fullmatch(_KEYS.get(kind, _KEY), artifact.key, re.ASCII) and ".." not in artifact.key
        for kind, found in artifacts.items()
        for artifact in found
    )


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()
