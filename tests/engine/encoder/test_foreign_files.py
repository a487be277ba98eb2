"""Checkpoint files: kinds that are read, objects that are not, damage."""

import argparse
import io
import os
import pickle
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from engine.encoder.foreign_files import read_tensors
from shards.errors import InputError
from shards.storage import files
from tests.engine.encoder.test_foreign import OLD, URL, file, message, read, small


class Planted:
    def __reduce__(self) -> Any:
        return os.system, ("touch planted",)


def deep() -> bytes:
    pickled = b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b"."
    return file([], **OLD).replace(pickle.dumps([], 2), pickled, 1)


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: b"", "is empty"),
        (
            lambda: b"<!DOCTYPE html>",
            "neither by torch.save nor by safetensors: it begins with b'<",
        ),
        (lambda: file(small())[:-100], "is not a whole file of torch.save"),
        (lambda: file(small(), **OLD)[:-100], "is not a whole file of torch.save"),
        (lambda: pickle.dumps({"a": [1, 2]}), "is not a whole file of torch.save"),
        (lambda: safetensors.torch.save(small())[:-5], "is not a whole safetensors file: "),
        (script, "is a TorchScript archive: save its state dict alone, by torch.save(torch.jit."),
        (lambda: file({"epoch": 1, "state_dict": {}}), "holds no tensors of a network"),
        (lambda: file(torch.zeros(3)), "holds no tensors of a network"),
        (lambda: file({"optimizer": {"a": torch.zeros(3)}}), "holds no tensors of a network"),
        (lambda: file({"x": {"param_groups": [], "s": small()}}), "holds no tensors of a network"),
        (lambda: file({"a": torch.zeros(3).to_sparse()}), "a is sparse, nested or without values"),
        (lambda: file({"a": torch.zeros(3, device="meta")}), "a is sparse, nested or without"),
        (
            lambda: file({"state_dict": small(), "best": Path("a")}),
            f"holds {type(Path()).__module__}.PosixPath, which is not loaded, because it could run "
            "code: save the state dict alone where the file was made, by "
            "torch.save(model.state_dict(), ...) for a whole model, or by "
            'torch.save(torch.load(...)["state_dict"], ...) for a checkpoint that has one',
        ),
        (lambda: file(nn.Linear(2, 2), **OLD), "holds torch.nn.modules.linear.Linear, which is"),
        (deep, "is nested too deeply for a checkpoint"),
    ],
)
def test_no_checkpoint(content: Callable[[], bytes], expected: str) -> None:
    told = message(lambda: read(content()))
    assert told.startswith(f"{URL}: ")
    assert expected in told


def test_a_message_begins_with_the_field() -> None:
    files.write(URL, file(nn.Linear(2, 2)))
    told = message(lambda: read_tensors(URL, "model.start"))
    assert told.startswith(f"model.start {URL}: holds torch.nn.modules.linear.Linear")


@pytest.mark.parametrize("options", [{}, OLD])
def test_nothing_is_run(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = file({"state_dict": small(), "more": Planted()}, **options)
    assert "holds posix.system, which" in message(lambda: read(content))
    assert not Path("planted").exists()
    torch.load(io.BytesIO(content), weights_only=False)
    assert Path("planted").exists()  # it would have run


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (f"{tmp_path}/a.pth", str(tmp_path)):
        assert message(partial(read_tensors, path)) == f"{path}: no such file"
    secret = "memory://user:secret@host/a.pth?token=secret"
    assert message(lambda: read_tensors(secret)) == "memory://host/a.pth: no such file"
    told = message(lambda: read(file(small()), f"{URL}.safetensors"))
    assert told.startswith(f"{URL}.safetensors: is not a whole safetensors file: ")


def test_damaged_bytes_give_one_line(recwarn: pytest.WarningsRecorder) -> None:
    tensors = {"w": torch.zeros(3, 4), "b": torch.zeros(())}
    content = {"a": tensors, "b": [argparse.Namespace(c=1), (2, "d")]}
    draw = random.Random(0)
    told = []
    for whole in (file(content), file(content, **OLD), safetensors.torch.save(tensors)) * 200:
        damaged = bytearray(whole)
        for _ in range(draw.choice([1, 2, 5])):
            damaged[draw.randrange(len(whole))] = draw.randrange(256)
        try:
            read(bytes(damaged))
        except InputError as error:
            told.append(str(error))
    assert len(told) > 300
    assert not [text for text in told if "\n" in text]
    assert not recwarn.list
