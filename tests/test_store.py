"""A packed store: what is read from it, and how it says what is wrong with it."""

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import train
from dclr import pack
from dclr.config import DataConfig
from dclr.data import store, texts
from dclr.data.catalog import open_catalog
from dclr.data.decode import UnreadableVideo, empty_planes, write_video
from dclr.data.store import Store, load_arrays, open_store, save_arrays
from dclr.errors import UserError

VIDEOS = ["a/0.mp4", "a/2.mp4", "b/1.mp4", "b/3.mp4", "b/5.mp4"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders `videos`, `planes` and `compact` beside each other: two stores of four shards. Tests that spoil one use `spoiled`."""
    root = tmp_path_factory.mktemp("packed")
    for name in VIDEOS:
        number = int(Path(name).stem)
        (root / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        height, width = ((32, 48), (48, 32), (40, 40))[number % 3]
        noise = np.random.default_rng(number).integers(0, 256, (20 + number, height, width, 3), dtype=np.uint8)
        write_video(root / "videos" / name, noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "SHARD_BYTES", 90_000)
        for kind in ("planes", "compact"):
            pack.pack(DataConfig(data=str(root / "videos")), str(root / kind), 32, compact=kind == "compact")
        yield root


@pytest.fixture
def spoiled(packed: Path, tmp_path: Path) -> Path:
    """A copy of both stores for a test to damage."""
    for kind in ("planes", "compact"):
        shutil.copytree(packed / kind, tmp_path / kind)
    return tmp_path


def whole(opened: Store, row: int) -> tuple[np.ndarray, ...]:
    planes = opened.read_planes(row, np.arange(opened.frames[row]))
    return planes.y.copy(), planes.u.copy(), planes.v.copy()


# ---------------------------------------------------------------- reading


@pytest.mark.parametrize("kind", ["planes", "compact"])
@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(np.arange(0, 20, 2), id="a window"),
        pytest.param(np.concatenate([np.arange(6, 20, 2), np.arange(3, 17, 2), [19, 4]]), id="two windows and stills"),
        pytest.param((14 + 2 * np.arange(8)) % 20, id="past the end"),
        pytest.param(np.array([7, 7, 7, 3, 3, 19, 0]), id="repeats and steps back"),
        pytest.param(np.empty(0, np.int64), id="nothing"),
        pytest.param([5], id="a list"),
    ],
)
def test_frames_are_those_of_the_whole_video_in_the_order_wanted(packed, kind, wanted):
    opened = open_store(packed / kind)
    for row in range(len(VIDEOS)):
        read = opened.read_planes(row, wanted)
        for plane, every in zip((read.y, read.u, read.v), whole(opened, row), strict=True):
            assert np.array_equal(plane, every[np.asarray(wanted, dtype=np.int64)])


def test_any_frames_in_any_order_are_the_right_ones(packed):
    opened = open_store(packed / "planes")
    every = whole(opened, 0)
    rng = np.random.default_rng(0)
    for _ in range(300):
        numbers = rng.integers(0, opened.frames[0], rng.integers(0, 12))
        if rng.random() < 0.5:
            numbers = np.sort(numbers)
        read = opened.read_planes(0, numbers)
        assert np.array_equal(read.y, every[0][numbers])
        assert np.array_equal(read.v, every[2][numbers])


@pytest.mark.parametrize("kind", ["planes", "compact"])
def test_frames_are_written_to_the_top_left_of_memory_that_is_given(packed, kind):
    opened = open_store(packed / kind)
    into = empty_planes(3, 60, 70)
    for plane in into:
        plane[...] = 99
    read = opened.read_planes(2, np.array([4, 6, 1]), into)
    height, width = opened.heights[2], opened.widths[2]
    fresh = opened.read_planes(2, np.array([4, 6, 1]))
    for name, plane in zip("yuv", into, strict=True):
        view = getattr(read, name)
        assert np.shares_memory(view, plane)
        assert np.array_equal(view, getattr(fresh, name))
        outside = np.ones(plane.shape, bool)
        outside[:, : view.shape[1], : view.shape[2]] = False
        assert (plane[outside] == 99).all()
    assert read.y.shape == (3, height, width)


@pytest.mark.parametrize("kind", ["planes", "compact"])
@pytest.mark.parametrize("wanted", [[0, 20], [-1], [[0, 1]]], ids=["too large", "negative", "two dimensions"])
def test_a_frame_that_does_not_exist_is_an_error(packed, kind, wanted):
    with pytest.raises(ValueError, match="wanted must be"):
        open_store(packed / kind).read_planes(0, wanted)


@pytest.mark.parametrize("kind", ["planes", "compact"])
def test_a_selection_numbers_its_videos_anew(packed, kind):
    opened = open_store(packed / kind)
    rows = opened.rows_of(["b/5.mp4", "a/2.mp4"])
    assert rows.tolist() == [4, 1]
    source = opened.source(rows)
    for index, row in enumerate(rows):
        assert np.array_equal(source.read_planes(index, [3]).y, opened.read_planes(row, [3]).y)
    with pytest.raises(KeyError):
        opened.rows_of(["c/5.mp4"])


def test_only_so_many_shards_are_open_at_a_time(packed, monkeypatch):
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    assert len(list((packed / "planes").glob("*.yuv"))) == 4
    for limit in (2, 256):
        monkeypatch.setattr(store, "_OPEN_SHARDS", limit)
        before = descriptors()
        opened = open_store(packed / "planes")
        for _ in range(2):
            for row in range(len(VIDEOS)):
                opened.read_planes(row, [0])
        assert descriptors() - before == min(limit, 4)
        del opened


def test_a_store_holds_no_object_a_video(packed):
    """Workers inherit it, and would copy the memory of every object they look at."""
    opened = open_store(packed / "planes")
    values = {field.name: getattr(opened, field.name) for field in fields(opened)}
    assert values.pop("unreadable") == {}
    for name in ("folder", "compact", "_shard"):
        values.pop(name)
    assert all(isinstance(value, np.ndarray) and value.dtype != object for value in values.values()), values


# ---------------------------------------------------------------- damage


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_store(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(folder), "STORE")


def test_a_shard_that_is_missing_or_of_another_length_is_refused_by_its_name(spoiled):
    planes = spoiled / "planes"
    shard = planes / "shard-00001.yuv"
    size = shard.stat().st_size
    for length in (size - 1, size + 1, 0):
        os.truncate(shard, length)
        assert refused(planes) == (
            f"STORE/shard-00001.yuv is damaged: it has {length:,} bytes instead of {size:,}: see train.py check --data STORE"
        )
    shard.unlink()
    assert refused(planes) == "STORE/shard-00001.yuv is missing: see train.py check --data STORE"


def test_a_small_video_that_is_missing_or_of_another_length_is_refused_by_its_name(spoiled):
    compact = spoiled / "compact"
    video = compact / "shard-00002" / "00000003.avi"
    size = video.stat().st_size
    expected = f"STORE/shard-00002 is damaged: 00000003.avi is missing or not {size:,} bytes long: see train.py check --data STORE"
    os.truncate(video, size - 1)
    assert refused(compact) == expected
    video.unlink()
    assert refused(compact) == expected


@pytest.mark.parametrize("file", [store.INDEX, store.PLAN])
def test_any_changed_byte_of_an_index_is_noticed(spoiled, file):
    path = spoiled / "planes" / file
    content = path.read_bytes()
    message = f"{path} is damaged: delete it and run the train.py pack command of this store again"
    for place in [*range(0, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(UserError, match=re.escape(message)):
            load_arrays(path)
    for length in (0, 10, 40, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match="is damaged"):
            load_arrays(path)


def test_an_unfinished_store_says_how_to_finish_it(spoiled, packed):
    for kind, flag in (("planes", ""), ("compact", " --compact")):
        folder = spoiled / kind
        (folder / store.INDEX).unlink()
        command = f"train.py pack --data {packed / 'videos'} --out STORE --short-side 32{flag}"
        assert refused(folder) == f"STORE is an unfinished store: run `{command}` to finish it"


def test_a_store_of_another_version_is_refused(spoiled):
    folder = spoiled / "planes"
    index, _ = load_arrays(folder / store.INDEX)
    save_arrays(folder / store.INDEX, {**index, "version": np.array(store.VERSION + 1)})
    assert "is of version 2, not 1" in refused(folder)


def test_a_shard_that_is_lost_while_it_is_used_fails_its_videos_and_no_others(spoiled):
    opened = open_store(spoiled / "planes")
    (spoiled / "planes" / "shard-00001.yuv").unlink()
    os.truncate(spoiled / "planes" / "shard-00002.yuv", 1000)
    os.truncate(spoiled / "planes" / "shard-00003.yuv", 0)
    reasons = {}
    for row in range(len(VIDEOS)):
        try:
            opened.read_planes(row, [0])
        except UnreadableVideo as reason:
            reasons[int(opened.shards[row])] = str(reason)
    assert reasons == {
        1: "shard-00001.yuv is missing",
        2: "shard-00002.yuv is too short: it is damaged",
        3: "shard-00003.yuv cannot be mapped: cannot mmap an empty file",
    }
    opened = open_store(spoiled / "compact")
    (spoiled / "compact" / "shard-00001" / "00000002.avi").unlink()
    opened.read_planes(0, [0])
    with pytest.raises(UnreadableVideo, match=re.escape("shard-00001/00000002.avi: no such file")):
        opened.read_planes(2, [0])


@pytest.mark.parametrize(
    ("kind", "file", "shard"),
    [
        ("planes", "shard-00001.yuv", "shard-00001.yuv"),
        ("compact", "shard-00001/00000002.avi", "shard-00001"),
    ],
)
def test_check_finds_a_single_changed_bit_and_says_how_to_mend_it(spoiled, packed, kind, file, shard, capsys):
    folder = spoiled / kind
    train.main(["check", "--data", str(folder), "--workers", "1"])
    shown = capsys.readouterr().out
    assert "class folders (packed), 5 videos, 2 classes" in shown
    assert f"store: {kind}, shards: 4, " in shown

    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / file).write_bytes(content)
    open_store(folder)  # cannot notice
    with pytest.raises(UserError) as caught:
        train.main(["check", "--data", str(folder)])
    command = f"train.py pack --data {packed / 'videos'} --out {folder} --short-side 32" + " --compact" * (
        kind == "compact"
    )
    assert str(caught.value) == (
        f"damaged shards, 1 of 4: rm -r {folder / shard}; then run `{command}`, which makes only these again"
    )
    assert f"  {shard} is damaged at b/1.mp4: its checksum differs" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in folder.glob("shard-*.npz")}
    pack.remove(folder / shard)
    train.main(command.split()[1:])
    train.main(["check", "--data", str(folder)])
    remade = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert remade == ["shard-00001.npz"]
    original = packed / kind / file
    assert (folder / file).read_bytes() == original.read_bytes()


# ---------------------------------------------------------------- its files


def test_arrays_come_back_and_their_file_depends_on_nothing_else(tmp_path, monkeypatch):
    names = ["ß #&(!).mp4", os.fsdecode(b"not \xff utf-8"), ""]
    arrays = {"version": np.array(store.VERSION), "names": texts.packed(names), "matrix": np.arange(6).reshape(2, 3)}
    digest = save_arrays(tmp_path / "a.npz", arrays)
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert save_arrays(tmp_path / "b.npz", arrays) == digest
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    read, read_digest = load_arrays(tmp_path / "a.npz")
    assert read_digest == digest
    assert texts.unpacked(read["names"]) == names
    assert np.array_equal(read["matrix"], arrays["matrix"])
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]  # nothing half-written stays


def test_a_store_is_a_catalog_with_only_the_splits_that_it_holds(packed):
    catalog = open_catalog(packed / "planes")
    assert [video.path for video in catalog.videos("train")] == VIDEOS
    with pytest.raises(UserError, match=re.escape("split 2 of class folders: the store in")):
        open_catalog(packed / "planes", 2)
