"""Keep the parts of features that are being written, and join them in the end.

Each part has a record of its rows, which is written after it. So a call that was stopped goes on
with the parts that are missing. An index, which is written last, describes the whole.
"""

import difflib
import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray

from engine.evaluation import feature_files
from engine.evaluation.feature_files import Format, Header, Part, Rows, as_text
from shards.documents import Natural, build
from shards.errors import InputError
from shards.fields import differences
from shards.storage import files, misplaced

INDEX = "features.json"
# What stands in `origin` for a digest in the settings.
_IN_WORDS = {
    "weights": ("run", "step"),
    "data": ("images_from",),
    "content": ("images_from",),
}
_PARTS = re.compile(rf"features-[0-9]{{5,}}\.({'|'.join(feature_files.FORMATS)})(\.csv)?")
# What a call, also one that was stopped while it wrote, leaves in its folder of unfinished parts.
_UNFINISHED = re.compile(
    rf"({re.escape(INDEX)}|features-[0-9]{{5,}}\.json|{_PARTS.pattern})"
    r"(\.[0-9a-f]{12}\.partial)?"
)


@dataclass(frozen=True)
class Output:
    """Where features are written."""

    url: str
    format: Format
    single: bool  # True for one file at `url`, False for a folder of parts

    @property
    def work(self) -> str:
        """The folder of what is unfinished."""
        return f"{self.url}.parts" if self.single else files.join(self.url, ".parts")

    @property
    def index(self) -> str:
        """The JSON file that describes the features."""
        if self.single:
            return f"{self.url}.json"
        return files.join(self.url, INDEX)

    @property
    def part_folder(self) -> str:
        """The folder of the parts' features."""
        return self.work if self.single else self.url

    def part(self, number: int) -> str:
        """The name of the file of a part's features."""
        return f"features-{number:05d}.{'npy' if self.single else self.format}"

    def record(self, number: int) -> str:
        """The name of a part's record."""
        return f"features-{number:05d}.json"


def choose_output(url: str, format: Format | None) -> Output:
    """Return where features go: to one file when OUT ends in a format, or else to a folder.

    Raises InputError when OUT is empty, and when it and the format contradict each other.
    """
    files.check(url, "OUT")
    name = misplaced.last_name(url)
    stem, _, suffix = name.rpartition(".")
    if not name.strip() or url.strip() in (".", ".."):
        raise InputError("OUT must be the URL of a folder, or of a file such as out.npz")
    named = next((one for one in feature_files.FORMATS if stem and one == suffix.lower()), None)
    if named and format not in (None, named):
        raise InputError(f"OUT {files.redact(url)} and --format {format} differ: leave one out")
    near = difflib.get_close_matches(suffix.lower(), feature_files.FORMATS, n=1, cutoff=0.7)
    if stem and near and not named and not files.exists(url):
        raise InputError(
            f"OUT {files.redact(url)}: .{suffix} is no format: did you mean .{near[0]}? A folder "
            "has another name"
        )
    chosen = named or format or "npz"
    feature_files.check_format(chosen)
    files.check_folder(misplaced.folder_of(url) if named else url, "OUT")
    return Output(url.rstrip("/"), chosen, single=named is not None)


@dataclass(frozen=True)
class Fault:
    """An image that was left out."""

    id: Natural
    name: str
    reason: str


@dataclass(frozen=True)
class Record:
    """What is known of a part that was written."""

    files: dict[str, Natural]  # their lengths in bytes
    ids: list[Natural]
    labels: list[int]
    names: list[str]
    left_out: list[Fault]

    @property
    def rows(self) -> Rows:
        return Rows(self.ids, self.labels, self.names)


class Occupied(InputError):
    """OUT holds something else than the features that are asked for."""


