"""An export into a folder that holds an earlier one: nothing of it goes in silence."""

import json
from pathlib import Path

import pytest

from engine.encoder import card
from engine.encoder.earlier import CARD
from launch import export
from shards.storage import files

Capture = pytest.CaptureFixture[str]
FIRST = ["--format", "safetensors", "state-dict"]
SECOND = ["--format", "torchscript"]
FILES = {"card.json", "config.json", "encoder.safetensors", "encoder.pth"}


def there(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


def listed(out: Path) -> set[str]:
    return set(json.loads((out / CARD).read_text())["files"])


def refused(capsys: Capture, *arguments: str) -> str:
    capsys.readouterr()
    assert export.main([*arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_formats_of_the_same_weights_add_up(
    whole_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, out = str(whole_run), tmp_path / "out"
    assert export.main([run, str(out), *FIRST]) == 0
    before = {name: (out / name).read_bytes() for name in FILES - {CARD}}
    capsys.readouterr()
    assert export.main([f"{run}/checkpoints/step_00000020", str(out), *SECOND]) == 0
    told = "kept, because they are of the same weights: encoder.pth, encoder.safetensors\n"
    assert told in capsys.readouterr().out
    assert there(out) == {*FILES, "encoder.ts"}
    assert listed(out) == there(out) - {"card.json", "config.json"}
    assert all((out / name).read_bytes() == content for name, content in before.items())
    for name, entry in json.loads((out / CARD).read_text())["files"].items():
        assert entry["bytes"] == len((out / name).read_bytes())
    assert export.main([run, str(out), *FIRST]) == 0
    assert there(out) == {*FILES, "encoder.ts"}


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (["--checkpoint", "12"], "step 20, not 12"),
        (["--network", "target"], "network online, not target"),
        (["--size", "64"], "size 32, not 64"),
    ],
)
def test_other_weights_are_refused_or_replaced(
    whole_run: Path, tmp_path: Path, capsys: Capture, other: list[str], text: str
) -> None:
    run, out = str(whole_run), tmp_path / "out"
    assert export.main([run, str(out), *FIRST]) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    line = refused(capsys, run, str(out), *SECOND, *other)
    assert line.startswith(f"error: OUT {out}: holds the export of other weights ({text}")
    assert line.endswith("): choose another OUT, or replace it with --overwrite")
    assert before == {path: path.read_bytes() for path in out.iterdir()}
    assert export.main([run, str(out), *SECOND, *other, "--overwrite"]) == 0
    assert (
        f"{out}: replaced what was there: card.json, config.json, encoder.pth, encoder.safetensors"
        in capsys.readouterr().out
    )
    assert there(out) == {CARD, "encoder.ts"}
    assert listed(out) == {"encoder.ts"}


@pytest.mark.parametrize("content", [None, b"no card", b"[]"])
def test_files_without_a_card_are_refused(
    whole_run: Path, tmp_path: Path, capsys: Capture, content: bytes | None
) -> None:
    run, out = str(whole_run), tmp_path / "out"
    out.mkdir()
    (out / "encoder.pth").write_bytes(b"somebody's")
    if content is not None:
        (out / CARD).write_bytes(content)
    line = refused(capsys, run, str(out), *SECOND)
    assert "encoder.pth, and no card.json that tells of which weights: choose another OUT" in line
    assert (out / "encoder.pth").read_bytes() == b"somebody's"


def test_a_file_that_the_card_does_not_describe_is_refused(
    whole_run: Path, tmp_path: Path, capsys: Capture
) -> None:
    run, out = str(whole_run), tmp_path / "out"
    assert export.main([run, str(out), *FIRST]) == 0
    (out / "encoder.pth").write_bytes(b"another")
    line = refused(capsys, run, str(out), *SECOND)
    assert "holds encoder.pth, which card.json does not describe: choose another OUT" in line
    assert export.main([run, str(out), *FIRST]) == 0  # It would be replaced anyway.


def test_the_same_command_goes_on_after_an_interruption(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also between a file and the card that lists it."""
    run, out = str(whole_run), tmp_path / "out"
    write = files.write
    stopped: list[str] = []

    def interrupt(url: str, content: bytes) -> None:
        write(url, content)
        if url.endswith("encoder.pth") and not stopped:
            stopped.append(url)
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "write", interrupt)
    assert export.main([run, str(out), *FIRST]) == 130
    assert listed(out) == {"encoder.safetensors"}
    assert export.main([run, str(out), *FIRST]) == 0
    assert listed(out) == {"encoder.safetensors", "encoder.pth"}


def test_a_failed_export_leaves_the_earlier_one(
    whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = str(whole_run), tmp_path / "out"
    assert export.main([run, str(out), *FIRST]) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(card, "verify", lambda *_: float("nan"))
    options = [*SECOND, "--checkpoint", "12", "--overwrite"]
    assert export.main([run, str(out), *options]) == 1
    assert before == {path: path.read_bytes() for path in out.iterdir()}
