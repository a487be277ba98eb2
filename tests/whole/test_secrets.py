"""Credentials, also inside URLs, are nowhere in what a run writes or says."""

import fsspec
import pytest

from launch import train
from shards.making import synthetic
from shards.storage import files
from tests.helpers.jobs import small

CANARY = "c4n4ry"
BUCKET = f"memory://user:{CANARY}@bucket"  # a name like any other there


@pytest.fixture
def _in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, f"{CANARY}-{name}")


@pytest.mark.usefixtures("_in_environment")
def test_no_secret_is_written_or_told(capsys: pytest.CaptureFixture[str]) -> None:
    for part, samples in (("train", 64), ("val", 16)):
        synthetic.write(f"{BUCKET}/data/{part}", samples, 32, seed=0)
    query = f"?token={CANARY}"
    runs = [f"{BUCKET}/run{query}", f"{BUCKET}/other"]
    steps = ["--steps", "4", "--checkpoint.every", "2", "--probe.every", "2", "--data.draw", "0"]
    first = small(f"{BUCKET}/data", runs[0], *steps)
    assert train.main(first) == 0
    assert train.main(small(f"{BUCKET}/data", runs[1], *steps, "--checkpoint.resume", runs[0])) == 0
    assert train.main([*first, "--seed", "5"]) == 1  # another run is there
    for wrong in (["--data.train", f"{BUCKET}/nothing{query}"], ["--checkpoint.resume", BUCKET]):
        assert train.main([*small(f"{BUCKET}/data", f"{BUCKET}/third", *steps), *wrong]) == 1
    told = capsys.readouterr()
    assert "error: " in told.err
    assert "checkpoint    memory://bucket/run" in told.out
    assert CANARY not in told.out + told.err

    filesystem = fsspec.filesystem("memory")
    written = {path: filesystem.cat_file(path) for path in filesystem.find("/")}
    kinds = ("recipe.json", "commit.json", ".metadata", "metrics.jsonl", ".byol", "lease/0")
    for kind in kinds:
        assert any(kind in path for path in written), kind
    leaks = [path for path, content in written.items() if CANARY.encode() in content]
    assert not leaks


def test_redact() -> None:
    assert files.redact(f"s3://k:{CANARY}@bucket/a?x={CANARY}") == "s3://bucket/a"
    assert files.redact(f"s3://bucket/a@b?x={CANARY}") == "s3://bucket/a@b"
    assert files.redact("plain/path?") == "plain/path?"
