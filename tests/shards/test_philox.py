"""The counter-based generator: published answers, and the frozen layout of its counters."""

import numpy as np
import pytest

from shards.philox import Domain, draw, permutation, philox, uniform


@pytest.mark.parametrize(
    ("counter", "seed", "answer"),
    [
        ("00000000 00000000 00000000 00000000", 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", -1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            0x299F31D0_A4093822,  # the key's low word comes first in the published list
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers_of_random123(counter: str, seed: int, answer: str) -> None:
    words = np.array([int(word, 16) for word in counter.split()], np.uint32)
    assert [f"{word:08x}" for word in philox(seed, words)] == answer.split()


def test_layout_of_the_counter_is_frozen() -> None:
    """A change here changes the order and the views of every run ever started."""
    words = draw(2**40 + 7, Domain.VIEW, np.array([0, 5, 2**33 + 1]), epoch=3, minor=9)
    assert words.dtype == np.uint32
    assert words.tolist() == [
        [0xF4FAB67B, 0x35E178CB, 0xDD3BFF12, 0xBF38571F],
        [0x32E48274, 0xBFF13481, 0x772BFAAA, 0x56F486ED],
        [0xAAFE040E, 0xAE989469, 0xB19E69A3, 0x8113592D],
    ]
    assert permutation(1, Domain.BLOCKS, np.arange(8), epoch=2).tolist() == [5, 2, 1, 6, 4, 0, 7, 3]


def test_every_coordinate_of_the_place_matters() -> None:
    index = np.arange(3)
    base = draw(0, Domain.VIEW, index, epoch=0, minor=0)
    others = [
        draw(1, Domain.VIEW, index),
        draw(2**32, Domain.VIEW, index),
        draw(0, Domain.PACK, index),
        draw(0, Domain.VIEW, index + 2**32),
        draw(0, Domain.VIEW, index, epoch=1),
        draw(0, Domain.VIEW, index, minor=1),
    ]
    assert all((base != other).any(axis=1).all() for other in others)


def test_permutation_is_one() -> None:
    order = permutation(3, Domain.SAMPLES, np.arange(1000) + 2**32, epoch=1)
    assert sorted(order.tolist()) == list(range(1000))
    assert order.tolist() != permutation(3, Domain.SAMPLES, np.arange(1000), epoch=1).tolist()
    assert permutation(3, Domain.SAMPLES, np.arange(0), epoch=1).shape == (0,)


def test_uniform_is_at_least_zero_and_below_one() -> None:
    ends = uniform(np.array([0, 2**31, 2**32 - 1], np.uint32))
    assert ends.tolist() == [0.0, 0.5, 1 - 2.0**-32]
    values = uniform(draw(5, Domain.SYNTHETIC, np.arange(5000)))  # [5000, 4]
    assert abs(values.mean() - 1 / 2) < 4 * np.sqrt(1 / 12 / values.size)
