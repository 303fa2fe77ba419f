"""What the tests share: one thread, a cache of their own, and a small demo set."""

import os
from pathlib import Path

import pytest
import torch

from cplib.apps.demo import make_demo

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory):
    """Keep caches in a temporary folder, and what the user has set out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPLIB_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TORCH_HOME", str(tmp_path_factory.mktemp("hub")))
        patch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
        for name in [n for n in os.environ if n == "MVTEC_ROOT" or n.startswith("CPLIB_")]:
            if name not in ("CPLIB_CACHE", "CPLIB_SCREENSHOTS"):
                patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """The demo set, 64 pixels: 8 images to train on, 4 good and 6 anomalous ones to test on."""
    folder = tmp_path_factory.mktemp("data") / "demo"
    return make_demo(folder, train=8, good=4, defective=6, size=64)
