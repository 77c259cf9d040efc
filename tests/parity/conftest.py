"""One rank's process groups, for every module that compares networks."""

from __future__ import annotations

import pytest
import torch

from nemo_kto import launch


@pytest.fixture(scope="module")
def groups():
    torch.set_num_threads(1)
    yield launch.start(1, 1)
    launch.shutdown()
