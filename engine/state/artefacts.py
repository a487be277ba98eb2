"""What torch.compile made, kept beside the run for the next start."""

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
_KEYS = {"autotune": f"{_KEY}/{_KEY}"}  # kind of artifact: its keys, where they are no plain names


class Artefacts:
    """What torch.compile made at an earlier start of this run, in RUN/compile or a local folder.

    Compiled code runs: only the training takes it, from the folder of its own run or from the one
    that `compile_folder` names, and after its digest matched. Whoever can write there can run code
    in the next start. Every kind of machine, number of processes and strategy has a file of its
    own, and so has every recipe.
    """

    def __init__(
        self, folder: str, method: dict[str, Any], strategy: str, recompute: bool, world: World
    ) -> None:
        """`folder`: a URL. `method`: the recipe's method fields, by dotted names."""
        facts = [method, torch.__version__, torch.version.cuda, world.size, strategy]
        facts += [recompute, _machine(world.device)]
        text = json.dumps(facts, sort_keys=True)
        key = digest(text)
        self._url = files.join(folder, f"{key}.bin")
        self._digest_url = files.join(folder, f"{key}.sha256")
        self._main = world.main
        self.loaded = False

    def load(self, report: Callable[[str], None]) -> None:
        """Fill torch's local caches. What is missing or damaged is compiled again."""
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
        except Exception as error:  # a full disk, or whatever torch makes of it
            reason = " ".join(str(error).split()) or type(error).__name__
            report(f"compile: {files.redact(self._url)} could not be taken: {reason}")
            return
        self.loaded = True

    def save(self, report: Callable[[str], None]) -> None:
        """Keep what the first process compiled since the start; the digest goes last."""
        found = torch.compiler.save_cache_artifacts() if self._main and not self.loaded else None
        if found is None:
            return
        content = found[0]
        try:
            files.write(self._url, content)
            files.write(self._digest_url, digest(content, 64).encode())
        except OSError as error:  # the run goes on without
            report(f"compile: artefacts could not be kept: {error}")


def _stays_inside(content: bytes) -> bool:
    """Whether torch will write the artifacts in `content` nowhere but below its own caches.

    It joins their keys to a cache's folder: Inductor's and AOTAutograd's under the key's second and
    third letter, those of tuned kernels as they stand, in a folder of their own.
    """
    artifacts = CacheArtifactManager.deserialize(content)  # runs nothing; None for what is none
    return artifacts is not None and all(
        re.fullmatch(_KEYS.get(kind, _KEY), artifact.key, re.ASCII) and ".." not in artifact.key
        for kind, found in artifacts.items()
        for artifact in found
    )


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()
