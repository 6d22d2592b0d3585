"""The demo videos are real files, balanced and deterministic, and only motion tells their classes apart."""

import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dclr.config import DataConfig
from dclr.data import datasets, demo
from dclr.data.datasets import open_catalog, open_data
from dclr.data.decode import read_planes, rgb_of, verify_video
from dclr.data.demo import BACKGROUNDS, CLASSES, FRAMES, SIZE, render_demo, render_video
from dclr.errors import UserError
from dclr.lock import LOCK

TRAIN, TEST = 24, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Render the first video of each class for training and for testing."""
    return render_demo(tmp_path_factory.mktemp("demo") / "small", train_per_class=1, test_per_class=1, progress=False)


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the whole data set with empty files in place of its 256 videos."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "render_video", lambda *drawn: None)
        patch.setattr(demo, "write_video", lambda path, *rest, **named: path.touch())
        return render_demo(tmp_path_factory.mktemp("demo") / "made on the way", progress=False)


def test_the_catalog_opens_it(listed: Path) -> None:
    catalog = open_catalog(listed)
    assert catalog.layout == "list file"
    assert catalog.classes == CLASSES
    assert catalog.missing == {}
    for split, per_class in {"train": TRAIN, "test": TEST}.items():
        assert Counter(video.label for video in catalog.videos(split)) == dict.fromkeys(range(8), per_class)
    paths = [video.path for split in catalog.splits.values() for video in split]
    assert len(set(paths)) == 8 * (TRAIN + TEST)


def test_of_two_processes_one_renders_and_the_other_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that begins to train would otherwise read videos that the other one writes again."""
    written, begun = [], threading.Event()

    def write(path: Path, *rest: object, **named: object) -> None:
        written.append(path.name)
        path.touch()
        begun.set()
        time.sleep(0.02)

    monkeypatch.setattr(demo, "render_video", lambda *drawn: None)
    monkeypatch.setattr(demo, "write_video", write)

    def render() -> None:
        render_demo(tmp_path / "demo", train_per_class=1, test_per_class=1, progress=False)

    other = threading.Thread(target=render)  # a lock file is locked for one open file, also inside one process
    other.start()
    begun.wait()
    render()
    other.join()
    assert len(written) == len(set(written)) == 16
    assert not (tmp_path / "demo" / LOCK).exists()


def test_they_have_one_official_split(listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "DEMO_VIDEOS", listed)
    assert open_data(DataConfig()).splits == open_catalog(listed).splits
    with pytest.raises(UserError, match="split 2 of list file: must be 1"):
        open_data(DataConfig(split=2))


@pytest.mark.parametrize("split", ["train", "test"])
def test_backgrounds_say_nothing_about_the_class(listed: Path, split: str) -> None:
    videos = open_catalog(listed).videos(split)
    of_class = [Counter(video.group for video in videos if video.label == label) for label in range(8)]
    assert all(counts == of_class[0] for counts in of_class)
    if split == "train":
        assert of_class[0] == {f"scene{number:02d}": 1 for number in range(BACKGROUNDS)}


@pytest.mark.parametrize("name", CLASSES)
def test_the_files_are_real_videos_of_what_was_drawn(folder: Path, name: str) -> None:
    path = folder / f"videos/{name}/{name}_0000.mp4"
    record = verify_video(path)
    assert (record.frames, record.height, record.width, record.seekable) == (FRAMES, SIZE, SIZE, True)
    scene = next(v.group for v in open_catalog(folder).videos("train") if v.path.endswith(path.name))
    drawn = render_video(name, demo._scenes(0)[int(scene[5:])], np.random.default_rng([0, 2, CLASSES.index(name), 0]))
    error = np.abs(rgb_of(read_planes(path, record, range(FRAMES))).astype(int) - drawn)
    assert error.mean() < 10  # h264, half the colour resolution
    moved = np.abs(np.diff(drawn.astype(int), axis=0)).max(axis=-1) > 30  # (T - 1, H, W)
    assert moved.any(axis=(1, 2)).mean() > 0.9  # something moves in nearly every frame
    assert moved.mean() < 0.25  # and most of the picture does not


def trajectories(name: str, count: int = 400) -> np.ndarray:
    """Return y, x, radius and angle of `count` videos, (count, 4, FRAMES)."""
    return np.array([demo._trajectory(name, np.random.default_rng([7, number])) for number in range(count)])


