"""List the images in a folder, and say what else lies there and is left out."""

from dataclasses import dataclass, field

from shards.errors import InputError
from shards.making.left_out import Reasons, explain, leave_out
from shards.samples import EXTENSIONS
from shards.storage import files, local_files, misplaced
from shards.storage.commands import spell_program
from shards.tar import is_tar

ARCHIVES = ("7z", "rar", "gz")
PATTERN_HINT = " (a * or ? is part of a name: name the folder, or let the shell expand it)"

# Folders that file managers, archivers and disks make beside the user's own.
_JUNK = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found"}
_JUNK_FILES = "hidden files and files of file managers"


@dataclass
class Listing:
    """What lies in a folder."""

    images: list[tuple[str, int]] = field(default_factory=list)  # their paths and sizes
    left_out: Reasons = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)  # folders
    tars: list[str] = field(default_factory=list)  # also what packing unpacks
    links: list[str] = field(default_factory=list)  # to folders of the folder itself

    def refuse(self, path: str) -> bool:
        """Return whether a file is no image by its name, and count it as left out if so."""
        reason = _reason_against(path)
        if reason:
            leave_out(self.left_out, reason, path)
            if reason != _JUNK_FILES and is_tar(path, compressed=True):
                self.tars.append(path)
        return bool(reason)


def list_folder(source: str, follow_links: bool, name: str, follower: str) -> Listing:
    """List a folder.

    Args:
        follow_links: Also take files outside of the folder that links in it lead to.
        name: The name of the argument that gave the folder, for messages.
        follower: What the user can give to have such links followed, for messages.

    Raises InputError when there is neither an image nor a tar.
    """
    listing = Listing()
    left_out = listing.left_out

    def note(reason: str, path: str) -> None:
        if reason == local_files.TWICE:
            if not is_junk(path):
                listing.links.append(path)
        elif is_junk(path):
            leave_out(left_out, _JUNK_FILES, path)
        elif reason == local_files.EMPTY:
            listing.empty.append(path)
        elif reason == local_files.OUTSIDE:
            leave_out(left_out, f"{reason}, which {follower} takes", path)
        else:
            leave_out(left_out, reason, path)

    for path, size in files.walk(source, follow_links=follow_links, leave_out=note):
        if not listing.refuse(path):
            listing.images.append((path, size))
    place = files.redact(source)
    if not listing.images and not files.exists(source):
        hint = PATTERN_HINT if set(source) & set("*?") else ""
        raise InputError(f"{name} {place}: no such folder{hint}")
    if not listing.images and not listing.tars:
        raise InputError(f"{name} {place}: no images there{_hint(source, left_out)}")
    listing.images.sort()
    return listing


def is_junk(path: str) -> bool:
    """Return whether a file is hidden, or lies in a folder that a file manager made."""
    return any(part.startswith(".") or part.lower() in _JUNK for part in path.split("/"))


def _hint(source: str, left_out: Reasons) -> str:
    """Return the end of a message that no images are in `source`: what is there instead."""
    suffix = misplaced.last_name(source).rpartition(".")[2].lower()
    if is_tar(source, compressed=True):
        return f"; pack it first, by `{spell_program('pack.py', source, 'OUT')}`"
    if suffix in ARCHIVES:
        return "; extract them to a folder, and give that"
    if suffix in (*EXTENSIONS, "json"):
        return f"; give the folder {files.redact(misplaced.folder_of(source))}"
    return explain(left_out) or f", of {', '.join(EXTENSIONS)}"


def _reason_against(path: str) -> str:
    """Return why a file is no image of a data set; "" when it is one."""
    if is_junk(path):
        return _JUNK_FILES
    stem, dot, extension = path.rpartition("/")[2].rpartition(".")
    if extension.lower() in EXTENSIONS and dot:
        return ""
    return f".{extension.lower()} files" if dot and stem else "files without an extension"
