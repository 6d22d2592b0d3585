"""train.py pack: a store gives the same windows as the videos, an interrupted pack continues, and errors are clear."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.frame import VideoFrame
from helpers import children, read_store
from PIL import Image

from dclr import lock as locks
from dclr.commands import train
from dclr.config import DataConfig
from dclr.data import clips, pack, store, store_damage, store_files
from dclr.data.datasets import official_splits, open_catalog
from dclr.data.decode import (
    UnreadableVideo,
    YuvFrames,
    read_planes,
    resized_planes,
    verify_video,
)
from dclr.data.encode import compact_record, compact_video, write_video
from dclr.data.manifest import load_manifest
from dclr.data.store import Selection
from dclr.data.store_files import shard_name
from dclr.data.string_array import unpack_strings
from dclr.errors import UserError
from dclr.lock import LOCK, folder_lock


def write_coded(path: Path, planes: YuvFrames, codec: str = "libx264", **options: str) -> None:
    """Write a video with these planes, matrix and range. With a lossless codec its sample values are exactly these."""
    _, height, width = planes.y.shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"qp": "0", "threads": "1", **options})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.colorspace = 1 if planes.bt709 else 5
        stream.codec_context.color_range = 2 if planes.full_range else 1
        for samples in zip(planes.y, planes.u, planes.v, strict=True):
            frame = VideoFrame(width, height, "yuv420p")
            for target, plane in zip(frame.planes, samples, strict=True):
                lines = np.frombuffer(memoryview(target), np.uint8).reshape(target.height, target.line_size)
                lines[:, : target.width] = plane
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def smooth(frames: int, height: int, width: int, bt709: bool = False, full_range: bool = False) -> YuvFrames:
    """Return frames with a moving wave in every plane."""

    def plane(phase: float, h: int, w: int) -> np.ndarray:
        t, y, x = np.ogrid[:frames, :h, :w]
        return (128 + 100 * np.sin(phase + 0.2 * t + 3 * y / h + 5 * x / w)).astype(np.uint8)

    half = ((height + 1) // 2, (width + 1) // 2)
    return YuvFrames(plane(0, height, width), plane(1, *half), plane(2, *half), bt709, full_range)


def together(frames: Iterator[YuvFrames]) -> YuvFrames:
    every = list(frames)
    y, u, v = (np.concatenate([getattr(frame, name) for frame in every]) for name in "yuv")
    return YuvFrames(y, u, v, every[0].bt709, every[0].full_range)


def same(a: YuvFrames, b: YuvFrames) -> bool:
    planes = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in "yuv")
    return planes and (a.bt709, a.full_range) == (b.bt709, b.full_range)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


# ---------------------------------------------------------------- resizing (dclr/data/decode.py)


def test_resizing_is_bicubic_in_each_plane(genuine):
    """The scaling is compared with PIL's."""
    path = genuine / "kinetics_sample" / "R6llTwEh07w.mp4"
    record = verify_video(path)
    frames = resized_planes(path, record, 128, 170)
    original = read_planes(path, record, [0, 1])
    for number in (0, 1):
        frame = next(frames)
        for name, size in (("y", (170, 128)), ("u", (85, 64)), ("v", (85, 64))):
            small, image = getattr(frame, name)[0], Image.fromarray(getattr(original, name)[number])
            bicubic, bilinear = (
                psnr(small, np.asarray(image.resize(size, method)))
                for method in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
            )
            assert small.shape == size[::-1]
            assert bicubic > 50, name
            assert bicubic > bilinear + 5, name


@pytest.mark.parametrize("bt709", [False, True])
@pytest.mark.parametrize("full_range", [False, True])
def test_resizing_keeps_values_matrix_and_range(tmp_path, bt709, full_range):
    """Each quarter has one colour. Values 0 and 255 need full range, and any conversion would change the middle
    values."""
    planes = smooth(3, 96, 128, bt709, full_range)
    low, high = (0, 255) if full_range else (16, 235)
    for plane in (planes.y, planes.u, planes.v):
        height, width = plane.shape[1] // 2, plane.shape[2] // 2
        plane[:, :height, :width], plane[:, :height, width:] = low, high
        plane[:, height:, :width], plane[:, height:, width:] = 77, 140
    write_coded(tmp_path / "a.mp4", planes)
    record = verify_video(tmp_path / "a.mp4")
    assert same(together(resized_planes(tmp_path / "a.mp4", record, 96, 128)), planes)
    small = together(resized_planes(tmp_path / "a.mp4", record, 32, 42))
    assert (small.bt709, small.full_range) == (bt709, full_range)
    for plane in (small.y, small.u, small.v):
        assert plane[:, 3, 3].tolist() == [low] * 3
        assert plane[:, 3, -4].tolist() == [high] * 3
        assert plane[:, -4, 3].tolist() == [77] * 3
        assert plane[:, -4, -4].tolist() == [140] * 3


