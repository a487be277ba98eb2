"""Feed damaged files to everything that reads what strangers wrote, and count what becomes of them.

    python -m tests.whole.fuzz --number 10000 --seed 1

Each input is refused with the error that its reader promises, or accepted. Other errors, and inputs
that take more than SECONDS, are failures. So is more memory than `confined.MEMORY`, because no more
can be had.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import random
import resource
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.encoder import foreign
from engine.encoder.foreign_files import read_tensors
from engine.evaluation.results import read_result
from engine.log import journal
from engine.processes.world import World
from engine.state import checkpoint, dcp_metadata, lease
from shards import index
from shards.decode import DecodeError, decode
from shards.errors import InputError
from shards.index import Index
from shards.making import synthetic
from shards.samples import Block, Layout, group_samples
from shards.storage import files
from shards.tar import TarError, read_members
from tests.helpers import confined
from tests.whole import fuzz_inputs
from tests.whole.fuzz_inputs import damage, damage_json

SECONDS = 5.0
HOME = "memory://fuzz"
ALONE = World(0, 1, 1, torch.device("cpu"))
OUTCOMES = ("accepted", "refused", "other errors", "too slow")


@dataclass
class Target:
    """What reads one kind of file: `read` gets the damaged content, and raises `refusal`."""

    read: Callable[[bytes], object]
    make: Callable[[random.Random], bytes]
    damage: Callable[[bytes, random.Random], bytes]
    refusal: type[Exception]
    counts: Counter[str] = field(default_factory=Counter)


def _read_tar(content: bytes) -> None:
    list(group_samples(read_members(io.BytesIO(content), whole=True), Layout()))


def _read_block(content: bytes) -> None:
    block = Block(content)
    for position in range(len(block)):
        block.label(position)


def _placed(url: str, read: Callable[[], object]) -> Callable[[bytes], object]:
    """Return a function that writes the content to `url` and then calls `read`."""

    def place_and_read(content: bytes) -> object:
        files.write(url, content)
        return read()

    return place_and_read


def _use_index(url: str) -> None:
    found = index.load(url, "data.train")
    for shard in range(len(found.shards)):
        found.blocks(shard)


def _use_checkpoint_file() -> None:
    tensors = read_tensors(f"{HOME}/file.pth")
    with contextlib.suppress(InputError):  # most have no network, which ends the search for it
        foreign.match(tensors, "online", "file")


def _ignore(_: str) -> None:
    pass


def _with_digest(content: bytes) -> bytes:
    """Make the digest of an index fit, as the format computes it, where that can be done."""
    try:
        document = json.loads(content)
        shards = [
            index.Shard(s["name"], s["samples"], s["bytes"], None, s["checksum"])
            for s in document["shards"]
        ]
        document["digest"] = Index(HOME, shards, document["classes"]).digest
    except Exception:
        return content
    return json.dumps(document).encode()


def _damage_index(content: bytes, chance: random.Random) -> bytes:
    found = damage_json(content, chance)
    return _with_digest(found) if chance.random() < 0.7 else found


def make_targets() -> dict[str, Target]:
    data, run = f"{HOME}/data", f"{HOME}/run"
    synthetic.write(data, 20, 16, seed=0)
    commit = checkpoint.save(run, 1, {"a": torch.ones(3, 2)}, {"seed": 0}, "digest", ALONE)
    metadata = files.read(f"{commit.url}/.metadata")
    held = lease.acquire(f"{HOME}/held", ["a:1:2:3"], lease.LONGEST_PERIOD, _ignore)
    held.release()
    result = json.dumps({"metrics": {"top1": 0.5}, "table": [{"a": "b", "top-1": 0.5}]}).encode()
    lines = b"".join(b'{"step": %d, "loss": 0.5, "data_digest": "a"}\n' % i for i in range(3))

    def json_target(
        url: str, content: bytes, read: Callable[[], object], change: Any = damage_json
    ) -> Target:
        return Target(_placed(url, read), lambda _: content, change, InputError)

    return {
        "tar": Target(_read_tar, fuzz_inputs.tar, fuzz_inputs.damage_tar, TarError),
        "block": Target(_read_block, fuzz_inputs.tar, fuzz_inputs.damage_tar, TarError),
        "image": Target(
            lambda content: decode(bytearray(content), 0, len(content)),
            fuzz_inputs.image,
            fuzz_inputs.damage_image,
            DecodeError,
        ),
        "index.json": json_target(
            f"{data}/index.json",
            files.read(f"{data}/index.json"),
            lambda: _use_index(data),
            _damage_index,
        ),
        "commit.json": json_target(
            f"{commit.url}/commit.json",
            files.read(f"{commit.url}/commit.json"),
            lambda: checkpoint.verify(commit.url, ALONE),
        ),
        ".metadata": Target(
            lambda content: dcp_metadata.parse(content, commit.files),
            lambda _: metadata,
            damage,
            InputError,
        ),
        "checkpoint file": Target(
            _placed(f"{HOME}/file.pth", _use_checkpoint_file),
            fuzz_inputs.checkpoint_file,
            fuzz_inputs.damage_checkpoint,
            InputError,
        ),
        "lease": json_target(
            f"{HOME}/held/lease/00000001.json",
            files.read(f"{HOME}/held/lease/00000001.json"),
            lambda: lease.is_free(f"{HOME}/held"),
        ),
        "result.json": json_target(
            f"{HOME}/result.json", result, lambda: read_result(f"{HOME}/result.json", _ignore)
        ),
        "metrics.jsonl": json_target(
            f"{HOME}/log/metrics.jsonl", lines, lambda: journal.read(f"{HOME}/log"), damage
        ),
    }


def feed(target: Target, content: bytes) -> str:
    """Give one input to its reader. Return what was wrong with the outcome, or ""."""
    try:
        confined.call_within(SECONDS, lambda: target.read(content))
    except target.refusal as error:
        target.counts["refused"] += 1
        text = str(error)
        return "" if text.isprintable() and len(text) < 2000 else f"the text {text[:200]!r}"
    except confined.TooLong:
        target.counts["too slow"] += 1
        return f"took more than {SECONDS:g} s"
    except Exception as error:
        target.counts["other errors"] += 1
        return f"{type(error).__name__}: {error}"[:300]
    target.counts["accepted"] += 1
    return ""


def run(number: int, seed: int) -> tuple[str, list[str]]:
    """Feed `number` inputs. Return the table and what was wrong, each with its input."""
    targets = make_targets()
    confined.limit_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faults = []
    faulthandler.enable()  # a crash in a library's C code says which reader called it
    for i in range(number):
        name = list(targets)[i % len(targets)]
        chance = random.Random(f"{seed} {i}")
        content = targets[name].damage(targets[name].make(chance), chance)
        if fault := feed(targets[name], content):
            faults.append(f"{name}, input {i}: {fault}; {content[:100]!r}")
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    rows = [f"{'':<16}" + "".join(f"{name:>14}" for name in OUTCOMES)]
    for name, target in targets.items():
        rows.append(f"{name:<16}" + "".join(f"{target.counts[one]:>14,}" for one in OUTCOMES))
    rows.append(f"{number:,} inputs, peak memory {more} MiB above the start")
    return "\n".join(rows), faults


def run_apart(number: int, seed: int) -> tuple[str, list[str]]:
    """Do what `run` does in a process of its own, whose memory is limited."""
    found: tuple[str, list[str]] = confined.call_apart(run, number, seed)
    return found


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    table, faults = run_apart(args.number, args.seed)
    print(table)
    for fault in faults[:50]:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
