"""Run the input pipeline of one rank: plan -> fetch blocks ahead -> decode in threads -> batches.

The plan (shards/order.py) says which rows make up a batch. Nothing that runs concurrently can
change it, because threads only fill rows of buffers that were laid out before.
"""

import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Interval
from numpy.typing import NDArray
from torch import Tensor
from torchdata.nodes import BaseNode

from shards.ahead import Ahead
from shards.cache import ShardCache
from shards.corrupt import Faults, Record, decode_good
from shards.decode import Exif, PixelRules, crop_into, decode_together
from shards.decode_threads import count_useful, map_in_threads
from shards.device_crops import THREADS as DEVICE_THREADS
from shards.device_crops import DeviceCrops
from shards.dimensions import MOST_PIXELS
from shards.errors import InputError
from shards.fields import Operation, UnitInterval
from shards.order import Order
from shards.reader import BlockReader, Fetches, StreamReader
from shards.samples import Block
from shards.storage import files
from shards.views import COLUMNS, ViewsConfig, crop_box, draw_views

CHUNK = 16  # A decode thread takes up to this many samples at a time.
BATCHES_AHEAD = 2
REMOTE_FETCHES = 32  # Not more threads than this, or than decode threads, wait for an object store.


@dataclass(frozen=True)
class DataConfig:
    """The places that images come from, and how they are read."""

    train: Operation[str] = ""
    """URL of the training shards: a folder with an index.json, which launch/pack.py writes."""
    val: Operation[str] = ""
    """URL of the validation shards, which kNN and the online head are measured on. The online head
    is a linear classifier that learns along with the encoder, without changing it. By default there
    are no such shards."""
    draw: Operation[Annotated[int, Interval(ge=0, le=2**31)]] = 0
    """Draw that many images of textures to data.train, and a quarter as many to data.val, when
    there are none yet. 0 draws nothing."""
    streams: Annotated[int, Interval(ge=1, le=2**20)] = 64
    """Number of equal parts that an epoch is cut into, which are read in parallel. It must divide
    batch.size, and it is the largest possible number of processes. Another number is another order
    of images."""
    prefetch: Operation[Annotated[int, Interval(ge=0, le=1024)]] = 1
    """Blocks of about 4 MB that are fetched ahead of need for each stream that this process
    reads."""
    cache: Operation[str] = ""
    """Local folder that keeps training shards of an object store once they are fetched. Several
    processes of a machine may share it. The first use of a shard waits for the whole shard. By
    default nothing is kept."""
    cache_gb: Operation[Annotated[float, Interval(ge=0, le=1e6)]] = 50
    """Gigabytes that data.cache may hold of a data set: the first shards that fit are kept."""
    corrupt: Operation[UnitInterval] = 0.01
    """Fraction of the training images that each process may find undecodable before the run stops.
    It may always find 10."""
    max_pixels: Annotated[int, Interval(ge=1, le=2**32)] = MOST_PIXELS
    """Images whose header claims more pixels count as undecodable. They are replaced."""
    exif: Exif = "ignore"
    """Orientation in the EXIF data of images: ignore takes the pixels as they are stored, as the
    official code does, and apply turns them upright."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Who decodes the training images and cuts their crops. gpu takes a CUDA GPU for the JPEGs that
    nvJPEG knows, and the CPU for other images. Pixels differ by rounding, and by how colors of half
    the resolution are enlarged."""
    own_process: Operation[bool | None] = None
    """Load images in a process of its own, so that steps of the training do not wait for Python's
    lock. By default that is done beside a GPU, unless data.train is a memory:// URL. With
    data.decode gpu it is never done."""
    audit: Operation[bool] = False
    """Add a CRC of the decoded uint8 views to data_digest in the metrics."""

    @property
    def rules(self) -> PixelRules:
        """Return the rules by which image files become pixels."""
        return PixelRules(self.max_pixels, self.exif)


