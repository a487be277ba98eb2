"""Find the images, classes and splits in a folder, and say what is left out and why."""

import contextlib
import os
import re
from typing import NamedTuple

from shards.errors import InputError
from shards.making.label_table import LabelTable
from shards.making.left_out import Reasons, leave_out
from shards.making.listing import Listing, list_folder
from shards.making.pack import Image, ImageSet
from shards.storage import files
from shards.storage.commands import spell_program
from shards.tar import is_parquet, is_tar, is_zip

# The names that people give to splits, in small letters and without what `_DECORATION` matches.
_SPLITS = {
    **{"train": "train", "training": "train"},
    **{"val": "val", "valid": "valid", "validation": "validation"},
    **{"dev": "val", "eval": "val", "evaluation": "val"},
    **{"test": "test", "testing": "test"},
}
_DECORATION = re.compile(r"[ _-]|[ _-]?(set|data|dataset|images|split)$")
SPLITS = ("train", "val", "valid", "validation", "test")
_KINDS = {"tar": is_tar, "parquet file": is_parquet, "zip file": is_zip}


class Found(NamedTuple):
    """The data sets in a folder of images."""

    sets: list[ImageSet]
    left_out: Reasons  # by reason, such as ".txt files"
    warnings: list[str]  # each of one line


def find_images(
    source: str,
    *,
    follow_links: bool = False,
    follower: str = "--follow-links",
    labels: bool = True,
    table: LabelTable | None = None,
) -> Found:
    """Find the data sets in a folder of images. There are none if it holds tars and no images.

    Args:
        follow_links: Also take files outside of the folder that links in it lead to.
        follower: What the user can give to have such links followed, for messages.
        labels: Whether folders name classes. Without labels they may still be splits.
        table: Names the classes of images.

    Raises InputError when there is neither, and what `make_sets` raises.
    """
    listing = list_folder(source, follow_links, "SOURCE", follower)
    if not listing.images:
        return Found([], listing.left_out, [])
    return make_sets(listing, files.redact(source), labels=labels, table=table)


def make_sets(
    listing: Listing, place: str, *, labels: bool = True, table: LabelTable | None = None
) -> Found:
    """Make the data sets of the images in a folder.

    The first folder below a data set names the class. Images that are in no such folder have no
    class. When all folders of the source are splits, in one of the spellings that people use, each
    is a data set. Hidden files and the folders of file managers hold no images. An empty folder
    in the place of a class is a class without images. Where a table names the classes of images,
    it does so in place of the folders.

    Args:
        place: The folder, for messages.
        labels: Whether folders name classes. Without labels they may still be splits.
        table: Names the classes of images.

    Raises InputError when several splits stand among other folders, when two folders are the same
    split, and when the table does not fit.
    """
    found, left_out = listing.images, listing.left_out
    splits = _find_splits(found, place)
    # An empty folder counts as if there were a file in it.
    paths = [*(path for path, _ in found), *(f"{path}/." for path in listing.empty)]
    folders = splits or {"": ""}
    names = {folder: _class_names(paths, folder) for folder in folders}
    plain = _find_plain(names)
    classes = sorted({name for folder in names if folder not in plain for name in names[folder]})
    sets = [_image_set(name, folder, found, classes) for folder, name in folders.items()]
    for path, _ in found:
        if splits and path.split("/", 1)[0] not in splits:
            leave_out(left_out, f"images outside of {', '.join(splits)}", path)
    if not labels:
        sets = [_without_labels(part) for part in sets]
    doubts = _tell_tars_and_links(listing)
    if table:
        sets, lines = table.label(sets, left_out)
        doubts += lines
    else:
        classes = next((part.classes for part in sets if part.classes), [])
        doubts += _doubt_classes(classes)
        doubts += [
            f"images of {split} lie in one folder, {name}, which is no class elsewhere: no label"
            for split, name in plain.items()
            if labels
        ]
        doubts += [line for part in sets for line in _tell_unlabeled(part)]
        doubts += _tell_nested(
            found, [folder for folder in folders if folder not in plain], len(classes)
        )
    doubts += [line for part in sets for line in _tell_bare(part)]
    return Found(sets, left_out, doubts)


def find_all_images(
    source: str, name: str, *, follow_links: bool = False, follower: str = "--follow-links"
) -> Found:
    """Find all images in a folder and below it, as one data set.

    The first folder names the class, or the second one where the first folders are splits.

    Args:
        name: The name of the argument that gave the folder, for messages.
        follow_links: Also take files outside of the folder that links in it lead to.
        follower: What the user can give to have such links followed, for messages.

    Raises InputError when there are no images.
    """
    listing = list_folder(source, follow_links, name, follower)
    found, tars, place = listing.images, listing.tars, files.redact(source)
    if not found:
        plain = all(is_tar(tar) for tar in tars)
        how = ("--index-only", source) if plain else (source, "OUT")
        raise InputError(
            f"{name} {place}: holds {'tars' if plain else 'packed files'}, such as {min(tars)}: "
            f"{'index' if plain else 'pack'} them first, by `{spell_program('pack.py', *how)}`"
        )
    splits: dict[str, str] = {}
    with contextlib.suppress(InputError):  # Here, splits may stand among other folders.
        splits = _find_splits(found, place)
    names = []
    for path, _ in found:
        top = path.partition("/")[0]
        names.append(_class_name(path, top if top in splits else "") or "")
    classes = sorted(set(names) - {""})
    labels = {known: i for i, known in enumerate(classes)} | {"": -1}
    images = [
        Image(path, size, labels[own]) for (path, size), own in zip(found, names, strict=True)
    ]
    return Found([ImageSet("", images, classes)], listing.left_out, [])


