# SPDX-License-Identifier: Apache-2.0
"""Offline, one thread; keylayers is imported inside fixtures so that shape checks install.

What many tests start from (`tiny`, `ranked`, `trained`, ...) is made once per session, also with
several workers. Tests that change it take a copy.
"""

import gc
import os
import shlex
import shutil
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from filelock import FileLock
from hypothesis import settings

import preloaded
from commands import STEPS, keylayers, rank

settings.register_profile("keylayers", deadline=None)  # a busy machine fails no test
settings.load_profile("keylayers")

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def pytest_configure(config):
    if getattr(config.option, "tx", None):  # this process only hands out tests: workers are forks
        config.option.tx = [f"popen//python={shlex.quote(preloaded.python())}"] * len(
            config.option.tx
        )
        return
    os.environ.update(preloaded.SET_BY_LIBRARIES)  # before the imports, as in the workers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party deprecations at import
        import torch

    torch.set_num_threads(1)


def pytest_collection_finish():
    """Every training of accelerate ends with a collection of garbage, over all that is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a small real model beside the repository; tests that need them skip without."""
    if not (SHARED / "models" / "english-2m").is_dir():
        pytest.skip("needs ../shared (a small pre-trained model and real data), which is not here")
    return SHARED


@pytest.fixture(scope="session")
def once(tmp_path_factory, request):
    """Make a folder once per session: `once("name", write)` calls `write(folder)` in one worker."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if hasattr(request.config, "workerinput") else root

    def folder_of(name, write):
        folder, done = root / name, root / f"{name}.done"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a test that failed halfway
                folder.mkdir()
                assert write(folder) in (None, 0)
                done.touch()
        return folder

    return folder_of


@pytest.fixture(scope="session")
def tiny(once) -> Path:
    """A folder with a tiny model, a tuned checkpoint of it, an adapter for it, and data."""
    from tiny_files import write_tiny_files

    return once("tiny", write_tiny_files)


@pytest.fixture(scope="session")
def preferences(once) -> Path:
    """A folder with pairs.jsonl (better and worse answers) and rated.jsonl (good or bad)."""
    from tiny_files import write_preferences

    return once("preferences", write_preferences)


@pytest.fixture(scope="session")
def eval_folder(tiny, once) -> Path:
    """A folder with all that the tests of `keylayers eval` measure. Not to be changed."""
    from eval_files import write_place

    return once("eval_folder", lambda folder: write_place(tiny, folder))


@pytest.fixture
def place(eval_folder, monkeypatch) -> Path:
    """The same folder as working directory."""
    monkeypatch.chdir(eval_folder)
    return eval_folder


@pytest.fixture
def said(place, tmp_path, capsys):
    """What a `keylayers eval` into `tmp_path / "out"` prints to stdout and to stderr."""

    def run(*arguments):
        capsys.readouterr()
        assert keylayers("eval", *arguments, "--output", tmp_path / "out") == 0
        return [" ".join(text.split()) for text in capsys.readouterr()]

    return run


@pytest.fixture(scope="session")
def ranked(tiny, once) -> Path:
    """A ranking with its own stage 1. Not to be changed: `ranking_copy` is for that."""
    return once("ranked", lambda folder: rank(tiny, folder))


@pytest.fixture(scope="session")
def ranked_parts(tiny, ranked, once) -> Path:
    """A ranking of rank-one parts of the adapter of another ranking's stage 1."""
    own = ("--adapter", ranked / "adapter", "--granularity", "part", "--method", "fisher-pruning")
    return once("ranked_parts", lambda folder: rank(tiny, folder, *own))


@pytest.fixture
def ranking_copy(ranked, tmp_path_factory) -> Path:
    return Path(shutil.copytree(ranked, tmp_path_factory.mktemp("copy") / "ranked"))


@pytest.fixture(scope="session")
def ranked_full(tiny, once) -> Path:
    """A ranking of two checkpoints."""
    return once("ranked_full", lambda folder: rank(tiny, folder, "--tuned", tiny / "tuned"))


@pytest.fixture(scope="session")
def trained(ranked, once) -> Path:
    """An adapter on the best three modules, with a control. Not to be changed."""
    words = ("train", "--ranking", ranked, "--budget", "3", *STEPS, "--controls", "random")
    return once("trained", lambda folder: keylayers(*words, "--output", folder))


@pytest.fixture(scope="session")
def pruned(ranked, once) -> Path:
    """The adapter of stage 1, cut to the best five modules. Not to be changed."""
    words = ("prune", "--ranking", ranked, "--budget", "5", "--output")
    return once("pruned", lambda folder: keylayers(*words, folder))
