"""PNG files: the pixels that libpng would give, and an exception for every damage."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from PIL.PngImagePlugin import PngInfo
from torchvision.io import ImageReadMode, decode_image

from shards.decode import DecodeError, decode
from shards.png import decode_png, encode_png, undo_scaling
from tests.helpers.pngs import encode_by_hand
from tests.shards.test_dimensions import encode

COLORS = np.random.default_rng(0).integers(0, 256, (20, 30, 4)).astype(np.uint8)
WIDE = np.random.default_rng(1).integers(0, 65536, (20, 30, 4)).astype(np.uint16)


def save(picture: PillowImage.Image, **options: Any) -> bytearray:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return bytearray(buffer.getvalue())


def kinds() -> dict[str, bytearray]:
    picture = PillowImage.fromarray(COLORS)
    found = {mode: save(picture.convert(mode)) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")}
    found["transparent palette"] = save(picture.convert("P"), transparency=bytes(range(256)))
    found["transparent gray"] = save(picture.convert("L"), transparency=5)
    found["transparent color"] = save(picture.convert("RGB"), transparency=(1, 2, 3))
    for bits in (1, 2, 4):
        small = picture.convert("P", palette=PillowImage.Palette.ADAPTIVE, colors=2**bits)
        found[f"palette of {bits} bits"] = save(small, bits=bits)
    for bits in (1, 2, 4, 8, 16):
        values = WIDE[..., :1] >> (16 - bits)
        found[f"gray of {bits} bits"] = bytearray(encode_by_hand(values, bits))
    return found


@pytest.mark.parametrize("kind", kinds())
def test_agrees_with_libpng(kind: str) -> None:
    """torchvision's decoder uses libpng, and is sound for files that are not damaged."""
    content = kinds()[kind]
    expected = decode_image(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB)
    values = decode_png(content)
    values = values if values.ndim == 3 else np.stack([values] * 3, axis=-1)
    assert (values.transpose(2, 0, 1) == expected.numpy()).all()


def test_what_is_encoded_is_decoded() -> None:
    for values in (COLORS[..., :3], COLORS[..., 0]):
        assert (decode_png(encode_png(values)) == values).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits(channels: int) -> None:
    found = decode_png(encode_by_hand(WIDE[..., :channels], 16))
    assert found.dtype == np.uint16
    assert (found == (WIDE[..., 0] if channels < 3 else WIDE[..., :3])).all()


def test_large_texts_and_profiles_do_no_harm() -> None:
    texts = PngInfo()
    texts.add_text("Comment", "x" * 3_000_000, zip=True)
    picture = PillowImage.fromarray(COLORS[..., :3])
    for content in (save(picture, pnginfo=texts), save(picture, icc_profile=bytes(3_000_000))):
        with pytest.raises(ValueError, match="too large"):
            PillowImage.open(io.BytesIO(content)).load()
        assert (decode_png(content) == COLORS[..., :3]).all()


def test_damage_never_ends_the_process() -> None:
    """libpng leaves a decoder by a jump, which ends the process in some releases of torchvision."""
    content = encode(60, 50, "PNG")
    damaged = [content[:length] for length in range(8, len(content), 97)]
    for seed in range(200):
        generator = np.random.default_rng(seed)
        spoiled = bytearray(content)
        for place in generator.integers(8, len(content) - 12, 1 + seed % 20):
            spoiled[place] ^= generator.integers(1, 256)
        damaged.append(bytes(spoiled))
    sound, reasons = 0, []
    for one in damaged:
        try:
            image = decode(bytearray(one), 0, len(one))
        except DecodeError as error:
            reasons.append(str(error))
        else:
            assert image.dtype == torch.uint8
            sound += 1
    assert sound < 3
    assert not any("\n" in reason for reason in reasons)


def test_a_size_that_the_pixels_do_not_have() -> None:
    content = encode_by_hand(WIDE[..., :3] >> 8, 8)
    wider = encode_by_hand(np.zeros((20, 31, 3), np.uint16), 8)
    false = wider[:33] + content[33:]
    with pytest.raises(DecodeError, match="damaged PNG"):
        decode(bytearray(false), 0, len(false))


def test_eight_bits_that_were_scaled_up() -> None:
    narrow = np.arange(256, dtype=np.uint8).reshape(16, 16)
    wide = narrow.astype(np.uint16) * 257
    found = undo_scaling(wide)
    assert found is not None
    assert (found == narrow).all()
    colors = undo_scaling(np.stack([wide] * 3, axis=-1)[:, ::-1])
    assert colors is not None
    assert (colors[..., 1] == narrow[:, ::-1]).all()
    wide[15, 3] ^= 1
    assert undo_scaling(wide) is None
    assert undo_scaling(np.zeros((2, 2), np.int32)) is None
