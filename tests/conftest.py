# SPDX-License-Identifier: Apache-2.0
"""Offline, one thread; keylayers is imported inside fixtures so that shape checks install."""

import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import settings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # third-party deprecations at import
    import torch

torch.set_num_threads(1)
settings.register_profile("keylayers", deadline=None)  # a busy machine fails no test
settings.load_profile("keylayers")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a small real model beside the repository; tests that need them skip without."""
    if not (SHARED / "models" / "english-2m").is_dir():
        pytest.skip("needs ../shared (a small pre-trained model and real data), which is not here")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a tuned checkpoint of it, an adapter for it, and data."""
    from tiny_files import write_tiny_files

    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_files(folder)
    return folder


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs.jsonl (better and worse answers) and rated.jsonl (good or bad)."""
    from tiny_files import write_preferences

    folder = tmp_path_factory.mktemp("preferences")
    write_preferences(folder)
    return folder
