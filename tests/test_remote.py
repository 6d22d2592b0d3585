"""A packed store on a server: its frames are those of the local store, and every fault of server or cache is named."""

import errno
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import pytest
import torch
from fsspec.spec import AbstractFileSystem
from helpers import assert_same_end

from benchmarks import tables
from benchmarks.range_server import Handler, serve
from benchmarks.remote import LOCAL, PROVIDERS, Round, figures, take_frames, write_tars
from dclr.commands import evaluate, train
from dclr.config import DataConfig, FinetuneConfig
from dclr.data import check, pack, remote, video_cache
from dclr.data.datasets import open_data
from dclr.data.decode import UnreadableVideo
from dclr.data.encode import write_video
from dclr.data.loader import Batches, BatchSampler
from dclr.data.samples import PairSamples
from dclr.data.video_cache import VideoCache, choose_cached
from dclr.data.videos import VideoSet, open_videos
from dclr.errors import UserError
from dclr.models import ClipFormat, build_backbone, save_backbone

WANTED = np.array([1, 3, 5, 7, 14, 16, 18, 2, 2, 0])


class Server(AbstractFileSystem):
    """A server without a network. It serves the folder `root` as server://HOST, and fails as a test wants."""

    protocol = "server"
    root: ClassVar[Path]
    ranges: ClassVar[list[tuple[str, int, int]]]
    """(file, start, stop) of each range that was read."""
    faults: ClassVar[list[Callable[[bytes], bytes] | Exception | None]]
    """What is done to the next answers."""

    def file(self, path: str) -> Path:
        return self.root / self._strip_protocol(path).removeprefix("host/")

    def cat_file(self, path: str, start: int, end: int, **_: Any) -> bytes:
        content = self.file(path).read_bytes()[start:end]
        self.ranges.append((self.file(path).name, start, end))
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            raise fault
        return fault(content) if fault else content

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        status = self.file(path).stat()
        return {"name": path, "size": status.st_size, "type": "file", "ETag": f"{status.st_mtime_ns}"}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two stores of four videos, `planes` and `compact`."""
    root = tmp_path_factory.mktemp("remote")
    for number in range(4):
        file = root / "videos" / "ab"[number % 2] / f"{number}.mp4"
        file.parent.mkdir(parents=True, exist_ok=True)
        frames = np.random.default_rng(number).integers(0, 256, (20 + number, 32, 48, 3), dtype=np.uint8)
        write_video(file, frames)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pack, "SHARD_BYTES", 90_000)
        for kind in ("planes", "compact"):
            pack.pack(DataConfig(data=str(root / "videos")), str(root / kind), 32, compact=kind == "compact")
    return root


@pytest.fixture(autouse=True)
def server(stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    """The server, which serves `stores`. The cache is in a folder of the test, and nothing waits."""
    fsspec.register_implementation("server", Server, clobber=True)
    Server.root, Server.ranges, Server.faults = stores, [], []
    monkeypatch.setenv(video_cache.FOLDER, str(tmp_path / "cache"))
    for name in ("WAITS", "WAITS_AT_START"):
        monkeypatch.setattr(remote, name, (0.0, 0.0))
    return Server


def open_train(data: str | Path) -> VideoSet:
    return open_videos(open_data(DataConfig(data=str(data))), "train", workers=1)


def assert_same_frames(ours: VideoSet, theirs: VideoSet) -> None:
    assert ours.fingerprint() == theirs.fingerprint()
    for index in range(len(theirs)):
        read, expected = ours.read(index, WANTED), theirs.read(index, WANTED)
        for plane in "yuv":
            assert np.array_equal(getattr(read, plane), getattr(expected, plane))


# ---------------------------------------------------------------- the same frames


@pytest.mark.parametrize("gigabytes", ["1", "0"], ids=["cached", "by ranges"])
@pytest.mark.parametrize("kind", ["planes", "compact"])
def test_frames_are_those_of_the_local_store(stores, server, monkeypatch, kind, gigabytes):
    monkeypatch.setenv(video_cache.SIZE, gigabytes)
    local, far = open_train(stores / kind), open_train(f"server://host/{kind}")
    assert str(far.root) == f"server://host/{kind}"
    assert [name for name, _, _ in server.ranges] == ["dclr-index.npz"] * 2
    assert_same_frames(far, local)
    once = len(server.ranges)
    assert_same_frames(far, local)
    assert_same_frames(open_train(f"server://host/{kind}"), local)
    fetched = [name for name, _, _ in server.ranges[once:] if name != "dclr-index.npz"]
    assert len(fetched) == (0 if gigabytes == "1" else 2 * len(local))
    assert far.read(0, np.empty(0, np.int64)).y.shape == (0, 32, 48)


def test_a_part_of_a_video_is_fetched_where_the_video_is_not_cached(stores, server, monkeypatch):
    monkeypatch.setenv(video_cache.SIZE, "0")
    monkeypatch.setattr(remote, "GAP", 0)
    far = open_train("server://host/planes")
    server.ranges.clear()
    far.read(1, np.array([12, 14, 16, 3, 4, 5, 13]))
    frame, offset = 32 * 48 * 3 // 2, int(far.source.store.offsets[far.source.rows[1]])
    assert sorted((start - offset, stop - offset) for _, start, stop in server.ranges) == [
        (3 * frame, 6 * frame),
        (12 * frame, 17 * frame),
    ]


def test_worker_processes_read_the_same_batches(stores):
    config = DataConfig(clip_length=4, crop_size=16)
    found = []
    for data in (stores / "planes", "server://host/planes"):
        samples = PairSamples(open_train(data), config, 0)
        batches = Batches(samples, BatchSampler(4, 2, 2), workers=2)
        found.append([(b.frames.y.clone(), b.frames.v.clone(), b.indices, b.query_params.still.box) for b in batches])
    for ours, theirs in zip(*found, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_a_run_that_was_started_on_a_local_copy_resumes_on_the_server(train_main, tiny_pretrain, stores, tmp_path):
    flags = {**tiny_pretrain, "crop_size": 16, "batch_size": 2, "queue_length": 8}
    train_main(**flags | {"data": stores / "planes"}, out=tmp_path / "whole")
    train_main(**flags | {"data": stores / "planes", "epochs": 1}, out=tmp_path / "run")
    train_main(resume=tmp_path / "run", data="server://host/planes", epochs=2)
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"]["data"] == "server://host/planes"
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["data"]["folder"] == "server://host/planes"


# ---------------------------------------------------------------- faults of the server


def test_a_lost_connection_is_tried_again(stores, server):
    far = open_train("server://host/planes")
    server.faults += [ConnectionResetError("lost"), TimeoutError()]
    assert_same_frames(far, open_train(stores / "planes"))


def test_a_connection_that_stays_lost_ends_the_run_and_names_the_address(server):
    far = open_train("server://host/planes")
    server.faults += [ConnectionResetError("lost")] * 3
    message = "server://host/planes/shard-00000.yuv cannot be read, after 3 tries: ConnectionResetError: lost"
    with pytest.raises(UserError, match=re.escape(message) + ".*--resume"):
        far.read(0, WANTED)


def test_a_call_that_never_returns_counts_as_a_lost_connection():
    released = remote.threading.Event()
    with pytest.raises(TimeoutError, match="no complete answer within 0 s"):
        remote._run_at_once([released.wait], 0.01)
    released.set()


def test_a_video_that_was_damaged_on_the_way_is_fetched_again(stores, server):
    far = open_train("server://host/planes")
    server.faults.append(lambda content: bytes(len(content)))
    assert_same_frames(far, open_train(stores / "planes"))


@pytest.mark.parametrize("kind", ["planes", "compact"])
def test_a_video_that_is_damaged_on_the_server_is_unreadable(stores, server, tmp_path, capsys, kind):
    shutil.copytree(stores / kind, tmp_path / kind)
    server.root = tmp_path
    far = open_train(f"server://host/{kind}")
    file = sorted(tmp_path.glob(f"{kind}/shard-00000*"))[-1 if kind == "planes" else 0]
    file = next(file.iterdir()) if file.is_dir() else file
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UnreadableVideo, match=r"^shard-00000.*: its checksum differs"):
        far.read(0, WANTED)
    with pytest.raises(
        UserError, match=r"damaged shards, 1 of .*: upload shard-00000\S* of the store to server://host"
    ):
        check.check(DataConfig(data=f"server://host/{kind}"))
    assert "is damaged at a/0.mp4" in capsys.readouterr().out
    file.unlink()
    with pytest.raises(UnreadableVideo, match="the server has no such file"):
        far.read(0, WANTED)


def test_a_search_shows_the_videos_of_a_store_on_a_server(stores, tmp_path, capsys):
    torch.manual_seed(0)
    weights = tmp_path / "backbone.safetensors"
    save_backbone(build_backbone("r2plus1d_10", 4), weights, ClipFormat(length=4, stride=2, crop=16))
    features = tmp_path / "features.npz"
    common = ["--checkpoint", str(weights), "--workers", "0"]
    search = ["search", *common, "--query", "a/0.mp4", "--html"]
    evaluate.main([*search, "--data", "server://host/planes", "--out", str(tmp_path / "found")])
    assert (tmp_path / "found" / "search.html").read_text().count("<video ") == 4
    # A file of features that somebody else wrote does not choose the server.
    evaluate.main(["features", *common, "--data", "server://host/planes", "--out", str(features)])
    capsys.readouterr()
    evaluate.main([*search, "--features", str(features), "--out", str(tmp_path / "again")])
    assert "warning: 4 videos cannot be shown" in capsys.readouterr().err
    results = [(tmp_path / name / "results.csv").read_text() for name in ("found", "again")]
    assert results[0] == results[1]


def test_a_store_that_changes_on_the_server_ends_the_run(stores, server, tmp_path, monkeypatch):
    monkeypatch.setenv(video_cache.SIZE, "0")
    shutil.copytree(stores / "planes", tmp_path / "planes")
    server.root = tmp_path
    far = open_train("server://host/planes")
    far.read(0, WANTED)
    os.utime(tmp_path / "planes" / "shard-00000.yuv", (1, 1))
    with pytest.raises(UserError, match=r"shard-00000.yuv has changed on the server while this run reads it"):
        far.read(0, WANTED)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda content: content + b"more", "the server ignores byte ranges: it sent 5 bytes instead of 1"),
        (PermissionError("AccessDenied"), "cannot be read: the server refuses access (PermissionError: AccessDenied)"),
        (FileNotFoundError("NoSuchBucket"), "holds no dclr-index.npz: a URL must be that of a packed store"),
    ],
    ids=["no ranges", "refused", "missing"],
)
def test_a_server_without_a_readable_store_is_refused(server, fault, message):
    server.faults.append(fault)
    with pytest.raises(UserError, match=re.escape(message)):
        open_train("server://host/planes")


def test_an_index_or_a_shard_that_is_not_what_was_packed_is_refused(stores, server, tmp_path):
    shutil.copytree(stores / "planes", tmp_path / "planes")
    server.root, index = tmp_path, tmp_path / "planes" / "dclr-index.npz"
    shard = tmp_path / "planes" / "shard-00000.yuv"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard-00000.yuv has \d+ bytes instead of \d+: upload the store again"):
        open_train("server://host/planes")
    shard.unlink()
    with pytest.raises(UserError, match="a shard is missing: upload the whole store"):
        open_train("server://host/planes")
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"server://host/planes/dclr-index.npz is damaged"):
        open_train("server://host/planes")


# ---------------------------------------------------------------- the address


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://me:hunter2@host/store", "--data https://...@... holds a user name or a password"),
        ("s3://hunter2:x@bucket/store", "--data s3://...@... holds a user name or a password"),
        ("https://host/store?key=hunter2", "--data https://host/store is followed by ? or #"),
        ("https:///store", "--data https:///store names no server"),
        ("https://[::1/store", "--data is not a URL"),
        ("file:///store", "--data is a file:// URL: give the path of the folder"),
    ],
)
def test_an_address_with_a_secret_or_without_a_server_is_refused(url, message):
    for make in (lambda: DataConfig(data=url), lambda: FinetuneConfig(data=DataConfig(data=url))):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            make()
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/store", "needs a package that is not installed .*: pip install 'dclr\\[remote\\]'"),
        ("nothing://host/store", "--data nothing://host/store cannot be opened: Protocol not known: nothing"),
    ],
)
def test_a_protocol_without_its_package_is_refused_in_one_line(monkeypatch, url, message):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(UserError, match=message):
        open_train(url)


def test_commands_that_cannot_use_an_address_say_so(tmp_path):
    with pytest.raises(UserError, match="--data server://host/planes is a packed store already"):
        pack.pack(DataConfig(data="server://host/planes"), str(tmp_path / "out"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(
        '{"command": "pretrain", "preset": "demo", "data": {"data": "https://host/store"}}'
    )
    with pytest.raises(UserError, match="was trained on https://host/store, and a server is only contacted if --data"):
        evaluate.settings_of(tmp_path / "run", {})
    config, _ = train.resolve_resumed("pretrain", "", {}, tmp_path / "run", None, {})
    assert config.data.data == "https://host/store"


# ---------------------------------------------------------------- the cache

SIZES = np.array([300, 0, 500, 200], np.int64)


def content_of(row: int) -> bytes:
    return bytes([row + 1]) * int(SIZES[row])


def make_cache(folder: Path, limit: int, key: str = "a") -> VideoCache:
    crc32 = np.array([video_cache.zlib.crc32(content_of(row)) for row in range(4)], np.uint32)
    return VideoCache(folder, limit, key, SIZES, crc32)


def held(folder: Path) -> int:
    """Return the bytes in a cache."""
    return sum(file.stat().st_size for file in folder.glob("store-*/*/*"))


def test_the_cached_part_of_a_store_fits_and_stays_the_same():
    sizes = np.random.default_rng(1).integers(1, 100, 1000)
    for limit in (0, 5_000, 25_000, 10**9):
        chosen = choose_cached(sizes, limit)
        assert sizes[chosen].sum() <= limit
        assert sizes[chosen].sum() > min(limit, sizes.sum()) - 100
        assert np.array_equal(chosen, choose_cached(sizes, limit))
        assert (choose_cached(sizes, 10**9) >= chosen).all()
    assert not choose_cached(np.array([0, video_cache.LARGEST + 1]), 2**40).any()


def test_the_least_recently_used_videos_make_room_and_the_size_stays_bounded(tmp_path):
    old, new = make_cache(tmp_path, 1100), make_cache(tmp_path, 1100, "b")
    for row in (0, 2, 3):
        old.add(row, content_of(row))
        os.utime(old._path(row), (row + 2, row + 2))
    being_read = old.find(2)
    os.utime(old._path(2), (1, 1))
    new.add(2, content_of(2))
    assert held(tmp_path) == 1000
    assert old.find(2) is None
    assert being_read.tobytes() == content_of(2)  # a reader keeps what it has opened
    assert old.find(0) is not None
    left = new._path(0).with_name("0.left.part")  # by a process that was killed
    left.write_bytes(bytes(40))
    os.utime(left, (1, 1))
    new.add(0, content_of(0))
    assert not left.exists()
    assert held(tmp_path) <= 1100
    (tmp_path / video_cache.LOCK).write_text("")
    new.add(3, content_of(3))
    assert held(tmp_path) <= 1100
    assert int((tmp_path / video_cache.LOCK).read_text()) == held(tmp_path)


@pytest.mark.parametrize("torn", [b"", bytes(299), bytes(300), bytes(301)])
def test_a_torn_file_is_never_used(tmp_path, torn):
    make_cache(tmp_path, 1000).add(0, content_of(0))
    after_a_power_failure = make_cache(tmp_path, 1000)
    after_a_power_failure._path(0).write_bytes(torn)
    assert after_a_power_failure.find(0) is None
    after_a_power_failure.add(0, b"\0" * 300)
    after_a_power_failure._path(0).unlink()
    after_a_power_failure.add(0, content_of(0))
    assert after_a_power_failure.find(0).tobytes() == content_of(0)


def test_processes_share_the_cache(tmp_path):
    """Six processes read and write two stores of 1,000 bytes each in a cache of 1,050."""
    caches = [make_cache(tmp_path, 1050, key) for key in "ab"]
    children = []
    for number in range(6):
        if (child := os.fork()) == 0:
            rng, status = np.random.default_rng(number), 1
            try:
                for _ in range(40):
                    cache, row = caches[rng.integers(2)], int(rng.choice([0, 2, 3]))
                    found = cache.find(row)
                    assert found is None or found.tobytes() == content_of(row)
                    if found is None:
                        cache.add(row, content_of(row))
                    with cache._locked():
                        assert held(tmp_path) <= 1050
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert not caches[0]._failed[0]


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"the cache .*file cannot be written \(Not a directory\): set DCLR_CACHE to"):
        make_cache(tmp_path / "file", 1000)
    assert make_cache(tmp_path / "file", 0).find(0) is None
    free = os.statvfs_result((1, 1, 900, 900, 900, 0, 0, 0, 0, 0))
    monkeypatch.setattr(os, "statvfs", lambda folder: free)
    with pytest.raises(UserError, match=r"may grow to 0.0 GB, and 0.0 GB are free: lower DCLR_CACHE_GB, or set"):
        make_cache(tmp_path, 1000)
    for text in ("many", "-1", "nan"):
        monkeypatch.setenv(video_cache.SIZE, text)
        with pytest.raises(UserError, match=f"DCLR_CACHE_GB is {text}, but must be a number of GB from 0, such as 50"):
            video_cache.cache_limit()


def test_a_disk_that_becomes_full_costs_the_cache_and_not_the_run(stores, server, monkeypatch, capsys):
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    far = open_train("server://host/planes")
    monkeypatch.setattr(video_cache.Path, "rename", full)
    assert_same_frames(far, open_train(stores / "planes"))
    assert_same_frames(far, open_train(stores / "planes"))
    assert (
        capsys.readouterr().err.count("cannot be written (No space left on device): videos that it does not hold") == 1
    )
    assert held(far.source.store.remote.cache.folder) == 0


def test_a_cache_smaller_than_the_store_is_named(stores, monkeypatch, capsys):
    monkeypatch.setenv(video_cache.SIZE, "1e-6")
    far = open_train("server://host/planes")
    assert not far.source.store.remote.cache.chosen.any()
    assert "holds 0 of the store's 0.000198 GB, and the rest is fetched in every epoch" in capsys.readouterr().err
    assert_same_frames(far, open_train(stores / "planes"))


# ---------------------------------------------------------------- real servers


class WithoutRanges(Handler):
    def parse_request(self) -> bool:
        parsed = super().parse_request()
        del self.headers["Range"]
        return parsed


class Refusing(Handler):
    def do_GET(self) -> None:
        self.send_error(403)


class Private(Handler):
    def do_GET(self) -> None:
        if self.headers["Authorization"] == "Bearer secret":
            super().do_GET()
        else:
            self.send_error(401)


class Stopping(Handler):
    """Closes every second connection in the middle of the body."""

    def do_GET(self) -> None:
        if self.server.requests % 2 and self.command == "GET":
            self.server.count(requests=1)
            self.send_response(206)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"half")
            self.close_connection = True
        else:
            super().do_GET()


@pytest.mark.parametrize(
    ("handler", "store", "message"),
    [
        (Handler, "planes", ""),
        (Stopping, "planes", ""),
        (Handler, "none", "/none holds no dclr-index.npz"),
        (WithoutRanges, "planes", "the server ignores byte ranges"),
        (Refusing, "planes", "the server refuses access (ClientResponseError: 403"),
    ],
)
def test_http(stores, handler, store, message):
    pytest.importorskip("aiohttp")
    with serve(stores, handler) as web:
        if message:
            with pytest.raises(UserError, match=re.escape(message)):
                open_train(f"{web.url}/{store}")
        else:
            assert_same_frames(open_train(f"{web.url}/{store}"), open_train(stores / store))


def test_a_private_web_server_gets_the_headers_of_fsspec_s_configuration(stores, monkeypatch):
    pytest.importorskip("aiohttp")
    with serve(stores, Private) as web:
        with pytest.raises(UserError, match=r"the server refuses access \(ClientResponseError: 401"):
            open_train(f"{web.url}/planes")
        monkeypatch.setitem(fsspec.config.conf, "http", {"headers": {"Authorization": "Bearer secret"}})
        assert_same_frames(open_train(f"{web.url}/planes"), open_train(stores / "planes"))


def test_a_host_that_does_not_answer_is_named():
    pytest.importorskip("aiohttp")
    with pytest.raises(UserError, match=r"http://127.0.0.1:9/store/dclr-index.npz cannot be read, after 3 tries: Conn"):
        open_train("http://127.0.0.1:9/store")


def test_s3_without_moto(stores, monkeypatch):
    """Our own server answers what a store needs: s3fs asks for HOST/BUCKET/KEY, as over http."""
    pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    with serve(stores.parent) as web:
        monkeypatch.setenv("AWS_ENDPOINT_URL", web.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        for gigabytes in ("1", "0"):
            monkeypatch.setenv(video_cache.SIZE, gigabytes)
            assert_same_frames(open_train(f"s3://{stores.name}/planes"), open_train(stores / "planes"))
        with pytest.raises(UserError, match=f"s3://{stores.name}/none holds no dclr-index.npz"):
            open_train(f"s3://{stores.name}/none")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], str]]:
    """Start an S3 server on this machine. Gives a function that uploads a folder and returns its URL."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    web = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    web.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*web.get_host_and_port()))
    fsspec.get_filesystem_class("s3").clear_instance_cache()

    def upload(folder: Path) -> str:
        system = fsspec.filesystem("s3")
        system.mkdir("bucket")
        system.put(str(folder), "s3://bucket/store", recursive=True)
        return "s3://bucket/store"

    yield upload
    web.stop()


