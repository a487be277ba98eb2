"""Find the images, classes and splits in a folder, and say what is left out and why."""

import re
from typing import NamedTuple

from shards.errors import InputError
from shards.making.pack import Image, ImageSet
from shards.storage import files, misplaced

EXTENSIONS = ("jpg", "jpeg", "png", "webp")

# The names that people give to splits, in small letters and without what `_DECORATION` matches.
_SPLITS = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "valid", "validation": "validation"},
    **{"dev": "val", "eval": "val", "evaluation": "val"},
    **{"test": "test", "testing": "test"},
}
_DECORATION = re.compile(r"[ _-]|[ _-]?(set|data|dataset|images|split)$")
_ORDER = ("train", "val", "valid", "validation", "test")
# Folders that file managers, archivers and disks make beside the user's own.
_JUNK = {"@eadir", "__macosx", "#recycle", "$recycle.bin", "lost+found"}


class LeftOut(NamedTuple):
    """The files that are left out for one reason."""

    number: int
    example: str  # path of one of them, relative to the source


class Found(NamedTuple):
    """The data sets in a folder of images."""

    sets: list[ImageSet]
    left_out: dict[str, LeftOut]  # the reason, such as ".txt files": what is left out
    warnings: list[str]  # each of one line


def find_images(source: str) -> Found:
    """Find the data sets in a folder of images.

    The first folder below a data set names the class. Images that are in no such folder have no
    class. When all folders of the source are splits, in one of the spellings that people use, each
    is a data set. Hidden files and the folders of file managers hold no images.

    Raises InputError when there are no images, when several splits stand among other folders, and
    when two folders are the same split.
    """
    found: list[tuple[str, int]] = []
    left_out: dict[str, LeftOut] = {}
    for path, size in files.walk(source):
        if reason := _reason_against(path):
            leave_out(left_out, reason, path)
        else:
            found.append((path, size))
    place = files.redact(source)
    if not found and not files.exists(source):
        raise InputError(f"SOURCE {place}: no such folder")
    if not found:
        hint = _hint(source, left_out)
        raise InputError(f"SOURCE {place}: no {', '.join(EXTENSIONS)} files there{hint}")
    found.sort()
    splits = _find_splits(found, place)
    if not splits:
        sets = [_image_set("", "", found, _class_names(found, ""))]
        return Found(sets, left_out, _doubts(sets[0].classes))
    classes = sorted({name for folder in splits for name in _class_names(found, folder)})
    sets = [_image_set(name, folder, found, classes) for folder, name in splits.items()]
    for path, _ in found:
        if path.split("/", 1)[0] not in splits:
            leave_out(left_out, f"images outside of {', '.join(splits)}", path)
    return Found(sets, left_out, _doubts(classes))


def _hint(source: str, left_out: dict[str, LeftOut]) -> str:
    """Return the end of a message that no images are in `source`: what is there instead."""
    if misplaced.last_name(source).rpartition(".")[2].lower() in (*EXTENSIONS, "tar", "json"):
        return f"; give the folder {files.redact(misplaced.folder_of(source))}"
    if ".tar files" not in left_out:
        return ""
    folder, _, _ = left_out[".tar files"].example.rpartition("/")
    place = files.redact(files.join(source, folder) if folder else source)
    if files.exists(files.join(source, folder, "index.json")):
        return f"; it is packed already: train on {place}"
    return f"; it holds tars: use --index-only {place}"


def _reason_against(path: str) -> str:
    """Return why a file is no image of a data set; "" when it is one."""
    parts = path.split("/")
    if any(part.startswith(".") or part.lower() in _JUNK for part in parts):
        return "hidden files and files of file managers"
    stem, dot, extension = parts[-1].rpartition(".")
    if extension.lower() in EXTENSIONS and dot:
        return ""
    return f".{extension.lower()} files" if dot and stem else "files without an extension"


def leave_out(left_out: dict[str, LeftOut], reason: str, path: str) -> None:
    """Count a file under the reason why it is left out."""
    known = left_out.get(reason, LeftOut(0, path))
    left_out[reason] = known._replace(number=known.number + 1)


def _find_splits(found: list[tuple[str, int]], place: str) -> dict[str, str]:
    """Return the folders that are splits, with the split's name; empty when they are classes."""
    folders = sorted({path.split("/", 1)[0] for path, _ in found if "/" in path})
    splits = {folder: name for folder in folders if (name := _split_name(folder))}
    if len(splits) > 1 and len(folders) > len(splits):
        rest = ", ".join([folder for folder in folders if folder not in splits][:3])
        raise InputError(
            f"SOURCE {place}: holds {' and '.join(splits)}, but {rest} too: pack each split alone"
        )
    if len(folders) > len(splits):
        return {}
    for name in splits.values():
        if len(same := [folder for folder in splits if splits[folder] == name]) > 1:
            raise InputError(
                f"SOURCE {place}: {' and '.join(same)} are both the split {name}: pack each alone"
            )
    return dict(sorted(splits.items(), key=lambda item: _ORDER.index(item[1])))


def _split_name(folder: str) -> str | None:
    return _SPLITS.get(_DECORATION.sub("", folder.lower()))


def _doubts(classes: list[str]) -> list[str]:
    """Warn of classes that are probably no classes."""
    if len(classes) == 1:
        return [f"there is one class only, {classes[0]}: is SOURCE one folder too high?"]
    if splits := [name for name in classes if _split_name(name)]:
        return [f"{' and '.join(splits)} became a class, but the name is that of a split"]
    return []


def _class_names(found: list[tuple[str, int]], split: str) -> list[str]:
    return sorted({name for path, _ in found if (name := _class_name(path, split))})


def _class_name(path: str, split: str) -> str | None:
    """Return the class of a file: "" when it has none, None when it is outside the split."""
    if split and not path.startswith(f"{split}/"):
        return None
    folder, _, rest = path[len(split) :].lstrip("/").partition("/")
    return folder if rest else ""


def _image_set(
    name: str, folder: str, found: list[tuple[str, int]], classes: list[str]
) -> ImageSet:
    labels = {known: i for i, known in enumerate(classes)} | {"": -1}
    images = [
        Image(path, size, labels[which])
        for path, size in found
        if (which := _class_name(path, folder)) is not None
    ]
    labeled = any(image.label >= 0 for image in images)
    return ImageSet(name, images, classes if labeled else [])
