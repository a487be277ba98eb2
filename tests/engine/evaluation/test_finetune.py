"""Fine-tuning against a loop in stock torch, and on several ranks; choices and what is kept."""

import dataclasses
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from engine.encoder.source import EncoderConfig
from engine.encoder.torchvision_twin import stock_resnet
from engine.evaluation.features import Accuracy
from engine.evaluation.finetune import FinetuneConfig, Finetuning, Split
from engine.evaluation.session import Evaluation, EvaluationDataConfig
from engine.evaluation.supervised import hold_out
from engine.method.resnet import ResNetConfig
from engine.processes import world
from engine.recipe import method_fields
from engine.state import checkpoint
from shards.loader import Assignment, DataConfig, TrainLoader
from shards.order import Order
from shards.views import Column, crop_and_flip, draw_views
from tests.helpers import tiny
from tests.helpers.ranks import Ranks
from tests.helpers.training import open_trainer

CONFIG = FinetuneConfig(epochs=(0.5, 0.7), lr=(0.2, 0.02), batch=16, holdout=20)


@pytest.fixture(scope="module")
def run(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run's directory with one checkpoint, of weights as they were drawn."""
    url = str(tmp_path_factory.mktemp("finetune") / "run")
    trainer = open_trainer(tiny.recipe(tiny_data, url, probe=tiny.NO_PROBE, precision="fp64"))
    trainer.run.write_recipe()
    digest = trainer.data.train.digest
    method = method_fields(trainer.recipe)
    checkpoint.save(url, 3, trainer.state(), method, digest, trainer.world)
    return url


def finetuning(run: str, out: str, config: FinetuneConfig = CONFIG) -> Finetuning:
    here = world.join(1, False)
    evaluation = Evaluation(
        "finetune",
        run,
        EncoderConfig(),
        EvaluationDataConfig(),
        config.settings(),
        here,
        out=out,
        threads=1,
    )
    index = evaluation.train
    held = hold_out(index.samples, config.holdout, config.seed)
    ids = np.arange(index.samples)
    return Finetuning(evaluation, config, Split(index, held, index, ids[held(ids)]))


def learn(run: str, out: str) -> tuple[list[float], dict[str, Any], list[float]]:
    """All choices: losses of every step, the best model, held-out accuracies."""
    ours = finetuning(run, out)
    losses = [ours.world.all_reduce(ours.train_step(batch)).item() for batch in ours.batches(0)]
    return losses, {k: v.numpy() for k, v in ours.best.items()}, ours.scores.tolist()


def test_steps_equal_stock_torch(run: str, tmp_path: Path) -> None:
    """torchvision's network with torch's own batch norm, cross-entropy and schedule."""
    ours = finetuning(run, str(tmp_path))
    config = ours.evaluation.source.config
    assert isinstance(config, ResNetConfig)
    stock = stock_resnet(config)
    stock.fc = nn.Linear(ours.model.fc.in_features, ours.model.fc.out_features)
    stock.double().load_state_dict(ours.model.tensors())
    optimizer = torch.optim.SGD(stock.parameters(), lr=1.0, momentum=0.9, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    optimizer.param_groups[0]["lr"] = scheduler.base_lrs[0] = 0.2 * 16 / 256
    mean, std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    stock.train()
    for _, batch in zip(range(3), ours.batches(0), strict=False):
        loss = ours.train_step(batch)
        images = (batch.inputs.double() / 255 - mean) / std
        expected = nn.functional.cross_entropy(stock(images), batch.labels, ignore_index=-1)
        expected.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert ours.step == 3
    for name, value in ours.model.tensors().items():
        torch.testing.assert_close(value, stock.state_dict()[name], rtol=1e-7, atol=1e-9)


def test_sharded_equals_single(run: str, tmp_path: Path, ranks: Ranks) -> None:
    losses, best, scores = learn(run, f"{tmp_path}/one")
    for found, there, measured in ranks.run(learn, run, f"{tmp_path}/three", size=3):
        np.testing.assert_allclose(found, losses, rtol=1e-9)
        assert measured == scores
        for name, value in best.items():
            np.testing.assert_allclose(there[name], value, rtol=1e-6, atol=1e-8)


def test_each_choice_begins_at_the_checkpoint(run: str, tmp_path: Path) -> None:
    """The losses of the last one are those of a training of its own."""
    losses, _, scores = learn(run, f"{tmp_path}/all")
    steps = [3, 4, 3, 4]  # 0.5 and 0.7 of 104 images, in batches of 16
    assert len(losses) == sum(steps)
    assert len(scores) == 4
    config = dataclasses.replace(CONFIG, lr=(0.02,), epochs=(0.7,))
    alone = finetuning(run, f"{tmp_path}/alone", config)
    own = [alone.train_step(batch).item() for batch in alone.batches(0)]
    assert losses[-4:] == own
    assert losses[0] == losses[3] == losses[7] == losses[10]  # same weights, same images
    assert losses[1] != losses[8]


def test_the_best_is_kept(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = finetuning(run, str(tmp_path))
    figures = iter([0.2, 0.9, 0.5, 0.9])
    monkeypatch.setattr(ours, "measure", lambda *_: Accuracy(next(figures), 1.0, 100))
    kept: list[dict[str, Tensor]] = []
    for batch in ours.batches(0):
        ours.train_step(batch)
        if ours.step in (3, 7, 10, 14):
            kept.append({k: v.clone() for k, v in ours.model.tensors().items()})
    assert ours.scores.tolist() == [0.2, 0.9, 0.5, 0.9]
    for name, value in ours.best.items():
        assert torch.equal(value, kept[1][name.removeprefix("encoder.")])
    assert not torch.equal(kept[0]["conv1.weight"], kept[1]["conv1.weight"])


def test_images_are_flipped_as_drawn(run: str, tmp_path: Path) -> None:
    """The loader's crops, mirrored where the drawn parameters say so, half of them."""
    ours = finetuning(run, str(tmp_path))
    index, views = ours.split.source, crop_and_flip(32)
    order = Order(index, CONFIG.seed, 16, 16)
    loader = TrainLoader(Assignment(order, range(16), views, DataConfig(), 1), print)
    mirrored = 0
    with closing(loader):
        for batch, rows in zip(islice(ours.batches(0), 3), loader, strict=False):
            drawn = draw_views(CONFIG.seed, 0, rows.ids, views).params[0]
            assert not drawn[:, [Column.JITTER, Column.GRAYSCALE, Column.SOLARIZE]].any()
            for row, crop, mirror in zip(
                batch.inputs.numpy(), rows.views[0].numpy(), drawn[:, Column.FLIP], strict=True
            ):
                assert np.array_equal(row, crop[:, :, ::-1] if mirror else crop)
                mirrored += int(mirror)
    assert 10 < mirrored < 38


def test_any_step_is_reached_at_once(run: str, tmp_path: Path) -> None:
    ours = finetuning(run, str(tmp_path))
    whole = list(ours.batches(0))
    assert len(whole) == ours.total_steps == 14
    for start in (5, 7, 12):
        for found, expected in zip(ours.batches(start), whole[start:], strict=True):
            assert torch.equal(found.inputs, expected.inputs)
            assert torch.equal(found.labels, expected.labels)
    assert any((batch.labels == -1).any() for batch in whole)  # what is held out
