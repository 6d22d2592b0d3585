"""A packed store on a server, read through fsspec: https://HOST/PATH/STORE, s3://BUCKET/STORE and others.

A video is fetched whole and kept in the local cache, or only the wanted frames are fetched. `choose_cached` decides
which. A whole video is compared with the checksum in the store's index. A part of a video has no checksum. So the
server is asked after each such read whether the file is still the same.

A connection that is lost is tried again for a minute. Then the run ends, and it can be resumed exactly. The videos are
not skipped as unreadable ones, because an outage concerns all of them and the run would train on other samples.
"""

import hashlib
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path, PosixPath
from typing import Any, Self, TypeVar

import numpy as np

from dclr.config import is_url
from dclr.data.decode import UnreadableVideo
from dclr.data.decoder_process import report_progress
from dclr.data.video_cache import VideoCache, cache_folder, cache_limit
from dclr.errors import UserError

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds to wait before each further try to read from the server."""

WAITS_AT_START = (0.5, 1.0)
"""The same before training, when a wrong address is more likely than a lost connection."""

SECONDS, BYTES_PER_SECOND = 30.0, 250_000
"""A request may take SECONDS, and more if it has so many bytes that this rate takes longer."""

GAP = 2**17
"""Bytes between two wanted ranges below which both are fetched as one. They take less time than another request."""

AT_ONCE = 32
"""Requests at once when the sizes of all shards are read."""

_STATED = ("size", "ETag", "etag", "md5Hash", "Content-MD5", "Last-Modified", "LastModified", "updated", "mtime")
"""What servers say about a file, by the names that the file systems of fsspec give it. It changes with the content."""

T = TypeVar("T")


class RemotePath(PosixPath):
    """The address of a folder or file on a server. Messages show it, and fsspec opens it.

    A Path would turn "s3://bucket" into "s3:/bucket".
    """

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)

    def resolve(self, strict: bool = False) -> Self:
        return self


def data_path(text: str) -> Path:
    """Return the path that --data names, a RemotePath for a URL."""
    return RemotePath(text) if is_url(text) else Path(text)


class Missing(Exception):
    """The server has no such file, or the file ends too early."""


class RemoteFolder:
    """A folder on a server. A process opens its connections when it first reads, so a forked process has its own."""

    def __init__(self, path: RemotePath) -> None:
        self.path = path

    def read_file(self, name: str, most: int) -> bytes:
        """Return a whole file.

        The first byte is read alone. A server that ignores ranges is noticed there, before it sends whole files.

        Raises:
            Missing: see `fetch`.
            UserError: see `fetch`; the server does not say the file's size, or the file has more than `most` bytes.
        """
        self.fetch(name, [(0, 1)], at_start=True)
        size = self.states([name], at_start=True)[0][0]
        if not size:
            raise UserError(f"{self.path / name}: the server does not say its size, which reading by ranges needs")
        if int(size) > most:
            raise UserError(f"{self.path / name} was not written by train.py pack ({int(size):,} bytes)")
        (content,) = self.fetch(name, [(0, int(size))], at_start=True)
        return content

    def fetch(self, name: str, spans: Sequence[tuple[int, int]], at_start: bool = False) -> list[bytes]:
        """Return byte ranges (start, stop) of a file, fetched at the same time.

        Args:
            at_start: repeat failed requests for seconds only, and not for a minute.

        Raises:
            Missing: there is no such file, or it ends before a range does.
            UserError: the server refuses, ignores ranges or cannot be reached.
        """
        system, root = self._open()
        calls = [partial(system.cat_file, f"{root}/{name}", start=start, end=stop) for start, stop in spans]
        longest = max(stop - start for start, stop in spans)
        found = self._try(name, calls, SECONDS + longest / BYTES_PER_SECOND, at_start)
        for content, (start, stop) in zip(found, spans, strict=True):
            if len(content) > stop - start:
                raise UserError(
                    f"{self.path / name}: the server ignores byte ranges: it sent {len(content):,} bytes instead of "
                    f"{stop - start:,}; serve the store by a server that supports them, such as nginx"
                )
            if len(content) < stop - start:
                raise Missing(f"it has no bytes {start:,} to {stop:,}")
        return found

    def states(self, names: Sequence[str], at_start: bool = False) -> list[tuple[str, ...]]:
        """Return what the server says about each file, in the order of _STATED: its size first, "" if it is not known.

        Errors are those of `fetch`.
        """
        system, root = self._open()
        found: list[tuple[str, ...]] = []
        for first in range(0, len(names), AT_ONCE):
            some = names[first : first + AT_ONCE]
            calls = [partial(system.info, f"{root}/{name}") for name in some]
            for answer in self._try(some[0], calls, SECONDS, at_start):
                found.append(tuple("" if answer.get(key) is None else str(answer[key]) for key in _STATED))
        return found

    def _open(self) -> tuple[Any, str]:
        """Return the file system and the folder's name in it. fsspec keeps one file system for each process."""
        try:
            from fsspec.config import conf
            from fsspec.core import url_to_fs

            options: dict[str, Any] = {}
            if str(self.path).startswith("http"):
                own = [conf.get(protocol, {}).get("headers", {}) for protocol in ("http", "https")]
                # A compressed answer would have other bytes.
                options["headers"] = {**own[0], **own[1], "Accept-Encoding": "identity"}
            system, root = url_to_fs(str(self.path), **options)
        except ImportError as error:
            raise UserError(
                f"--data {self.path} needs a package that is not installed ({error}): pip install 'dclr[remote]', "
                "which has those for https:// and s3://"
            ) from None
        except (ValueError, OSError) as error:
            raise UserError(f"--data {self.path} cannot be opened: {error}") from None
        return system, root.rstrip("/")

    def _try(self, name: str, calls: Sequence[Callable[[], T]], seconds: float, at_start: bool) -> list[T]:
        """Return the results of the calls, which run at the same time, and repeat them if the connection fails."""
        waits = WAITS_AT_START if at_start else WAITS
        for wait in (*waits, None):
            try:
                return _run_at_once(calls, seconds)
            except Exception as error:  # each protocol has its own
                status, reason = _status(error), _reason(error)
                if status in (404, 410, 416):
                    raise Missing("the server has no such file") from error
                if status in (401, 403):
                    raise UserError(
                        f"{self.path / name} cannot be read: the server refuses access ({reason}); credentials come "
                        "from the environment or from files such as ~/.aws/credentials"
                    ) from error
                if wait is None:
                    tries = len(waits) + 1
                    raise UserError(
                        f"{self.path / name} cannot be read, after {tries} tries: {reason}; "
                        "a training run continues with --resume when the server answers again"
                    ) from error
                _sleep(wait)
        raise AssertionError