class Batch(NamedTuple):
    """One rank's rows of a global batch, in host memory, which is pinned when asked for."""

    views: Tensor  # [V, B, 3, S, S] uint8, channels last
    params: Tensor  # [V, B, P] float32, see shards.views
    ids: NDArray[np.int64]  # [B]
    labels: Tensor  # [B] int64, -1 where there is none
    crcs: NDArray[np.uint32]  # [B], zeros unless audited


class Piece(NamedTuple):
    """Consecutive rows of a batch that come from one block."""

    start: int  # the first of the rows
    block: Block
    first_id: int
    positions: list[int]  # positions in the block


class Chunk(NamedTuple):
    """The rows of a batch that a thread fills at a time."""

    batch: Batch
    rows: list[tuple[Tensor, ...]]  # [V][B] views [1, 3, S, S] of every row of batch.views
    pieces: list[Piece]
    crops: NDArray[np.float64]  # [V, B, 4] uniforms for `crop_box`, of the whole batch
    epoch: int
    last: bool  # True for the last chunk of a batch


def allocate(rows: int, views: ViewsConfig, pin_memory: bool) -> Batch:
    """Return a batch of so many rows that is still to be filled in; only the CRCs are zeros."""
    size, count = views.size, len(views.views)
    pixels = torch.empty((count, rows, size, size, 3), dtype=torch.uint8, pin_memory=pin_memory)
    params = torch.empty(count, rows, COLUMNS, pin_memory=pin_memory)
    labels = torch.empty(rows, dtype=torch.int64, pin_memory=pin_memory)
    ids, crcs = np.empty(rows, np.int64), np.zeros(rows, np.uint32)
    return Batch(pixels.permute(0, 1, 4, 2, 3), params, ids, labels, crcs)


class Assignment(NamedTuple):
    """The batches that one process makes. Whichever process makes them, they are the same."""

    order: Order
    streams: range  # of the order's streams, those that make up the process's rows
    views: ViewsConfig
    config: DataConfig
    threads: int  # that decode, at most; see `count_useful`
    micro: int = 1  # equal slices that a batch is cut into; see `TrainLoader._plan`
    start: int = 0  # the step of the first batch

    @property
    def rows(self) -> int:
        """Return the number of rows of a batch."""
        return self.order.rows * len(self.streams)

    @property
    def block_memory(self) -> int:
        """Estimate the most block bytes held at once: streams x block x (1 + prefetch).

        The block is the largest one of the first shard that has any.
        """
        index = self.order.index
        first = next(i for i, shard in enumerate(index.shards) if shard.samples)
        ranges = (index.block_range(first, block) for block in range(len(index.blocks(first))))
        largest = max(stop - start for start, stop in ranges)
        return len(self.streams) * largest * (1 + self.config.prefetch)


