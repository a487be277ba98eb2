"""Keep what the parts of tests/gpu_day.sh found in one file, and draw its images."""

import fcntl
import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from engine.log import journal
from launch.benchmarks.machine import read_head
from launch.benchmarks.step import write_photos
from shards.making import synthetic

LINES = 40  # last lines of what a part printed that are kept


def draw(folder: str, photos: int, images: int, size: int) -> None:
    """Draw photos, and images of the size and number of CIFAR-10, unless they are there."""
    if Path(folder, "cifar10", "test", "index.json").exists():
        return
    write_photos(f"{folder}/photos", photos)
    synthetic.write(f"{folder}/cifar10/train", images, size, seed=0)
    synthetic.write(f"{folder}/cifar10/test", max(16, images // 5), size, seed=1)


def read_figures(out: Path, name: str) -> dict[str, Any]:
    """Return what a part left: rows, records of a log, tables of a profile, counts of tests."""
    found: dict[str, Any] = {}
    rows = out / f"{name}.rows.json"
    if rows.exists():
        document = json.loads(rows.read_text())
        found |= {key: document[key] for key in ("title", "rows", "failed")}
    run = out / name
    if run.is_dir():
        found["log"] = journal.read(str(run))[-20:]
        found["profile"] = [p.read_text().splitlines() for p in (run / "profile").glob("*.txt")]
    text = (out / f"{name}.log").read_text(errors="replace")
    if counts := re.findall(
        r"^(?=.*\bin [\d.]+s).*\b(?:passed|failed|skipped|deselected).*$", text, re.M
    ):
        found["tests"] = counts[-1].strip("= ")
    return found | {"last_lines": text.splitlines()[-LINES:]}


def note(out: Path, name: str, code: int, start: float, limit: float, command: list[str]) -> None:
    """Add a part to the file. Parts that run at once add themselves one after the other."""
    with open(out / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _note(out, name, code, start, limit, command)


def _note(out: Path, name: str, code: int, start: float, limit: float, command: list[str]) -> None:
    path = out / "gpu_day.json"
    if path.exists():
        document = json.loads(path.read_text())
    else:
        head = read_head()
        document = {**vars(head), "parts": {}}
    document["parts"][name] = {
        "command": shlex.join(command),
        "exit_code": code,
        "timed_out": code in (124, 137),
        "seconds": round(time.time() - start, 1),
        "limit": limit,
        "figures": read_figures(out, name),
    }
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(document, indent=1))
    partial.replace(path)


if __name__ == "__main__":
    if sys.argv[1] == "draw":
        draw(sys.argv[2], *map(int, sys.argv[3:6]))
    else:
        out, name, code, start, limit, *command = sys.argv[1:]
        note(Path(out), name, int(code), float(start), float(limit), command)
