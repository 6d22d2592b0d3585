"""Verification: one complete decode of every video finds what is readable, how long it is and where seeking works.

The findings are kept in one cache file per data folder, outside of it because data folders are often read-only. They
are found again by path, file size and modification time. So only new and changed files are decoded at the next start.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from dclr.data.decode import VideoRecord
from dclr.data.decoder_process import TIMEOUT
from dclr.data.file_content import DIGEST_BYTES, FileStatus, find_status
from dclr.data.findings import Findings, Stamp, load_findings
from dclr.data.records import Records
from dclr.data.string_array import unpack_strings
from dclr.data.verification import verify_files
from dclr.errors import UserError


class RecordsByPath(Mapping[str, VideoRecord]):
    """The records of N readable videos by path relative to the data folder. A record is made when it is asked for.

    Attributes:
        paths: N paths.
        records: N records as arrays.
    """

    def __init__(self, paths: list[str], records: Records) -> None:
        self.paths, self.records = paths, records

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {path: row for row, path in enumerate(self.paths)}

    @cached_property
    def _damages(self) -> list[str]:
        return unpack_strings(self.records.damages)

    def __getitem__(self, path: str) -> VideoRecord:
        row = self._rows[path]
        return replace(self.records[row], damage=self._damages[row])

    def __contains__(self, path: object) -> bool:
        return path in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self, paths: list[str]) -> np.ndarray:
        """Return the positions of paths, (number of paths,) int64. Raises KeyError."""
        if paths == self.paths:  # saves a dictionary of all paths
            return np.arange(len(paths))
        return np.array([self._rows[path] for path in paths], np.int64)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The findings about each requested video. A video is either in `records` or in `unreadable`, in the requested
    order."""

    root: Path
    records: RecordsByPath
    unreadable: dict[str, str]
    """Path relative to root -> reason in one line."""
    sizes: np.ndarray
    """(N,) int64, bytes of the files in `records`."""


@dataclass(frozen=True, kw_only=True)
class KnownFiles:
    """What the cache knows about files as they are now."""

    paths: list[str]
    """Relative to the data folder, each once."""
    status: FileStatus
    findings: Findings
    """All that the cache holds."""
    rows: np.ndarray
    """(number of paths,) int64, the row of the finding about each file; -1: there is none."""

    def unverified(self) -> dict[str, Stamp]:
        """Return path -> stamp, of the files that can be used and have no finding."""
        return {
            self.paths[position]: (int(self.status.stamps[position, 0]), int(self.status.stamps[position, 1]))
            for position in np.flatnonzero(self.rows < 0).tolist()
            if position not in self.status.faults
        }


def look_up(root: Path, paths: Sequence[str], cache_dir: Path | None = None) -> KnownFiles:
    """Return what the cache knows about the files `root / path`. See `load_manifest` for `cache_dir`."""
    paths = list(dict.fromkeys(paths))
    status, findings = find_status(root, paths), load_findings(cache_file(root, cache_dir))
    return KnownFiles(paths=paths, status=status, findings=findings, rows=_known_rows(paths, status, findings))


def load_manifest(
    root: Path,
    paths: Sequence[str],
    *,
    workers: int,
    progress: bool = True,
    cache_dir: Path | None = None,
    timeout: float = TIMEOUT,
    known: KnownFiles | None = None,
) -> Manifest:
    """Verify the videos `root / path` that the cache does not know, in `workers` decoder processes.

    Other processes may verify the same folder at the same time: then each decodes a part (see verification.py). The
    cache keeps the findings of videos that `paths` does not name.

    Args:
        cache_dir: the folder of the cache, by default $XDG_CACHE_HOME/dclr/manifests or ~/.cache/dclr/manifests.
        timeout: seconds without a frame after which a decoder process is killed. Its video is then unreadable, like one
            on which the decoder crashes. These findings are not cached, because the machine may have caused them.
        known: the result of `look_up` for the same files, if the caller has it already.

    Raises:
        UserError: the cache cannot be written, or a video has changed and another process has verified it since.
    """
    known = known or look_up(root, paths, cache_dir)
    paths, status, findings, rows = known.paths, known.status, known.findings, known.rows
    died: dict[str, str] = {}
    if todo := known.unverified():
        cache = cache_file(root, cache_dir)
        died = verify_files(cache, root, todo, workers, timeout, progress)
        findings = load_findings(cache)
        rows = _known_rows(paths, status, findings)

    reasons, numbers = unpack_strings(findings.reasons), findings.record_rows()
    readable = (rows >= 0) & findings.readable[rows] if len(findings) else np.zeros(len(paths), bool)
    unreadable = {}
    for position in np.flatnonzero(~readable).tolist():
        path, row = paths[position], int(rows[position])
        reason = status.faults.get(position) or (died.get(path) if row < 0 else reasons[numbers[row]])
        if reason is None:
            raise UserError(
                f"{root / path} has changed while videos were verified: wait until the data set is complete, then run "
                "the same command again"
            )
        unreadable[path] = reason
    positions = np.flatnonzero(readable)
    return Manifest(
        root=root,
        records=RecordsByPath(
            [paths[position] for position in positions.tolist()], findings.records.select(numbers[rows[positions]])
        ),
        unreadable=unreadable,
        sizes=status.numbers[positions, 2],
    )


def known_digests(root: Path, paths: Sequence[str], status: FileStatus) -> np.ndarray:
    """Return the digests of the ends of files (see file_content.py) that the cache knows, (number of paths,
    DIGEST_BYTES) uint8; zeros: not known."""
    known = load_findings(cache_file(root), warn=False)
    rows = _known_rows(paths, status, known)
    digests = np.zeros((len(paths), DIGEST_BYTES), np.uint8)
    digests[rows >= 0] = known.digests[rows[rows >= 0]]
    return digests


def cache_file(root: Path, cache_dir: Path | None = None) -> Path:
    """Return the cache file of a data folder. See `load_manifest` for `cache_dir`."""
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dclr" / "manifests"
    root = root.resolve()
    return cache_dir / f"{root.name}-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}.npz"


def _known_rows(paths: Sequence[str], status: FileStatus, known: Findings) -> np.ndarray:
    """Return the row of the finding about each file, (number of paths,) int64; -1: none about the file as it is now."""
    row_of = {path: row for row, path in enumerate(unpack_strings(known.paths))}
    rows = np.array([row_of.get(path, -1) for path in paths], np.int64)
    found = np.flatnonzero(rows >= 0)
    changed = (known.stamps[rows[found]] != status.stamps[found]).any(axis=1)
    rows[found[changed]] = -1
    rows[list(status.faults)] = -1
    return rows
