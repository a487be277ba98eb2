"""Transfer evaluation: regularized logistic regression on the features of the frozen encoder.

A classifier is fitted for each strength of the L2 penalty. The one that is best on images held out
of the training set names the strength. It is fitted anew on all training images, and its accuracy
on data.val is the result.

Source: BYOL (arXiv 2006.07733), section 4 and the appendix on transfer, by the protocol of
Kornblith et al., "Do better ImageNet models transfer better?" (arXiv 1805.08974).
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from engine.evaluation.features import Accuracy, Features, measure_accuracy
from engine.evaluation.knn import NOT_FINITE
from engine.evaluation.linear import keep_head
from engine.evaluation.results import Result, Row, list_metrics, show_chosen
from engine.evaluation.session import Evaluation
from engine.evaluation.supervised import check_held_out, check_labels, hint_at_edge, hold_out
from engine.log.progress import show_progress
from engine.processes.world import World
from shards.errors import InputError

ROWS = 1 << 14  # rows of features whose scores are held at once
TOLERANCE = 1e-6  # the largest entry of the gradient at which a fit is done


@dataclass(frozen=True)
class LogisticConfig:
    """Options of the logistic regression. The defaults are the paper's."""

    l2: Annotated[tuple[float, float], Interval(ge=1e-12, le=1e12)] = (1e-6, 1e5)
    """Lowest and highest strength of the penalty that is tried. The fit minimizes the sum of all
    cross-entropies, plus half the strength times the sum of the squared weights. Biases have no
    penalty."""
    strengths: Annotated[int, Interval(ge=1, le=1000)] = 45
    """Number of strengths that are tried, evenly spaced on a logarithmic scale."""
    iterations: Annotated[int, Interval(ge=1, le=10**6)] = 1000
    """Most iterations of L-BFGS for each strength. A line says how many fits needed more."""
    holdout: Annotated[int, Interval(ge=1, le=2**31)] = 10_000
    """Approximate number of training images that are held out to choose the strength. It is at most
    a tenth of data.train."""
    seed: Annotated[int, Interval(ge=0, le=2**62)] = 0
    """Seed of the choice of held-out images."""

    def settings(self) -> dict[str, Any]:
        """Return the options that decide the result."""
        return asdict(self)


def evaluate(evaluation: Evaluation, config: LogisticConfig) -> Result:
    """Choose the strength on held-out images, fit on all of them, and measure on data.val."""
    index, world, say = evaluation.train, evaluation.world, evaluation.terminal.say
    strengths = np.geomspace(max(config.l2), min(config.l2), config.strengths).tolist()
    held = hold_out(index.samples, config.holdout, config.seed)
    held_ids = np.flatnonzero(held(np.arange(index.samples)))
    remedy = "give the one strength that you want by --l2 and --strengths 1"
    check_held_out(len(held_ids), len(strengths), say, "strength", remedy)
    check_labels(evaluation, index, held, index, held_ids)
    bank, queries = evaluation.extract(index), evaluation.extract(evaluation.val)
    finite = bool(bank.features.isfinite().all() & queries.features.isfinite().all())
    if not all(world.all_gather_object(finite)):
        raise InputError(NOT_FINITE)
    apart = torch.from_numpy(held(bank.ids.cpu().numpy())).to(world.device)
    learned, aside = (Features(*(part[rows] for part in bank)) for rows in (~apart, apart))

    head = nn.Linear(bank.features.shape[1], evaluation.classes, device=world.device).double()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    chosen_on, kept, cut_off = list[Accuracy](), list[Tensor](), 0
    with show_progress(evaluation.terminal, "fits", len(strengths) + 1) as progress:
        for strength in strengths:  # each fit begins where the one before it ended
            cut_off += not fit(head, learned, strength, config.iterations, world)
            chosen_on.append(measure(head, aside, world, "data.train"))
            kept.append(nn.utils.parameters_to_vector(head.parameters()).detach().cpu())
            progress.advance()
        scores = [found.top1 for found in chosen_on]
        best = scores.index(max(scores))  # of equally good ones the strongest penalty
        nn.utils.vector_to_parameters(kept[best].to(world.device), head.parameters())
        cut_off += not fit(head, bank, strengths[best], config.iterations, world)
        progress.advance()
    if cut_off:
        say(
            f"{cut_off} of {len(strengths) + 1} fits were not done after {config.iterations:,} "
            "iterations: give more --iterations for exact ones"
        )
    hint_at_edge(strengths, scores, evaluation, "--l2")
    found = measure(head, queries, world, "data.val")
    keep_head(head, evaluation)
    table: list[Row] = []
    for number, (strength, there) in enumerate(zip(strengths, chosen_on, strict=True)):
        row: Row = {"l2": f"{strength:.3g}", "held-out top-1": there.top1}
        table.append(row | show_chosen(found, number == best, evaluation.classes))
    return Result(list_metrics(found, evaluation.classes, evaluation.name), table)


def fit(head: nn.Linear, data: Features, strength: float, iterations: int, world: World) -> bool:
    """Fit the classifier to features that the processes hold; return whether it is done.

    All processes call it together, with equal classifiers, which stay equal. Cross-entropies and
    penalty are divided by the number of rows of all processes, which moves no minimum.
    """
    rows = world.all_reduce(torch.tensor(len(data.labels), device=world.device)).item()
    weight, bias = head.parameters()
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=iterations,
        max_eval=25 * iterations,  # a line search takes at most so many
        tolerance_grad=TOLERANCE,
        tolerance_change=TOLERANCE**2,  # of the loss, which is flat at its minimum
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> Tensor:
        optimizer.zero_grad()
        total = torch.zeros(1, dtype=weight.dtype, device=world.device)
        for x, labels in zip(data.features.split(ROWS), data.labels.split(ROWS), strict=True):
            part = F.cross_entropy(score(head, x).to(weight.dtype), labels, reduction="sum") / rows
            part.backward()
            total += part.detach()
        assert weight.grad is not None  # there is a part, if an empty one
        assert bias.grad is not None
        sums = world.all_reduce(torch.cat([total, weight.grad.flatten(), bias.grad]))
        loss, for_weight, for_bias = sums.split([1, weight.numel(), bias.numel()])
        weight.grad = for_weight.view_as(weight) + strength / rows * weight.detach()
        bias.grad = for_bias
        penalized: Tensor = loss[0] + strength / (2 * rows) * weight.detach().square().sum()
        return penalized

    optimizer.step(loss_and_gradient)
    return bool(optimizer.state[weight]["n_iter"] < iterations)


def score(head: nn.Linear, features: Tensor) -> Tensor:
    """Compute the scores [N, C] of features [N, F] in their own precision."""
    return F.linear(features, head.weight.to(features.dtype), head.bias.to(features.dtype))


@torch.no_grad()
def measure(head: nn.Linear, data: Features, world: World, field: str) -> Accuracy:
    """Measure the accuracy on features that the processes hold."""
    return measure_accuracy(score(head, data.features), data.labels, world, field)
