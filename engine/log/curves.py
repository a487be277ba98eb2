"""Name a run's curves in tensorboard, and make what stands beside them: the recipe, an overview.

A curve is named after its key in metrics.jsonl. Tensorboard sorts names, so some keys have a word
in front of them, which lets the loss and kNN come first in their groups.
"""

from typing import Any

from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalar
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.util.tensor_util import make_tensor_proto

from shards.errors import printable

VIEWS = "views/batch"  # the tag of the pictures

_TAGS = {
    "loss": "train/loss",
    "loss_scale": "train/loss_scale",
    "head_loss": "train/online_head_loss",
    "feature_std": "train/spread_feature_std",
    "projection_std": "train/spread_projection_std",
    "view_correlation": "train/spread_view_correlation",
    "grad_norm": "train/update_grad_norm",
    "update_ratio": "train/update_ratio",
    "skipped": "train/skipped",
    "knn_top1": "eval/knn_top1",
    "online_top1": "eval/online_top1",
    "knn_pixels": "eval/reference_knn_pixels",
    "knn_untrained": "eval/reference_knn_untrained",
    "knn_start": "eval/reference_knn_start",
    "knn_chance": "eval/reference_knn_chance",
    "feature_rank": "eval/spread_feature_rank",
    **{key: f"schedule/{key}" for key in ("lr", "tau", "epoch")},
    **{key: f"system/{key}" for key in ("images_per_second", "images_per_second_device")},
    **{key: f"system/{key}" for key in ("data_wait", "memory_gib", "mfu")},
}

# The charts of the overview, with the curves of each.
_CHARTS = {
    "loss": ["loss"],
    "kNN accuracy": [
        "knn_top1",
        "knn_pixels",
        "knn_untrained",
        "knn_start",
        "knn_chance",
    ],
    "accuracy of the online head": ["online_top1"],
    "spread of the features and the projections: std": ["feature_std", "projection_std"],
    "spread of the features: rank": ["feature_rank"],
    "images a second": ["images_per_second"],
}


def name_curve(key: str) -> str:
    """Return the tag of a figure's curve, by the figure's key in metrics.jsonl."""
    measured = ("top1" in key, "top5" in key, key.startswith("knn_"))
    group = "eval" if any(measured) else "train"
    return _TAGS.get(key, f"{group}/{printable(key)}")


def show_fields(fields: dict[str, Any]) -> Summary.Value:
    """Make a table of a recipe's fields, as a text."""
    lines = ["| field | value |", "|-|-|"]
    lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in fields.items()]
    return text_pb("recipe", "\n".join(lines)).value[0]


def compare_fields(fields: dict[str, Any]) -> Summary.Value:
    """Make the columns by which tensorboard's tab HPARAMS compares runs."""
    plain = {
        printable(name): value if isinstance(value, bool | int | float) else printable(str(value))
        for name, value in fields.items()
    }
    return hparams_pb(plain).value[0]


def lay_out_overview() -> Summary.Value:
    """Make the charts of the tab CUSTOM SCALARS, which begin with the loss and kNN."""
    charts = [
        layout_pb2.Chart(
            title=title,
            multiline=layout_pb2.MultilineChartContent(
                tag=[f"^{name_curve(key)}$" for key in keys]
            ),
        )
        for title, keys in _CHARTS.items()
    ]
    overview = layout_pb2.Category(title="overview", chart=charts)
    return Summary.Value(
        tag=custom_scalar.CONFIG_SUMMARY_TAG,
        metadata=custom_scalar.create_summary_metadata(),
        tensor=make_tensor_proto(layout_pb2.Layout(category=[overview]).SerializeToString()),
    )


def _cell(value: Any) -> str:
    """Write a value for a cell of a table in Markdown, in which nothing of it is markup."""
    text = printable(str(value)).replace("\\", "\\\\")
    return "".join(f"\\{c}" if c in "|`*_<>[]()#!~" else c for c in text)
