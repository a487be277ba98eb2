"""Metadata that was planted: nothing of it runs, and only what the engine writes is taken."""

import builtins
import io
import os
import pickle
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from engine.state.dcp_files import Sums
from engine.state.dcp_metadata import Place, parse
from shards.errors import InputError
from tests.helpers.dcp_state import FILE, fault, load, plain_files, plain_state, save, stock, sums

pytestmark = [
    pytest.mark.versions,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
]

FILES = {"__0_0.distcp": (1000, 0), ".metadata": (500, 0), "a/b": (1000, 0)}
INDEX = MetadataIndex("m.w", (4, 0), 1)
SIZE = torch.Size((4, 2))
DCP = "torch.distributed.checkpoint.metadata"


def genuine(
    properties: Any = None,
    entry: Any = None,
    info: Any = None,
) -> Metadata:
    """As torch writes it, for a tensor in two parts of which one is stored."""
    chunks = [ChunkStorageMetadata(torch.Size((at, 0)), SIZE) for at in (0, 4)]
    properties = properties or TensorProperties(torch.bfloat16)
    tensor = entry or TensorStorageMetadata(properties, torch.Size((8, 2)), chunks)
    places = {INDEX: info or _StorageInfo("__0_0.distcp", 10, 990)}
    return Metadata({"m.w": tensor}, {"m.w": ("m", "w")}, places, StorageMeta("s3://a"), "1")


def parsed(metadata: object) -> Metadata:
    return parse(pickle.dumps(metadata), FILES)


def unpickle_by_name(module: str, name: str, rest: bytes) -> bytes:
    """A pickle that loads `module.name`, and goes on with `rest`."""
    names = (text.encode() for text in (module, name))
    return b"\x80\x04" + b"".join(b"\x8c%c%s" % (len(n), n) for n in names) + b"\x93" + rest


def test_genuine_metadata_is_taken() -> None:
    found = parsed(genuine())
    assert found.state_dict_metadata == genuine().state_dict_metadata
    assert found.planner_data == genuine().planner_data
    assert found.storage_data == {INDEX: Place("__0_0.distcp", 10, 990)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_every_dtype(dtype: torch.dtype) -> None:
    found: Any = parsed(genuine(TensorProperties(dtype))).state_dict_metadata["m.w"]
    assert found.properties.dtype is dtype


@pytest.mark.parametrize("length", [5, 6])
def test_properties_of_older_and_newer_releases(
    monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    """The strides came later; torch itself cannot read what a newer release wrote."""
    state = (torch.bfloat16, torch.strided, True, None, False, (2, 1))[:length]
    monkeypatch.setattr(TensorProperties, "__getstate__", lambda _: state)
    assert parsed(genuine()).state_dict_metadata == genuine().state_dict_metadata


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("builtins", "eval"),
        ("torch", "load"),
        ("torch.serialization", "load"),
        # What an admitted module has imported, and what an admitted class leads to.
        (DCP, "os.system"),
        (DCP, "Metadata.__init__"),
        ("pathlib", "Path.touch"),
    ],
)
def test_a_planted_call_is_refused(
    monkeypatch: pytest.MonkeyPatch, module: str, name: str, tmp_path: Path
) -> None:
    called: list[object] = []
    monkeypatch.setattr(os, "system", called.append)
    monkeypatch.setattr(builtins, "eval", called.append)
    witness = str(tmp_path / "ran").encode()
    planted = unpickle_by_name(module, name, b"\x8c%c%s\x85R." % (len(witness), witness))
    with pytest.raises(InputError, match=f"^names {module}.{name}, which no checkpoint of this"):
        parse(planted, FILES)
    assert called == list(tmp_path.iterdir()) == []


def test_admitted_names_are_no_functions() -> None:
    """getattr is admitted, and is not called."""
    arguments = unpickle_by_name(DCP, "Metadata", b"\x8c\x08__init__\x86R.")[2:]
    with pytest.raises(InputError, match=r"is damaged: TypeError: no Metadata where one"):
        parse(unpickle_by_name("builtins", "getattr", arguments), FILES)


@pytest.mark.parametrize(("module", "name"), [(DCP, "Metadata"), ("torch", "Size")])
def test_classes_are_not_changed(module: str, name: str) -> None:
    """A pickle can ask to set the attributes of a class: here, `planted = 1`."""
    planted = unpickle_by_name(module, name, b"N}\x8c\x07plantedK\x01s\x86b.")
    with pytest.raises(InputError, match="is damaged"):
        parse(planted, FILES)
    assert not hasattr(Metadata, "planted")
    assert parsed(genuine()).storage_data


def test_what_is_no_tensor_is_refused() -> None:
    """Torch would unpickle it without any restriction."""
    with pytest.raises(InputError, match=rf"^names {DCP}.BytesStorageMetadata, which no"):
        parsed(genuine(entry=BytesStorageMetadata()))


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "a/b", "__1_0.distcp", ""])
def test_other_files_are_refused(file: str) -> None:
    with pytest.raises(InputError, match=f"^names the file '{file}', which"):
        parsed(genuine(info=_StorageInfo(file, 0, 1)))


