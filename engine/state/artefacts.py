"""Keep what torch.compile made in a folder, so that the next start of the run can use it."""

import json
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.compiler._cache import CacheArtifactManager

from engine.processes.world import World
from shards.digest import digest
from shards.errors import InputError
from shards.storage import files

_KEY = r"[\w:-][\w.:-]*"
# These kinds of artifacts have keys that are not plain names.
_KEYS = {"autotune": f"{_KEY}/{_KEY}"}


class Artefacts:
    """Save and load what torch.compile made, in RUN/compile or in a local folder.

    A start that loads this code runs it, so whoever can write to the folder can run code in the
    next start. Only training loads it, from the folder of its own run or from `compile_folder`, and
    only when its digest matches. Each combination of the recipe's method fields, torch release,
    kind of machine, number of processes, strategy and recomputation has a file of its own.
    """

    def __init__(
        self, folder: str, method: dict[str, Any], strategy: str, recompute: bool, world: World
    ) -> None:
        """Choose the names of the files; nothing is read yet.

        `folder` is a URL. `method` holds the recipe's method fields by dotted names.
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
        """Fill torch's local caches from the file, and set `loaded` when that succeeds.

        Without a file nothing happens. A file that is damaged or cannot be read is reported and not
        used. torch then compiles again.
        """
        try:
            expected = files.read(self._digest_url).decode()
            content = files.read(self._url)
        except FileNotFoundError:
            return
        except (OSError, InputError, UnicodeDecodeError) as error:
            report(f"compile: {files.redact(self._url)} could not be read: {error}")
            return
        if digest(content, 64) != expected or not _stays_inside(content):
            report(f"compile: {files.redact(self._url)} is damaged; compiling again")
            return
        try:
            torch.compiler.load_cache_artifacts(content)
        except Exception as error:  # torch raises errors of many kinds, for instance on a full disk
            reason = " ".join(str(error).split()) or type(error).__name__
            report(f"compile: {files.redact(self._url)} could not be taken: {reason}")
            return
        self.loaded = True

    def save(self, report: Callable[[str], None]) -> None:
        """Save what the first process has compiled since the start, unless `load` succeeded.

        The digest is written last. A failure is reported.
        """
        found = torch.compiler.save_cache_artifacts() if self._main and not self.loaded else None
        if found is None:
            return
        content = found[0]
        try:
            files.write(self._url, content)
            files.write(self._digest_url, digest(content, 64).encode())
        except OSError as error:  # the run can do without them
            report(f"compile: artefacts could not be kept: {error}")


def _stays_inside(content: bytes) -> bool:
    """Return whether torch will write the artifacts in `content` only below its own caches.

    torch makes file paths out of the keys of the artifacts. The caches of Inductor and AOTAutograd
    have a folder named after each key. Inductor's lies in a folder named after the key's second and
    third character. The key of a tuned kernel is itself a path: a folder and a file name.
    """
    # This runs no code from `content`. It returns None when it cannot decode `content`.
    artifacts = CacheArtifactManager.deserialize(content)
    return artifacts is not None and all(
        re.fullmatch(_KEYS.get(kind, _KEY), artifact.key, re.ASCII) and ".." not in artifact.key
        for kind, found in artifacts.items()
        for artifact in found
    )


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()
