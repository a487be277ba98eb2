"""Files of a stranger that claim much: sizes are checked before anything is allocated."""

import io
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch

from engine.encoder import foreign, foreign_files
from engine.encoder.foreign import match
from engine.encoder.foreign_files import read_tensors
from engine.state import dcp_metadata
from shards.errors import InputError
from shards.storage import files
from tests.engine.encoder.test_foreign import OLD, file, small
from tests.helpers import confined

URL = "memory://hostile/file.pth"
HUGE = 10**11


def zipped(pickled: bytes, kind: int = zipfile.ZIP_STORED, values: bytes = bytes(12)) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", values)
    return buffer.getvalue()


def tensor(size: str, stride: str, count: int = 3, key: str = "0") -> bytes:
    """A pickle of {"a": tensor}, with sizes as pickled text."""
    return (
        b"\x80\x02}U\x01actorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\n"
        b"U\x01%sU\x03cpuI%d\ntQI0\n(%st(%st\x89NtRs."
        % (key.encode(), count, size.encode(), stride.encode())
    )


def old(count: int) -> bytes:
    """The values' number stands where they follow the pickle."""
    whole = file({"a": torch.zeros(3)}, **OLD)
    values = whole[-20:]
    assert values[:8] == struct.pack("<q", 3)
    return whole[:-20] + struct.pack("<q", count) + values[8:]


def reduced(name: str, argument: bytes) -> bytes:
    return b"\x80\x02}U\x01ac%s\n(%stRs." % (name.replace(".", "\n", 1).encode(), argument)


def doubled_keys() -> bytes:
    """A dict whose key is a tuple of tuples of tuples: its hash takes 2**60 steps."""
    return b"\x80\x02})" + b"2\x86" * 60 + b"Ns."


def one_list_many_times() -> bytes:
    return (
        b"\x80\x02}U\x01a]q\x00(" + b"N" * 10**5 + b"es" + b"U\x01b](" + b"h\x00" * 10**5 + b"es."
    )


def long_name() -> bytes:
    below = b"".join(b"X\x06\x00\x00\x00%06dN" % i for i in range(10**4))
    return b"\x80\x02}X\x40\x42\x0f\x00" + b"n" * 10**6 + b"}(" + below + b"us."