class Parts:
    """The parts of one output."""

    def __init__(
        self,
        output: Output,
        settings: dict[str, Any],
        origin: dict[str, Any],
        header: Header,
        count: int,
    ) -> None:
        """Describe the parts, `count` of them.

        Args:
            settings: All that decides the features.
            origin: Where weights and images came from, for people.
        """
        self.output, self.header, self.numbers = output, header, range(count)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.origin = origin

    def claim(self, overwrite: bool = False) -> bool:
        """Claim OUT for these features. Return False when it already holds all of them.

        With `overwrite`, other features there are removed.

        Raises InputError when it holds something else, and, also with `overwrite`, when that would
        remove or hide what is nobody's features.
        """
        self._check_folders()
        try:
            return self._claim()
        except Occupied:
            if not overwrite:
                raise
        output = self.output
        for url in (output.index, output.work, *self._others()):
            files.remove(url)
        return self._claim()

    def _check_folders(self) -> None:
        """Raise InputError when a folder lies where a file goes, or work holds other files."""
        output = self.output
        for url in (output.index, *self._others()):
            if files.list_names(url):
                raise InputError(
                    f"OUT {files.redact(url)}: is a folder, and a file goes there: choose another "
                    "OUT"
                )
        for name in files.list_names(output.work):
            if not _UNFINISHED.fullmatch(name):
                raise InputError(
                    f"OUT {files.redact(output.work)}: has files of something else, such as "
                    f"{as_text(name)}, and parts go there for a while: choose another OUT"
                )

    def _claim(self) -> bool:
        output = self.output
        work = files.join(output.work, INDEX)
        for url in (output.index, work):
            try:
                there = files.read_json(url)
            except FileNotFoundError:
                continue
            except ValueError:
                there = None
            known = there.get("settings") if isinstance(there, dict) else None
            if isinstance(known, dict):  # Earlier releases did not note the content.
                known.setdefault("content", self.settings["content"])
            if known != self.settings:
                listed = self._tell_differences(there) if isinstance(known, dict) else []
                raise Occupied(
                    f"OUT {files.redact(output.url)}: holds something else "
                    f"({'; '.join(listed) or 'no features'}): choose another OUT, or give "
                    "--overwrite"
                )
            return url == work
        for url in self._others():
            raise Occupied(
                f"OUT {files.redact(url)}: is there already: choose another OUT, or give "
                "--overwrite"
            )
        document = {"settings": self.settings, "origin": self.origin}
        files.write(work, json.dumps(document).encode())
        return True

    def _tell_differences(self, document: dict[str, Any]) -> list[str]:
        """List what differs from the features that an index describes.

        Digests say nothing to people. So the run, the step and the place of the images stand for
        those of weights and images, if the index has them and they differ.
        """
        known, origin = document["settings"], document.get("origin")
        there, here = dict(known), dict(self.settings)
        for digest, names in _IN_WORDS.items():
            if not isinstance(origin, dict) or known.get(digest) == self.settings[digest]:
                continue
            places = {name: origin.get(name) for name in names}
            own = {name: self.origin[name] for name in names}
            for settings, found in ((there, places), (here, own)):
                if places != own:
                    settings.pop(digest, None)
                settings |= found
        if known.get("data") != self.settings["data"]:
            for settings in (there, here):  # They follow from the images.
                settings.pop("content", None)
                settings.pop("classes", None)
                settings.pop("rows_of_a_part", None)
        return differences(there, here)

    def _others(self) -> list[str]:
        """List what is there that would be overwritten, although it is not of these features."""
        output = self.output
        if output.single:
            names = [output.url, feature_files.names_url(output.url)]
            with_text = output.format in ("npz", "parquet")
            return [url for url in names[: 1 if with_text else 2] if files.exists(url)]
        found = filter(_PARTS.fullmatch, files.list_names(output.url))
        return [files.join(output.url, name) for name in found]

    def find_done(self) -> list[int]:
        """Find the parts that an earlier call wrote."""
        there = set(files.list_names(self.output.work))
        known = [number for number in self.numbers if self.output.record(number) in there]
        return [number for number in known if self.read(number) is not None]

    def read(self, number: int) -> Record | None:
        """Read a part's record. Return None when it or one of its files is missing or damaged."""
        folder = self.output.part_folder
        try:
            url = files.join(self.output.work, self.output.record(number))
            record = build(Record, files.read_json(url))
            sizes = {name: files.size(files.join(folder, name)) for name in record.files}
        except (FileNotFoundError, ValueError, InputError):
            return None
        return record if sizes == record.files else None

    def write(self, number: int, rows: Rows, features: NDArray[Any], left_out: list[Fault]) -> None:
        """Write a part and then its record."""
        output = self.output
        url = files.join(output.part_folder, output.part(number))
        part = Part(rows, lambda: features)
        if output.single:  # The names stand in the record.
            names = feature_files.write_npy(url, self.header, [part])
        else:
            names = feature_files.write_features(url, output.format, self.header, [part])
        sizes = {name: files.size(files.join(output.part_folder, name)) for name in names}
        record = asdict(Record(sizes, *rows, left_out))
        place = files.join(output.work, output.record(number))
        files.write(place, json.dumps(record).encode())

    def finish(self, facts: dict[str, Any], report: Callable[[str], None]) -> list[Fault]:
        """Join the parts where one file is wanted, and write the index. Return what is left out.

        Args:
            facts: What the index says besides.
            report: Takes a message when a store refuses to remove what is not needed any more.
        """
        output, left_out = self.output, list[Fault]()
        counts: dict[str, int] = {}
        parts: list[Part] = []
        for number in self.numbers:
            record = self.read(number)
            if record is None:
                place = files.redact(files.join(output.part_folder, output.part(number)))
                raise InputError(f"OUT {place}: is gone or was changed: run the command again")
            left_out += record.left_out
            counts |= dict.fromkeys(record.files, len(record.ids))
            if output.single:
                url = files.join(output.part_folder, output.part(number))
                parts.append(Part(record.rows, partial(feature_files.read_npy, url)))
        rows = sum(count for name, count in counts.items() if not name.endswith(".csv"))
        if not rows:
            raise InputError("no image of DATA can be decoded: repair them")
        if output.single:
            names = feature_files.write_features(output.url, output.format, self.header, parts)
            counts = dict.fromkeys(names, rows)
        document = {
            "rows": rows,
            "shape": list(self.header.shape),
            "classes": [as_text(name) for name in self.header.classes],
            "files": [{"name": name, "rows": count} for name, count in sorted(counts.items())],
            "left_out": [asdict(fault) for fault in left_out],
            **facts,
            "origin": self.origin,
            "settings": self.settings,
        }
        files.write(output.index, json.dumps(document, indent=1).encode())
        place = misplaced.folder_of(output.url) if output.single else output.url
        files.discard(output.work, place, report)
        return left_out
