"""Ours beside the stock PyTorch way, measured in the same run.

    python launch/bench.py input     images per second, and per second of a core, of the pipeline
    python launch/bench.py step      images per second, compile time, memory and data wait of a
                                     training step; also under torchrun
    python launch/bench.py checkpoint seconds that training waits for a checkpoint, that it takes,
                                     and from a process's start to its first step
    python launch/bench.py order     seconds and memory until a rank knows its batch at any step
    python launch/bench.py plan      memory and communication of a process among many, none needed

Both sides take turns in every round. A figure is the median over the rounds, a ratio is that of
the medians, and behind it stand the smallest and the largest ratio of a single round. On a machine
that is not idle use --threads 1 and the column per core-second: threads of torch that wait for
each other spin. Memory and the workers' CPU time are read from Linux's /proc.
"""

import sys

from launch.requirements import check_requirements

if __name__ == "__main__":  # an import of what follows would fail with less to go by
    check_requirements()

import tyro

from engine.processes.failures import report_failure
from launch.benchmarks.checkpoint import bench_checkpoint
from launch.benchmarks.input import bench_input
from launch.benchmarks.order import bench_order
from launch.benchmarks.plan import bench_plan
from launch.benchmarks.step import bench_step
from shards.errors import InputError


def main(arguments: list[str]) -> int:
    try:
        tyro.extras.subcommand_cli_from_dict(
            {
                "input": bench_input,
                "step": bench_step,
                "checkpoint": bench_checkpoint,
                "order": bench_order,
                "plan": bench_plan,
            },
            prog="python launch/bench.py",
            description=__doc__,
            args=arguments,
        )
    except (InputError, OSError) as error:
        report_failure(error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