def test_a_file_that_is_not_the_one_that_was_verified_is_not_packed(tmp_path):
    for name, frames in (("long.mp4", 30), ("short.mp4", 20)):
        write_video(tmp_path / name, np.zeros((frames, 32, 48, 3), np.uint8))
    long, short = verify_video(tmp_path / "long.mp4"), verify_video(tmp_path / "short.mp4")
    with pytest.raises(UnreadableVideo, match="ends before frame 20 of the 30 verified: the file changed"):
        together(resized_planes(tmp_path / "short.mp4", long, 16, 24))
    with pytest.raises(UnreadableVideo, match="frame 20 is not the one that was verified: the file changed"):
        together(resized_planes(tmp_path / "long.mp4", short, 16, 24))


@pytest.mark.parametrize(
    ("height", "width", "stored"),
    [
        pytest.param(240, 320, (128, 170), id="UCF101"),
        pytest.param(320, 240, (170, 128), id="upright"),
        pytest.param(256, 340, (128, 170), id="Kinetics"),
        pytest.param(240, 352, (128, 188), id="wide"),
        pytest.param(129, 129, (128, 128), id="square"),
        pytest.param(128, 1000, (128, 1000), id="already small"),
        pytest.param(101, 77, (101, 77), id="small and odd"),
    ],
)
def test_sizes(height, width, stored):
    assert pack.small_size(height, width, 128) == stored


# ---------------------------------------------------------------- compact videos (dclr/data/encode.py)


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [
        pytest.param(61, 128, 170, id="typical"),
        pytest.param(1, 128, 170, id="one frame"),
        pytest.param(12, 64, 64, id="one group of pictures"),
        pytest.param(13, 64, 64, id="one more frame"),
        pytest.param(30, 101, 77, id="odd"),
        pytest.param(14, 6, 10, id="tiny"),
    ],
)
def test_a_compact_video_is_what_its_record_promises(tmp_path, frames, height, width):
    planes = smooth(frames, height, width)
    file = compact_video([planes], height, width)
    (tmp_path / "a.avi").write_bytes(file)
    promised = compact_record(frames, height, width)
    found = verify_video(tmp_path / "a.avi")
    assert vars(found).keys() == vars(promised).keys()
    for name, value in vars(found).items():
        assert np.array_equal(value, getattr(promised, name)), name
    back = read_planes(tmp_path / "a.avi", promised, range(frames))
    for name in "yuv":
        assert psnr(getattr(back, name), getattr(planes, name)) > 34
    assert compact_video([planes], height, width) == file


def test_a_cut_makes_no_keyframe_of_its_own(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 64, 64), dtype=np.uint8)
    planes = YuvFrames(noise, noise[:, ::2, ::2], noise[:, 1::2, 1::2], False, False)
    (tmp_path / "a.avi").write_bytes(compact_video([planes], 64, 64))
    assert verify_video(tmp_path / "a.avi").keyframes.tolist() == [0, 12]


# ---------------------------------------------------------------- the same samples as from the videos


def pack_genuine(data: Path, out: Path, compact: bool = False, workers: int = 2) -> Path:
    pack.pack(DataConfig(data=str(data), workers=workers), str(out), compact=compact)
    return out


