"""The manifest does not depend on the number of processes, decodes each video once, and survives a damaged cache
file."""

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import REPOSITORY, block, children, crash, loop

from dclr.data import decoder_process, manifest, verification
from dclr.data.decode import NO_PTS, VideoRecord, verify_video
from dclr.data.encode import write_video
from dclr.data.findings import load_findings
from dclr.data.manifest import Manifest, load_manifest
from dclr.errors import UserError

GOOD = ["a.mp4", "sub folder/b.mp4", "c.h264", "ß #&(!).mp4"]
BAD = {"empty.avi": "empty file", "text.mp4": "cannot be opened: Invalid data found when processing input"}
GONE = {"gone.mp4": "no such file"}


def noise(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    (root / "sub folder").mkdir(parents=True)
    for number, name in enumerate(GOOD):
        write_video(root / name, noise(20 + number), keyframe_every=8)
    (root / "empty.avi").touch()
    (root / "text.mp4").write_text("not a video\n" * 100)
    return root


class Decoded:
    """The names of the files that are decoded in any process. They are collected in a file."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.clear()

    def clear(self) -> None:
        self.file.write_text("")

    def add(self, name: str) -> None:
        with self.file.open("a") as file:
            file.write(name + "\n")

    @property
    def names(self) -> list[str]:
        return sorted(self.file.read_text().splitlines())


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Decoded:
    found = Decoded(tmp_path / "decoded.txt")

    def counting(path: Path) -> VideoRecord:
        found.add(path.name)
        return verify_video(path)

    monkeypatch.setattr(verification, "verify_video", counting)
    return found


PATHS = [*GOOD, *BAD, *GONE]


def load(root: Path, workers: int = 1, paths: list[str] = PATHS, timeout: float = 60) -> Manifest:
    return load_manifest(root, paths, workers=workers, progress=False, cache_dir=root.parent / "cache", timeout=timeout)


def cache_file(root: Path) -> Path:
    (file,) = (root.parent / "cache").iterdir()  # exactly one: no temporary file stays behind
    return file


def plain(found: Manifest) -> dict[str, tuple[object, ...]]:
    return {
        path: (r.frames, r.declared, r.height, r.width, r.pts.tolist(), r.keyframes.tolist(), r.seekable, r.skippable)
        for path, r in found.records.items()
    }


def test_what_it_finds(root: Path) -> None:
    found = load(root)
    assert list(found.records) == GOOD
    assert found.unreadable == BAD | GONE
    assert found.root == root
    assert [record.frames for record in found.records.values()] == [20, 21, 22, 23]
    assert found.records["a.mp4"].keyframes.tolist() == [0, 8, 16]
    assert [record.seekable for record in found.records.values()] == [True, True, False, True]
    assert [record.skippable for record in found.records.values()] == [True, True, False, True]


def test_in_parallel_as_in_one_process(root: Path, tmp_path: Path) -> None:
    alone = load(root)
    shutil.rmtree(tmp_path / "cache")
    parallel = load(root, workers=2)
    assert plain(parallel) == plain(alone)
    assert parallel.unreadable == alone.unreadable


def test_nothing_is_decoded_twice(root: Path, decoded: Decoded) -> None:
    first = load(root, paths=[*PATHS, *GOOD])  # named twice, as where "val" is "test" too
    assert decoded.names == sorted(Path(path).name for path in [*GOOD, *BAD])
    decoded.clear()
    second = load(root)
    assert decoded.names == []
    assert plain(second) == plain(first)
    assert (second.records["c.h264"].pts == NO_PTS).all()  # the extreme value survives being stored as a difference
    assert second.unreadable == first.unreadable
    for record in second.records.values():
        assert (record.pts.dtype, record.keyframes.dtype) == (np.int64, np.int64)


def test_a_changed_file_is_looked_at_again(root: Path, decoded: Decoded) -> None:
    load(root)
    decoded.clear()
    write_video(root / "a.mp4", noise(9))
    status = (root / "c.h264").stat()
    os.utime(root / "c.h264", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    found = load(root)
    assert decoded.names == ["a.mp4", "c.h264"]
    assert found.records["a.mp4"].frames == 9
    decoded.clear()
    load(root)
    assert decoded.names == []


def test_a_video_that_grows_while_two_processes_verify_is_refused_in_one_line(root: Path, monkeypatch) -> None:
    def verify_later(cache: Path, root: Path, todo: dict[str, tuple[int, int]], *settings: Any) -> dict[str, str]:
        """Verify, and let the findings be those of a process that has seen the file one nanosecond later."""
        later = {path: (size, modified + 1) for path, (size, modified) in todo.items()}
        return verification.verify_files(cache, root, later, *settings)

    monkeypatch.setattr(manifest, "verify_files", verify_later)
    with pytest.raises(UserError) as refusal:
        load(root, paths=["a.mp4"])
    assert str(refusal.value) == (
        f"{root / 'a.mp4'} has changed while videos were verified: wait until the data set is complete, then run the "
        "same command again"
    )


def test_videos_not_asked_for_stay_known(root: Path, decoded: Decoded) -> None:
    load(root, paths=["a.mp4"])
    found = load(root, paths=["c.h264"])
    assert list(found.records) == ["c.h264"]
    decoded.clear()
    load(root, paths=["a.mp4", "c.h264"])
    assert decoded.names == []


def test_two_folders_do_not_share_a_cache_file(root: Path, tmp_path: Path) -> None:
    load(root, paths=["a.mp4"])
    other = tmp_path / "other" / "data"
    other.mkdir(parents=True)
    write_video(other / "a.mp4", noise(5))
    found = load_manifest(other, ["a.mp4"], workers=1, progress=False, cache_dir=tmp_path / "cache")
    assert found.records["a.mp4"].frames == 5
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_nothing_to_verify_writes_nothing(root: Path) -> None:
    assert load(root, paths=[*GONE]).unreadable == GONE
    assert not (root.parent / "cache").exists()


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip(file: Path) -> None:
    """Change a byte of the timestamps. Some bytes of the archive's own headers have no meaning."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        after = archive.infolist()[names.index("pts_runs.npy") + 1].header_offset
        inside = after - archive.getinfo("pts_runs.npy").compress_size // 2
    content = bytearray(file.read_bytes())
    content[inside] ^= 0xFF
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def garble(file: Path) -> None:
    file.write_bytes(b"\0" * 1000)


def older(file: Path) -> None:
    with np.load(file) as old:
        arrays = dict(old)
    np.savez(file, **arrays | {"version": np.array(0)})


def pickled(file: Path) -> None:
    np.savez(file, version=np.array([{}], dtype=object))


def incomplete(file: Path) -> None:
    with np.load(file) as old:
        arrays = dict(old)
    np.savez(file, **arrays | {"keyframe_counts": arrays["keyframe_counts"][:-1]})


@pytest.mark.parametrize("damage", [cut, flip, empty, garble, older, pickled, incomplete])
def test_a_damaged_cache_is_rebuilt(
    root: Path, decoded: Decoded, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    first = load(root)
    damage(cache_file(root))
    decoded.clear()
    assert plain(load(root)) == plain(first)
    assert len(decoded.names) == len(GOOD) + len(BAD)
    warning = capsys.readouterr().err
    assert warning.startswith(f"warning: {cache_file(root)} cannot be used (")
    assert warning.count("\n") == 1
    decoded.clear()
    load(root)
    assert decoded.names == []


def test_what_was_verified_before_an_interruption_is_kept(
    root: Path, decoded: Decoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = verification.verify_video

    def interrupted(path: Path) -> VideoRecord:
        if path.name == "c.h264":
            raise KeyboardInterrupt
        return counting(path)

    monkeypatch.setattr(verification, "verify_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    assert decoded.names == ["a.mp4", "b.mp4"]
    monkeypatch.setattr(verification, "verify_video", counting)
    decoded.clear()
    load(root, paths=GOOD)
    assert decoded.names == ["c.h264", "ß #&(!).mp4"]


def leave() -> None:
    os._exit(3)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (crash, "the decoder crashes on it (SIGSEGV)"),
        (leave, "the decoder crashes on it (exit status 3)"),
        (loop, "the decoder gives no frame for 1 s"),
        (block, "the decoder gives no frame for 1 s"),
    ],
)
def test_a_decoder_that_crashes_or_never_returns_costs_its_video_alone(root, monkeypatch, workers, fault, reason):
    monkeypatch.setattr(
        verification, "verify_video", lambda path: fault() if path.name == "b.mp4" else verify_video(path)
    )
    began = time.monotonic()
    found = load(root, workers, timeout=1)
    assert time.monotonic() - began < 15
    assert found.unreadable == BAD | GONE | {"sub folder/b.mp4": reason}
    assert list(found.records) == ["a.mp4", "c.h264", "ß #&(!).mp4"]
    assert children() == []
    monkeypatch.undo()
    assert list(load(root).records) == GOOD  # the finding is not kept


def test_a_decoder_that_is_killed_once_is_asked_once_more(root, decoded, monkeypatch, tmp_path):
    """The kernel may have killed the first process because memory was short. After a second kill, the video is
    unreadable."""
    counting = verification.verify_video

    def killed(path: Path) -> VideoRecord:
        record = counting(path)
        if path.name == "b.mp4" or (path.name == "a.mp4" and decoded.names.count("a.mp4") == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return record

    monkeypatch.setattr(verification, "verify_video", killed)
    found = load(root, paths=GOOD)
    assert found.unreadable == {"sub folder/b.mp4": "the decoder crashes on it (SIGKILL)"}
    assert decoded.names == sorted(["a.mp4", "a.mp4", "b.mp4", "b.mp4", "c.h264", "ß #&(!).mp4"])


def test_a_long_decode_is_not_cut_while_it_gives_frames(root, monkeypatch):
    def slow(path: Path) -> VideoRecord:
        for _ in range(8):
            time.sleep(0.3)
            decoder_process.report_progress()
        return verify_video(path)

    monkeypatch.setattr(verification, "verify_video", slow)
    assert list(load(root, paths=["a.mp4"], timeout=1).records) == ["a.mp4"]


def test_default_place_of_the_cache(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_manifest(root, ["a.mp4"], workers=1, progress=False)
    assert len(list((tmp_path / "xdg/dclr/manifests").glob("data-*.npz"))) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_manifest(root, ["a.mp4"], workers=1, progress=False)
    assert len(list((tmp_path / "home/.cache/dclr/manifests").glob("data-*.npz"))) == 1


def test_a_cache_that_cannot_be_written_is_named_before_the_work(root: Path, decoded: Decoded, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write .*/file/cache .*set \$XDG_CACHE_HOME"):
        load_manifest(root, PATHS, workers=1, progress=False, cache_dir=tmp_path / "file" / "cache")
    assert decoded.names == []


def test_a_cache_with_changed_numbers_is_used_only_where_they_agree(tmp_path, capsys):
    """After each of 500 seeded changes of one array, the cache is refused with a warning, or its records are valid."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_video(folder / name, np.zeros((30, 32, 48, 3), np.uint8))
    (folder / "c.mp4").write_bytes(b"x")
    cache_dir = tmp_path / "cache"
    load_manifest(folder, ["a.mp4", "b.mp4", "c.mp4"], workers=1, progress=False, cache_dir=cache_dir)
    (cache,) = cache_dir.iterdir()
    with np.load(cache) as file:
        good = {name: file[name] for name in file.files}
    rng, used = np.random.default_rng(0), 0
    for _ in range(500):
        arrays = dict(good)
        name = rng.choice([n for n in good if n != "version"])
        array = arrays[name].copy()
        kind = rng.integers(4)
        if kind == 0 and array.size:
            array.ravel()[rng.integers(array.size)] = rng.choice([0, 1, 2, 7, 255])
        elif kind == 1:
            array = array[: rng.integers(len(array) + 1)]
        elif kind == 2:
            array = array.astype(rng.choice([np.float64, np.int8, np.int64]))
        else:
            array = np.concatenate([array, array])
        arrays[name] = array
        rng.choice([np.savez, np.savez_compressed])(cache, **arrays)
        known = load_findings(cache)
        used += bool(len(known))
        for file in known:
            finding = file.finding
            assert all(isinstance(number, int) for number in file.stamp)
            if not isinstance(finding, str):
                assert 0 < finding.frames == len(finding.pts)
                assert min(finding.height, finding.width) > 0
                assert all(0 <= keyframe < finding.frames for keyframe in finding.keyframes)
    assert 50 < used < 450
    assert capsys.readouterr().err.count("cannot be used") == 500 - used


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_saves_the_findings_and_ends_the_command(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    program = """
import sys, time
from pathlib import Path
from dclr.data import manifest, verification

def verify_video(path):
    if path.name == "slow.mp4":  # the last one, so the findings about the others have arrived
        Path(cache, "all others are done").touch()
        time.sleep(1000)
    return real(path)

real, verification.verify_video = verification.verify_video, verify_video
root, cache, *names = sys.argv[1:]
manifest.load_manifest(Path(root), names, workers=1, progress=False, cache_dir=Path(cache))
"""
    (root / "slow.mp4").write_text("the decoder sleeps")
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", program, str(root), str(cache), *GOOD, "slow.mp4"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        while not (cache / "all others are done").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -number
    assert errors == f"stopped by {number.name}: the videos verified so far are not decoded again\n"
    monkeypatch.setattr("dclr.data.verification.verify_video", None)  # nothing is decoded again
    assert list(load_manifest(root, GOOD, workers=1, progress=False, cache_dir=cache).records) == GOOD


def test_too_little_memory_to_verify_is_one_line(root, monkeypatch):
    def short_of_memory(path: Path) -> None:
        raise MemoryError

    monkeypatch.setattr(verification, "verify_video", short_of_memory)
    with pytest.raises(UserError, match=r": a process that verifies videos has too little memory: lower --workers$"):
        load_manifest(root, ["a.mp4"], workers=1, progress=False, cache_dir=root.parent / "cache")