def _find_splits(found: list[tuple[str, int]], place: str) -> dict[str, str]:
    """Return the folders that are splits, with the split's name; empty when they are classes."""
    folders = sorted({path.split("/", 1)[0] for path, _ in found if "/" in path})
    splits = {folder: name for folder in folders if (name := split_name(folder))}
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
    return dict(sorted(splits.items(), key=lambda item: SPLITS.index(item[1])))


def split_name(folder: str) -> str | None:
    """Return the split that a folder of this name holds, or None when it is no split."""
    return _SPLITS.get(_DECORATION.sub("", folder.lower()))


def _tell_tars_and_links(listing: Listing) -> list[str]:
    """Warn of tars whose images are not taken, and of images that links lead to."""
    doubts = []
    if tars := listing.tars:
        kind = next((k for k, of in _KINDS.items() if all(map(of, tars))), "tar")
        are = f"{len(tars):,} files, such as {min(tars)}, are {kind}s"
        are = f"{min(tars)} is a {kind}" if len(tars) == 1 else are
        doubts.append(
            f"{are}, whose images are not taken: give the {kind}s as SOURCE to pack those"
        )
    if links := listing.links:
        lead = f"{len(links):,} links lead to folders"
        lead = "1 link leads to a folder" if len(links) == 1 else lead
        doubts.append(
            f"{lead} of SOURCE itself, such as {min(links)}: images that are taken there too are "
            "taken twice"
        )
    return doubts


def _doubt_classes(classes: list[str]) -> list[str]:
    """Warn of folders that are probably no classes."""
    if len(classes) == 1:
        return [f"there is one class only, {classes[0]}: is SOURCE one folder too high?"]
    if splits := [name for name in classes if split_name(name)]:
        return [f"{' and '.join(splits)} became a class, but the name is that of a split"]
    return []


def _tell_bare(part: ImageSet) -> list[str]:
    """Say that some classes of a set have no image; nothing when all have one."""
    used = {image.label for image in part.images}
    bare = [name for i, name in enumerate(part.classes) if i not in used]
    more = f" and {len(bare) - 3:,} more" if len(bare) > 3 else ""
    where = f" in {part.name}" if part.name else ""
    return [f"classes without an image{where}: {', '.join(bare[:3])}{more}"] if bare else []


def _tell_unlabeled(part: ImageSet) -> list[str]:
    """Say that some images of a set with classes have none; nothing when all have one."""
    bare = [image.path for image in part.images if image.label < 0]
    if not bare or not part.classes:
        return []
    lie = "1 image lies" if len(bare) == 1 else f"{len(bare):,} images lie"
    return [f"{lie} in no folder of a class, such as {bare[0]}: no label"]


def _tell_nested(found: list[tuple[str, int]], splits: list[str], classes: int) -> list[str]:
    """Say that images in folders below that of a class have its class; nothing when none are."""
    nested: list[tuple[str, str]] = []
    for path, _ in found:
        for split in splits:
            name = _class_name(path, split)
            if name and "/" in path[len(split) :].lstrip("/").partition("/")[2]:
                nested.append((path, name))
    if not nested or classes < 2:
        return []  # That there is one class only was said.
    path, name = nested[0]
    number = "1 image lies" if len(nested) == 1 else f"{len(nested):,} images lie"
    return [f"{number} in folders below that of a class, such as {path}, whose class is {name}"]


def _find_plain(names: dict[str, list[str]]) -> dict[str, str]:
    """Return the splits whose one folder, such as `test/images`, is no class, with its name.

    Other splits have several classes then, and none of that name.

    Args:
        names: The folders in each split.
    """
    several = {name for found in names.values() if len(found) > 1 for name in found}
    single = {split: found[0] for split, found in names.items() if len(found) == 1}
    return {split: name for split, name in single.items() if several and name not in several}


def _class_names(paths: list[str], split: str) -> list[str]:
    """Return the names of the classes of a split, or of the source when `split` is ""."""
    return sorted({name for path in paths if (name := _class_name(path, split))})


def _class_name(path: str, split: str) -> str | None:
    """Return the class of a file: "" when it has none, None when it is outside the split.

    Bytes of a folder's name that are no UTF-8 become escapes such as `\\xe9`.
    """
    if split and not path.startswith(f"{split}/"):
        return None
    folder, _, rest = path[len(split) :].lstrip("/").partition("/")
    return os.fsencode(folder).decode(errors="backslashreplace") if rest else ""


def _without_labels(part: ImageSet) -> ImageSet:
    return ImageSet(part.name, [image._replace(label=-1) for image in part.images], [])


def _image_set(
    name: str, folder: str, found: list[tuple[str, int]], classes: list[str]
) -> ImageSet:
    labels = {known: i for i, known in enumerate(classes)} | {"": -1}
    images = [
        Image(path, size, labels.get(which, -1))
        for path, size in found
        if (which := _class_name(path, folder)) is not None
    ]
    labeled = any(image.label >= 0 for image in images)
    return ImageSet(name, images, classes if labeled else [])
