"""Measure this project beside stock PyTorch, in the same run.

    python launch/bench.py all        one table of all that follow, and one file of JSON
    python launch/bench.py input      the pipeline's images per second and per core-second
    python launch/bench.py step       images per second, compile time, memory and data wait of a
                                      training step; also under torchrun
    python launch/bench.py peers      a step, training and views beside lightly and kornia
    python launch/bench.py accuracy   kNN accuracy after equal core-seconds, beside lightly
    python launch/bench.py checkpoint seconds that training waits for a checkpoint, seconds that the
                                      checkpoint takes, and seconds from a process's start to its
                                      first step
    python launch/bench.py order      seconds and memory until a rank knows its batch at any step
    python launch/bench.py plan       memory and communication of one process among many, without
                                      starting the others
    python launch/bench.py roofline   bytes, FLOPs and least time of a step on a device
    python launch/bench.py variants   one forward beside two, channels_last beside contiguous
    python launch/bench.py largest    the largest batch that a device holds

"ours" is this project, and "stock" is the usual way in PyTorch. The two take turns in every round.
A figure is the median over the rounds. A ratio is the ratio of the medians, and behind it stand the
smallest and the largest ratio of a single round. Ratios of ours and stock are above 1 when ours
needs less time or memory. On a
machine that is not idle, use --threads 1 and the column per core-second, because torch's threads
spin while they wait for each other. Memory and the workers' CPU time are read from Linux's /proc.
"""

import sys
from collections.abc import Callable

try:
    from launch import imports
except ModuleNotFoundError as error:  # This Python is not the one that the project is installed in.
    sys.exit(f"error: {error}: run `. .venv/bin/activate`, or install it: pip install -e .")

if __name__ == "__main__":  # the imports below would fail with a less helpful message
    imports.begin()

import tyro

from engine.processes.failures import report_failure
from launch.benchmarks.accuracy import bench_accuracy
from launch.benchmarks.all import bench_all
from launch.benchmarks.checkpoint import bench_checkpoint
from launch.benchmarks.input import bench_input
from launch.benchmarks.machine import read_head
from launch.benchmarks.order import bench_order
from launch.benchmarks.peers import bench_peers
from launch.benchmarks.plan import bench_plan
from launch.benchmarks.results import Report, publish
from launch.benchmarks.roofline import bench_roofline
from launch.benchmarks.step import bench_step
from launch.benchmarks.variants import bench_largest, bench_variants
from launch.help_texts import join_help_lines
from launch.plain_errors import list_options, plain_errors
from shards.errors import InputError

BENCHES: dict[str, Callable[..., Report | None]] = {
    "all": bench_all,
    "input": bench_input,
    "step": bench_step,
    "checkpoint": bench_checkpoint,
    "peers": bench_peers,
    "accuracy": bench_accuracy,
    "order": bench_order,
    "plan": bench_plan,
    "roofline": bench_roofline,
    "variants": bench_variants,
    "largest": bench_largest,
}


def main(arguments: list[str]) -> int:
    for bench in BENCHES.values():
        join_help_lines(bench, arguments)
    try:
        chosen = BENCHES.get(arguments[0]) if arguments else None
        with plain_errors(arguments, lambda: list_options(chosen) if chosen else list(BENCHES)):
            head = read_head()
            report = tyro.extras.subcommand_cli_from_dict(
                BENCHES,
                prog="python launch/bench.py",
                description=__doc__,
                args=arguments,
            )
        if report is None:  # of a process that is not the first
            return 0
        publish(report, head, arguments)
        return 1 if report.failed else 0
    except (InputError, OSError) as error:
        report_failure(error)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    imports.end()
    sys.exit(main(sys.argv[1:]))
