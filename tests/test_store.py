"""A packed store: its frames, its index, and its messages about damage."""

import hashlib
import io
import os
import re
import shutil
import struct
import tracemalloc
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from helpers import read_store

from dclr.commands import train
from dclr.config import DataConfig
from dclr.data import pack, store, store_files, string_array
from dclr.data.datasets import open_catalog
from dclr.data.decode import UnreadableVideo, empty_planes
from dclr.data.encode import write_video
from dclr.data.store import Selection, Store, load_index
from dclr.data.store_files import load_arrays, save_arrays
from dclr.data.videos import open_videos
from dclr.errors import UserError

VIDEOS = ["a/0.mp4", "a/2.mp4", "b/1.mp4", "b/3.mp4", "b/5.mp4"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `videos`, `planes` and `compact`: two stores of four shards. Tests that damage a store use
    `spoiled`."""
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
    opened = read_store(packed / kind)
    for row in range(len(VIDEOS)):
        read = opened.read_planes(row, wanted)
        for plane, every in zip((read.y, read.u, read.v), whole(opened, row), strict=True):
            assert np.array_equal(plane, every[np.asarray(wanted, dtype=np.int64)])


def test_any_frames_in_any_order_are_the_right_ones(packed):
    opened = read_store(packed / "planes")
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
    opened = read_store(packed / kind)
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
        read_store(packed / kind).read_planes(0, wanted)


@pytest.mark.parametrize("kind", ["planes", "compact"])
def test_a_selection_numbers_its_videos_anew(packed, kind):
    opened = read_store(packed / kind)
    rows = opened.rows_of(["b/5.mp4", "a/2.mp4"])
    assert rows.tolist() == [4, 1]
    source = Selection(opened, rows)
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
        opened = read_store(packed / "planes")
        for _ in range(2):
            for row in range(len(VIDEOS)):
                opened.read_planes(row, [0])
        assert descriptors() - before == min(limit, 4)
        del opened


def test_a_store_holds_no_object_a_video(packed):
    """Workers inherit the store and would copy the memory of every object that they read."""
    opened = read_store(packed / "planes")
    values = {field.name: getattr(opened, field.name) for field in fields(opened)}
    assert values.pop("unreadable") == {}
    assert values.pop("remote") is None
    values |= vars(values.pop("displays"))
    for name in ("folder", "compact", "shard"):
        values.pop(name)
    assert all(isinstance(value, np.ndarray) and value.dtype != object for value in values.values()), values


@pytest.mark.parametrize("kind", ["planes", "compact"])
def test_the_index_is_read_once_a_run(packed, kind, monkeypatch, capsys):
    read: list[str] = []
    real = store_files.load_arrays

    def counting(path: Path) -> tuple[store_files.Arrays, bytes]:
        read.append(path.name)
        return real(path)

    monkeypatch.setattr(store, "load_arrays", counting)
    catalog = open_catalog(packed / kind)
    assert len(open_videos(catalog, "train", workers=1)) == len(VIDEOS)
    assert len(open_videos(catalog, "train", workers=1)) == len(VIDEOS)
    assert read == [store_files.INDEX]
    read.clear()
    train.main(["check", "--data", str(packed / kind), "--workers", "1"])
    assert read == [store_files.INDEX]


# ---------------------------------------------------------------- damage


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_store(folder)
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
            f"STORE/shard-00001.yuv is damaged: it has {length:,} bytes instead of {size:,}: "
            "see train.py check --data STORE"
        )
    shard.unlink()
    assert refused(planes) == "STORE/shard-00001.yuv is missing: see train.py check --data STORE"


def test_a_small_video_that_is_missing_or_of_another_length_is_refused_by_its_name(spoiled):
    compact = spoiled / "compact"
    video = compact / "shard-00002" / "00000003.avi"
    size = video.stat().st_size
    expected = f"STORE/shard-00002 is damaged: 00000003.avi is missing or not {size:,} bytes long"
    expected += ": see train.py check --data STORE"
    os.truncate(video, size - 1)
    assert refused(compact) == expected
    video.unlink()
    assert refused(compact) == expected


@pytest.mark.parametrize("file", [store_files.INDEX, store_files.PLAN])
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
        (folder / store_files.INDEX).unlink()
        command = f"train.py pack --data {packed / 'videos'} --out STORE --short-side 32{flag}"
        assert refused(folder) == f"STORE is an unfinished store: run `{command}` to finish it"


def test_a_store_of_another_version_is_refused(spoiled):
    folder = spoiled / "planes"
    index, _ = load_arrays(folder / store_files.INDEX)
    save_arrays(folder / store_files.INDEX, {**index, "version": np.array(store_files.VERSION + 1)})
    assert "is of version 2, not 1" in refused(folder)


def test_a_shard_that_is_lost_while_it_is_used_fails_its_videos_and_no_others(spoiled):
    opened = read_store(spoiled / "planes")
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
    opened = read_store(spoiled / "compact")
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
def test_check_finds_a_single_changed_bit_and_says_how_to_fix_it(spoiled, packed, kind, file, shard, capsys):
    folder = spoiled / kind
    train.main(["check", "--data", str(folder), "--workers", "1"])
    shown = capsys.readouterr().out
    assert "class folders (packed), 5 videos, 2 classes" in shown
    assert f"store: {kind}, shards: 4, " in shown

    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / file).write_bytes(content)
    read_store(folder)  # sizes alone do not show it
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
    arrays = {
        "version": np.array(store_files.VERSION),
        "names": string_array.pack_strings(names),
        "matrix": np.arange(6).reshape(2, 3),
    }
    digest = save_arrays(tmp_path / "a.npz", arrays)
    monkeypatch.setattr("time.time", lambda: 2e9)
    assert save_arrays(tmp_path / "b.npz", arrays) == digest
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    read, read_digest = load_arrays(tmp_path / "a.npz")
    assert read_digest == digest
    assert string_array.unpack_strings(read["names"]) == names
    assert np.array_equal(read["matrix"], arrays["matrix"])
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "b.npz"]  # nothing half-written stays


def test_a_store_is_a_catalog_with_only_the_splits_that_it_holds(packed):
    catalog = open_catalog(packed / "planes")
    assert [video.path for video in catalog.videos("train")] == VIDEOS
    with pytest.raises(UserError, match=re.escape("split 2 of class folders: the store in")):
        open_catalog(packed / "planes", 2)


# ---------------------------------------------------------------- an index that somebody else has signed


def read_all(folder: Path, expected: dict[str, tuple[np.ndarray, ...]]) -> str:
    """Open a store, read every video as training would, and return how this ended. Any other exception fails the test.

    The frames must be those of the video, up to the number of frames in the index.
    """
    try:
        catalog = open_catalog(folder)
        videos = catalog.videos("train")
        opened = read_store(folder)
        rows = opened.rows_of(video.path for video in videos if video.path not in opened.unreadable)
    except UserError:
        return "refused"
    ended = "read"
    for video, row in zip([v for v in videos if v.path not in opened.unreadable], rows.tolist(), strict=True):
        assert -1 <= video.label < len(catalog.classes)
        try:
            frames = whole(opened, row)
        except UnreadableVideo:
            ended = "unreadable"
            continue
        assert any(
            all(np.array_equal(plane, right[: len(plane)]) for plane, right in zip(frames, planes, strict=True))
            for planes in expected.values()
        ), video.path
    return ended


ODD = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 2**14, 2**31, 2**40, 2**62, 2**63 - 1)


def mutated(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> tuple[dict[str, np.ndarray], str]:
    """Return the arrays with one random change (a value, type, shape or length, or no array), and the array's name."""
    name = str(rng.choice(list(arrays)))
    array = arrays[name].copy()
    match int(rng.integers(8)):
        case 0:
            return {key: value for key, value in arrays.items() if key != name}, name
        case 1:
            array = array.astype(rng.choice(["int8", "uint8", "int32", "int64", "uint64", "bool", ">i8"]))
        case 2:
            array = array[None] if rng.random() < 0.5 else array[..., None]
        case 3:
            array = array.ravel()[: int(rng.integers(array.size + 1))]
        case 4:
            array = np.repeat(array.ravel(), int(rng.integers(2, 4)))
        case 5:
            array = rng.permutation(array.ravel()).reshape(array.shape)
        case _ if array.size:
            with np.errstate(over="ignore"):
                array.ravel()[int(rng.integers(array.size))] = np.array(rng.choice(ODD)).astype(array.dtype)
    return {**arrays, name: array}, name


@pytest.mark.parametrize("kind", ["planes", "compact"])
def test_a_store_whose_index_is_spoiled_at_random_and_signed_is_refused_or_read_as_it_is(spoiled, kind):
    """600 damaged indexes of 20 arrays: every array is changed in most of these ways."""
    folder = spoiled / kind
    index, _ = load_arrays(folder / store_files.INDEX)
    opened = read_store(folder)
    expected = {video: whole(opened, row) for row, video in enumerate(VIDEOS)}
    assert read_all(folder, expected) == "read"
    rng = np.random.default_rng(0)
    ends: dict[str, set[str]] = {}
    for _ in range(600):
        arrays, name = mutated(index, rng)
        save_arrays(folder / store_files.INDEX, arrays)
        ends.setdefault(name, set()).add(read_all(folder, expected))
    assert ends.keys() == index.keys()
    assert all("refused" in found for found in ends.values()), ends


def spoil(folder: Path, **changed: object) -> str:
    """Return the message that refuses a store whose index has these arrays replaced, or changed by these functions."""
    index, _ = load_arrays(folder / store_files.INDEX)
    arrays = {name: array.copy() for name, array in index.items()}
    for name, change in changed.items():
        made = change(arrays[name]) if callable(change) else change
        arrays[name] = made if isinstance(made, np.ndarray) else np.array(made, dtype=index[name].dtype)
    save_arrays(folder / store_files.INDEX, arrays)
    for way in (lambda: open_catalog(folder), lambda: read_store(folder)):
        with pytest.raises(UserError) as caught:
            way()
    message = str(caught.value)
    start, end = f"{folder / store_files.INDEX} cannot be used: ", "; delete it and pack again"
    assert message.startswith(start), message
    return message.removeprefix(start).removesuffix(end)


def at(place: int, value: int):
    def change(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return change


MISSING = {"missing_split": np.array([0]), "missing_label": np.array([-1])}
"""The further columns of one missing video."""


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": at(0, 2**62)}, "frames must be 1 to 16,777,216, or 0 in no shard"),
        ({"frames": at(0, 0)}, "frames must be 1 to 16,777,216, or 0 in no shard"),
        ({"frames": at(1, 21)}, "sizes must be frames times the bytes of a frame"),
        ({"heights": at(2, -40)}, "heights must be 1 to 16,384, or 0 in no shard"),
        ({"widths": at(2, 2**40)}, "widths must be 1 to 16,384, or 0 in no shard"),
        ({"sizes": at(0, -1)}, "sizes must be 0 to 1,125,899,906,842,624"),
        ({"offsets": at(0, 8)}, "offsets must be where the video before ends"),
        ({"offsets": at(4, 2**60)}, "offsets must be 0 to 1,125,899,906,842,624"),
        ({"shards": at(0, 1)}, "shards must be 0 for the first video that is in one"),
        ({"shards": at(4, 9)}, "shards must be that of the video before, or the next"),
        ({"shards": at(4, 0)}, "shards must be that of the video before, or the next"),
        ({"shards": at(0, -2)}, "shards must be -1 or more"),
        ({"shards": at(4, -1)}, "reasons must be given for what is in no shard"),
        ({"short_side": 16}, "short_side must be at least that of every video"),
        ({"entry_row": at(0, 5)}, "entry_row must be 0 to 4"),
        ({"entry_row": at(0, -1)}, "entry_row must be 0 to 4"),
        ({"entry_label": at(0, 2)}, "entry_label must be -1 to 1"),
        ({"entry_split": at(0, 3)}, "entry_split must be 0 to 2"),
        ({"entry_number": at(0, 2)}, "entry_number must be one of the numbers"),
        ({"numbers": [1, 1]}, "numbers must be at least one, and each different"),
        ({"numbers": []}, "numbers must be at least one, and each different"),
        ({"numbers": [1, -1]}, "numbers must be 0 or more"),
        (
            {"paths": string_array.pack_strings(["a", "a", "b", "c", "d"])},
            "paths must be at least one, and each different",
        ),
        ({"paths": string_array.pack_strings(["a"])}, "paths must be of shape (5,), not (1,)"),
        ({"paths": at(-1, 65)}, "paths must be strings, each with a null character behind it"),
        (
            {"missing": string_array.pack_strings(["a"]), "missing_number": np.array([2]), **MISSING},
            "missing_number must be one of the numbers",
        ),
        (
            {
                "missing": string_array.pack_strings(["a"]),
                "missing_number": np.array([1]),
                **MISSING,
                "missing_split": np.array([3]),
            },
            "missing_split must be 0 to 2",
        ),
        ({"layout": string_array.pack_strings([])}, "layout must be of shape (1,), not (0,)"),
        ({"crc32": np.zeros(5, np.int64)}, "crc32 must be an array of uint32"),
        ({"compact": np.array([True])}, "compact must be of shape (), not (1,)"),
        ({"frames": np.zeros((5, 1), np.int64)}, "frames must be of shape (any,), not (5, 1)"),
        ({"stamps": np.zeros((4, 2), np.int64)}, "stamps must be of shape (5, 2), not (4, 2)"),
        ({"compact": True}, "offsets must be 0 in a compact store"),
    ],
)
def test_an_index_that_says_what_cannot_be_is_refused_by_the_array(spoiled, changed, message):
    assert spoil(spoiled / "planes", **changed) == message


