"""Record with torch.profiler what some steps of a run spend their time on."""

import re
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from engine.log.terminal import Terminal
from shards.errors import InputError
from shards.storage import files

PROFILE = "profile"  # folder of a run
MOST_STEPS = 100
ROWS = 10  # operations in the table


def parse_steps(text: str) -> range:
    """Return the steps that FIRST:LAST names; none for an empty text.

    Raises InputError when it names no steps, or too many.
    """
    if not text.strip():
        return range(0)
    found = re.fullmatch(r"\s*(\d{1,18})\s*:\s*(\d{1,18})\s*", text, re.ASCII)
    steps = range(int(found[1]), int(found[2]) + 1) if found else range(0)
    if not steps or steps[0] < 1 or len(steps) > MOST_STEPS:
        raise InputError(
            f"profile {text[:100]!r}: give FIRST:LAST, two numbers of steps such as 10:12, from 1 "
            f"on and with at most {MOST_STEPS} steps"
        )
    return steps


class StepProfiler:
    """Profile steps of one process, and write a trace and a table to RUN/profile.

    A profile that cannot be written is reported, and training goes on.
    """

    def __init__(self, steps: range, run: str, device: torch.device, terminal: Terminal) -> None:
        """Prepare to profile `steps`. Without steps nothing is ever done."""
        self._steps, self._run, self._device, self._terminal = steps, run, device, terminal
        self._profile: profile | None = None
        self._first = 0

    def check(self, first: int, last: int) -> None:
        """Say so when none of the steps is among those that this process takes."""
        steps = self._steps
        if steps and first > last:
            self._terminal.say(
                f"profile {steps[0]}:{steps[-1]}: nothing is profiled, because step {last:,} was "
                "the last one: give a larger --steps or, for a run that is finished, profile a new "
                "run with another --run-url and --checkpoint.resume CHECKPOINT of an earlier step"
            )
        elif steps and not range(max(first, steps[0]), min(last, steps[-1]) + 1):
            self._terminal.say(
                f"profile {steps[0]}:{steps[-1]}: nothing is profiled, because this start takes "
                f"the steps {first:,} to {last:,}"
            )

    def begin(self, step: int) -> None:
        """Begin the profile if `step`, which comes next, is the first of its steps."""
        if self._profile is None and step in self._steps:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._first, self._profile = step, profile(activities=activities)
            self._profile.start()

    def end(self, step: int) -> None:
        """Write the profile if `step`, which is over, was the last of its steps."""
        if self._profile is not None and step not in self._steps[:-1]:
            self.write(step)

    def write(self, step: int) -> None:
        """End the profile at `step` and write it, if one was begun."""
        if (done := self.cancel()) is None:
            return
        name = f"steps_{self._first:08d}-{step:08d}"
        key = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        table = done.key_averages().table(sort_by=key, row_limit=ROWS)
        try:
            with tempfile.TemporaryDirectory() as folder:
                trace = Path(folder, "trace.json.gz")
                done.export_chrome_trace(str(trace))
                files.write(files.join(self._run, PROFILE, f"{name}.json.gz"), trace.read_bytes())
            files.write(files.join(self._run, PROFILE, f"{name}.txt"), table.encode())
        except OSError as error:
            self._terminal.report(f"the profile could not be written: {error}; training goes on")
        else:
            place = files.redact(files.join(self._run, PROFILE, name))
            self._terminal.say(f"profile  {place}.json.gz (chrome://tracing, Perfetto), .txt")

    def cancel(self) -> profile | None:
        """End the profile without writing it, and return it, if one was begun."""
        done, self._profile = self._profile, None
        if done is not None:
            done.stop()
        return done
