"""Say which field is meant by an option of another name, such as --lr or --epochs."""

import difflib
import re
from dataclasses import fields
from typing import NamedTuple

from engine.method.encoders import ENCODERS
from engine.recipe import Recipe, optimizers
from launch.optimizer_hints import explain_option
from shards.fields import flatten


class Meant(NamedTuple):
    """What is meant by a name that other programs have."""

    fields: list[str]  # the fields that do the same here
    text: str = ""  # what is to be known about them
    both: bool = False  # Propose all of them, and not only the first one that the recipe has.


# By names of other programs.
FIELDS: dict[str, Meant] = {
    "lr base-lr learning-rate base-learning-rate blr optimizer.lr": Meant(
        ["schedule.base-lr"],
        "it is the peak at batch size 256, and goes in proportion to the batch",
    ),
    "epoch max-epochs num-epochs n-epochs total-epochs": Meant(["schedule.epochs"]),
    "max-steps num-steps iterations iters max-iters": Meant(
        ["steps"],
        "it stops this process, and --schedule.epochs is the length of the schedule",
    ),
    "batch batch-size bs batchsize global-batch-size train-batch-size b": Meant(
        ["batch.size"],
        "it counts the images of all processes together",
    ),
    "accumulate accumulation accumulate-grad-batches gradient-accumulation-steps "
    "micro-batch": Meant(
        ["batch.micro"],
        "it is the number of parts of a batch",
    ),
    "init init-from pretrained weights load load-from load-weights start start-from "
    "finetune": Meant(
        ["model.start"],
        "it is the URL of the weights that training starts from",
    ),
    "branch fork": Meant(["checkpoint.branch"]),
    "initialization weight-init weight-initialization init-method": Meant(
        ["model.initialization"],
        "it is official, xavier_uniform, kaiming_normal and so on",
    ),
    "zero-init zero-init-residual zero-init-last last-gamma": Meant(
        ["model.last-gamma"],
        "it is zero, as in the official code, or one",
    ),
    "polyak polyak-ema model-ema swa average": Meant(
        ["average.rate"],
        "--network average evaluates and exports it; the target's own rate is --schedule.base-tau",
    ),
    "patience early-stopping early-stop stop-early": Meant(
        ["early-stop.key", "early-stop.patience"],
        "the first names a figure of the log, and the second counts its measurements",
        both=True,
    ),
    "visdom visdom-url visdom-port visdom-server": Meant(
        ["log.visdom"],
        "it is a URL with the port, such as http://localhost:8097",
    ),
    "wandb wandb-project wandb-entity": Meant(["log.wandb"]),
    "dali gpu-decode decode-gpu": Meant(["data.decode"], "it is cpu or gpu"),
    "checkpoint ckpt checkpoint-path ckpt-path resume-path": Meant(
        ["checkpoint.resume"],
        "it starts a new run from another run's state, and the same command continues a run",
    ),
    "workers workers-per-replica num-workers n-workers data-workers j jobs num-threads": Meant(
        ["threads"],
        "threads of each process do what worker processes do elsewhere",
    ),
    "wd weight-decay decay": Meant(["optimizer.weight-decay"]),
    "beta betas beta1 beta2": Meant(["optimizer.betas"]),
    "nesterov": Meant(["optimizer.nesterov", "optimizer.options"]),
    "clip": Meant(
        ["clip.value", "clip.norm"],
        "the first bounds each element of the gradient, the second all of it together",
        both=True,
    ),
    "clip-grad grad-clip clip-grad-norm max-grad-norm gradient-clip-val max-norm": Meant(
        ["clip.norm"],
        "it bounds the gradient of all parameters together",
    ),
    "clip-grad-value gradient-clip-value": Meant(["clip.value"]),
    "scheduler lr-update-schedule lr-scheduler lr-schedule lr-policy": Meant(
        ["schedule.lr-decay"],
        "it is cosine or none",
    ),
    "arch architecture depth backbone encoder network net model.backbone.type": Meant(
        ["model.encoder.depth", "model.encoder.name"],
    ),
    "width width-multiplier": Meant(["model.encoder.width"]),
    "proj-dim projection-dim projection-size out-dim output-dim dim": Meant(["model.projection"]),
    "hidden-dim head-latent-size hidden-size mlp-dim projection-hidden-size": Meant(
        ["model.hidden"],
    ),
    "output out output-dir out-dir log-dir logdir run-dir save-dir exp-dir rundir dir name "
    "uid model-dir time-stamp ckpt-prefix": Meant(
        ["run-url"],
        "it is the URL of the run's directory",
    ),
    "data dataset data-dir data-path root train train-dir train-list image-dir images": Meant(
        ["data.train"],
        "it is a folder of shards, which launch/pack.py writes",
    ),
    "val val-dir val-list valid validation test eval-data val-data": Meant(["data.val"]),
    "amp fp16 half bf16 mixed-precision dtype fp32 autocast opt-level": Meant(
        ["precision"],
        "it is fp32, bf16 or fp16",
    ),
    "image-size image-size-override img-size imsize crop-size resolution input-size size-crops "
    "resize-size": Meant(
        ["views.size"],
    ),
    "crop crop-scale min-scale scale": Meant(["views.area"]),
    "tau base-decay base-momentum ema ema-decay ema-momentum momentum moving-average-decay m "
    "target-decay": Meant(
        ["schedule.base-tau"],
        "it is the target's averaging rate, and that of the optimizer is --optimizer.momentum",
    ),
    "warmup warmup-epochs warm-up warmup-steps warmup-iters": Meant(
        ["schedule.warmup"],
        "it takes steps, such as 300, or epochs, such as '10 epochs'",
    ),
    "schedule.warmup-epochs": Meant(
        ["schedule.warmup"],
        "it takes epochs with their unit, such as '10 epochs', because a bare number counts steps",
    ),
    "eval-every eval-interval eval-freq val-every evaluate-every": Meant(["probe.every"]),
    "save-every save-interval save-freq save-epoch checkpoint-every": Meant(
        ["checkpoint.every"],
        "it takes steps, such as 500, or epochs, such as '1 epoch'",
    ),
    "log-every log-interval print-freq log-freq log-step": Meant(["log.every"]),
    "knn knn-k k": Meant(["probe.neighbours"]),
    "random-seed manual-seed": Meant(["seed"]),
    "strategy ddp fsdp distributed": Meant(["parallel.strategy"], "it is auto, ddp, fsdp or hsdp"),
    "debug dry-run fast-dev-run": Meant(["debug-step"]),
}

