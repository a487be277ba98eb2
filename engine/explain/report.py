"""--explain: print what a run will take, before anything is spent on it."""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from engine.explain import memory, plan, traffic
from engine.explain.checks import check_start
from engine.explain.known import Known, check_order, look
from engine.explain.plan import date_of
from engine.explain.sizes import LEAST, Fakes, StepCost
from engine.log.terminal import Terminal
from engine.method.resnet import ResNet
from engine.method.torchvision_encoder import TorchvisionEncoder
from engine.processes import parallel
from engine.processes.parallel import Strategy
from engine.processes.world import World
from engine.recipe import Recipe, in_steps
from engine.state.early_stop import find_doubt
from shards import allocation
from shards.loader import REMOTE_FETCHES
from shards.loader_process import loads_apart
from shards.order import Order
from shards.storage import files

MACHINE = 8  # processes of a machine, where only one process was started to explain
UNIT = 1000.0  # images a second, where no speed is known


def explain(recipe: Recipe, world: World, terminal: Terminal) -> None:
    """Print networks, batch, memory, landmarks, requests and checkpoints of a run.

    It reads the indexes of the data and the log of the run, and no sample. It writes nothing. All
    processes call it together.

    Raises InputError when the recipe cannot be run with these processes or this data, or in this
    run directory.
    """
    world.on_main(lambda: _print_tables(recipe, world, terminal))
    check_start(recipe, world, terminal)


def _print_tables(recipe: Recipe, world: World, terminal: Terminal) -> None:
    processes = recipe.explain_processes or world.size
    machine = world.local_size if world.size > 1 else MACHINE
    share = plan.share_batch(recipe, processes)
    parallel.check_groups(recipe.parallel, processes, min(machine, processes))
    known = look(recipe, processes)
    order = check_order(recipe, known)
    if known.samples is not None:
        recipe = in_steps(recipe, known.samples // recipe.batch.size)
    fakes = Fakes(recipe, known.classes)
    costs = [fakes.measure_step(share.rows[1], recompute=again) for again in (False, True)]
    tables = [
        _networks(recipe, fakes, costs[0], share),
        _batch(recipe, processes, share),
        _memory(recipe, fakes, costs, processes, machine, share),
        _landmarks(recipe, known),
        _reading(recipe, known, order, processes, share),
        _saving(recipe, known, fakes, processes),
        _doing(recipe, fakes),
    ]
    for table in filter(None, tables):
        terminal.console.print(table)
    for text in filter(None, [*known.missing, _find_doubt(recipe, known)]):
        terminal.say(text)


def _find_doubt(recipe: Recipe, known: Known) -> str:
    """Return why an early stop never comes, where the length of the run is known."""
    if known.samples is None:
        return ""
    schedule, sizes = recipe.schedule, (known.samples, recipe.batch.size)
    lengths = schedule.warmup_steps(*sizes), schedule.total_steps(*sizes)
    return find_doubt(recipe.early_stop, *lengths, recipe.log.every, recipe.probe.every)


def _table(title: str, *columns: str) -> Table:
    style: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False, "show_edge": False}
    style |= {"title_justify": "left", "title_style": "bold", "caption_justify": "left"}
    table = Table(title=f"\n{title}", show_header=bool(columns), **style)
    for number, name in enumerate(columns or ("", "")):
        table.add_column(name, justify="left" if number == 0 or not columns else "right")
    return table


def _networks(recipe: Recipe, fakes: Fakes, cost: StepCost, share: plan.Share) -> Table:
    encoder = fakes.online.encoder
    table = _table(f"Networks: {recipe.model.encoder.describe()}", "part", "parameters")
    for name, number in fakes.parts().items():
        table.add_row(name, f"{number:,}")
    table.add_row("an image's features", f"{encoder.feature_dim:,} numbers")
    if isinstance(encoder, TorchvisionEncoder):
        for name, text in encoder.facts().items():
            table.add_row(name, text)
    operations = cost.operations / max(share.rows[1], LEAST) / 1e9
    table.add_row("a step, for each image (both views)", f"{operations:,.2f} GFLOP")
    return table


def _batch(recipe: Recipe, processes: int, share: plan.Share) -> Table:
    table = _table(f"Batch: {recipe.batch.size:,} images on {_processes(processes)}")
    table.add_row("images of a process", _range(share.images))
    table.add_row("its streams", f"{_range(share.streams)} of {recipe.data.streams}")
    table.add_row("micro-batches, one after the other", f"{recipe.batch.micro}")
    table.add_row("images of a process in a micro-batch", _range(share.rows))
    table.add_row("images that share norm statistics", f"{share.norm_rows:,} for each view")
    return table


