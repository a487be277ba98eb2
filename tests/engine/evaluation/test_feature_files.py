"""Files of features as they are written, without a network."""

from pathlib import Path

import numpy as np
import pytest

from engine.evaluation.feature_files import Header, Part, Rows, write_features
from tests.engine.evaluation.test_feature_extraction import npz


@pytest.mark.parametrize("classes", [[], ["a", "bb"]])
def test_the_file_names_the_classes_where_there_are_none_too(
    tmp_path: Path, classes: list[str]
) -> None:
    features = np.zeros((1, 3), np.float32)
    part = Part(Rows([0], [-1], ["x"]), lambda: features)
    header = Header((3,), features.dtype, classes)
    write_features(f"{tmp_path}/out.npz", "npz", header, [part])
    found = npz(f"{tmp_path}/out.npz")
    assert found["classes"].tolist() == classes
    assert found["classes"].dtype.kind == "U"