@pytest.mark.parametrize("compact", [False, True], ids=["planes", "compact"])
def test_every_split_of_a_store_gives_the_windows_of_its_videos(genuine, tmp_path, compact):
    data = genuine / "ucf101_sample"
    packed = pack_genuine(data, tmp_path / "store", compact)
    opened = read_store(packed)
    assert opened.compact == compact
    for split in (1, 2, 3):
        videos, again = open_catalog(data, split), open_catalog(packed, split)
        assert again.layout == "UCF101 (packed)"
        assert again.root == packed
        assert (again.classes, again.missing) == (videos.classes, videos.missing)
        assert list(again.splits.items()) == list(videos.splits.items())  # paths, labels and groups, in order

    listed = open_catalog(data).videos("train") + open_catalog(data).videos("test")
    manifest = load_manifest(data, [video.path for video in listed], workers=1, progress=False)
    rows = opened.rows_of([video.path for video in listed])
    source = Selection(opened, rows)
    for index, video in enumerate(listed):
        record = manifest.records[video.path]
        assert opened.frames[rows[index]] == record.frames
        assert (opened.heights[rows[index]], opened.widths[rows[index]]) == (128, 170)
        pair, stored_pair = (
            clips.draw_pair(clips.sample_rng(0, 3, index), int(frames), 16, 2)
            for frames in (record.frames, opened.frames[rows[index]])
        )
        assert vars(pair).keys() == vars(stored_pair).keys()
        wanted, stored = (np.concatenate([p.query, p.key, [p.query_still, p.key_still]]) for p in (pair, stored_pair))
        assert np.array_equal(wanted, stored)
        read = source.read_planes(index, stored)
        every = together(resized_planes(data / video.path, record, 128, 170))
        expected = YuvFrames(every.y[wanted], every.u[wanted], every.v[wanted], every.bt709, every.full_range)
        if compact:
            assert psnr(read.y, expected.y) > 36
            assert psnr(read.y, np.roll(expected.y, 1, axis=0)) < psnr(read.y, expected.y)  # the frame, not a neighbour
        else:
            assert same(read, expected)


def test_small_videos_are_stored_byte_for_byte_as_they_are_decoded(genuine, tmp_path):
    data = tmp_path / "videos"
    data.mkdir()
    for file in sorted((genuine / "weizmann").rglob("*.mp4"))[::9]:
        shutil.copy(file, data)
    opened = read_store(pack_genuine(data, tmp_path / "store"))
    paths = [video.path for video in open_catalog(data).videos("train")]
    assert len(paths) == 10
    manifest = load_manifest(data, paths, workers=1, progress=False)
    for row, path in zip(opened.rows_of(paths), paths, strict=True):
        record = manifest.records[path]
        wanted = np.arange(record.frames)
        assert same(opened.read_planes(row, wanted), read_planes(data / path, record, wanted))


@pytest.mark.parametrize("compact", [False, True], ids=["planes", "compact"])
def test_colours_and_odd_sizes_survive(tmp_path, compact):
    """An mpeg4 file cannot name its colour space, so the index does."""
    (tmp_path / "videos").mkdir()
    made = {}
    for number, (bt709, full_range) in enumerate([(False, False), (True, False), (False, True), (True, True)]):
        made[f"{number}.mp4"] = smooth(15, 64, 96, bt709, full_range)
    made["odd.mkv"] = smooth(15, 101, 77)
    for name, planes in made.items():
        write_coded(tmp_path / "videos" / name, planes, "ffv1" if name == "odd.mkv" else "libx264")
    opened = read_store(pack_genuine(tmp_path / "videos", tmp_path / "store", compact))
    for row, name in zip(opened.rows_of(made), made, strict=True):
        read = opened.read_planes(row, np.arange(15))
        if compact:
            assert (read.bt709, read.full_range) == (made[name].bt709, made[name].full_range)
            assert min(psnr(getattr(read, plane), getattr(made[name], plane)) for plane in "yuv") > 36
        else:
            assert same(read, made[name])


def test_videos_that_cannot_be_read_are_listed_with_their_reasons(genuine, tmp_path):
    videos = open_catalog(genuine / "faulty")
    packed = pack_genuine(genuine / "faulty", tmp_path / "store")
    opened = read_store(packed)
    assert open_catalog(packed).videos("train") == videos.videos("train")
    manifest = load_manifest(videos.root, [v.path for v in videos.videos("train")], workers=1, progress=False)
    assert opened.unreadable == manifest.unreadable
    assert len(opened.unreadable) == 7
    for path in manifest.records:
        (row,) = opened.rows_of([path])
        assert opened.frames[row] == manifest.records[path].frames
        opened.read_planes(row, [0])


# ---------------------------------------------------------------- interrupted and continued

