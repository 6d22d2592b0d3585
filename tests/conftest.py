"""Fixtures shared by all tests."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Without a GPU the kernels run in Triton's interpreter, which must be asked for before Triton is imported. Where there is one, they are
# compiled, and the tests that need the interpreter are skipped (`make test` hides the GPU from them).
HAS_GPU = Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
os.environ.setdefault("TRITON_INTERPRET", "0" if HAS_GPU else "1")

import pytest  # noqa: E402
import torch  # noqa: E402
from helpers import REPOSITORY, as_flags  # noqa: E402
from tensorboard.summary.writer import event_file_writer  # noqa: E402

GENUINE = Path(os.environ.get("DCLR_TEST_VIDEOS", Path(__file__).parents[2] / "shared" / "data"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session", autouse=True)
def own_manifest_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Verified videos of the tests stay out of the user's cache; processes that tests start inherit this."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def parts_of_a_run_in_order() -> Iterator[None]:
    """TensorBoard reads a run's files by name: second, process, how many it had made; so of one second "10" comes before "9".

    What a stopped and resumed run has written in the same second and process, as only tests do, would be taken in the wrong order.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(10**6))
        yield


@pytest.fixture(scope="session")
def genuine() -> Path:
    """The folder of genuine videos (UCF101, HMDB51, Kinetics, Weizmann and faulty files); they are not part of the repository."""
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
    """Where a test's tensors belong; functions of `kernels` run there by the implementation that the test's id names."""
    import kernels

    implementation, name = request.param
    if request.param == ("triton", "cpu") and not kernels.backend.INTERPRETED:
        pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1")
    kernels.set_backend(implementation)
    yield torch.device(name)
    kernels.set_backend("auto")


@pytest.fixture(scope="session")
def one_process() -> torch.device:
    """This process as a run of one rank, under DeepSpeed. For all tests together: DeepSpeed cannot start twice in a process."""
    from dclr.training.engine import start_processes, stop_processes

    device = start_processes()
    # Networks this small gain nothing from a second thread, and threads that wait for a core other work holds cost 10 times as much.
    torch.set_num_threads(1)
    yield device
    stop_processes()


@pytest.fixture(scope="session")
def clean_environment() -> dict[str, str]:
    """For processes that tests start: runs of their own, whatever this one has become."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in launched}


@pytest.fixture(scope="session")
def demo_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small rendering of the demo videos: 8 classes, 2 training videos and 1 test video of each."""
    from dclr.data.demo import render_demo

    folder = tmp_path_factory.mktemp("demo") / "videos"
    return render_demo(folder, train_per_class=2, test_per_class=1, progress=False)


@pytest.fixture(scope="session")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ds_configs/zero1.json without autocast, so that results do not depend on the CPU's bfloat16."""
    config = json.loads((REPOSITORY / "ds_configs" / "zero1.json").read_text())
    config["torch_autocast"]["enabled"] = False
    path = tmp_path_factory.mktemp("ds_configs") / "float32.json"
    path.write_text(json.dumps(config))
    return path


@pytest.fixture
def tiny(demo_videos: Path, float32: Path) -> dict[str, Any]:
    """Settings every command knows, for runs of a second: 4 steps an epoch."""
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
    """`tiny` with a queue that is full, and mined from then on, after five steps: one into the second epoch of two."""
    return {**tiny, "queue_length": 18, "embedding_dim": 32, "mined_positives": 2, "fill_steps": 1, "key_momentum": 0.9}


@pytest.fixture
def train_main(one_process: torch.device, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`train.py COMMAND`, in this process: flags as keyword arguments (True: a flag without a value)."""
    import train

    monkeypatch.setattr("dclr.training.engine.start_processes", lambda: one_process)
    monkeypatch.setattr("dclr.training.engine.stop_processes", lambda: None)

    def run(*command: str, **flags: Any) -> None:
        train.main([*command, *as_flags(flags)])

    return run