CLAIMS: dict[str, Callable[[], bytes]] = {
    "bytearray": lambda: zipped(reduced("builtins.bytearray", b"I%d\n" % HUGE)),
    "Tensor": lambda: zipped(reduced("torch.Tensor", b"I%d\n" % HUGE)),
    "stride 0": lambda: zipped(tensor(f"I{HUGE}\n", "I0\n")),
    "beyond its storage": lambda: zipped(tensor(f"I{HUGE}\n", "I1\n")),
    "storage beyond its file": lambda: zipped(tensor("I3\n", "I1\n", HUGE)),
    "negative": lambda: zipped(tensor("I-3\n", "I-1\n")),
    "many bits": lambda: zipped(tensor(f"I{10**400}\n", "I1\n")),
    "many dimensions": lambda: zipped(tensor("I1\n" * 1000, "I1\n" * 1000)),
    "old storage": lambda: old(HUGE),
    "old storage, negative": lambda: old(-1),
    "deflated": lambda: zipped(tensor("I3\n", "I1\n"), zipfile.ZIP_DEFLATED, bytes(600 << 20)),
    "memo": lambda: zipped(b"\x80\x02Nr\xff\xff\xff\x0f."),
    "bytearray of a length": lambda: zipped(b"\x80\x05\x96" + struct.pack("<q", 1 << 40) + b"."),
    "hash of a key": lambda: zipped(doubled_keys()),
    "one list many times": lambda: zipped(one_list_many_times()),
    "a long name": lambda: zipped(long_name()),
    "recursion": lambda: zipped(b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."),
}


METADATA: dict[str, Callable[[], bytes]] = {
    "memo of metadata": lambda: b"\x80\x02Nr\xff\xff\xff\x0f.",
    "hash of a key of metadata": doubled_keys,
    "one list many times, of metadata": one_list_many_times,
    "a long name of metadata": long_name,
}


def stems(count: int, width: Callable[[int], int]) -> bytes:
    found = {}
    for i in range(count):
        found[f"{i:05d}.a"] = torch.zeros(width(i), 3, 7, 7)
        found |= {f"{i:05d}.{name}": torch.zeros(width(i)) for name in "bcde"}
    return safetensors.torch.save(found)


def many_networks() -> bytes:
    names = ("conv1.weight", "layer1.0.conv1.weight")
    return safetensors.torch.save(
        {f"{i}.{name}": small()[name].clone() for i in range(100) for name in names}
    )


MORE = "may be the first one of a ResNet, more than can be tried"
SEARCHES: dict[str, tuple[Callable[[], bytes], str]] = {
    "stems": (lambda: stems(200, lambda i: 1 + i), f"200 tensors of 200 widths {MORE}"),
    "equal stems": (lambda: stems(1999, lambda _: 3), f"1,999 tensors of 1 widths {MORE}"),
    "networks": (many_networks, f"holds more than {foreign.MOST_NETWORKS} networks"),
}


def use(given: tuple[str, bytes]) -> None:
    """Read a file as the program does that it is for."""
    name, content = given
    if name in METADATA:
        dcp_metadata.parse(content, {})
        return
    files.write(URL, content)
    tensors = read_tensors(URL)
    if name in SEARCHES:
        match(tensors, "online", "file")


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """What is told of each file, in a process that cannot take much memory."""
    contents = {name: make() for name, make in (CLAIMS | METADATA).items()}
    contents |= {name: make() for name, (make, _) in SEARCHES.items()}
    return dict(zip(contents, confined.outcomes(use, contents.items()), strict=True))


def test_what_a_file_claims_is_not_allocated(told: dict[str, str]) -> None:
    for name in CLAIMS:
        assert told[name].startswith(f"InputError: {URL}: "), (name, told[name][:500])
        assert told[name].isprintable()
        assert len(told[name]) < 500, name
    for name in METADATA:
        assert told[name].startswith("InputError: is damaged: "), (name, told[name][:500])


def test_the_search_for_a_network_ends(told: dict[str, str]) -> None:
    for name, (_, text) in SEARCHES.items():
        assert told[name].startswith(f"InputError: file: {text}"), (name, told[name][:500])


def test_a_sound_tensor_is_read() -> None:
    """The claims above differ from it in one thing each."""
    files.write(URL, zipped(tensor("I3\n", "I1\n")))
    assert torch.equal(read_tensors(URL)["a"], torch.zeros(3))
    files.write(URL, old(3))
    assert torch.equal(read_tensors(URL)["a"], torch.zeros(3))


@pytest.mark.parametrize("options", [{}, OLD])
def test_tensors_are_as_torch_reads_them(options: dict[str, Any]) -> None:
    wide = torch.arange(24.0).view(4, 6)
    content = {
        "part": wide[1:3, 2:],
        "transposed": wide.t(),
        "same": wide,
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "half": wide.half(),
        "flags": wide > 3,
        "parameter": torch.nn.Parameter(wide * 2),
        "float8": wide.to(torch.float8_e4m3fn),
        "unsigned": wide.to(torch.uint16),
    }
    files.write(URL, file(content, **options))
    found = read_tensors(URL)
    assert list(found) == list(content)
    for name, expected in content.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name].double(), expected.detach().double()), name
        assert found[name].stride() == expected.stride()


def test_many_claims_on_one_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    files.write(URL, file({str(i): t for i, t in enumerate([torch.zeros(10**5)] * 20)}))
    with pytest.raises(InputError, match=r"tensors claim 8,000,000 bytes, and the file has 40"):
        read_tensors(URL)
    monkeypatch.setattr(foreign_files, "MOST_SHARED", 100)
    assert len(read_tensors(URL)) == 20
