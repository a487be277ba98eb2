"""Read what Weights & Biases wrote of an offline run: a log in the format of LevelDB."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

BLOCK = 32768
HEAD = 7  # of the file, and of each part of a record: checksum 4, length 2, kind 1


def find_runs(folder: Path) -> list[Path]:
    """Return the files of all runs below a folder, in the order in which they began."""
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda path: path.parent.name)


def read_records(path: Path) -> list[Any]:
    """Return the records of a run's file, as messages of wandb's protocol."""
    messages: Any = import_module("wandb.proto.wandb_internal_pb2")
    content, at, whole, found = path.read_bytes(), HEAD, b"", []
    while at + HEAD <= len(content):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK  # padding
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole += content[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = messages.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def read_history(records: list[Any]) -> list[dict[str, Any]]:
    """Return the logged values of each step, by name."""
    return [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in record.history.item
        }
        | {"_step": record.history.step.num}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