@pytest.mark.parametrize("file", [store_files.INDEX, store_files.PLAN])
def test_a_store_that_lacks_an_array_is_refused_in_one_line(spoiled, file):
    folder = spoiled / "planes"
    arrays, _ = load_arrays(folder / file)
    (folder / store_files.INDEX).unlink()  # then the plan is read
    for lacking in arrays.keys() - {"version"}:
        save_arrays(folder / file, {name: array for name, array in arrays.items() if name != lacking})
        message = rf"/{file} cannot be used: {lacking} must be an array of \w+; delete it and pack again$"
        with pytest.raises(UserError, match=message):
            load_index(folder)


def test_a_small_video_of_more_frames_than_bytes_is_refused(spoiled):
    assert spoil(spoiled / "compact", frames=at(0, 2**24)) == "sizes must be more than a byte a frame"


def signed(path: Path, content: bytes) -> None:
    path.write_bytes(content + hashlib.sha256(content).digest())


def npz_of(header: bytes, data: bytes, compression: int = zipfile.ZIP_STORED, members: int = 1) -> bytes:
    """Return a .npz file with a custom header."""
    npy = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for number in range(members):
            archive.writestr(f"{'version' if number == 0 else number}.npy", npy)
    return file.getvalue()


GOOD_HEADER = b"{'descr': '<i8', 'fortran_order': False, 'shape': (), }\n"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(npz_of(GOOD_HEADER.replace(b"()", b"(10**15,)"), b"\0" * 8), id="a header that is no literal"),
        pytest.param(npz_of(GOOD_HEADER.replace(b"()", b"(1000000000000000,)"), b"\0" * 8), id="petabytes"),
        pytest.param(npz_of(GOOD_HEADER.replace(b"()", b"(-1,)"), b"\0" * 8), id="a negative length"),
        pytest.param(npz_of(GOOD_HEADER.replace(b"()", b"(" * 3000), b""), id="a deep header"),
        pytest.param(npz_of(GOOD_HEADER.replace(b"<i8", b"|O"), b"\0" * 8), id="objects"),
        pytest.param(npz_of(GOOD_HEADER.replace(b"<i8", b"<f8"), b"\0" * 8), id="floats"),
        pytest.param(npz_of(GOOD_HEADER, b""), id="cut short"),
        pytest.param(npz_of(GOOD_HEADER, b"\0" * 10**6, zipfile.ZIP_DEFLATED), id="compressed"),
        pytest.param(npz_of(GOOD_HEADER, b"\0" * 8)[:-30], id="no directory"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"PK\x05\x06" + b"\0" * 18, id="no members"),
    ],
)
def test_a_signed_file_that_is_none_of_ours_is_refused_before_memory_is_taken(tmp_path, content):
    signed(tmp_path / store_files.INDEX, content)
    tracemalloc.start()
    with pytest.raises(
        UserError, match=r"dclr-index\.npz was not written by train\.py pack \(.+\): delete it and pack again"
    ):
        open_catalog(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_members_that_lie_on_each_other_are_refused(tmp_path):
    """The directory of a zip file may list the same bytes a thousand times."""
    content = npz_of(GOOD_HEADER.replace(b"()", b"(1000,)"), b"\0" * 8000)
    directory = content.rindex(b"PK\x01\x02")
    entry, end = content[directory : content.rindex(b"PK\x05\x06")], bytearray(content[content.rindex(b"PK\x05\x06") :])
    struct.pack_into("<HHI", end, 8, 50, 50, 50 * len(entry))
    signed(tmp_path / store_files.INDEX, content[:directory] + 50 * entry + end)
    with pytest.raises(UserError, match="its members are larger than the file"):
        open_catalog(tmp_path)


def test_a_file_too_large_to_be_an_index_is_not_read(tmp_path):
    with (tmp_path / store_files.INDEX).open("wb") as file:
        file.truncate(store_files.MAX_FILE + 1)  # sparse
    with pytest.raises(UserError, match=r"was not written by train\.py pack \(1,073,741,825 bytes\)"):
        open_catalog(tmp_path)


@pytest.mark.parametrize("kind", ["planes", "compact"])
def test_what_is_said_of_a_shard_is_checked_and_what_cannot_be_is_made_again(spoiled, packed, kind, capsys):
    folder, name = spoiled / kind, "shard-00001.npz"
    found, _ = load_arrays(folder / name)
    index = (folder / store_files.INDEX).read_bytes()
    flags = ["--out", str(folder), "--short-side", "32", "--workers", "1", *["--compact"][: kind == "compact"]]
    for changed in (
        {"sizes": found["sizes"][:0]},
        {"sizes": found["sizes"].astype(np.float32).astype(np.int32)},
        {"sizes": -found["sizes"]},
        {"crc32": found["crc32"].astype(np.int64)},
        {"reasons": string_array.pack_strings(["", ""])},
        {"plan": found["plan"][:5]},
        {"bt709": np.array(True)},
    ):
        save_arrays(folder / name, {**found, **changed})
        train.main(["pack", "--data", str(packed / "videos"), *flags])
        said = "belongs to another store" if "plan" in changed else "is damaged"
        assert f"{name} {said}: its shard is made again" in capsys.readouterr().err
        assert (folder / store_files.INDEX).read_bytes() == index


def test_sizes_of_a_shard_that_only_add_up_to_the_planned_ones_are_not_taken(spoiled, packed, capsys):
    folder = spoiled / "planes"
    for path in sorted(folder.glob("shard-*.npz")):
        found, _ = load_arrays(path)
        if len(found["sizes"]) == 2:
            break
    save_arrays(path, {**found, "sizes": found["sizes"] + [8, -8]})
    train.main(["pack", "--data", str(packed / "videos"), "--out", str(folder), "--short-side", "32", "--workers", "1"])
    assert f"{path.name} is damaged: its shard is made again" in capsys.readouterr().err
    read_store(folder)
