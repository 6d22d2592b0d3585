"""Hundreds of damaged videos: none crashes the reader, blocks it or silently changes its frames.

As a script, this module writes variants into a folder, to test more of them:
`python tests/test_fuzz.py VIDEOS FOLDER SEED VARIANTS`.
"""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import children, run_program

from dclr.config import DataConfig
from dclr.data import clips, decode
from dclr.data.datasets import open_catalog
from dclr.data.decode import UnreadableVideo, read_planes, verify_video
from dclr.data.loader import Batches, BatchSampler
from dclr.data.samples import ClipSamples, PairSamples
from dclr.data.videos import open_videos

VARIANTS = 312
CONFIG = DataConfig(clip_length=4, clip_stride=2, crop_size=32)
KINDS = ("truncate", "flip", "flip-head", "zero")


def sources(genuine: Path) -> list[Path]:
    """Return genuine clips: all of UCF101, HMDB51 and Kinetics, two per Weizmann class, and the faulty files that are
    not empty."""
    files = []
    for folder, suffix in (("ucf101_sample", "avi"), ("hmdb51_sample", "avi"), ("kinetics_sample", "mp4")):
        files += sorted((genuine / folder).rglob(f"*.{suffix}"))
    for folder in sorted((genuine / "weizmann").iterdir()):
        files += sorted(folder.glob("*.mp4"))[:2]
    return [*files, *(file for file in sorted((genuine / "faulty").iterdir()) if file.stat().st_size)]


