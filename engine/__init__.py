"""The training engine: networks, augmentation, optimizers and the training loop.

The names below can be imported from here, for recipes and notebooks. They are looked up when they
are first used, so `import engine` does no work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.data import open_data as open_data
    from engine.evaluation.during_training import ProbeConfig as ProbeConfig
    from engine.log.metrics import LogConfig as LogConfig
    from engine.method.adamw import AdamWConfig as AdamWConfig
    from engine.method.average import AverageConfig as AverageConfig
    from engine.method.byol import BYOLConfig as BYOLConfig
    from engine.method.clipping import ClipConfig as ClipConfig
    from engine.method.lars import LARSConfig as LARSConfig
    from engine.method.resnet import ResNetConfig as ResNetConfig
    from engine.method.schedule import ScheduleConfig as ScheduleConfig
    from engine.method.sgd import SGDConfig as SGDConfig
    from engine.method.torch_optimizer import TorchOptimizerConfig as TorchOptimizerConfig
    from engine.method.torchvision_encoder import TorchvisionConfig as TorchvisionConfig
    from engine.notebook import Session as Session
    from engine.notebook import open_session as open_session
    from engine.processes.parallel import ParallelConfig as ParallelConfig
    from engine.recipe import Recipe as Recipe
    from engine.recorded import load_recipe as load_recipe
    from engine.state.checkpoint import CheckpointConfig as CheckpointConfig
    from engine.state.early_stop import EarlyStopConfig as EarlyStopConfig
    from engine.trainer import Trainer as Trainer
    from shards.errors import InputError as InputError
    from shards.loader import DataConfig as DataConfig
    from shards.order import BatchConfig as BatchConfig
    from shards.views import ViewConfig as ViewConfig
    from shards.views import ViewsConfig as ViewsConfig

_PLACES = {
    "AdamWConfig": "engine.method.adamw",
    "AverageConfig": "engine.method.average",
    "BYOLConfig": "engine.method.byol",
    "BatchConfig": "shards.order",
    "CheckpointConfig": "engine.state.checkpoint",
    "ClipConfig": "engine.method.clipping",
    "DataConfig": "shards.loader",
    "EarlyStopConfig": "engine.state.early_stop",
    "InputError": "shards.errors",
    "LARSConfig": "engine.method.lars",
    "LogConfig": "engine.log.metrics",
    "ParallelConfig": "engine.processes.parallel",
    "ProbeConfig": "engine.evaluation.during_training",
    "Recipe": "engine.recipe",
    "ResNetConfig": "engine.method.resnet",
    "SGDConfig": "engine.method.sgd",
    "ScheduleConfig": "engine.method.schedule",
    "Session": "engine.notebook",
    "TorchOptimizerConfig": "engine.method.torch_optimizer",
    "TorchvisionConfig": "engine.method.torchvision_encoder",
    "Trainer": "engine.trainer",
    "ViewConfig": "shards.views",
    "ViewsConfig": "shards.views",
    "load_recipe": "engine.recorded",
    "open_data": "engine.data",
    "open_session": "engine.notebook",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(_PLACES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