# What is no field at all.
ADVICE: dict[str, str] = {
    "resume auto-resume continue resume-from restart": (
        "the same command continues its run by itself; --checkpoint.resume URL starts a new run "
        "from another run's state, and --checkpoint.branch URL one with other fields"
    ),
    "num-replicas distributed-master distributed-rank distributed-port "
    "gpus gpu num-gpus ngpu devices device world-size nproc nproc-per-node local-rank nodes": (
        "torchrun starts one process for each GPU: torchrun --nproc-per-node=N launch/train.py "
        "RECIPE"
    ),
    "task download": (
        "launch/pack.py packs a folder of images once, and nothing is downloaded; --data.train is "
        "what it wrote, and --data.decode is cpu or gpu"
    ),
    "representation-size input-dim": "each network says how many features it has",
    "model.projection.type model.predictor.type": "projector and predictor are the paper's MLPs",
    "endpoint ckpt-endpoint key-id secret-id": (
        "endpoints and keys come from the environment of the storage library"
    ),
    "bucket": (
        "a bucket is part of a URL: --data.train s3://BUCKET/train --run-url s3://BUCKET/runs/first"
    ),
    "use-local-dataloader": "the URL in --data.train says whether data is local or in a bucket",
    "val-batch-size": "evaluations choose the size of their batches, which changes no result",
    "dual-views": "an image always gives two views, of one decode",
    "num-examples": "index.json has the number of images, and --schedule.epochs counts passes",
    "exclude-bias-and-bn": "biases and norms never have weight decay or LARS's adaptation",
    "stage": (
        "launch/train.py trains, and launch/evaluate.py measures: by finetune, linear, knn and more"
    ),
    "load-and-convert": "launch/export.py reads checkpoints of others, and writes TorchScript",
    "convert-to-sync-bn sync-bn": "norms always share statistics over all processes",
    "no-cuda cpu": "CUDA_VISIBLE_DEVICES= before the command hides the GPUs of a machine",
    "color-jitter-strength": (
        "--views.view1.brightness, --views.view1.contrast, --views.view1.saturation and "
        "--views.view1.hue set it, and those of view2; recipes/simclr_views.py sets all by one "
        "strength"
    ),
    "window window-percentiles data.window data.window-percentiles max-side data.max-side": (
        "the packing does that, once for all runs: python launch/pack.py IMAGES OUT with its "
        "--window, --window-percentiles or --max-side"
    ),
    "config cfg recipe": "the recipe is the first argument, without an option's name",
}


