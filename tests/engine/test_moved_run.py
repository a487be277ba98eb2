"""A run whose folder is moved away while it trains: what is written afterwards is a run again."""

from pathlib import Path

import pytest

from engine.evaluation.during_training import ProbeConfig
from engine.log import journal
from engine.processes.world import join
from engine.state import checkpoint, layout
from engine.state.checkpoint import CheckpointConfig
from engine.trainer import StepOutput
from shards.loader import Batch, DataConfig
from tests.engine.log.test_events import points
from tests.helpers import tiny
from tests.helpers.training import finish, train, training


def test_a_run_that_was_moved_away_goes_on_as_a_whole_run(
    tiny_data: DataConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    config = tiny.recipe(
        tiny_data,
        run,
        probe=ProbeConfig(),
        checkpoint=CheckpointConfig(every=4, background=False),
        steps=12,
    )
    with training(config) as trainer:
        train_step = trainer.train_step

        def step(batch: Batch) -> StepOutput:
            if trainer.step == 5:
                run.rename(elsewhere)
            return train_step(batch)

        trainer.train_step = step  # type: ignore[method-assign]
        assert finish(trainer)
    said = capfd.readouterr().out
    assert said.count("was moved or removed while this job trains") == 1
    assert "Errno" not in said, "the log needs no second attempt"
    assert layout.read_recipe(str(run)) == layout.read_recipe(str(elsewhere))
    assert [record["step"] for record in journal.read(str(run))] == list(range(1, 13))
    assert [step for step, _ in points(str(run), "train/loss")] == list(range(6, 13))
    assert checkpoint.committed_steps(str(run)) == [8, 12]
    assert checkpoint.latest(str(elsewhere), join(1, False), print) is not None
    train(tiny.recipe(tiny_data, run, probe=ProbeConfig(), steps=13))
    assert "resumed at step 12" in capfd.readouterr().out