def test_one_frame_says_nothing_about_the_class() -> None:
    """In a random frame, position, size and angle have the stated distribution in each class.

    Kolmogorov-Smirnov test against the uniform distribution: with 400 independent videos, a correct class exceeds 0.115
    once in 10,000 draws. The seeds are fixed.
    """
    smallest, largest = np.log(demo._RADII)
    expected = np.arange(1, 401) / 400
    for name in CLASSES:
        frame = np.random.default_rng(1).integers(0, FRAMES, 400)
        y, x, radius, angle = trajectories(name)[np.arange(400), :, frame].T
        for what, uniform in {
            "y": y % SIZE / SIZE,
            "x": x % SIZE / SIZE,
            "size": (np.log(radius) - smallest) / (largest - smallest),
            "angle": angle % (2 * np.pi) / (2 * np.pi),
        }.items():
            assert np.abs(np.sort(uniform) - expected).max() < 0.115, (name, what)


def features(path: np.ndarray) -> np.ndarray:
    """Return what differs between classes: mean velocities, turn per frame, growth, and the direction in which the path
    curves."""
    y, x, radius, angle = path
    vy, vx = np.diff(y), np.diff(x)
    curl = np.mean(vy[:-1] * vx[1:] - vx[:-1] * vy[1:])
    return np.array([vy.mean(), vx.mean(), (angle[-1] - angle[0]) / FRAMES, np.log(radius[-1] / radius[0]), curl])


def test_classes_are_closed_under_horizontal_flips() -> None:
    """A flipped video moves like another video of its class: left becomes right, and the rotation is reversed."""
    for name in CLASSES:
        motion = np.array([features(path) for path in trajectories(name)])
        flipped = motion * [1, -1, -1, 1, -1]
        for here, there in zip(np.sort(motion, axis=0).T, np.sort(flipped, axis=0).T, strict=True):
            spread = max(np.ptp(here), 1e-3)
            assert np.abs(here - there).mean() / spread < 0.1, name


def test_each_class_moves_as_its_name_says() -> None:
    motion = {name: np.array([features(path) for path in trajectories(name, 50)]) for name in CLASSES}
    vy, vx, turn, growth = (np.array([motion[name][:, column] for name in CLASSES]) for column in range(4))
    at = {name: CLASSES.index(name) for name in CLASSES}
    assert (vy[at["up"]] < -1).all()
    assert (vy[at["down"]] > 1).all()
    assert (np.abs(vx[at["across"]]) > 1).all()
    assert 10 < (vx[at["across"]] > 0).sum() < 40
    assert (np.abs(turn[at["spin"]]) > 0.1).all()
    assert (growth[at["grow"]] > 0.7).all()
    assert (growth[at["shrink"]] < -0.7).all()
    for name in ("circle", "shake"):
        assert (np.abs(motion[name][:, :2]) < 0.8).all(), name  # gets nowhere
    for name, (least, most) in {"circle": (20, 22.1), "shake": (6, 7.1)}.items():
        y, x = trajectories(name, 50)[:, 0], trajectories(name, 50)[:, 1]
        reach = np.hypot(np.ptp(y, axis=1), np.ptp(x, axis=1)) / (np.sqrt(2) if name == "circle" else 1)
        assert (reach > least).all(), name
        assert (reach < most).all(), name


def test_the_same_seed_gives_the_same_pixels() -> None:
    def draw(seed: int) -> np.ndarray:
        return render_video("spin", demo._scenes(seed)[3], np.random.default_rng([seed, 2, 3, 4]))

    assert np.array_equal(draw(5), draw(5))
    assert not np.array_equal(draw(5), draw(6))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_complete_is_left_and_incomplete_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    render_demo(tmp_path, train_per_class=2, test_per_class=1, progress=False)
    made = contents(tmp_path)
    assert len(made) == 8 * 3 + 4
    victim = tmp_path / "videos/up/up_0001.mp4"

    written: list[Path] = []
    real = demo.write_video
    monkeypatch.setattr(
        demo, "write_video", lambda path, *rest, **named: written.append(path) or real(path, *rest, **named)
    )
    render_demo(tmp_path, train_per_class=2, test_per_class=1, progress=False)
    assert written == []

    victim.write_bytes(b"half")  # as after an interruption: demo.json is written last
    (tmp_path / "demo.json").unlink()
    render_demo(tmp_path, train_per_class=2, test_per_class=1, progress=False)
    assert contents(tmp_path) == made

    written.clear()
    render_demo(tmp_path, train_per_class=2, test_per_class=1, seed=1, progress=False)
    assert len(written) == 8 * 3
    assert contents(tmp_path)["videos/up/up_0001.mp4"] != made["videos/up/up_0001.mp4"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the demo videos to"):
        render_demo(tmp_path / "file" / "demo", progress=False)