VIDEOS = [f"{'ab'[number % 2]}/{number}.mp4" for number in range(7)]


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Seven videos of at least 20 frames, in shards of two."""
    for number, name in enumerate(VIDEOS):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (20 + number, 48, 64, 3), dtype=np.uint8)
        write_video(path, noise)
    monkeypatch.setattr(pack, "SHARD_BYTES", 2 * 26 * 32 * 42 * 3 // 2)
    return tmp_path / "videos"


def pack_small(videos: Path, out: Path, workers: int = 1, **settings: Any) -> Path:
    pack.pack(DataConfig(data=str(videos), workers=workers), str(out), **{"short_side": 32, **settings})
    return out


def slowly(job: pack.Job, row: int, written: np.ndarray, frames: Any = pack.small_frames) -> Iterator[YuvFrames]:
    for frame in frames(job, row, written):
        time.sleep(0.01)
        yield frame


def wait_for(what: Any, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("compact", [False, True], ids=["planes", "compact"])
def test_a_killed_pack_continues_to_the_bytes_of_an_uninterrupted_one(videos, tmp_path, monkeypatch, compact):
    whole = content(pack_small(videos, tmp_path / "whole", workers=1, compact=compact))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(pack, "small_frames", slowly)
        process = multiprocessing.get_context("fork").Process(
            target=pack_small, args=(videos, out, 2), kwargs={"compact": compact}
        )
        process.start()
        wait_for(lambda: list(out.glob("shard-*.npz")))
        wait_for(lambda: list(out.glob("shard-*.part")))
        decoders = children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    wait_for(lambda: not any(Path(f"/proc/{decoder}").exists() for decoder in decoders), 5)  # they end with it
    assert not (out / store_files.INDEX).exists()
    with pytest.raises(UserError, match=r"is an unfinished store: run `train\.py pack --data"):
        open_catalog(out)
    done = {file: file.stat().st_mtime_ns for file in out.glob("shard-*.npz")}
    assert 1 <= len(done) < 4

    pack_small(videos, out, workers=2, compact=compact)
    assert content(out) == whole
    assert {file: file.stat().st_mtime_ns for file in done} == done  # finished shards were not written again


@pytest.mark.parametrize("compact", [False, True], ids=["planes", "compact"])
def test_killed_between_any_two_steps(videos, tmp_path, monkeypatch, compact):
    """A shard has no checksums, or the index is missing, or half-written files are left."""
    whole = content(pack_small(videos, tmp_path / "out", compact=compact))
    out, name = tmp_path / "out", shard_name(1, compact)
    for gone in ("shard-00001.npz", store_files.INDEX, name):
        pack.remove(out / gone)
        (out / f"{store_files.INDEX}.part").write_bytes(b"half")
        (out / f"{shard_name(2, compact=False)}.part").write_bytes(b"half")
        (out / f"{shard_name(2, compact=True)}.part").mkdir()
        pack_small(videos, out, compact=compact)
        assert content(out) == whole


def test_a_finished_pack_is_left_as_it_is(videos, tmp_path, capsys):
    out = pack_small(videos, tmp_path / "out")
    before = {file: file.stat().st_mtime_ns for file in out.glob("shard-*")}
    pack_small(videos, out)
    assert {file: file.stat().st_mtime_ns for file in out.glob("shard-*")} == before
    assert "4 of 4 shards are there already" in capsys.readouterr().out


@pytest.mark.parametrize("file", [store_files.PLAN, store_files.INDEX])
def test_a_lost_plan_or_index_is_written_again_and_no_shard(videos, tmp_path, file):
    out = pack_small(videos, tmp_path / "out")
    whole = content(out)
    before = {file: file.stat().st_mtime_ns for file in out.glob("shard-*")}
    (out / file).unlink()
    assert content(pack_small(videos, out)) == whole
    assert {file: file.stat().st_mtime_ns for file in before} == before


@pytest.mark.parametrize("compact", [False, True], ids=["planes", "compact"])
@pytest.mark.parametrize("what", ["length", "checksums", "another store's"])
def test_a_damaged_shard_is_named_and_made_again(videos, tmp_path, capsys, compact, what):
    out = pack_small(videos, tmp_path / "out", compact=compact)
    whole = content(out)
    shard, vouched = out / shard_name(2, compact), out / "shard-00002.npz"
    if what == "length":
        file = shard / store_files.compact_name(4) if compact else shard
        os.truncate(file, file.stat().st_size - 1)
        size = len(whole[str(file.relative_to(out))])
        fault = (
            f"00000004.avi is missing or not {size:,} bytes long"
            if compact
            else f"it has {size - 1:,} bytes instead of {size:,}"
        )
        expected = f"warning: {shard} is damaged: {fault}: it is made again\n"
    elif what == "checksums":
        vouched.write_bytes(vouched.read_bytes()[:-40])
        expected = f"warning: {vouched} is damaged: its shard is made again\n"
    else:
        other = pack_small(videos, tmp_path / "other", compact=compact, short_side=40)
        shutil.copy(other / vouched.name, vouched)
        expected = f"warning: {vouched} belongs to another store: its shard is made again\n"
    capsys.readouterr()
    pack_small(videos, out, compact=compact)
    said = capsys.readouterr().err.replace("\r", "\n").splitlines(keepends=True)
    assert [line for line in said if line.startswith("warning")] == [expected]
    assert content(out) == whole


@pytest.mark.parametrize("compact", [False, True], ids=["planes", "compact"])
def test_a_video_that_fails_while_it_is_packed_is_named_and_listed_and_the_others_are_there(
    videos, tmp_path, monkeypatch, capsys, compact
):
    bad = VIDEOS[2]
    whole = read_store(pack_small(videos, tmp_path / "whole", compact=compact))

    def failing(path: Path, *arguments: Any) -> Iterator[YuvFrames]:
        for number, frame in enumerate(resized_planes(path, *arguments)):
            if number == 5 and path == videos / bad:
                raise UnreadableVideo("frame 5 is corrupt")
            yield frame

    monkeypatch.setattr(pack, "resized_planes", failing)
    capsys.readouterr()
    out = pack_small(videos, tmp_path / "out", compact=compact)
    shown = capsys.readouterr()
    assert (
        f"warning: {bad} could not be packed (frame 5 is corrupt); it is listed as unreadable"
        in shown.err.replace("\r", "\n").splitlines()
    )
    assert shown.out.splitlines()[-1].startswith(f"packed 6 videos into {out}, ")
    opened = read_store(out)
    assert opened.unreadable == {bad: "frame 5 is corrupt"}
    assert store_damage.damaged_shards(opened, 1) == {}
    others = [path for path in VIDEOS if path != bad]
    for row in whole.rows_of(others):
        every = np.arange(whole.frames[row])
        assert same(opened.read_planes(row, every), whole.read_planes(row, every))


def test_a_small_video_that_does_not_read_back_is_not_trusted(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "compact_video", lambda frames, *size: compact_video(list(frames)[1:], *size))
    opened = read_store(pack_small(videos, tmp_path / "out", compact=True))
    assert set(opened.unreadable) == set(VIDEOS)
    assert set(opened.unreadable.values()) == {"its compact video is not as expected (frames)"}


def test_colours_that_change_on_the_way_are_refused(videos, tmp_path, monkeypatch):
    def changing(*arguments: Any) -> Iterator[YuvFrames]:
        for number, frame in enumerate(resized_planes(*arguments)):
            yield YuvFrames(frame.y, frame.u, frame.v, number > 5, False)

    monkeypatch.setattr(pack, "resized_planes", changing)
    for compact in (False, True):
        opened = read_store(pack_small(videos, tmp_path / f"{compact}", compact=compact))
        assert set(opened.unreadable.values()) == {
            "its colour matrix or range changes inside the video, which a store cannot hold"
        }


# ---------------------------------------------------------------- what is refused


def refused(*arguments: Any, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        pack_small(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_other_settings_or_changed_videos_are_refused_and_the_store_stays(videos, tmp_path):
    out = pack_small(videos, tmp_path / "out")
    whole = content(out)

    def difference(**settings: Any) -> str:
        message = refused(videos, out, **settings)
        assert content(out) == whole
        begun, _, advice = message.partition(": ")
        assert advice == "pack as before, or into another folder (or delete this one)"
        return begun.removeprefix(f"{out} was begun with ")

    assert difference(short_side=40) == "--short-side 32, not 40"
    assert difference(compact=True) == "planes, not --compact"
    new = videos / "a" / "9.mp4"
    shutil.copy(videos / VIDEOS[1], new)
    assert difference() == "7 videos, not 8 (such as a/9.mp4)"
    new.unlink()

    (videos / "b").rename(videos / "c")
    (videos / "a").rename(videos / "b")
    (videos / "c").rename(videos / "a")
    assert difference().startswith("7 videos, not 7 (such as a/")
    (videos / "a").rename(videos / "c")
    (videos / "b").rename(videos / "a")
    (videos / "c").rename(videos / "b")

    stamp = (videos / VIDEOS[4]).stat().st_mtime_ns
    os.utime(videos / VIDEOS[4], ns=(stamp, stamp + 10**9))
    assert difference() == f"another {VIDEOS[4]} (its size or date has changed)"
    os.utime(videos / VIDEOS[5], ns=(stamp, stamp + 10**9))
    assert difference().endswith("(its size or date has changed, as in 1 more)")


def test_other_lists_are_refused(videos, tmp_path):
    lists = videos / "splits"
    lists.mkdir()
    (lists / "train.txt").write_text("".join(f"{path} 0\n" for path in VIDEOS))
    out = pack_small(videos, tmp_path / "out")
    (lists / "train.txt").write_text("".join(f"{path} 1\n" for path in VIDEOS))
    assert "was begun with other lists of classes or splits" in refused(videos, out)


def test_lists_of_five_folds(videos, tmp_path):
    for number in range(1, 6):
        (videos / f"trainlist0{number}.txt").write_text(f"{VIDEOS[number]} 0\n")
        (videos / f"testlist0{number}.txt").write_text(f"{VIDEOS[0]} 0\n")
    out = pack_small(videos, tmp_path / "out")
    assert official_splits(out) == [1, 2, 3, 4, 5]
    for number in (1, 5):
        assert open_catalog(out, number).splits == open_catalog(videos, number).splits


def test_videos_may_have_moved(videos, tmp_path):
    """The folder of the videos is kept for the user to read and is not compared."""
    out = pack_small(videos, tmp_path / "out")
    whole = content(out)
    videos.rename(tmp_path / "moved")
    again = content(pack_small(tmp_path / "moved", out))
    assert [name for name in whole if again[name] != whole[name]] == [store_files.INDEX]
    assert unpack_strings(store.load_index(out)["source"]) == [str(tmp_path / "moved")]


def test_a_folder_that_holds_something_else_is_refused(videos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert refused(videos, tmp_path / "out") == (
        f"--out {tmp_path / 'out'} holds something that is not a packed store: give an empty or a new folder"
    )
    assert refused(videos, videos / "store").startswith(f"--out {videos / 'store'} lies in the data folder")
    assert not (videos / "store").exists()
    (tmp_path / "file").touch()
    assert refused(videos, tmp_path / "file" / "out").startswith(
        f"cannot write to {tmp_path / 'file' / 'out'}: Not a directory;"
    )


def test_a_url_is_no_folder_for_a_store(videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(videos, "s3://bucket/store") == (
        "--out is s3://bucket/store, but must be a local folder: pack there, then upload the folder"
    )
    assert os.listdir() == ["videos"]


def test_a_wrong_folder_is_refused_before_videos_are_verified(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "load_manifest", None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert "holds something that is not a packed store" in refused(videos, tmp_path / "out")
    message = refused(videos, tmp_path / "out" / "thesis.tex")
    assert message.startswith(f"cannot write to {tmp_path / 'out' / 'thesis.tex'}: File exists;")


def test_what_is_no_data_set_or_no_size_is_refused(videos, tmp_path, genuine):
    out = pack_small(videos, tmp_path / "out")
    assert refused(out, tmp_path / "again") == (
        f"--data {out} is a packed store already: give the videos that it was made from"
    )
    for size in (33, 14, 0, -2):
        assert refused(videos, tmp_path / "new", short_side=size).startswith(
            f"--short-side is {size}, but must be even"
        )
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").touch()
    assert refused(tmp_path / "broken", tmp_path / "new") == (
        f"{tmp_path / 'broken'}: none of its 1 videos can be read (a.mp4: empty file); see train.py check"
    )
    assert not (tmp_path / "new").exists()


def test_too_little_space_is_noticed_before_anything_is_written(videos, tmp_path, monkeypatch, capsys):
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    size = sum(20 + number for number in range(7)) * 32 * 42 * 3 // 2
    compact = pack.COMPACT_SHARE * sum(20 + number for number in range(7)) * 32 * 42
    assert refused(videos, tmp_path / "out") == (
        f"{tmp_path / 'out'}: {pack.amount(size)} are still to be written, and 0.1 MB are free; "
        f"--compact takes about {pack.amount(compact)}"
    )
    assert os.listdir(tmp_path / "out") == [store_files.PLAN]
    capsys.readouterr()
    assert pack_small(videos, tmp_path / "compact", compact=True)  # takes less
    assert "warning" not in capsys.readouterr().err


def test_an_estimate_of_the_space_warns_and_refuses_nothing(videos, tmp_path, monkeypatch, capsys):
    """The estimate was five times too large for a data set, and the pack was refused though it would have fitted."""
    whole = content(pack_small(videos, tmp_path / "whole", compact=True))
    compact = pack.COMPACT_SHARE * sum(20 + number for number in range(7)) * 32 * 42
    free = shutil.disk_usage(tmp_path)._replace(free=int(compact) - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    capsys.readouterr()
    assert content(pack_small(videos, tmp_path / "out", compact=True)) == whole
    amount = pack.amount(compact)
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")] == [
        f"warning: {tmp_path / 'out'}: an estimated {amount} are still to be written, and {amount} are free"
    ]


@pytest.mark.parametrize("compact", [False, True], ids=["planes", "compact"])
def test_a_disk_that_fails_on_the_way_is_one_line_and_what_is_finished_stays(videos, tmp_path, monkeypatch, compact):
    whole = content(pack_small(videos, tmp_path / "whole", compact=compact))
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        sync = os.fsync

        def full(descriptor: int) -> None:
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if "shard-00002" in name:
                raise OSError(errno.ENOSPC, "No space left on device")
            sync(descriptor)

        patch.setattr(os, "fsync", full)
        assert refused(videos, out, compact=compact) == (
            f"cannot write to {out}: No space left on device; "
            "finished shards stay: fix the cause, then run the same command again"
        )
    assert sorted(file.name for file in out.glob("shard-*.npz")) == ["shard-00000.npz", "shard-00001.npz"]
    assert content(pack_small(videos, out, compact=compact)) == whole


def test_a_worker_that_dies_is_one_line(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(pack, "small_frames", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    assert "a worker process died while it packed into" in refused(videos, tmp_path / "out", workers=2)


# ---------------------------------------------------------------- several packs into one store


@pytest.mark.parametrize("compact", [False, True], ids=["planes", "compact"])
def test_three_packs_share_one_store_and_the_shard_of_a_killed_one_is_written_by_another(
    videos, tmp_path, monkeypatch, compact
):
    """Nothing is written before three of the four shards are claimed and one of the three packs is killed."""
    whole = content(pack_small(videos, tmp_path / "whole", compact=compact))
    out, go, log = tmp_path / "out", tmp_path / "go", tmp_path / "log"
    log.mkdir()

    def gated(job: pack.Job, row: int, written: np.ndarray, frames: Any = pack.small_frames) -> Iterator[YuvFrames]:
        wait_for(go.exists)
        yield from frames(job, row, written)

    def logged(job: pack.Job, number: int, checksums: Any, publish: Any = pack.publish_shard) -> None:
        (log / f"{number} {os.getpid()}").touch()
        publish(job, number, checksums)

    with monkeypatch.context() as patch:
        patch.setattr(pack, "small_frames", gated)
        patch.setattr(pack, "publish_shard", logged)
        patch.setattr(pack, "WAIT_S", 0.02)
        context = multiprocessing.get_context("fork")
        processes = [
            context.Process(target=pack_small, args=(videos, out), kwargs={"compact": compact}) for _ in range(3)
        ]
        for process in processes:
            process.start()
        wait_for(lambda: len(list(out.glob("shard-*.part"))) == 3)
        assert "was begun with --short-side 32, not 40" in refused(videos, out, short_side=40, compact=compact)
        os.kill(processes[0].pid, signal.SIGKILL)
        processes[0].join()
        go.touch()
        for process in processes[1:]:
            process.join(20)
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0, 0]
    assert content(out) == whole
    writers = [entry.name.split() for entry in log.iterdir()]
    assert sorted(number for number, _ in writers) == ["0", "1", "2", "3"]  # each once
    assert {int(process) for _, process in writers} == {process.pid for process in processes[1:]}


def leave_claim(claim: Path) -> None:
    """Leave the lock of a shard that a process on another machine holds."""
    claim.write_text(json.dumps({"process": 7, "host": "node3", "machine": "other", "since": "2026"}))


@pytest.fixture
def quick_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SILENCE_S", "SETTLE_S"):
        monkeypatch.setattr(locks, name, 0.2)
    monkeypatch.setattr(pack, "WAIT_S", 0.02)


def test_the_shard_of_a_machine_that_vanished_is_waited_for_and_then_written(videos, tmp_path, quick_locks, capsys):
    out = pack_small(videos, tmp_path / "out")
    whole = content(out)
    (out / "shard-00001.npz").unlink()
    leave_claim(out / "shard-00001.lock")
    assert content(pack_small(videos, out)) == whole
    shown = capsys.readouterr().out
    assert f"1 shard(s) of {out} are being written by process 7 on node3, since 2026: waiting for them\n" in shown


def test_a_shard_that_another_pack_has_taken_over_is_left_to_that_pack(videos, tmp_path, quick_locks, monkeypatch):
    """This pack was suspended for long. Then the other one ends without a result, so this pack writes the shard."""
    out = tmp_path / "out"
    whole = content(pack_small(videos, tmp_path / "whole"))
    seen = []

    def taken_over(job: pack.Job, number: int, written: np.ndarray, write: Any = pack.write_shard) -> Any:
        found = write(job, number, written)
        if number == 1 and not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            leave_claim(job.lock(1))
        return found

    def logged(job: pack.Job, number: int, checksums: Any, publish: Any = pack.publish_shard) -> None:
        seen.append((number, json.loads(job.lock(number).read_text())["process"]))
        publish(job, number, checksums)

    monkeypatch.setattr(pack, "write_shard", taken_over)
    monkeypatch.setattr(pack, "publish_shard", logged)
    assert content(pack_small(videos, out)) == whole
    assert seen == [(number, os.getpid()) for number in (0, 2, 3, 1)]


def test_a_pack_waits_for_another_one_that_writes_the_plan_or_the_index(videos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    context = multiprocessing.get_context("fork")
    process = context.Process(target=pack_small, args=(videos, out))
    with folder_lock(out):
        process.start()
        process.join(0.3)
        assert process.is_alive()
        assert os.listdir(out) == [LOCK]
    process.join(20)
    assert process.exitcode == 0
    assert (out / store_files.INDEX).exists()


def test_two_packs_count_the_space_of_unfinished_shards_once(videos, tmp_path, monkeypatch):
    """A second pack was refused although the store fits on the disk."""
    out = pack_small(videos, tmp_path / "out")
    whole = content(out)
    for file in ("shard-00001.npz", store_files.INDEX):
        (out / file).unlink()
    (out / "shard-00001.yuv").rename(out / "shard-00001.yuv.part")
    free = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: free)
    assert content(pack_small(videos, out)) == whole


# ---------------------------------------------------------------- the command


def test_without_out_only_sizes_are_printed(videos, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    train.main(["pack", "--data", str(videos), "--short-side", "32"])
    lines = capsys.readouterr().out.splitlines()
    frames = sum(20 + number for number in range(7))
    assert lines[0] == f"{videos}: class folders, 7 videos, {frames} frames, short side 32"
    assert re.fullmatch(r"  the videos themselves +\d+\.\d MB", lines[1])
    assert lines[2].split()[-2:] == [f"{frames * 32 * 42 * 1.5 / 1e6:.1f}", "MB"]
    assert lines[3].startswith("  --compact")
    assert "give --out STORE" in lines[4]
    assert sorted(tmp_path.rglob("*")) == before


def test_the_estimate_for_ucf101_is_what_its_2_5_million_frames_take():
    assert 2_484_199 * store_files.frame_bytes(*pack.small_size(240, 320, 128)) == pytest.approx(81e9, rel=0.01)


def test_the_command_packs_and_names_every_official_split(genuine, tmp_path, capsys):
    data = genuine / "hmdb51_sample"
    train.main(["pack", "--data", str(data), "--out", str(tmp_path / "store"), "--compact", "--workers", "1"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"{data}: HMDB51, 4 videos, ")
    assert shown[-1].startswith(f"packed 4 videos into {tmp_path / 'store'}, ")
    assert open_catalog(tmp_path / "store").splits == open_catalog(data).splits
    with pytest.raises(UserError, match=re.escape("split 2 of HMDB51: the store in")):
        open_catalog(tmp_path / "store", 2)