def test_s3_of_moto(stores, bucket, monkeypatch):
    with pytest.raises(UserError, match=r"s3://bucket/store holds no dclr-index.npz"):
        open_train("s3://bucket/store")
    url = bucket(stores / "planes")
    assert_same_frames(open_train(url), open_train(stores / "planes"))
    monkeypatch.setenv(video_cache.SIZE, "0")
    assert_same_frames(open_train(url), open_train(stores / "planes"))


# ---------------------------------------------------------------- the benchmark


@pytest.mark.parametrize("kind", ["planes", "compact"])
def test_the_tars_hold_the_videos_of_the_store(stores, tmp_path, kind):
    videos = open_train(stores / kind)
    write_tars(videos, tmp_path / "tars")
    with tarfile.open(tmp_path / "tars" / "0000.tar") as tar:
        parts = {entry.name: tar.extractfile(entry).read() for entry in tar}
    for index in range(len(videos)):
        sample = {name[7:]: content for name, content in parts.items() if name.startswith(f"{index:06d}.")}
        y, u, v = take_frames(kind, sample)
        whole = videos.read(index, np.arange(videos.frames[index]))
        found = {frame.tobytes() for frame in whole.y}, {frame.tobytes() for frame in whole.v}
        assert y.shape == (34, 32, 48)
        assert u.shape == (34, 16, 24)
        assert all(frame.tobytes() in found[0] for frame in y)
        assert all(frame.tobytes() in found[1] for frame in v)


def test_the_table_says_what_a_sample_costs_next_to_the_local_store():
    local, far = [Round(100, 50.0, 1.0, 0, 0)] * 2, [Round(100, 25.0, 2.0, 240, 227_000_000)] * 2
    providers = {name: {"skipped": "not installed"} for name in PROVIDERS}
    providers |= {LOCAL: figures(local, local), "store, without cache": figures(far, local)}
    table = tables.remote_table({"rows": [{"latency_ms": 20, "providers": providers}]}, gpu=False)
    assert "| store, without cache | 0.5 | 20.0 to 20.0 | 2.27 | 2.40 |" in table
    assert "| WebDataset, planes | not installed |" in table
