"""What people have in place of plain tars: it is read, or told in one line with the remedy."""

import os
import tarfile
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import pytest

from shards.errors import InputError
from shards.making import kept_scans, scan
from shards.making.labels import read_class_names
from shards.making.scan_tar import Stopped, until
from shards.tar import Member
from tests.helpers.tars import make_index, scan_tars, write_tar
from tests.shards.making.test_pack import ignore
from tests.shards.making.test_scan import samples_of, write_foreign


def test_what_stands_after_the_end_of_a_tar_is_told(tmp_path: Path) -> None:
    tars = [write_tar(tmp_path / "x" / name, {f"{name}.jpg": b"x"}).read_bytes() for name in "ab"]
    (tmp_path / "0.tar").write_bytes(tars[0] + tars[1])
    (tmp_path / "1.tar").write_bytes(tars[0] + b"junk" * 1000)
    indexed = scan_tars(f"{tmp_path}/{{0,1}}.tar")
    assert indexed.made.samples == 2
    assert indexed.left_out == {
        "members after the end mark of their tar (`python launch/pack.py SOURCE OUT` repacks "
        "them)": (2, "0.tar: b.jpg")
    }


def test_labels_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    labels = {"a.cls": b"\xff\xfe", "b.cls": b"x" * 2000, "c.cls": b"x" * (2 << 20), "d.cls": b"1"}
    images = {f"{key}.jpg": b"x" for key in "abcd"}
    write_tar(tmp_path / "0.tar", dict(sorted((images | labels).items())))
    (told,) = scan_tars(str(tmp_path)).left_out.values()
    assert told == (3, "0.tar: a")


def test_reasons_are_bounded(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {f"a{i}.{'x' * i}.gif": b"" for i in range(200)} | {"a.jpg": b""})
    told = scan_tars(str(tmp_path)).left_out
    assert len(told) < 30
    assert sum(left.number for left in told.values()) == 200


def test_a_tar_that_was_replaced_is_read_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x", "a.cls": b"1"})
    (tmp_path / "1.tar").write_bytes(b"")
    with pytest.raises(InputError, match=r"1\.tar: damaged"):
        make_index(str(tmp_path))
    write_tar(tmp_path / "new", {"a.jpg": b"x", "a.cls": b"3"}).replace(tmp_path / "0.tar")
    (tmp_path / "1.tar").unlink()
    assert samples_of(make_index(str(tmp_path))) == [("a", 3)]


def test_what_stays_after_a_failure_is_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x"})
    (tmp_path / "1.tar").write_bytes(b"<html>")
    told: list[str] = []
    for name, stays in {"1.tar": False, "{0,1}.tar": True}.items():
        with (
            pytest.raises(InputError, match="it is an HTML or XML page"),
            kept_scans.telling_what_stays(str(tmp_path), told.append),
        ):
            scan_tars(f"{tmp_path}/{name}")
        assert (tmp_path / ".index").exists() == stays == bool(told)
    assert ".index keeps what was found in 1 tar:" in told[0]


def test_no_folder_is_made_of_a_mistyped_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not there"):
        scan_tars(f"{tmp_path}/typo/0.tar")
    assert os.listdir(tmp_path) == []


def test_an_index_of_other_shards_is_not_replaced(tmp_path: Path) -> None:
    make_index(write_foreign(tmp_path / "a", [0, 1]))
    other = write_foreign(tmp_path / "b", [0, 1])
    with pytest.raises(InputError, match=r"--out .*a: holds the index\.json of the shards that"):
        scan_tars(other, out=f"{tmp_path}/a")
    for _ in range(2):
        scan.save(scan_tars(other, out=f"{tmp_path}/c"), ignore)


