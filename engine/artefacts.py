"""What torch.compile made, kept beside the run for the next start."""

import hashlib
import json
from collections.abc import Callable

import torch

from engine.recipe import Recipe, method_fields
from engine.world import World
from shards import storage

FOLDER = "compile"  # in the run's directory


class Artefacts:
    """What torch.compile made at an earlier start of this run, in RUN/compile.

    Compiled code runs: it is taken only from the run's own URL, and after its digest matched. Every
    kind of machine, number of processes and strategy has a file of its own.
    """

    def __init__(self, recipe: Recipe, world: World, strategy: str) -> None:
        facts = [method_fields(recipe), torch.__version__, torch.version.cuda, world.size, strategy]
        facts += [recipe.parallel.recompute, _machine(world.device)]
        text = json.dumps(facts, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._url = storage.join(recipe.run, FOLDER, f"{key}.bin")
        self._digest_url = storage.join(recipe.run, FOLDER, f"{key}.sha256")
        self._main = world.main
        self.loaded = False

    def load(self, report: Callable[[str], None]) -> None:
        """Fill torch's local caches. What is missing or damaged is compiled again."""
        try:
            expected = storage.read(self._digest_url).decode()
            content = storage.read(self._url)
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as error:
            report(f"compile: {storage.redact(self._url)} could not be read: {error}")
            return
        if hashlib.sha256(content).hexdigest() != expected:
            report(f"compile: {storage.redact(self._url)} is damaged; compiling again")
            return
        torch.compiler.load_cache_artifacts(content)
        self.loaded = True

    def save(self, report: Callable[[str], None]) -> None:
        """Keep what the first process compiled since the start; the digest goes last."""
        found = torch.compiler.save_cache_artifacts() if self._main and not self.loaded else None
        if found is None:
            return
        content = found[0]
        try:
            storage.write(self._url, content)
            storage.write(self._digest_url, hashlib.sha256(content).hexdigest().encode())
        except OSError as error:  # the run goes on without
            report(f"compile: artefacts could not be kept: {error}")


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.backends.cpu.get_cpu_capability()