def _memory(
    recipe: Recipe,
    fakes: Fakes,
    costs: list[StepCost],
    processes: int,
    machine: int,
    share: plan.Share,
) -> Table:
    """Compare the strategies by what a process needs on its device."""
    options = memory.strategies(processes, recipe.parallel.shard or machine)
    columns = [_name_column(name, size) for name, size in options.items()]
    table = _table("Memory of a process on its device, GiB, in eager mode", "", *columns)
    held = [memory.hold(fakes, size) for size in options.values()]
    for name, part in (
        ("parameters", "parameters"),
        ("gradients", "gradients"),
        ("optimizer", "optimizer"),
        ("target network", "target"),
        *[("average of the encoder", "average")] * (recipe.average.rate > 0),
        ("gathered for a moment, about", "gathered"),
        ("made for a moment by the optimizer", "update"),
    ):
        table.add_row(name, *(_gib(getattr(one, part)) for one in held))
    views = 2 * share.images[1] * 3 * recipe.views.size**2
    apart = loads_apart(recipe.data, recipe.data.train, cuda=True)
    plain, again = costs
    table.add_row("a step's other tensors, at the peak", *(_gib(plain.peak) for _ in held))
    table.add_row("the same with --parallel.recompute", *(_gib(again.peak) for _ in held))
    table.add_section()
    for name, cost in (("all together", plain), ("with --parallel.recompute", again)):
        table.add_row(name, *(_gib(memory.need(one, cost, views)) for one in held))
    table.caption = (
        "On a GPU, CUDA, its libraries and fragments of memory come on top (1 to 2 GiB). "
        "torch.compile keeps less.\n"
        + "One process with --cuda-graph needs a step's other tensors twice.\n" * recipe.cuda_graph
        + _explain_groups(options)
        + f"On the host, {_gib(memory.host_views(views, apart))} GiB of views wait for each "
        f"process, and {_gib(fakes.checkpoint)} GiB of a checkpoint are shared out.\n"
        + ("One or two processes that load its images take about 0.5 GiB each.\n" if apart else "")
        + "--parallel.strategy auto takes ddp where a device has more than "
        f"{_gib(2 * held[0].state)} GiB."
    )
    return table


def _name_column(strategy: Strategy, group: int) -> str:
    if strategy == "none":
        return "one process"
    return f"{strategy} ({group} to a group)" if group > 1 else strategy


def _explain_groups(groups: dict[Strategy, int]) -> str:
    """Return the line that says what a group is, or nothing where there is none."""
    if max(groups.values()) == 1:
        return ""
    line = "The processes of a group share out parameters, gradients, optimizer and target network"
    if "hsdp" in groups:
        line += ";\nhsdp has several such groups, usually one for each machine"
    return f"{line}.\n"


def _landmarks(recipe: Recipe, known: Known) -> Table | None:
    if known.samples is None:
        return None
    batch, schedule = recipe.batch.size, recipe.schedule
    total, each = schedule.total_steps(known.samples, batch), known.samples // batch
    title = f"Schedule: {schedule.epochs:g} epochs of {known.samples:,} images, {total:,} steps"
    table = _table(title, "landmark", "step", "epoch", "learning rate", "tau", "date (UTC)")
    for mark in plan.find_landmarks(recipe, known.samples, known.at):
        date = "passed" if mark.step < known.at else "now"
        if mark.step > known.at:
            left = (mark.step - known.at) * batch
            date = date_of(left / known.speed.images) if known.speed else "?"
        epoch = f"{mark.step * batch / known.samples:,.2f}"
        table.add_row(mark.name, f"{mark.step:,}", epoch, f"{mark.lr:.4g}", f"{mark.tau:.6f}", date)
    evaluations, logged = (
        plan.count_due(plan.cadence(every), total) if every else 0
        for every in (recipe.probe.every, recipe.log.every)
    )
    table.caption = (
        f"steps an epoch: {each:,}; logged steps: about {logged:,}; evaluations: {evaluations:,}, "
        "whose time is not counted"
    )
    if known.speed:
        images, source = known.speed
        table.caption += f"\nat {images:,.1f} images a second of all processes ({source})"
    return table