def test_names_that_stand_for_themselves_or_for_too_much(tmp_path: Path) -> None:
    write_tar(tmp_path / "x{a,b}.tar", {"a.jpg": b"x"})
    assert make_index(f"{tmp_path}/x{{a,b}}.tar").samples == 1
    write_tar(tmp_path / "folder.tar" / "0.tar", {"a.jpg": b"x"})
    assert make_index(f"{tmp_path}/folder.tar").samples == 1
    for pattern in ("{0..99999999999}", "{0..9999}{0..9999}"):
        with pytest.raises(InputError, match="stands for more than 1,000,000 tars"):
            scan_tars(f"{tmp_path}/{pattern}.tar")
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(InputError, match="it is no file"):
        scan_tars(f"{tmp_path}/pipe.tar")
    with pytest.raises(InputError, match="is named twice"):
        scan_tars(f"{tmp_path}/folder.tar/0.tar", f"{tmp_path}/./folder.tar/0.tar")
    for url in ("https://host/a.tar?key=secret", "https://me:secret@host/a.tar"):
        with pytest.raises(InputError) as error:
            scan_tars(url, out=f"{tmp_path}/out")
        assert "secret" not in str(error.value)


def test_splits_are_not_mixed(tmp_path: Path) -> None:
    for name in ("set-train-0", "set-train-1", "set-val-0"):
        write_tar(tmp_path / f"{name}.tar", {"a.jpg": b"x"})
    for sources in ([str(tmp_path)], sorted(map(str, tmp_path.glob("*.tar")))):
        with pytest.raises(InputError, match=r"splits, such as set-train-0\.tar and set-val"):
            scan_tars(*sources)
    assert make_index(f"{tmp_path}/set-train-{{0,1}}.tar").samples == 2
    assert make_index(f"{tmp_path}/set-{{train-0,val-0}}.tar").samples == 2
    write_tar(tmp_path / "x" / "0.tar", {"s/train/a/1.jpg": b"x", "s/val/a/1.jpg": b"x"})
    assert "train and val in the tars look like splits" in scan_tars(f"{tmp_path}/x").warnings[-1]


def test_names_that_come_again_are_warned_about(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", {"a.jpg": b"x", "b.jpg": b"x"})
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"))
    assert "as after `tar -r`: 1," in scan_tars(str(tmp_path)).warnings[-1]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"ant\nbee\n", ["ant", "bee"]),
        (b"\xef\xbb\xbfant\r\nbee \r\n\r\n", ["ant", "bee"]),
        (b"ant\n\nbee\n", "line 2 is empty"),
        (b"", "line 1 is empty"),
        (b"\xff", "is no text in UTF-8"),
        (None, "no such file"),
    ],
)
def test_files_of_class_names(
    tmp_path: Path, content: bytes | None, names: list[str] | str
) -> None:
    path = tmp_path / "classes.txt"
    if content is not None:
        path.write_bytes(content)
    if isinstance(names, list):
        assert read_class_names(str(path)) == names
        return
    with pytest.raises(InputError, match=f"--classes .*{names}"):
        read_class_names(str(path))


def test_class_names_that_come_twice(tmp_path: Path) -> None:
    """ImageNet has two classes of one name, which is no fault where labels are indices."""
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x", "a.cls": b"1"})
    assert make_index(str(tmp_path), ["crane", "crane"]).classes == ["crane", "crane"]
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x", "a.cls": b"crane"})
    with pytest.raises(InputError, match="--classes names 'crane' twice"):
        make_index(str(tmp_path), ["crane", "crane"])


class _Silent(SimpleHTTPRequestHandler):
    """Python's own handler, which knows no ranges."""

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_knows_no_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shards.storage.retries.BACKOFF", 0.0)
    write_tar(tmp_path / "0.tar", {f"{i}.jpg": b"x" for i in range(50)})
    with ThreadingHTTPServer(("127.0.0.1", 0), _Silent) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/0.tar"
        with pytest.raises(OSError, match="sends all of a file instead of a part: download it"):
            scan_tars(url, out=f"{tmp_path}/out")
        server.shutdown()


def test_reading_ends_when_another_thread_has_failed() -> None:
    stop, member = Event(), Member("a.jpg", 0, 512, 0)
    members = until(stop, [member, member])
    assert next(members) == member
    stop.set()
    with pytest.raises(Stopped):
        next(members)
