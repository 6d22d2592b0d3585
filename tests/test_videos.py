"""The set of videos has what the catalog and the manifest say, in the same order, without their objects."""

import gc
import weakref
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dclr.config import DataConfig
from dclr.data.catalog import Video
from dclr.data.clips import draw_pair, sample_rng
from dclr.data.datasets import open_catalog
from dclr.data.decode import UnreadableVideo, VideoRecord, empty_planes, read_planes
from dclr.data.encode import write_video
from dclr.data.manifest import load_manifest
from dclr.data.pack import pack
from dclr.data.records import collect_arrays
from dclr.data.string_array import StringArray
from dclr.data.videos import VideoFiles, open_videos
from dclr.errors import UserError


def test_a_split_is_the_readable_videos_of_the_catalog_in_its_order(genuine):
    catalog = open_catalog(genuine / "ucf101_sample")
    for split in ("train", "test"):
        listed = catalog.videos(split)
        videos = open_videos(catalog, split, workers=1, progress=False)
        assert [videos.path(index) for index in range(len(videos))] == [video.path for video in listed]
        assert videos.labels.tolist() == [video.label for video in listed]
        assert (videos.root, videos.layout, videos.classes) == (catalog.root, "UCF101", catalog.classes)
        assert set(zip(videos.heights.tolist(), videos.widths.tolist(), strict=True)) == {(240, 320)}
        assert videos.unreadable == {}


def test_records_come_back_as_they_were_found(genuine):
    """The files have scrambled, missing and even timestamps and many lengths; some are seekable."""
    root, names = genuine, []
    for folder in ("ucf101_sample", "hmdb51_sample", "kinetics_sample"):
        names += [
            p.relative_to(root).as_posix() for p in sorted((root / folder).rglob("*")) if p.suffix in (".avi", ".mp4")
        ]
    records = load_manifest(root, names, workers=1, progress=False).records
    source = VideoFiles(root, StringArray(records), records.records)
    assert len(records) == 15
    assert len({record.seekable for record in records.values()}) == 2
    for index, (name, record) in enumerate(records.items()):
        found = source.record(index)
        for field in fields(VideoRecord):
            value, expected = getattr(found, field.name), getattr(record, field.name)
            assert type(value) is type(expected)
            assert np.array_equal(value, expected), (name, field.name)
            assert getattr(value, "dtype", None) == getattr(expected, "dtype", None)


def test_frames_are_those_of_the_file_also_into_given_planes(genuine):
    catalog = open_catalog(genuine / "ucf101_sample")
    videos = open_videos(catalog, "test", workers=1, progress=False)
    wanted = np.array([3, 0, 5])
    for index in range(len(videos)):
        path = catalog.root / videos.path(index)
        expected = read_planes(path, videos.source.record(index), wanted)
        into = empty_planes(3, 250, 330)
        for found in (videos.read(index, wanted), videos.read(index, wanted, into)):
            assert all(np.array_equal(getattr(found, name), getattr(expected, name)) for name in "yuv")
        assert np.array_equal(into[0][:, :240, :320], expected.y)


def test_videos_that_cannot_be_read_are_skipped_with_their_reasons(tmp_path):
    for number, name in enumerate("abcd"):
        path = tmp_path / "xy"[number % 2] / f"{name}.mp4"
        path.parent.mkdir(exist_ok=True)
        write_video(path, np.zeros((3 + number, 16, 32, 3), np.uint8))
    (tmp_path / "x" / "a.mp4").write_bytes(b"")
    videos = open_videos(open_catalog(tmp_path), "train", workers=1, progress=False)
    assert [videos.path(index) for index in range(len(videos))] == ["x/c.mp4", "y/b.mp4", "y/d.mp4"]
    assert videos.labels.tolist() == [0, 1, 1]
    assert videos.frames.tolist() == [5, 4, 6]
    assert videos.unreadable == {"x/a.mp4": "empty file"}
    (tmp_path / "x" / "c.mp4").unlink()
    with pytest.raises(UnreadableVideo, match="no such file"):
        videos.read(0, np.array([0]))


def test_a_folder_of_which_nothing_can_be_read_is_refused_with_a_reason(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(UserError, match=r"none of the 1 videos of split train can be read \(empty.mp4: empty file\)"):
        open_videos(open_catalog(tmp_path), "train", workers=1, progress=False)


def test_nothing_of_the_catalog_is_kept(demo_videos):
    """Workers inherit all objects that are kept, so none are kept per video."""
    gc.collect()
    before = sum(isinstance(found, Video | VideoRecord) for found in gc.get_objects())
    catalog = open_catalog(demo_videos)
    gone = weakref.ref(catalog)
    videos = open_videos(catalog, "train", workers=1, progress=False)
    del catalog
    gc.collect()
    assert gone() is None
    assert sum(isinstance(found, Video | VideoRecord) for found in gc.get_objects()) == before
    assert len(videos) == 16


def test_arrays_of_any_length_come_back():
    arrays = [np.arange(n, dtype=np.int64) - 2**62 for n in (3, 0, 1)]
    ragged = collect_arrays(arrays, np.int64)
    assert all(np.array_equal(ragged[i], array) and ragged[i].dtype == np.int64 for i, array in enumerate(arrays))


@pytest.mark.parametrize("compact", [False, True], ids=["planes", "compact"])
@pytest.mark.parametrize("split", [1, 2])
def test_a_store_is_the_same_set_and_gives_the_same_windows(genuine, tmp_path, split, compact):
    """Genuine UCF101 files at short side 128: the frames of training are scaled frames of a decode."""
    source = genuine / "ucf101_sample"
    pack(DataConfig(data=str(source)), out=str(tmp_path / "store"), compact=compact)
    before, after = open_catalog(source, split), open_catalog(tmp_path / "store", split)
    for name in before.splits:
        videos, stored = (open_videos(catalog, name, workers=1, progress=False) for catalog in (before, after))
        assert [stored.path(i) for i in range(len(stored))] == [videos.path(i) for i in range(len(videos))]
        assert stored.labels.tolist() == videos.labels.tolist()
        assert stored.frames.tolist() == videos.frames.tolist()
        assert (stored.classes, stored.layout) == (videos.classes, "UCF101 (packed)")
        assert set(zip(stored.heights.tolist(), stored.widths.tolist(), strict=True)) == {(128, 170)}
        for index in range(len(videos)):
            pair = draw_pair(sample_rng(0, 0, index), int(videos.frames[index]), 16, 2)
            again = draw_pair(sample_rng(0, 0, index), int(stored.frames[index]), 16, 2)
            assert all(np.array_equal(getattr(pair, part), getattr(again, part)) for part in vars(pair))
            large, small = (s.read(index, pair.query).y.astype(np.float32) for s in (videos, stored))
            scaled = torch.from_numpy(large)[:, None]
            scaled = F.interpolate(scaled, (128, 170), mode="bicubic", antialias=True)[:, 0].numpy()
            # Another filter, and quantised anew in a compact store; but nearer than the next frame.
            assert np.abs(scaled - small).mean() < 3
            assert np.abs(scaled[1:] - small[:-1]).mean() > np.abs(scaled - small).mean()


def test_a_damaged_store_is_refused_by_name(demo_videos, tmp_path):
    store = tmp_path / "store"
    pack(DataConfig(data=str(demo_videos)), out=str(store))
    (shard,) = store.glob("shard-*.yuv")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=r"shard-00000.yuv is damaged: it has [0-9,]+ bytes instead of [0-9,]+: see train.py check"
    ):
        open_videos(open_catalog(store), "train", workers=1, progress=False)
