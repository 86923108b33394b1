"""The process for each architecture by name: load pretrained → remove the classifier → extract → normalize → model.

Only EfficientNetLite0 and, at most, MobileNet have published weights; the others a file like them or seeded ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

import nbfeat
from tests.backbones.test_alexnet_googlenet import googlenets
from tests.backbones.test_weights import drawn
from tests.backbones.torch_files import checkpoint

# The layers to cut at, with their numbers of features.
LAYERS = {
    "AlexNet": {"pool2": 192, "fc6": 4096},
    "VGG16": {"block3_pool": 256, "block5_pool": 512},
    "ResNet50": {"conv3_block4_out": 512, "conv5_block3_out": 2048},
    "InceptionV3": {"mixed2": 288, "mixed10": 2048},
    "GoogLeNet": {"inception_3b": 480, "inception_5b": 1024},
    "MobileNet": {"conv_pw_6_relu": 128, "conv_pw_13_relu": 256},
    "EfficientNetLite0": {"block4c_add": 80, "block6d_add": 192},
}


def words(name: str, folder: Path, keras_home: Path) -> str:
    """Return the backbone with the options for its weights."""
    if name == "GoogLeNet":
        file = folder / "googlenet.pth"
        file.write_bytes(checkpoint(drawn(googlenets())))
        return f"{name} --weights {file}"
    if name == "EfficientNetLite0":
        return name
    if name == "MobileNet":
        there = (keras_home / "models" / "mobilenet_2_5_224_tf_no_top.h5").exists()
        return f"{name} --alpha 0.25 --weights {'imagenet' if there else 'random'}"
    return f"{name} --size {96 if name == 'InceptionV3' else 64} --weights random"


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_from_pretrained_network_to_svm_and_random_forest(
    name: str, photos: pd.DataFrame, tmp_path: Path, keras_home: Path
) -> None:
    layers = LAYERS[name]
    early, late = layers
    backbone = words(name, tmp_path, keras_home)
    result = nbfeat.extract(
        photos,
        f"{backbone} --layer {early} --pooling max --normalize standard --prefix early",
        f"{backbone} --layer {late} --normalize l2 --prefix late",
        images="path",
        fit_on="split == 'train'",
    )
    assert {prefix: result[prefix].shape for prefix in ("early", "late")} == {
        "early": (20, layers[early]),
        "late": (20, layers[late]),
    }
    np.testing.assert_allclose(np.linalg.norm(result["late"], axis=1), 1, rtol=1e-5)
    train = photos["split"] == "train"
    varying = result["early"][train].std() > 0
    np.testing.assert_allclose(result["early"][train].loc[:, varying].std(ddof=0), 1, rtol=1e-3)
    folds = StratifiedKFold(3, shuffle=True, random_state=0)
    for model in (make_pipeline(StandardScaler(), SVC(C=10)), RandomForestClassifier(50, random_state=0)):
        score = cross_val_score(model, result.features, photos["label"], cv=folds).mean()
        assert score >= 0.7, f"{name}: four kinds of pictures are told apart in {score:.0%}"
