"""Watch a training step from outside: losses of single images, gradients, the first bad tensor.

The step itself is the trainer's own. Hooks look at what passes, and change nothing.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from engine.method.augment import denormalize
from engine.method.byol import VIEWS, OnlineOutput, byol_loss
from engine.method.local_shards import foreach_norms, local, whole_norms
from engine.trainer import Trainer
from shards.loader import Batch

_MOST_NAMED = 5  # samples in a message


class Layer(NamedTuple):
    """The norms of a parameter of the online network in a step."""

    name: str
    shape: tuple[int, ...]
    gradient: float
    weight: float  # before the step
    update: float  # of the step that the optimizer made


class NotFinite(NamedTuple):
    """A tensor that is not finite, as the n-th of those that were looked at."""

    number: int
    text: str


class Watch:
    """Watch one step of a trainer while it is entered. The trainer must not be compiled.

    Afterwards `losses` and `head_losses` [B] hold those of each image, `pictures` [V, B, S, S, 3]
    what the network saw, in uint8, and `layers` the norms of each parameter. `not_finite` is the
    first tensor that is not finite, or None.
    """

    def __init__(self, trainer: Trainer, batch: Batch) -> None:
        self._trainer, self._hooks = trainer, ExitStack()
        micro = trainer.recipe.batch.micro
        self._ids = np.array_split(batch.ids, micro)
        self._labels = batch.labels.chunk(micro)
        self._part = -1  # number of the micro-batch
        self._looked = 0
        self._order: dict[str, int] = {}  # by module of the online network, when it ran
        self._before: list[Tensor] = []
        self._projection: Tensor | None = None
        self._losses: list[Tensor] = []
        self._head_losses: list[Tensor] = []
        self._pictures: list[Tensor] = []
        self._backward_at = -1  # when the module ran whose output's gradient is not finite
        self.layers: list[Layer] = []
        self.not_finite: NotFinite | None = None

    @property
    def losses(self) -> NDArray[np.float64]:
        return torch.cat(self._losses).numpy()

    @property
    def head_losses(self) -> NDArray[np.float64]:
        """Return the losses of the online head; nan where there is no label."""
        return torch.cat(self._head_losses).numpy()

    @property
    def pictures(self) -> NDArray[np.uint8]:
        return torch.cat(self._pictures, dim=1).numpy()

    def __enter__(self) -> "Watch":
        trainer = self._trainer
        self._look_at_state("before the step")
        online, target = trainer.online, trainer.target
        handles: list[Any] = [
            target.register_forward_pre_hook(self._begin),
            target.register_forward_hook(self._keep),
            online.register_forward_hook(self._compare),
            trainer.optimizer.register_step_pre_hook(self._measure),
        ]
        for prefix, network in (("online", online), ("target", target)):
            for name, module in network.named_modules():
                if name:
                    handles.append(module.register_forward_hook(partial(self._pass, prefix, name)))
        for handle in handles:
            self._hooks.callback(handle.remove)
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        self._hooks.close()
        if failure is None:
            self._measure_updates()
            self._look_at_state("after the step")

    # The forward pass -----------------------------------------------------------------------

    def _begin(self, _: nn.Module, inputs: tuple[Tensor]) -> None:
        self._part += 1
        images = inputs[0].detach()
        self._look("the augmented images", images, rows=True)
        shown = denormalize(images).nan_to_num(0).clamp(0, 1).mul(255).round().byte()
        self._pictures.append(shown.unflatten(0, (VIEWS, -1)).permute(0, 1, 3, 4, 2).cpu())

    def _pass(self, prefix: str, name: str, _: nn.Module, __: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        self._look(f"the output of {prefix}.{name}", output.detach(), rows=True)
        if prefix == "online":
            self._order.setdefault(name, len(self._order))  # a recomputed module runs twice
            if output.requires_grad:
                output.register_hook(partial(self._pass_back, name, self._order[name]))

    def _keep(self, _: nn.Module, __: Any, projection: Tensor) -> None:
        self._projection = projection

    def _compare(self, _: nn.Module, __: Any, output: OnlineOutput) -> None:
        assert self._projection is not None  # the target network ran before
        prediction, logits = output.prediction.detach(), output.logits
        losses = byol_loss(prediction, self._projection)
        self._look("the loss", losses, rows=True)
        self._losses.append(losses.double().cpu())
        labels = self._labels[self._part].to(losses.device)
        heads = torch.full_like(losses, torch.nan)
        if logits is not None:
            wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
            found = F.cross_entropy(wide, labels.clamp(min=0), reduction="none")
            heads = torch.where(labels >= 0, found.to(heads.dtype), heads)
        self._head_losses.append(heads.double().cpu())

    # The backward pass ----------------------------------------------------------------------

    def _pass_back(self, name: str, when: int, gradient: Tensor) -> None:
        found = self._look(f"the gradient at the output of online.{name}", gradient, rows=True)
        if found:
            self._backward_at = when

    @torch.no_grad()
    def _measure(self, _: Any, given: tuple[Any, ...], __: Any) -> None:
        """Take the norms of all gradients before the optimizer's step."""
        trainer, named = self._trainer, dict(self._trainer.online.named_parameters())
        parameters = list(named.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        group = trainer.parallel.shard_group
        norms = whole_norms(foreach_norms(local(gradients)), group).double().cpu()
        if trainer.guard.scale is not None:  # gradients are still multiplied by it
            norms = norms / (trainer.guard.scale.double().cpu() / trainer.world.size)
        weights = whole_norms(foreach_norms(local(parameters)), group).double().cpu()
        self._before = [part.clone() for part in local(parameters)]
        self.layers = [
            Layer(name, tuple(p.shape), gradient, weight, 0.0)
            for (name, p), gradient, weight in zip(
                named.items(), norms.tolist(), weights.tolist(), strict=True
            )
        ]
        self._name_gradient()
        divisor = given[1] if len(given) > 1 else None  # given[0] is the optimizer
        if isinstance(divisor, Tensor) and not divisor.isfinite():
            self._found("the gradients, which exceed the range of fp16 at this loss scale")
        self._looked += 1

    def _name_gradient(self) -> None:
        """Name the first parameter whose gradient is not finite, in the order of the backward pass.

        Those of the modules that ran last come first. A module's output has its gradient before
        its parameters have theirs.
        """
        bad = [layer.name for layer in self.layers if not np.isfinite(layer.gradient)]
        if not bad:
            return
        first = max(bad, key=lambda name: self._order.get(name.rpartition(".")[0], -1))
        earlier = self._order.get(first.rpartition(".")[0], -1) > self._backward_at >= 0
        if earlier:  # the tensor that was found so far came later
            self.not_finite = None
        self._found(f"the gradient of online.{first}")

    def _measure_updates(self) -> None:
        parameters = local(self._trainer.online.parameters())
        moved = torch._foreach_sub([p.detach() for p in parameters], self._before)
        norms = whole_norms(foreach_norms(list(moved)), self._trainer.parallel.shard_group)
        self.layers = [
            layer._replace(update=norm)
            for layer, norm in zip(self.layers, norms.tolist(), strict=True)
        ]

    # Looking --------------------------------------------------------------------------------

    def _look_at_state(self, when: str) -> None:
        """Look at weights, running statistics and optimizer state."""
        trainer = self._trainer
        for prefix, network in (("online", trainer.online), ("target", trainer.target)):
            tensors = [*network.named_parameters(), *network.named_buffers()]
            for name, tensor in tensors:
                if not name.endswith(("batch_mean", "batch_var")):
                    self._look(f"{prefix}.{name} {when}", *local([tensor.detach()]), rows=False)
        for name, parameter in trainer.online.named_parameters():
            for key, tensor in trainer.optimizer.state[parameter].items():
                self._look(f"the optimizer's {key} of {name} {when}", *local([tensor]), rows=False)

    def _look(self, what: str, tensor: Tensor, *, rows: bool) -> bool:
        """Note a tensor if it is the first that is not finite; return whether it is that.

        With `rows`, the tensor has a row for each image, or for each view of each.
        """
        self._looked += 1
        if self.not_finite is not None or bool(tensor.isfinite().all()):
            return False
        bad = ~tensor.isfinite()
        shape = "x".join(map(str, tensor.shape)) or "one number"
        text = f"{what} ({shape}): {int(bad.sum()):,} of {bad.numel():,} values are not finite"
        if rows:
            text += self._name_rows(bad.flatten(1).any(1) if bad.ndim > 1 else bad)
        self._found(text)
        return True

    def _found(self, text: str) -> None:
        if self.not_finite is None:
            self.not_finite = NotFinite(self._looked, text)

    def _name_rows(self, bad: Tensor) -> str:
        """Say which samples the rows belong to, unless all rows are bad."""
        if bool(bad.all()):
            return ", in all rows"
        ids = self._ids[self._part]
        rows = bad.nonzero().flatten().tolist()
        views = [f"view {row // len(ids) + 1} of " if len(bad) > len(ids) else "" for row in rows]
        names = [f"{v}sample {ids[row % len(ids)]}" for v, row in zip(views, rows, strict=True)]
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        return f", in {', '.join(names[:_MOST_NAMED])}{more}"


def first(found: Iterable[NotFinite | None]) -> NotFinite | None:
    """Return what came first of what several processes found."""
    return min((one for one in found if one is not None), default=None, key=lambda one: one.number)
