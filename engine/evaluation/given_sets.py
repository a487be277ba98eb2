"""Open a set of images that a user named: shards, or a plain folder of images, which is packed."""

from collections.abc import Callable

from engine.processes.world import World, waiting_for_hours
from engine.state import layout
from shards import index as indexes
from shards.errors import InputError
from shards.index import Index
from shards.making.convert import PixelOptions
from shards.making.packed_folder import Folder, find_folder
from shards.storage import files


def find_images(url: str, name: str, *, labels: bool = True) -> Folder:
    """List the images of a plain folder, which is no run: see `find_folder`.

    Raises InputError when it is a run, or no folder of images.
    """
    refuse_run(url, name)
    return find_folder(url, name, labels=labels)


def refuse_run(url: str, name: str) -> None:
    """Raise InputError when a run lies at the URL that the field `name` gives for a set."""
    if files.exists(files.join(url, layout.RECIPE)):  # its pictures are no data
        raise InputError(
            f"{name} {files.redact(url)}: no images there but a run's own: give the URL of "
            "shards or of a folder of images"
        )


class GivenSet:
    """A set of images at a URL. It is found at once, and a folder is packed when it is opened."""

    def __init__(self, url: str, name: str, world: World, *, labels: bool = True) -> None:
        """Read the index, or list the folder. All processes call it together.

        Args:
            name: The field that gave the URL, for messages.
            labels: Whether a folder of images without labels is refused.

        Raises InputError on all processes when there is neither.
        """
        self.url, self.name, self._world = url, name, world
        files.check(url, name)
        folders: list[Folder] = []  # on the first process

        def look() -> list[str] | None:
            if files.exists(files.join(url, indexes.NAME)):
                return None
            folders.append(find_images(url, name, labels=labels))
            return folders[0].images.classes

        self.index: Index | None = None
        with waiting_for_hours():  # a folder may have millions of files
            classes = world.on_main(look)
        if classes is None:  # machines may have the shards in other places
            self.index = world.on_all(lambda: indexes.load(url, name))
        self._folders = folders
        self.preview = self.index or Index(url, [], classes or [])
        """The index, or for a folder one that has its classes and no shards yet."""

    def open(
        self,
        cache: str,
        find_options: Callable[[], PixelOptions],
        *,
        threads: int,
        report: Callable[[str], None],
        alone: bool,
    ) -> Index:
        """Return the index, of a folder after it was packed to a folder below `cache`.

        All processes call it together.

        Args:
            find_options: Returns how the pixels of a folder's images are converted.
            report: Takes lines about the packing, on the first process.
            alone: Whether what was packed there of other images is removed.

        Raises InputError on all processes when the images cannot be packed.
        """
        if self.index is not None:
            return self.index
        world = self._world

        def pack() -> str:
            (folder,) = self._folders
            return folder.keep_packed(
                cache, find_options(), threads=threads, report=report, alone=alone
            )

        with waiting_for_hours():
            packed = world.on_main(pack)
        self.index = world.on_all(lambda: indexes.load(packed, self.name))
        return self.index

    def require_labels(self) -> None:
        """Raise InputError when it has no labels on some process. All of them call it together."""

        def check() -> None:
            if not self.preview.classes:
                raise InputError(
                    f"{self.name} {files.redact(self.url)}: has no labels: give a set that has, or "
                    "a folder of images with one folder for each class"
                )

        self._world.on_all(check)