class TrainLoader:
    """Iterates without end over the batches of an assignment.

    Threads start at the first batch, and `close` ends them. The iteration raises InputError when
    the data is at fault.
    """

    def __init__(
        self,
        assignment: Assignment,
        report: Callable[[str], None],
        *,
        pin_memory: bool = False,
        device: torch.device | None = None,
        record: Record | None = None,
    ) -> None:
        """Build the pipeline.

        Args:
            report: Takes warnings, each of one line.
            device: The GPU that decodes, when the config says so.
            record: Takes the samples that cannot be decoded, when somebody else counts them.
        """
        self.assignment, self.pin_memory = assignment, pin_memory
        order, streams, views, config, threads, *_ = assignment
        self.order, self.views = order, views
        remote = not files.is_local(order.index.folder)
        cache = None
        if remote and config.cache:
            cache = ShardCache(order.index, config.cache, config.cache_gb, report)
        self.reader = BlockReader(order.index, cache, report, config.rules)
        self.faults = Faults(order.index.samples, config.corrupt, report)
        self._record = self.faults.record if record is None else record
        self._device_crops: DeviceCrops | None = None
        if config.decode == "gpu":
            assert device is not None
            self._device_crops = DeviceCrops(device, config.rules, views, report)
            threads = min(threads, DEVICE_THREADS)
        else:
            threads = count_useful(threads, order.index, len(views.views) * views.size**2)
        self._closed = False
        fetches = min(REMOTE_FETCHES, len(streams) * (1 + config.prefetch)) if remote else 4
        self._pool = ThreadPoolExecutor(max(fetches, threads), thread_name_prefix="fetch")
        assembled = _Assemble(map_in_threads(self._decode, self._plan(), threads))
        self._batches: Ahead[Batch | InputError] | None = Ahead(assembled, BATCHES_AHEAD)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        result = next(self._batches)
        if isinstance(result, InputError):
            raise result
        return result

    def wait(self, seconds: float) -> bool:
        """Wait until the next batch is there, or a fault. Return False when it takes longer."""
        return self._batches is None or self._batches.wait(seconds)

    def describe_wait(self) -> str:
        """Say what a long wait may come from."""
        return f"does {files.redact(self.order.index.folder)} answer?"

    def close(self) -> None:
        """End the threads and drop what they hold."""
        self._closed = True
        self._batches = None
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def undecodable(self) -> int:
        """The number of samples that could not be decoded so far."""
        return self.faults.count

    def _plan(self) -> Iterator[Chunk | InputError]:
        """Yield the chunks of every batch. A fault of the data is yielded as a value.

        Rows are laid out by micro-batch: micro-batch m holds the m-th of M equal slices of every
        stream's rows. So the rows that share norm statistics do not depend on the world size.
        """
        start, prefetch = self.assignment.start, self.assignment.config.prefetch
        try:
            fetches = Fetches(self.reader, self._pool)
            readers = {
                s: StreamReader(self.order.stream_blocks(start, s), fetches, prefetch)
                for s in self.assignment.streams
            }
            step = start
            while not self._closed:
                yield from self._plan_batch(step, readers)
                step += 1
        except InputError as error:
            yield error

    def _plan_batch(self, step: int, readers: dict[int, StreamReader]) -> Iterator[Chunk]:
        streams = self.assignment.streams
        part = self.order.rows // self.assignment.micro  # rows of one stream in one micro-batch
        pieces = []
        ids = np.empty(self.assignment.rows, np.int64)  # [B]
        for position, stream in enumerate(streams):
            used = 0
            for segment in self.order.batch_segments(step, stream):
                first_id = int(segment.ids[0] - segment.rows[0])
                positions = segment.rows.tolist()
                taken = 0
                while taken < len(positions):
                    micro, inside = divmod(used, part)
                    count = min(CHUNK, part - inside, len(positions) - taken)
                    row = (micro * len(streams) + position) * part + inside
                    block = readers[stream].get(segment.shard, segment.block)
                    ids[row : row + count] = segment.ids[taken : taken + count]
                    pieces.append(Piece(row, block, first_id, positions[taken : taken + count]))
                    taken, used = taken + count, used + count
        epoch = step // self.order.steps_per_epoch
        draws = draw_views(self.order.seed, epoch, ids, self.views)
        batch = self._allocate(ids, draws.params)
        rows = [view.split(1) for view in batch.views]  # a quarter of the time of indexing each
        groups = _group(pieces)
        for i, group in enumerate(groups):
            yield Chunk(batch, rows, group, draws.crop, epoch, i + 1 == len(groups))

    def _allocate(self, ids: NDArray[np.int64], drawn: NDArray[np.float32]) -> Batch:
        """Return a batch of the samples `ids` whose views and labels are still to be filled in."""
        batch = allocate(len(ids), self.views, self.pin_memory)
        batch.params.numpy()[...] = drawn
        return batch._replace(ids=ids)

    @torch.inference_mode()  # It makes each call of torch cheaper.
    def _decode(self, chunk: Chunk | InputError) -> Chunk | InputError:
        if isinstance(chunk, InputError):
            return chunk
        try:
            self._fill(chunk)
        except InputError as error:
            return error
        return chunk

    def _fill(self, chunk: Chunk) -> None:
        """Fill in the views, the labels and, if they are wanted, the CRCs of a chunk's rows."""
        for group in decode_together(self._decode_rows(chunk)):
            for image, (row, crops) in group:
                _, height, width = image.shape
                for rows, uniforms in zip(chunk.rows, crops, strict=True):
                    crop_into(rows[row], image, crop_box(uniforms, height, width, self.views))
        if self.assignment.config.audit:
            self._audit(chunk)

    def _decode_rows(
        self, chunk: Chunk
    ) -> Iterator[tuple[Tensor, tuple[int, NDArray[np.float64]]]]:
        """Yield the images of a chunk that the CPU has to cut, and fill in the labels of all.

        With each come its row in the batch and its uniforms for `crop_box` [V, 4].
        """
        labels = chunk.batch.labels.numpy()
        for piece in chunk.pieces:
            cut = self._cut_on_device(chunk, piece)
            for row, position in enumerate(piece.positions, piece.start):
                if row not in cut:
                    position, image, crops = self._decode_row(chunk, piece, row, position)
                    yield image, (row, crops)
                labels[row] = piece.block.label(position)

    def _cut_on_device(self, chunk: Chunk, piece: Piece) -> set[int]:
        """Cut the views of a piece's images that the GPU decodes, if any; return their rows."""
        if self._device_crops is None:
            return set()
        rows = slice(piece.start, piece.start + len(piece.positions))
        out = chunk.batch.views[:, rows]
        cut = self._device_crops.cut(piece.block, piece.positions, chunk.crops[:, rows], out)
        return {piece.start + i for i in cut}

    def _decode_row(
        self, chunk: Chunk, piece: Piece, row: int, position: int
    ) -> tuple[int, Tensor, NDArray[np.float64]]:
        """Decode an image, or its replacement; return its position, its pixels and uniforms."""
        batch, block, first_id = chunk.batch, piece.block, piece.first_id
        crops = chunk.crops[:, row]
        found, image = decode_good(self.reader, block, position, first_id, self._record)
        if found != position:  # The replacement has its own id and parameters.
            batch.ids[row] = first_id + found
            ids = batch.ids[row : row + 1]
            draws = draw_views(self.order.seed, chunk.epoch, ids, self.views)
            batch.params[:, row] = torch.from_numpy(draws.params[:, 0])
            crops = draws.crop[:, 0]
        elif self._device_crops is not None:
            self._device_crops.tell(self.reader.name_sample(block, position, first_id))
        return found, image, crops

    def _audit(self, chunk: Chunk) -> None:
        """Fill in the CRCs of a chunk's rows."""
        batch = chunk.batch
        for piece in chunk.pieces:
            for row in range(piece.start, piece.start + len(piece.positions)):
                pixels = batch.views[:, row].permute(0, 2, 3, 1).contiguous()
                batch.crcs[row] = zlib.crc32(pixels.numpy().tobytes())


def _group(pieces: list[Piece]) -> list[list[Piece]]:
    """Group pieces, in order, so that each group has at most CHUNK rows, or is one piece."""
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if len(piece.positions) > room:
            groups.append([])
            room = CHUNK
        groups[-1].append(piece)
        room -= len(piece.positions)
    return groups


class _Assemble(BaseNode[Any]):
    """Returns each batch once its last chunk has arrived in order, and faults as they come."""

    def __init__(self, source: BaseNode[Any]) -> None:
        super().__init__()
        self.source = source

    def reset(self, initial_state: dict[str, Any] | None = None) -> None:
        super().reset(initial_state)
        self.source.reset()

    def next(self) -> Batch | InputError:
        while True:
            item: Chunk | InputError = next(self.source)
            if isinstance(item, InputError):
                return item
            if item.last:
                return item.batch

    def get_state(self) -> dict[str, Any]:
        return {}  # A position is a step number, so nodes have nothing to save.
