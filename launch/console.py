"""The commands byol-train, byol-pack, byol-evaluate and byol-export, which pip installs.

Each of them runs its script of this folder as `python launch/train.py` would, with the same checks
before the imports and the same exit status.
"""

import runpy


def train() -> None:
    _run_script("train")


def pack() -> None:
    _run_script("pack")


def evaluate() -> None:
    _run_script("evaluate")


def export() -> None:
    _run_script("export")


def _run_script(name: str) -> None:
    runpy.run_module(f"launch.{name}", run_name="__main__", alter_sys=True)
