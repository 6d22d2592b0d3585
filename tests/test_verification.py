"""Several processes verify one folder at once: no video is decoded twice, and no finding is lost."""

import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dclr.data import verification
from dclr.data.decode import VideoRecord
from dclr.data.findings import VerifiedFile, collect_findings, load_findings, merge_findings, save_findings
from dclr.data.manifest import Manifest, cache_file, load_manifest

VIDEOS = [f"{number:02d}.mp4" for number in range(40)]
RECORD = VideoRecord(
    frames=3, declared=3, height=32, width=48, pts=np.array([7, 9, 11]), keyframes=np.zeros(1, np.int64),
    seekable=False, skippable=True,
)  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of files that a decoder in place of FFmpeg takes for videos. It notes which it decodes."""
    folder, decoded = tmp_path / "data", tmp_path / "decoded.txt"
    folder.mkdir()
    decoded.touch()
    for name in VIDEOS:
        (folder / name).write_text(name)

    def decode(path: Path) -> VideoRecord:
        time.sleep(0.003)
        with decoded.open("a") as file:
            file.write(f"{path.name}\n")
        return RECORD

    monkeypatch.setattr(verification, "verify_video", decode)
    return folder


def decoded(root: Path) -> Counter[str]:
    return Counter((root.parent / "decoded.txt").read_text().split())


def load(root: Path) -> Manifest:
    return load_manifest(root, VIDEOS, workers=1, progress=False, cache_dir=root.parent / "cache")


def parts(root: Path) -> Path:
    return cache_file(root, root.parent / "cache").with_suffix(".parts")


def in_child(work: Callable[[], object]) -> int:
    """Start a process that does the work and return its id."""
    process = os.fork()
    if process == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return process


def test_processes_that_verify_one_folder_at_once_decode_each_video_once(root):
    children = [in_child(lambda: load(root)) for _ in range(2)]
    found = load(root)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert list(found.records) == VIDEOS
    assert decoded(root) == Counter(VIDEOS)
    assert list(load(root).records) == VIDEOS
    assert decoded(root) == Counter(VIDEOS)
    assert list(cache_file(root, root.parent / "cache").parent.iterdir()) == [cache_file(root, root.parent / "cache")]


def test_a_killed_process_loses_only_what_it_had_not_saved(root, monkeypatch):
    monkeypatch.setattr(verification, "SAVE_EVERY", 0.0)
    child = in_child(lambda: load(root))
    while len(decoded(root)) < 10:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(list(parts(root).glob("*.npz"))) == 1
    saved = len(load_findings(next(parts(root).glob("*.npz"))))
    assert 5 <= saved < 40
    assert list(load(root).records) == VIDEOS
    again = decoded(root)
    assert set(again) == set(VIDEOS)
    assert again.total() <= 40 + 5  # the video in its decoder, and findings on their way
    assert not parts(root).exists()


def test_torn_and_foreign_part_files_cost_one_line_each(root, capsys):
    parts(root).mkdir(parents=True)
    whole = parts(root) / "whole.npz"
    save_findings(
        whole,
        collect_findings(
            VerifiedFile(path=name, stamp=(len(name), (root / name).stat().st_mtime_ns), finding=RECORD, digest=b"")
            for name in VIDEOS[:10]
        ),
    )
    (parts(root) / "torn.npz").write_bytes(whole.read_bytes()[:-40])
    (parts(root) / "foreign.npz").write_text("something else")
    assert list(load(root).records) == VIDEOS
    assert decoded(root) == Counter(VIDEOS[10:])  # the whole part of a process that was killed is used
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert all("cannot be used" in line for line in warnings)
    assert sorted(file.name for file in parts(root).glob("*.npz")) == ["foreign.npz", "torn.npz"]


def test_a_silent_process_of_another_machine_keeps_its_videos_for_a_minute(root, monkeypatch):
    monkeypatch.setattr(verification, "SILENCE", 0.5)
    parts(root).mkdir(parents=True)
    (parts(root) / "other.claim").write_bytes(b"another machine\0" + b"".join(f"{v}\0".encode() for v in VIDEOS[:3]))
    began = time.monotonic()
    assert list(load(root).records) == VIDEOS
    assert time.monotonic() - began >= 0.5
    assert decoded(root) == Counter(VIDEOS)
    assert not parts(root).exists()


def test_merged_findings_are_those_of_the_last_part(root):
    def part(names: list[str], size: int) -> list[VerifiedFile]:
        findings = [RECORD if number % 2 else f"reason {number}" for number in range(len(names))]
        return [
            VerifiedFile(path=name, stamp=(size, 5), finding=finding, digest=bytes([size]) * 16)
            for name, finding in zip(names, findings, strict=True)
        ]

    first, second = part(["a", "b", "c", "d"], 1), part(["e", "c", "ä\udcff"], 2)
    merged = list(merge_findings([collect_findings(first), collect_findings(()), collect_findings(second)]))
    expected = {file.path: file for file in [*first, *second]}
    assert {file.path for file in merged} == set(expected)
    for file in merged:
        other = expected[file.path]
        assert (file.stamp, file.digest, type(file.finding)) == (other.stamp, other.digest, type(other.finding))
        if isinstance(file.finding, VideoRecord):
            assert file.finding.pts.tolist() == [7, 9, 11]
        else:
            assert file.finding == other.finding
