"""Files that training cannot decode are named when they are packed."""

import gzip
from pathlib import Path

import pytest

from launch import pack as pack_command
from shards.decode import DecodeError, decode
from shards.making.undecodable import find_fault
from tests.conftest import draw_photo
from tests.shards.test_dimensions import encode, png_header

BAD = {
    "empty": b"",
    "gzip": gzip.compress(draw_photo(0, 16, 16)),
    "HTML": b"\n<!DOCTYPE html><html>403 Forbidden</html>",
    "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "GIF": b"GIF89a" + bytes(20),
    "TIFF": b"II*\0" + bytes(20),
    "AVIF": b"\0\0\0\x20ftypavif" + bytes(20),
    "damaged PNG": png_header(9, 9)[:12] + bytes(20),
    "no header of an image": b"\x89PNG",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_decoded_has_a_reason(kind: str) -> None:
    content = BAD[kind]
    assert kind in find_fault(content)
    assert find_fault(content)
    with pytest.raises(DecodeError):
        decode(bytearray(content), 0, len(content))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images_have_none(kind: str) -> None:
    assert find_fault(encode(20, 10, kind)) == ""


def test_packing_names_each_reason_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in" / "ant").mkdir(parents=True)
    for i in range(8):
        (tmp_path / "in" / "ant" / f"{i}.jpg").write_bytes(draw_photo(i, 16, 16))
    for i, content in enumerate((BAD["HTML"], BAD["HTML"], BAD["empty"])):
        (tmp_path / "in" / "ant" / f"bad{i}.jpg").write_bytes(content)
    pack_command.main((str(tmp_path / "in"), str(tmp_path / "out")), threads=2)
    out, err = capsys.readouterr()
    text = " ".join(err.split())
    assert "cannot be decoded: 2 of 11 images (an HTML or XML page), such as ant/bad" in text
    assert "cannot be decoded: 1 of 11 images (empty), such as ant/bad2.jpg" in text
    assert err.count("cannot be decoded") == 2
    assert text.count("packed as they are: training takes the next good image") == 1
    assert "11 samples" in out
