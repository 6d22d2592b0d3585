"""Fixtures shared by all tests."""

import gc
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Without a GPU the kernels run in Triton's interpreter. TRITON_INTERPRET must be set before Triton is imported.
# With a GPU the kernels are compiled, and tests that need the interpreter are skipped. `make test` hides the GPU.
HAS_GPU = Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
os.environ.setdefault("TRITON_INTERPRET", "0" if HAS_GPU else "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import REPOSITORY, as_flags  # noqa: E402
from tensorboard.summary.writer import event_file_writer  # noqa: E402
from tqdm import tqdm  # noqa: E402

# Forked processes share tqdm's default lock. A test that kills such a process in the middle of a progress bar would
# leave the lock taken, and the next bar of this process would wait for ever. A lock of threads is not shared.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0

GENUINE = Path(os.environ.get("DCLR_TEST_VIDEOS", Path(__file__).parents[2] / "shared" / "data"))


# The files whose tests take longest, the longest first: more than 20 seconds for all, or for one test.
LONGEST = (
    "test_machines.py", "test_chaos.py", "test_resume.py", "test_view_generation.py", "test_extend.py",
    "test_pretrain.py", "test_entries.py", "test_models.py", "test_ranks.py", "test_views_apart.py",
    "test_bench_layers.py", "test_bench_counts.py", "test_notebook.py", "test_compile.py", "test_export.py",
    "test_resources.py", "test_signals.py", "test_bench_step.py", "test_splits.py", "test_feature_table.py",
    "test_package.py", "test_info_nce.py", "test_evaluation_ranks.py", "test_remote.py", "test_untrusted.py",
    "test_loader.py", "test_engine.py", "test_decode.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the files of LONGEST first. Of two test processes, neither waits for a long file of the other at the end."""
    ranks = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def own_manifest_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the manifests of the tests out of the user's cache. Processes that tests start inherit the setting."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def event_files_in_order() -> Iterator[None]:
    """Give TensorBoard's event files names that sort in the order of writing.

    A file name holds the second, the process id and a counter. TensorBoard sorts names as text, so "10" comes before
    "9". Only tests stop and resume a run within one second and one process, where the counter decides the order.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10**6))
        yield


@pytest.fixture(scope="session", autouse=True)
def small_sheets() -> Iterator[None]:
    """Let pictures of clips have two rows, because matplotlib takes longer for eight than most tests for the rest."""
    from dclr.evaluation import accuracy, activation_maps, background, retrieval

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "SHEET_QUERIES", 2)
        patch.setattr(accuracy, "SHEET_MISTAKES", 2)
        patch.setattr(background, "SHEET_VIDEOS", 2)
        patch.setattr(activation_maps, "SHEET_CLIPS", 2)
        yield


@pytest.fixture(scope="session", autouse=True)
def frozen_objects_stay_frozen() -> Iterator[None]:
    """Let a loader that starts workers collect only the objects that are new since the last collection.

    A loader of its own process visits all objects once, before it forks its workers. In the tests' process, which
    holds over a million objects of torch, this took 0.8 s for each of a hundred loaders.
    """
    from dclr.data import loader

    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        kept = SimpleNamespace(collect=gc.collect, freeze=gc.freeze, unfreeze=lambda: None)
        patch.setattr(loader, "gc", kept)
        yield


@pytest.fixture(scope="session", autouse=True)
def fast_interpreter() -> Iterator[None]:
    """Let Triton's interpreter patch the language once for each launch, and find the NumPy type of a type once.

    Triton patches again for every function that a kernel calls. The second time changes nothing, but the interpreter
    spends half of its time on it. Of the rest, it spends a sixth on the types: each operation builds a table of them.
    """
    from dclr.kernels import backend

    if not backend.INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patch_language, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched: set[int] = set()  # modules whose functions run with the patched language, until the end of the launch

    def patch_once(function: Callable[..., Any]) -> Any:
        if id(function.__globals__) in patched:
            return None
        patched.add(id(function.__globals__))
        return patch_language(function)

    def restore_all(scope: Any) -> None:
        patched.clear()
        restore(scope)

    find_numpy_type, numpy_types = interpreter._get_np_dtype, {}

    def numpy_type(of: Any) -> Any:
        name = of.scalar.name
        if name not in numpy_types:
            numpy_types[name] = find_numpy_type(of)
        return numpy_types[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(interpreter._LangPatchScope, "restore", restore_all)
        patch.setattr(interpreter, "_get_np_dtype", numpy_type)
        yield


@pytest.fixture(scope="session")
def genuine() -> Path:
    """Return the folder of genuine videos (UCF101, HMDB51, Kinetics, Weizmann and faulty files).

    The videos are not part of the repository. Tests that need them are skipped if the folder does not exist.
    """
    if not GENUINE.is_dir():
        pytest.skip(
            f"no genuine videos at {GENUINE}: set DCLR_TEST_VIDEOS to the folder that holds ucf101_sample, faulty, ..."
        )
    return GENUINE


@pytest.fixture(
    params=[
        pytest.param(("reference", "cpu"), id="reference"),
        pytest.param(("triton", "cpu"), id="triton"),
        pytest.param(("triton", "cuda"), id="triton_on_gpu", marks=pytest.mark.gpu),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Return the device for a test's tensors. `kernels` uses the implementation that the test's id names."""
    from dclr import kernels

    implementation, name = request.param
    if request.param == ("triton", "cpu") and not kernels.backend.INTERPRETED:
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    kernels.set_backend(implementation)
    yield torch.device(name)
    kernels.set_backend("auto")


@pytest.fixture(scope="session")
def one_process() -> torch.device:
    """Start DeepSpeed in this process as a run of one rank, and return the device.

    All tests share this rank, because DeepSpeed cannot start twice in one process.
    """
    from dclr.training.engine import start_processes, stop_processes

    device = start_processes()
    # Networks this small gain nothing from a second thread. A thread that waits for a busy core makes a step
    # 10 times as slow.
    torch.set_num_threads(1)
    yield device
    stop_processes()


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    """Return the environment without a launcher's variables, so that a child process starts a run of its own."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launched}


@pytest.fixture(scope="session")
def demo_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Render a small set of demo videos: 8 classes, each with 2 training videos and 1 test video. Return the folder."""
    from dclr.data.demo import render_demo

    folder = tmp_path_factory.mktemp("demo") / "videos"
    return render_demo(folder, train_per_class=2, test_per_class=1, progress=False)


@pytest.fixture(scope="session")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write ds_configs/zero1.json without autocast, so that results do not depend on the CPU's bfloat16."""
    config = json.loads((REPOSITORY / "ds_configs" / "zero1.json").read_text())
    config["torch_autocast"]["enabled"] = False
    path = tmp_path_factory.mktemp("ds_configs") / "float32.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def tiny(demo_videos: Path, float32: Path) -> dict[str, Any]:
    """Return settings that every command has, for runs of about one second: 4 steps per epoch."""
    return {
        "data": str(demo_videos),
        "ds_config": str(float32),
        "width": 4,
        "clip_length": 8,
        "crop_size": 32,
        "batch_size": 4,
        "epochs": 2,
        "workers": 0,
        "log_every": 1,
    }


@pytest.fixture
def tiny_pretrain(tiny: dict[str, Any]) -> dict[str, Any]:
    """Return `tiny` with pretraining settings. The queue is full after 5 steps of 8, and mining starts then."""
    return {**tiny, "queue_length": 18, "embedding_dim": 32, "mined_positives": 2, "fill_steps": 1, "key_momentum": 0.9}


@pytest.fixture
def train_main(one_process: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that runs `train.py COMMAND` in this process, with flags as keyword arguments.

    The value True stands for a flag without a value.
    """
    from dclr.commands import train

    monkeypatch.setattr("dclr.training.engine.start_processes", lambda: one_process)
    monkeypatch.setattr("dclr.training.engine.stop_processes", lambda: None)

    def run(*command: str, **flags: Any) -> None:
        train.main([*command, *as_flags(flags)])

    return run
