"""Memory does not grow with the number of epochs or videos.

As a script, this module measures training batches in a process without other tests: `python tests/test_memory.py
FOLDER`.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers import children

from dclr.config import DataConfig
from dclr.data.catalog import Video
from dclr.data.datasets import open_catalog
from dclr.data.decode import VideoRecord, empty_planes
from dclr.data.loader import Batches, BatchSampler
from dclr.data.records import collect_records
from dclr.data.samples import PairSamples
from dclr.data.string_array import StringArray
from dclr.data.videos import VideoFiles, VideoSet, open_videos

EPOCHS = 30
SETTLED = 8  # epochs until every worker has seen every video and holds what it will always hold
CONFIG = DataConfig(clip_length=4, crop_size=32)
MIB = 2**20

needs_rollup = pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists() or "Pss_Anon" not in Path("/proc/self/smaps_rollup").read_text(),
    reason="needs Pss_Anon in /proc/PID/smaps_rollup (Linux 5.4)",
)


def memory(process: int | None, kind: str) -> int:
    """Return a value of /proc/PID/smaps_rollup in bytes. In Pss_Anon, a page that n processes share counts 1/n."""
    rollup = Path(f"/proc/{process or 'self'}/smaps_rollup").read_text()
    found = re.search(rf"^{kind}:\s+(\d+) kB$", rollup, re.MULTILINE)
    assert found
    return int(found[1]) * 1024


class MallocInfo(ctypes.Structure):
    """The struct mallinfo2 of glibc."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def allocated(libc: ctypes.CDLL) -> int:
    """Return the bytes that C code has allocated and not freed, without the allocator's reserve."""
    libc.mallinfo2.restype = MallocInfo
    info = libc.mallinfo2()
    return info.uordblks + info.hblkhd


# ---------------------------------------------------------------- by epochs


def test_a_sample_leaves_nothing_allocated(demo_videos):
    """Exact to the byte, in one process. A PyAV iterator dropped before its end left 150 bytes: 1 MB every 7,000
    samples."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs mallinfo2 (glibc 2.33)")
    samples = PairSamples(open_videos(open_catalog(demo_videos), "train", workers=1, progress=False), CONFIG, 0)
    count, videos = 200, len(samples.videos)
    into = empty_planes(samples.frames_a_sample, int(samples.videos.heights.max()), int(samples.videos.widths.max()))

    def read(first: int) -> tuple[int, int]:
        for number in range(first, first + count):
            samples.read_into(number // videos, number % videos, into)
        gc.collect()
        return allocated(libc), sys.getallocatedblocks()

    read(0)
    before, after = read(count), read(2 * count)
    assert after[0] - before[0] < 50 * count
    assert after[1] - before[1] < 0.5 * count  # Python's own objects: less than one for two samples


class Leaky(PairSamples):
    """Samples that leak 16 KiB each in the worker that reads them."""

    kept: list[bytes] = []  # noqa: RUF012

    def read(self, epoch, index, into=None):
        self.kept.append(os.urandom(16 * 1024))
        return super().read(epoch, index, into)


def growth(samples: PairSamples) -> int:
    """Return the growth in bytes of this process and its workers from epoch SETTLED to the end. Shared pages count
    once."""
    videos, found = len(samples.videos), []
    for number, batch in enumerate(Batches(samples, BatchSampler(videos, videos // 2, EPOCHS), workers=2)):
        assert batch.frames.y.any()
        if number in (2 * SETTLED, 2 * EPOCHS - 6):  # the workers have not read everything yet
            time.sleep(0.5)  # but all that they have been asked for
            workers = children()
            assert len(workers) == 4  # each with its decoder
            found.append([memory(process, "Pss_Anon") for process in (None, *workers)])
    print(f"{type(samples).__name__}: bytes of this process and its children at both times: {found}", file=sys.stderr)
    return sum(found[1]) - sum(found[0])


def collected(samples: PairSamples) -> int:
    """Return the growth in bytes after a full garbage collection, which happens by itself once in thousands of
    steps."""
    batches = Batches(samples, BatchSampler(len(samples.videos), 8, EPOCHS), workers=2)
    next(batches)
    before = memory(None, "Pss_Anon")
    gc.collect()
    return memory(None, "Pss_Anon") - before


@pytest.mark.slow
@needs_rollup
def test_memory_stays_flat_over_epochs(demo_videos):
    """300 samples with two workers grow by at most 2 MiB, which forked processes still copy. A leak of 16 KiB each is 5
    MiB."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    run = subprocess.run([sys.executable, __file__, demo_videos], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kept, with_leak, by_collecting = json.loads(run.stdout)
    assert kept < 2 * MIB, run.stderr
    assert by_collecting < 4 * MIB  # without gc.freeze before the workers are forked: 66 MB
    assert with_leak > kept + 3 * MIB, run.stderr


# ---------------------------------------------------------------- by videos


def in_worker(work: Callable[[], None]) -> int:
    """Return the growth in private bytes of a forked process that calls `work`."""

    def run(result):
        gc.freeze()  # as a decoder process does
        before = memory(None, "Private_Dirty")
        work()
        result.put(memory(None, "Private_Dirty") - before)

    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    worker = context.Process(target=run, args=(result,))
    worker.start()
    found = result.get()
    worker.join()
    return found


@needs_rollup
def test_a_worker_does_not_copy_the_list_of_videos():
    """200,000 videos, about as many as in Kinetics-400: reading arrays copies nothing, reading objects copies all."""
    listed = tuple(Video(path=f"train/{n % 400:03d}/{n:011d}_000010_000020.mp4", label=n % 400) for n in range(200_000))
    record = VideoRecord(
        frames=3,
        declared=3,
        height=240,
        width=320,
        seekable=False,
        skippable=False,
        pts=np.arange(3),
        keyframes=np.zeros(1, np.int64),
    )
    paths, ones = StringArray(video.path for video in listed), np.ones(len(listed), np.int64)
    source = VideoFiles(Path("/data"), paths, collect_records([record] * len(listed)))
    videos = VideoSet(
        root=Path("/data"), layout="", classes=(), unreadable={}, paths=paths, labels=ones, frames=ones, heights=ones,
        widths=ones, source=source,
    )  # fmt: skip

    def look_at_arrays() -> None:
        for index in range(0, len(videos), 3):  # a page holds about 60 of them
            assert videos.path(index) == listed_path(index)
            assert source.record(index).width == 320

    def listed_path(index: int) -> str:
        return f"train/{index % 400:03d}/{index:011d}_000010_000020.mp4"

    def look_at_objects() -> None:
        for index in range(0, len(listed), 3):
            assert listed[index].path == listed_path(index)

    assert in_worker(look_at_arrays) < 2 * MIB
    assert in_worker(look_at_objects) > 15 * MIB


@needs_rollup
def test_a_worker_that_collects_garbage_copies_nothing():
    """A collection copies no inherited objects, of which torch and its imports have 80 MiB."""
    assert in_worker(gc.collect) < 10 * MIB


if __name__ == "__main__":
    found = open_videos(open_catalog(Path(sys.argv[1])), "train", workers=1, progress=False)
    grown = [growth(kind(found, CONFIG, 0)) for kind in (PairSamples, Leaky)]
    print(json.dumps([*grown, collected(PairSamples(found, CONFIG, 0))]))