@pytest.mark.parametrize(("offset", "length"), [(-1, 10), (0, 0), (0, -1), (10, 991)])
def test_bytes_that_the_file_does_not_have(offset: int, length: int) -> None:
    with pytest.raises(InputError, match="is damaged"):
        parsed(genuine(info=_StorageInfo("__0_0.distcp", offset, length)))


def test_an_encoded_file_is_refused() -> None:
    info = _StorageInfo("__0_0.distcp", 0, 1, transform_descriptors=["stream.zstd"])
    with pytest.raises(InputError, match="encoded"):
        parsed(genuine(info=info))


@pytest.mark.parametrize(
    "metadata",
    [
        {"state_dict_metadata": {}},
        genuine(TensorProperties("float32")),  # type: ignore[arg-type]
        genuine(entry=genuine().storage_data[INDEX]),
        genuine(info=StorageMeta()),
        replace(genuine(), storage_data=[1]),
        replace(genuine(), storage_data={"m.w": genuine().storage_data[INDEX]}),
        replace(genuine(), planner_data="m.w"),
    ],
)
def test_other_types_are_refused(metadata: object) -> None:
    with pytest.raises(InputError, match=r"is damaged: TypeError: "):
        parsed(metadata)


def test_damage_is_an_input_error() -> None:
    content = pickle.dumps(genuine())
    for length in range(len(content)):
        with pytest.raises(InputError):
            parse(content[:length], FILES)
    chance = random.Random(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] = chance.randrange(256)
        try:
            parse(bytes(damaged), FILES)
        except InputError:
            refused += 1
    assert refused > 300


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_metadata_of_another_sum_is_not_unpickled(tmp_path: Path) -> None:
    files = save(str(tmp_path), plain_state())
    content = (tmp_path / ".metadata").read_bytes()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    assert "damaged, its length or CRC32" in str(fault(str(tmp_path), files, plain_state()))
    (tmp_path / ".metadata").unlink()
    assert str(fault(str(tmp_path), files, plain_state())) == f"{tmp_path}: .metadata is missing"
    (tmp_path / ".metadata").write_bytes(content)
    load(str(tmp_path), files, plain_state())


def test_planted_metadata_is_not_run(tmp_path: Path) -> None:
    files = save(str(tmp_path), plain_state())
    planted = pickle.dumps(Touch(tmp_path / "ran"))
    (tmp_path / ".metadata").write_bytes(planted)
    files |= sums({".metadata": planted})
    error = fault(str(tmp_path), files, plain_state())
    assert str(error).startswith(f"{tmp_path}: .metadata names pathlib.")
    assert not (tmp_path / "ran").exists()
    pickle.loads(planted)
    assert (tmp_path / "ran").exists()  # it would have worked


def change_metadata(folder: Path, change: Callable[[Any], object]) -> Sums:
    """The sums of the files after `change` was made to what torch unpickles."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata.storage_data)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return sums(plain_files(str(folder)))


def test_a_tensor_that_is_in_no_file(tmp_path: Path) -> None:
    save(str(tmp_path), plain_state())
    files = change_metadata(tmp_path, lambda places: places.popitem())
    error = fault(str(tmp_path), files, plain_state())
    assert str(error) == f"{tmp_path}: .metadata is damaged: nested.1 is in no file"


def test_planted_bytes_are_not_run(tmp_path: Path) -> None:
    """As torch saves what is no tensor; its own reader unpickles that."""
    state = {"number": 3, "tensor": torch.ones(2)}
    dcp_save(state, storage_writer=stock.FsspecWriter(str(tmp_path)), no_dist=True)
    error = fault(str(tmp_path), sums(plain_files(str(tmp_path))), {"tensor": torch.ones(2)})
    assert "BytesStorageMetadata, which no checkpoint of this engine has" in str(error)


@pytest.mark.parametrize("payload", ["planted", "dictionary", "shorter", "noise"])
def test_planted_tensors_are_not_run(tmp_path: Path, payload: str) -> None:
    """Of a file whose sums are right."""
    state = {"tensor": torch.ones(2, 300)}
    save(str(tmp_path), state)
    content = io.BytesIO(bytes(1000))
    stored: Any = {"planted": Touch(tmp_path / "ran"), "dictionary": {}, "shorter": torch.ones(2)}
    if payload != "noise":
        torch.save(stored[payload], content := io.BytesIO())
    (tmp_path / FILE).write_bytes(content.getvalue())
    length = len(content.getvalue())
    files = change_metadata(
        tmp_path,
        lambda places: places.update({i: replace(p, length=length) for i, p in places.items()}),
    )
    error = fault(str(tmp_path), files, state)
    what = "a tensor of another shape" if payload == "shorter" else "no plain tensor"
    assert str(error) == (
        f"{tmp_path}: {FILE} at byte 0 has {what}: the file is damaged or malicious"
    )
    assert not (tmp_path / "ran").exists()
