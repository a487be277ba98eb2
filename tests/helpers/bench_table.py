"""Write the comparisons in a file of `launch/bench.py all` as a table for a README.

python -m tests.helpers.bench_table recipes/figures.json
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

from launch.benchmarks.results import Row, figure, read_rows

HEAD = ["| row | ours | beside | ratio | share of the limit |", "|-|-|-|-|-|"]


def format_figures(document: dict[str, Any]) -> str:
    """Return what was measured, with machine and versions, and the rows that compare something."""
    machine, versions = document["machine"], document["versions"]
    known = [name for name in ("torch", "torchvision", "lightly", "kornia") if versions[name]]
    device = f"{machine['gpus']} x {machine['gpu']}" if machine["gpu"] else "no GPU"
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {device},",
        f"{', '.join(f'{name} {versions[name]}' for name in known)}, {document['date'][:10]}:",
        "",
        *HEAD,
    ]
    compared = [row for row in read_rows(document) if row.ratio or row.share]
    for command, rows in groupby(compared, key=lambda row: row.command):
        lines.append(f"| `{command}` | | | | |")
        lines += [_format_row(row) for row in rows]
    for failure in document["failed"]:
        lines.append(f"| `{failure['command']}` | failed: {failure['reason']} | | | |")
    return "\n".join(lines)


def _format_row(row: Row) -> str:
    other = "" if row.other is None else f"{row.beside} {figure(row.other)}"
    share = "" if row.share is None else f"{row.share:.0%} of {figure(row.limit)}"
    name = f"{row.name} ({row.note})" if row.note else row.name
    return f"| {name} | {figure(row.ours)} {row.unit} | {other} | {row.ratio or ''} | {share} |"


if __name__ == "__main__":
    print(format_figures(json.loads(Path(sys.argv[1]).read_text())))