def hint(option: str, recipe: Recipe) -> str:
    """Return what an unknown option may have meant, as half a sentence.

    Args:
        option: The option without its dashes.
    """
    name = option.lower().replace("_", "-")
    if negated := _negate(name, recipe):
        return f"did you mean --{negated}?"
    known = [field.replace("_", "-") for field in flatten(recipe)] + ["run-url"]
    if name in _encoder_fields() - set(known) | {"model.encoder"}:
        return (
            f"the encoder of this recipe is {recipe.model.encoder.describe()}; a recipe file sets "
            "ResNetConfig or TorchvisionConfig, which is any network of torchvision"
        )
    if name in ("optimizer", "optim", "optimiser", "opt"):
        others = " or ".join(kind.__name__ for kind in optimizers())
        return (
            f"the optimizer of this recipe is {type(recipe.optimizer).__name__}; a recipe file "
            f"sets it, by optimizer={others}"
        )
    if advice := explain_option(name, recipe) if name not in known else "":
        return advice
    leaf = name.rpartition(".")[2]
    if found := _look_up(name, recipe, known) or _look_up(leaf, recipe, known):
        return found
    leaves = [field for field in known if field.rpartition(".")[2] == leaf]
    near = (
        difflib.get_close_matches(name, known, n=1, cutoff=0.85)
        or leaves[:4]
        or difflib.get_close_matches(name, known, n=1)
    )
    if not near:
        return "--help lists the fields"
    return f"did you mean {' or '.join(f'--{one}' for one in near)}?"


def _look_up(name: str, recipe: Recipe, known: list[str]) -> str:
    """Return what the tables say about a name; "" when they do not have it."""
    for names, text in ADVICE.items():
        if name in names.split():
            return text
    for names, meant in FIELDS.items():
        if name not in names.split():
            continue
        there = [field for field in meant.fields if field in known]
        if not there:
            return next(filter(None, (explain_option(one, recipe) for one in meant.fields)), "")
        proposed = " or ".join(f"--{one}" for one in (there if meant.both else there[:1]))
        return f"did you mean {proposed}?" + f" ({meant.text})" * bool(meant.text)
    return ""


def _negate(name: str, recipe: Recipe) -> str:
    """Return how the field is switched off that `name` negates in another place; "" for none.

    The no- stands before the last part of a field's name, as in --probe.no-baseline.
    """
    wanted = re.sub(r"(^|\.)no-", r"\1", name, count=1)
    if wanted == name:
        return ""
    switches = [k.replace("_", "-") for k, v in flatten(recipe).items() if isinstance(v, bool)]
    found = [one for one in switches if wanted in (one, one.rpartition(".")[2])]
    if len(found) != 1:
        return ""
    group, dot, leaf = found[0].rpartition(".")
    return f"{group}{dot}no-{leaf}"


def _encoder_fields() -> set[str]:
    """Return the options of the fields that an encoder of some kind has."""
    names = {entry.name for kind in ENCODERS.values() for entry in fields(kind)}
    return {f"model.encoder.{name.replace('_', '-')}" for name in names}