def _reading(
    recipe: Recipe, known: Known, order: Order | None, processes: int, share: plan.Share
) -> Table | None:
    index = known.train
    if index is None or order is None:
        return None
    epoch, speed = traffic.read_epoch(recipe, order), known.speed
    about = "up to " if epoch.exact else "about "
    table = _table("Reading data.train, by all processes together", "", "an epoch", "a second")
    rate = speed.images if speed else UNIT
    remote = not files.is_local(index.folder)  # A disk is not asked by requests.

    def add(name: str, requests: float, size: float) -> None:
        seconds = epoch.images / rate
        gets = f"{requests:,.0f} GETs, ", f"{requests / seconds:,.2f} GETs, "
        first, second = gets if remote else ("", "")
        table.add_row(name, f"{about}{first}{_gb(size)}", f"{second}{_gb(size / seconds)}")

    add("without a cache" if remote else "from the disk", epoch.requests, epoch.bytes)
    if epoch.kept_requests:
        left = epoch.requests - epoch.kept_requests
        add("with data.cache, once it is full", left, epoch.bytes - epoch.kept_bytes)
    fetches = min(REMOTE_FETCHES, share.streams[1] * (1 + recipe.data.prefetch))
    under_way = f" Each process has up to {fetches} requests under way." * remote
    cores = rate / traffic.DECODED
    takes = "takes" if recipe.data.decode == "cpu" else "by the CPU would take"
    table.caption = (
        ("" if speed else f"A second is the time of {UNIT:,.0f} images of all processes.\n")
        + f"The data set has {_gb(sum(shard.bytes for shard in index.shards))} in "
        f"{len(index.shards):,} {'shard' if len(index.shards) == 1 else 'shards'}.{under_way}\n"
        + (_explain_streams(epoch, order.streams) if remote else "")
        + f"Decoding {takes} about {cores:,.1f} cores, {cores / processes:,.1f} for each process, "
        f"at {traffic.DECODED:g} images a second of a core.\nThat was measured with ImageNet's "
        "JPEGs at 224 pixels (recipes/README.md); measure yours with launch/bench.py input."
    )
    return table


def _explain_streams(epoch: traffic.Reading, streams: int) -> str:
    """Return the line that says why there are more requests than blocks, where there are."""
    if epoch.requests <= epoch.blocks:
        return ""
    number = "1 block" if epoch.blocks == 1 else f"{epoch.blocks:,} blocks"
    return (
        f"It is {number}, and each of the {streams} streams (data.streams) fetches those that it "
        "needs by itself:\na block that several streams need counts once for each of them.\n"
    )


def _saving(recipe: Recipe, known: Known, fakes: Fakes, processes: int) -> Table:
    table = _table("Checkpoints")
    size = fakes.checkpoint
    table.add_row("one of them", f"{_gb(size)}, in up to {processes + 2:,} files")
    if known.samples is not None:
        total = recipe.schedule.total_steps(known.samples, recipe.batch.size)
        saving = traffic.save_run(recipe, total)
        table.add_row(
            "written until the end", f"{saving.written:,}, {_gb(saving.written * size)} together"
        )
        table.add_row("of them stay", f"{saving.kept:,}, {_gb(saving.kept * size)} together")
    if recipe.checkpoint.keep_best:
        table.add_row("and", f"the best one by {recipe.checkpoint.keep_best}")
    every = float(plan.cadence(recipe.checkpoint.every))
    if known.speed and every:
        year = plan.YEAR * known.speed.images / recipe.batch.size / every
        table.add_row(
            "a year of training at this pace would write",
            f"{year:,.0f}, {_gb(year * size)} together",
        )
        seconds = every * recipe.batch.size / known.speed.images
        table.add_row("from one to the next", f"{seconds / 60:,.1f} minutes")
    return table


def _doing(recipe: Recipe, fakes: Fakes) -> Table:
    table = _table("What is compiled, spread and saved")
    blocks = f"{len(fakes.online.encoder.blocks())} blocks"
    stem = ", stem" if isinstance(fakes.online.encoder, ResNet) else ""
    compiled = (
        f"{blocks}{stem} and heads of both networks, the losses, the moving average and, on a GPU, "
        "the augmentation"
    )
    kept = files.redact(recipe.compile_folder) or "RUN/compile"
    table.add_row("compiled", compiled if recipe.compile else "nothing")
    if recipe.compile:
        table.add_row("kept of that", kept if recipe.compile_artefacts else "nothing")
    table.add_row(
        "memory",
        "as the environment sets glibc's allocator"
        if allocation.is_chosen_by_user()
        else "freed blocks are kept for the next step, where the C library is glibc",
    )
    table.add_row(
        "spread",
        "the batch, always; with fsdp and hsdp also parameters, gradients, optimizer and target",
    )
    table.add_row(
        "saved",
        "parameters and running statistics of both networks, "
        + "the average of the encoder, " * (recipe.average.rate > 0)
        + "the optimizer, counters of skipped steps",
    )
    table.add_row("written", f"{files.redact(recipe.run)}: checkpoints, metrics.jsonl, tensorboard")
    return table


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number:,} processes"


def _range(pair: tuple[int, int]) -> str:
    low, high = pair
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.3f}"


def _gb(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size / 1e3:,.1f} kB"
