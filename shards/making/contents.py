"""Convert image files while they are packed, and count what was done and what is unusable."""

from collections.abc import Iterator
from threading import Lock

from shards.dimensions import MOST_PIXELS, image_size
from shards.making.convert import PixelOptions, convert, packed_extension
from shards.making.left_out import Reasons, leave_out
from shards.making.pack import Image
from shards.making.pictures import UnusableError
from shards.orientation import image_orientation


class Contents:
    """Convert image files, and count what was converted and what cannot be used."""

    def __init__(self, options: PixelOptions) -> None:
        self._bad: Reasons = {}
        self._converted: Reasons = {}  # by what was done
        self._large = (0, "")  # pixels and path of the largest image
        self._turned = (0, "")  # number and path of images whose EXIF data say how to turn them
        self._options, self._lock = options, Lock()  # several threads convert

    def convert(self, image: Image, content: bytes) -> tuple[str, bytes]:
        """Return the extension and the content to pack. What cannot be used stays as it is."""
        try:
            extension, content, done = convert(image.path, content, self._options)
        except UnusableError as error:
            with self._lock:
                leave_out(self._bad, str(error), image.path)
            return packed_extension(image.path, content), content
        width, height = image_size(content) or (0, 0)
        turned = image_orientation(content) != 1
        with self._lock:
            if turned:
                self._turned = (self._turned[0] + 1, self._turned[1] or image.path)
            self._large = max(self._large, (width * height, image.path))
            if done:
                leave_out(self._converted, done, image.path)
        return extension, content

    def list_conversions(self) -> Iterator[str]:
        """Yield one line for each thing that was done to images."""
        for done, some in sorted(self._converted.items()):
            yield f"converted: {some.number:,} {done}, such as {some.example}"

    def list_turned(self) -> Iterator[str]:
        """Yield a line when some images are to be turned, which training does only if told to."""
        number, path = self._turned
        if number:
            are = "image is" if number == 1 else "images are"
            yield (
                f"{number:,} {are} stored turned, such as {path}: --data.exif apply turns them "
                "upright by their EXIF data, in training and evaluations"
            )

    def list_faults(self, total: int) -> Iterator[str]:
        """Yield one line for each fault of the `total` images, and one for too large an image.

        Images that cannot be decoded are packed all the same: the plan of the shards, by which a
        packing that was stopped goes on, is made before any image is read.
        """
        for reason, bad in sorted(self._bad.items()):
            share = f"{bad.number:,} of {total:,} images ({reason})"
            yield f"cannot be decoded: {share}, such as {bad.example}"
        if self._bad:
            yield (
                "such images are packed as they are: training takes the next good image in the "
                "place of each, evaluations leave them out, and data.corrupt bounds how many"
            )
        pixels, path = self._large
        if pixels > MOST_PIXELS:
            yield (
                f"{path} has {pixels:,} pixels: train with --data.max-pixels {pixels}, or shrink "
                "it with --max-side"
            )