def damaged(content: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """Return a copy that is cut short, has up to 200 changed bytes (anywhere or in the first 4 KiB), or a range of
    zeros."""
    data = np.frombuffer(content, np.uint8).copy()
    if kind == "truncate":
        return data[: rng.integers(1, len(data))].tobytes()
    if kind == "zero":
        start = rng.integers(len(data))
        data[start : start + rng.integers(1, 1 + len(data) // 4)] = 0
        return data.tobytes()
    within = min(len(data), 4096) if kind == "flip-head" else len(data)
    places = rng.integers(0, within, int(2 ** rng.uniform(0, np.log2(200))))
    data[places] ^= rng.integers(1, 256, len(places), dtype=np.uint8)
    return data.tobytes()


def make_variants(genuine: Path, folder: Path, seed: int, variants: int) -> None:
    """Write damaged copies, named after the damage (class/truncate-007-v_Rowing_g16_c03.avi), and the files of faulty/
    unchanged."""
    files = sources(genuine)
    for number in range(variants):
        file, kind = files[number % len(files)], KINDS[number // len(files) % len(KINDS)]
        rng = np.random.default_rng((seed, number))
        target = folder / "ab"[number % 2] / f"{kind}-{number:03d}-{file.name}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(damaged(file.read_bytes(), kind, rng))
    for file in sorted((genuine / "faulty").iterdir()):
        (folder / "a" / f"faulty-{file.name}").write_bytes(file.read_bytes())


@pytest.fixture(scope="module")
def fuzzed(genuine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with at least 300 damaged videos and all of faulty/, in two classes."""
    folder = tmp_path_factory.mktemp("fuzzed") / "videos"
    make_variants(genuine, folder, seed=0, variants=VARIANTS)
    return folder


@pytest.fixture(scope="module")
def checked(fuzzed: Path) -> str:
    """The output of `train.py check` for these videos, run in another process."""
    words = ["train.py", "check", "--data", fuzzed, "--workers", "2", "--video-timeout", "20"]
    words += ["--report", report_of(fuzzed)]
    run = run_program(*words, environment=dict(os.environ), timeout=120)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    return run.stdout


def report_of(fuzzed: Path) -> Path:
    return fuzzed.with_name("checked.json")


def all_videos(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_variants_are_the_same_each_time_and_no_two_alike(genuine, fuzzed, tmp_path):
    make_variants(genuine, tmp_path / "again", seed=0, variants=VARIANTS)
    contents = {path: (fuzzed / path).read_bytes() for path in all_videos(fuzzed)}
    assert len(contents) == VARIANTS + 10 >= 310
    assert contents == {path: (tmp_path / "again" / path).read_bytes() for path in all_videos(tmp_path / "again")}
    assert len(set(contents.values())) == len(contents)
    of_kind = {kind: sum(f"/{kind}-" in path for path in contents) for kind in (*KINDS, "faulty")}
    assert min(of_kind.values()) >= 10
    untouched = {file.read_bytes() for file in sources(genuine)}
    assert sum(content in untouched for content in contents.values()) == 9  # faulty/, but for its empty file


@pytest.mark.slow
def test_check_lists_every_damaged_video_once_with_its_reason(fuzzed, checked):
    readable = int(re.search(r"^readable: (\d+);", checked, re.MULTILINE)[1])
    count = re.search(r"^unreadable: (\d+)$", checked, re.MULTILINE)[1]
    reasons = json.loads(report_of(fuzzed).read_text())["unreadable"]
    assert len(reasons) == int(count)
    assert set(reasons) <= all_videos(fuzzed)
    assert all(reason.strip() for reason in reasons.values())
    assert readable + int(count) == len(all_videos(fuzzed))
    assert 20 < readable < 100  # damage is noticed, and some does none: both are tried below


@pytest.mark.slow
@pytest.mark.parametrize("kind", [PairSamples, ClipSamples])
def test_an_epoch_reads_every_video_that_is_left_or_lists_it(fuzzed, checked, kind):
    """Three videos are damaged again after verification. Every video that replaces another one in the epoch is
    reported."""
    videos = open_videos(open_catalog(fuzzed), "train", workers=2, progress=False)
    assert len(videos) + len(videos.unreadable) == len(all_videos(fuzzed))
    late = {videos.path(index): fuzzed / videos.path(index) for index in (0, 7, 8)}
    contents = {path: file.read_bytes() for path, file in late.items()}
    try:
        for file in late.values():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
        found = []
        for batch in Batches(kind(videos, CONFIG, 3), BatchSampler(len(videos), 1, 1), workers=2):
            found.append((batch.indices.tolist(), batch.failures))
    finally:
        for path, file in late.items():
            file.write_bytes(contents[path])
    order = clips.epoch_order(3, 0, len(videos)).tolist()
    failed = {path for _, failures in found for path in failures}
    bad = {index for index in order if videos.path(index) in failed}
    assert failed
    assert failed <= set(late)  # what a full decode found readable, a partial one reads
    for place, (indices, failures) in enumerate(found):
        expected, passed = [], []
        for index in [*order[place:], *order[:place]]:
            if index not in bad:
                expected = [index]
                break
            passed.append(videos.path(index))
        assert indices == expected
        assert list(failures) == passed
        assert all(reason and "\n" not in reason for reason in failures.values())
    assert len(found) == len(order)
    assert children() == []


# ---------------------------------------------------------------- more than there is


def test_a_demuxer_that_goes_round_in_circles_is_left(genuine, monkeypatch):
    """FFmpeg would return the same packets, and valid frames of them, without end."""
    file = sorted((genuine / "weizmann" / "walk").iterdir())[0]
    record = verify_video(file)
    packets = decode._packets

    class Circling:
        """A container that starts again at its end."""

        def __init__(self, container) -> None:
            self.container, self.size = container, container.size

        def demux(self, stream):
            while True:
                yield from (packet for packet in self.container.demux(stream) if packet.size)
                self.container.seek(0)

    monkeypatch.setattr(decode, "_packets", lambda container, stream: packets(Circling(container), stream))
    with pytest.raises(UnreadableVideo, match=r"^gives more than 4 times the data that it holds$"):
        verify_video(file)
    assert len(read_planes(file, record, [3, 60]).y) == 2  # what is wanted comes before


@pytest.mark.parametrize("side", [8192, 8200])
def test_frames_of_unheard_of_size_are_refused_before_their_memory_is_taken(tmp_path, side):
    """A GIF of 60 bytes declares a huge frame."""
    size = side.to_bytes(2, "little") * 2
    content = b"GIF89a" + size + b"\x80\0\0\0\0\0\xff\xff\xff,\0\0\0\0" + size + b"\0\2\2\x44\1\0;"
    (tmp_path / "huge.gif").write_bytes(content)
    reasons = {
        8192: r"^a still image, not a video$",  # its only frame has decoded
        8200: r"^frames of 8200 x 8200 pixels: more than 8192 x 8192 are not read$",
    }
    with pytest.raises(UnreadableVideo, match=reasons[side]):
        verify_video(tmp_path / "huge.gif")


if __name__ == "__main__":
    make_variants(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