def _run_at_once(calls: Sequence[Callable[[], T]], seconds: float) -> list[T]:
    """Run each call in a thread of its own and return the results. Raises the first error, or TimeoutError.

    This process waits for at most `seconds`, and in this time it counts as making progress. The threads do not keep the
    process alive.
    """
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for thread in threads:
        while thread.is_alive():
            if time.monotonic() > deadline:
                raise TimeoutError(f"no complete answer within {seconds:.0f} s")
            thread.join(min(1.0, seconds))
            report_progress()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(calls))]


def _sleep(seconds: float) -> None:
    """Sleep, and count as making progress."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 1.0))
        report_progress()


def _cause(error: BaseException) -> BaseException:
    """Return the original error. Some file systems of fsspec turn every error into FileNotFoundError."""
    return error.__cause__ if isinstance(error, OSError) and error.__cause__ is not None else error


def _status(error: BaseException) -> int:
    """Return the HTTP status that stands for an error, or 0 for an error that may be temporary."""
    cause = _cause(error)
    response = getattr(cause, "response", None)
    of_s3 = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
    status = of_s3 or getattr(cause, "status", None)
    if isinstance(status, int):
        return status
    if type(cause).__name__ == "NoCredentialsError" or isinstance(cause, PermissionError):
        return 403
    return 404 if isinstance(cause, FileNotFoundError) else 0


def _reason(error: BaseException) -> str:
    cause = _cause(error)
    return f"{type(cause).__name__}: {cause}"[:300].rstrip(": ")


class RemoteVideos:
    """The bytes of V videos of a store on a server, through the cache."""

    def __init__(
        self,
        path: RemotePath,
        name: Callable[[int], str],
        offsets: np.ndarray,
        sizes: np.ndarray,
        crc32: np.ndarray,
    ) -> None:
        """Open the cache.

        Args:
            path: the store.
            name: row of a video -> name of its file in the store.
            offsets, sizes, crc32: (V,) of the bytes in the file, as the index of the store has them.

        Raises:
            UserError: the cache cannot be used, see `VideoCache`.
        """
        self.folder, self._name = RemoteFolder(path), name
        self._offsets, self._sizes, self._crc32 = offsets, sizes, crc32
        key = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in (offsets, sizes, crc32)))
        self.cache = VideoCache(cache_folder(), cache_limit(), key.hexdigest()[:16], sizes, crc32)
        self._states: dict[str, tuple[str, ...]] = {}

    def remember(self, sizes: dict[str, int]) -> str:
        """Ask the server for the state of files, and keep it. Return what is wrong with the first bad file, or "".

        `sizes`: name of a file -> the bytes that it should have.
        """
        try:
            self._states = dict(zip(sizes, self.folder.states(list(sizes), at_start=True), strict=True))
        except Missing:
            return "a shard is missing: upload the whole store"
        for name, size in sizes.items():
            if self._states[name][0] not in ("", str(size)):
                return f"{name} has {self._states[name][0]} bytes instead of {size}: upload the store again"
        return ""

    def read(self, row: int, spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return byte ranges (start, stop) of a video, counted from its first byte, each (stop - start,) uint8.

        Raises:
            UnreadableVideo: the file is missing or damaged.
            UserError: the server cannot be reached, refuses, or has another file than when the run started.
        """
        if self.cache.chosen[row]:
            content = self.whole(row)
            return [content[start:stop] for start, stop in spans]
        if not spans:
            return []
        joined = _join(spans)
        name, offset = self._name(row), int(self._offsets[row])
        try:
            if name not in self._states:
                (self._states[name],) = self.folder.states([name])
            found = self.folder.fetch(name, [(offset + start, offset + stop) for start, stop in joined])
            if self.folder.states([name]) != [self._states[name]]:
                raise UserError(
                    f"{self.folder.path / name} has changed on the server while this run reads it: put the store of "
                    "this run back, or start another run"
                )
        except Missing as reason:
            raise UnreadableVideo(f"{name}: {reason}") from reason
        arrays = [np.frombuffer(content, np.uint8) for content in found]
        result = []
        for start, stop in spans:
            number = next(n for n, (first, end) in enumerate(joined) if first <= start and stop <= end)
            first = joined[number][0]
            result.append(arrays[number][start - first : stop - first])
        return result

    def whole(self, row: int) -> np.ndarray:
        """Return all bytes of a video, (size,) uint8, from the cache or from the server. Errors are those of `read`."""
        cached = self.cache.find(row) if self.cache.chosen[row] else None
        if cached is not None:
            return cached
        content = self.download(row)
        if self.cache.chosen[row]:
            self.cache.add(row, content)
        return np.frombuffer(content, np.uint8)

    def download(self, row: int) -> bytes:
        """Return all bytes of a video from the server, compared with their checksum. Errors are those of `read`."""
        name, offset, size = self._name(row), int(self._offsets[row]), int(self._sizes[row])
        for _ in range(2):  # once more, if it was damaged on the way
            try:
                (content,) = self.folder.fetch(name, [(offset, offset + size)])
            except Missing as reason:
                raise UnreadableVideo(f"{name}: {reason}") from reason
            if zlib.crc32(content) == self._crc32[row]:
                return content
        raise UnreadableVideo(f"{name}: its checksum differs: it is damaged, or it has changed on the server")


def _join(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the ranges that cover `spans`, in order, with those joined that overlap or have at most GAP between
    them."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1] + GAP:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined
