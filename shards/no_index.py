"""Say what a user may do where a data set has no index: what lies there instead, or nearby."""

from shards.samples import EXTENSIONS
from shards.storage import files, misplaced
from shards.storage.commands import quote, spell_program

_LEVELS = 3  # of folders that are looked into, such as train/cat/1.jpg
_WIDTH = 3  # folders that are looked into at each level


def say_what_to_do(url: str, field_name: str, name: str) -> str:
    """Return the end of a message that the object `name`, the index, is not at `url`.

    Args:
        field_name: The recipe's field that gave the URL.
    """
    near = misplaced.find_near(url, name)
    wanted = field_name.removeprefix("data.")
    near.sort(key=lambda folder: not misplaced.last_name(folder).startswith(wanted))
    if near:
        return f"there is one in {files.redact(near[0])}: give that folder"
    if any(folder.endswith(".tar") for folder in misplaced.folders_below(url)):
        return f"index the tars there: {spell_program('pack.py', '--index-only', url)}"
    if holds_images(url):
        return _pack_folder(url, field_name, wanted)
    packing = spell_program("pack.py")
    return f"pack images with `{packing}`, or index existing tars with its --index-only"


def _pack_folder(url: str, field_name: str, split: str) -> str:
    here = misplaced.last_name(url) in ("", ".", "..")
    out = "packed" if here else f"{url.rstrip('/')}-packed"
    below = [misplaced.last_name(folder) for folder in misplaced.folders_below(url)]
    given = files.join(out, split) if split in below else out  # Splits are packed to folders.
    text = (
        f"it is a folder of images: pack it by `{spell_program('pack.py', url, out)}` and give "
        f"--{field_name} {quote(given)}"
    )
    if field_name == "data.val":
        text += f", or give --probe.val {quote(url)}, which takes such a folder as it is"
    return text


def holds_images(url: str, levels: int = _LEVELS) -> bool:
    """Return whether some file in a folder, or in the first folders below, is one of an image."""
    below = list(misplaced.folders_below(url))
    if any(one.rpartition(".")[2].lower() in EXTENSIONS for one in below):
        return True
    folders = [one for one in below if "." not in misplaced.last_name(one)]
    return levels > 1 and any(holds_images(one, levels - 1) for one in folders[:_WIDTH])
