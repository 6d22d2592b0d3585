"""Video files to frames. Only this module and encode.py import av (PyAV, FFmpeg).

Frames are numbered in the order in which the decoder gives them, never by time. Files of real data sets make any other
number unreliable:

- Timestamps are scrambled. Packed-B AVI files of HMDB51 and UCF101 give 1, 4, 3, 6, 5, ...
- Headers declare frames that do not exist, such as 49 frames for 48.
- Empty packets are flagged as keyframes.

So `verify_video` decodes a file once from beginning to end and records what it really contains. `read_planes` reads by
this record. Its frames are byte for byte those of a decode from frame 0.

`read_planes` decodes as little as possible. It seeks, and it skips frames that no wanted frame refers to. It does so
only in files for which a trial has shown that the wanted frames stay the same. In all other files it decodes from the
start and counts.

Frames are returned as they are coded, together with what the file says about showing them (`dclr.data.display`).
Interlaced frames are returned as they are coded too: both fields stay in one frame.
"""

import re
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import av
import av.logging
import numpy as np
from av import Packet
from av.container import InputContainer
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.frame import PictureType, VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from dclr.data.decoder_process import report_progress
from dclr.data.display import AS_CODED, Display, orientation_of

NO_PTS = np.iinfo(np.int64).min
"""Replaces the timestamp of a frame that has none (FFmpeg's own AV_NOPTS_VALUE)."""

MOST_PIXELS = 8192 * 8192
"""Largest frame that is read: twice the largest video format in use (8K, 8192 x 4320), 96 MiB as planes. A few changed
bytes of a header can declare a frame of gigabytes, and a decoder allocates the memory before it finds that the file has
less."""

_BT601 = (2, 5, 6)
"""FFmpeg's AVColorSpace: unspecified, BT.470BG and SMPTE 170M, which have the same matrix. PyAV names only the
second."""

_PLANES_420 = ("yuv420p", "yuvj420p")
"""FFmpeg's names of YUV 4:2:0 with 8 bits and one plane each. The second one is in full range."""

_BICUBIC = int(Interpolation.BICUBIC) | 0x40000 | 0x80000
"""Bicubic with FFmpeg's SWS_ACCURATE_RND and SWS_BITEXACT, which PyAV names from version 18 on. Without these, black
(0) becomes 1 in some places and the result depends on the processor. They cost 6 % of the scaling time."""

_CODECS_THAT_NOTICE_DAMAGE = (
    "h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4", "h263", "flv1", "wmv1", "wmv2", "wmv3", "vc1", "msmpeg4v1",
    "msmpeg4v2", "msmpeg4v3", "mjpeg", "prores", "png", "vp9", "av1",
)  # fmt: skip
"""Codecs whose decoders notice most damage, or write every pixel of a frame. The others, such as VP8 and FFV1 without
checksums, may leave old memory in a damaged frame. The trial of seeking compares all frames of their files."""

_TRIAL_FRAMES = 12
"""Frames compared after each trial seek. The keyframe alone proves little: the frames after a recovery point may still
refer to frames before it, and the nearest ones are the most likely to do so. UCF101 has groups of 12 pictures."""

_SKIPPING_CODECS = ("h264", "mpeg4")
"""Decoders whose non-reference frames may be skipped. Their standards let nothing refer to such a frame, and no other
state outlives it. The others are not safe. HEVC promises this within a temporal layer only. VP8 and VP9 carry
probabilities and segment maps from frame to frame. AV1's decoder reads the setting only when it opens, and then lost
wanted frames."""

_MOST_DATA = 4
"""Most bytes of a video's packets, as a multiple of the file's size. In all genuine videos it is at most 1.00, because
packets are sections of the file. With some damaged indexes, a demuxer returns the same packets for ever.
Four leaves room for tables that list a section twice, and for containers that omit what each packet begins with."""

_STRICT = "crccheck+bitstream+buffer+explode"
"""FFmpeg's err_detect. Without it, decoders of MJPEG, WMV and HEVC hide damage. They fill what is missing from the
frames that were decoded before, and do not mark the frame as corrupt. It refuses none of 2,500 healthy genuine
videos."""

_END_MISSING = ("File ended prematurely", "partial file")
"""FFmpeg's messages about a Matroska file and an mp4 file whose end is missing."""

_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "avi")
"""FFmpeg's names of formats in which the index or the header tells the position of the end."""

_EARLY = 0.95
"""A file whose frames cover less than this share of the duration in its header ends early. Headers are rounded, so a
smaller difference shows nothing."""

_MOST_ERRORS = 20
"""Messages of errors that are kept for a video. A damaged frame may give thousands."""

_PLAYLISTS = ("concat", "hls", "dash")
"""FFmpeg's names of playlist formats, which open other files. FFmpeg recognises them under any file name."""

_TEXT_FORMATS = ("tty", "bin", "xbin", "adf", "idf")
"""FFmpeg's names of formats that turn text into pictures of a terminal."""

_PICTURE_FORMATS = ("gif", "apng", "mjpeg", "mjpeg_2000", "webp", "webp_anim", "jpegxl_anim")
"""FFmpeg's names of formats for pictures that move or stand still: a file with a single frame is a still image."""

_HEIF_BRANDS = ("avif", "avis", "mif1", "msf1", "heic", "heix", "hevc")
"""Main brands of picture files (AVIF, HEIC) that have the structure of mp4."""

_PICTURE_CODECS = {
    "apng", "bmp", "gif", "jpeg2000", "jpegls", "jpegxl", "mjpeg", "mjpegb", "png", "ppm", "tiff", "webp"
}  # fmt: skip
"""Codecs of covers and previews, and of some videos."""

_MOVING = 5
"""A video stream that declares fewer frames than this is read only if no other stream declares more. FFmpeg uses the
same number."""

_NO_VIDEO = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image | Disposition.metadata
"""Marks of streams that hold pictures about the video: covers and thumbnails."""


_STILL_IMAGE = "a still image, not a video"


class UnreadableVideo(Exception):
    """A video file does not give the frames it should. The message is the reason, without the name of the file."""


@dataclass(frozen=True, kw_only=True)
class VideoRecord:
    """What one complete decode of a video file found."""

    frames: int
    """Number of frames that decode, which is the only reliable count."""
    declared: int
    """Number of frames in the header; 0 if it has none. A number above `frames` may mean that the file was cut
    short."""
    height: int
    """Pixels, the same for all frames."""
    width: int
    """Pixels, the same for all frames."""
    pts: np.ndarray
    """(frames,) int64, timestamps in the stream's own unit, in decode order; NO_PTS for a frame without a timestamp."""
    keyframes: np.ndarray
    """(number of keyframes,) int64, increasing numbers of the frames that are keyframes."""
    seekable: bool
    """True if there are keyframes after frame 0, and a trial seek to each of them gave exactly its frames."""
    skippable: bool
    """True if there are B-frames, and a trial that skipped unneeded frames gave exactly the others."""
    display: Display = AS_CODED
    """How the first frame is to be shown. It counts for all frames."""
    oblique: bool = False
    """True if the file turns its frames by an angle that is not a multiple of 90 degrees. `display` has the nearest."""
    interlaced: bool = False
    """True if a frame is marked as interlaced."""
    video_streams: int = 1
    """Number of video streams to choose from. Covers and thumbnails do not count."""
    cut_from: int = 0
    """Number of frames that the file would hold if its end were not missing, by its header; 0 if no end is missing."""
    damage: str = ""
    """First error that FFmpeg reported although every frame decodes, such as "ogg: CRC mismatch!". Frames may be
    missing or damaged. Empty if there was no error."""


Planes = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Writable planes y (N, H, W), u and v (N, ceil(H / 2), ceil(W / 2)), all uint8."""


@dataclass(frozen=True)
class YuvFrames:
    """N frames of one video as planes in YUV 4:2:0: one chroma value for every 2 x 2 pixels. Odd sizes round up."""

    y: np.ndarray
    """(N, H, W) uint8."""
    u: np.ndarray
    """(N, ceil(H / 2), ceil(W / 2)) uint8."""
    v: np.ndarray
    """The same shape as u."""
    bt709: bool
    """The matrix is BT.709's; otherwise BT.601's."""
    full_range: bool
    """All planes use 0..255; otherwise y uses 16..235, and u and v use 16..240."""
    display: Display = AS_CODED
    """How the frames are to be shown."""

    def select(self, index: Any) -> "YuvFrames":
        """Return the frames at `index`, which is applied to the first dimension of each plane. Slices give views."""
        return replace(self, y=self.y[index], u=self.u[index], v=self.v[index])


def empty_planes(count: int, height: int, width: int) -> Planes:
    """Return uninitialised planes for `count` frames."""
    y = np.empty((count, height, width), dtype=np.uint8)
    u, v = np.empty((2, count, (height + 1) // 2, (width + 1) // 2), dtype=np.uint8)
    return y, u, v


# ---------------------------------------------------------------- verifying


def is_video(path: Path) -> bool:
    """Return whether a file, whatever its name, holds a video: it opens, and the first frame decodes.

    Still images, texts and playlists are not videos. This does not verify the file: later frames may be damaged.
    """
    try:
        with _opened(path) as (container, stream):
            least = 2 if _holds_pictures(container) else 1
            return len(list(islice(_decoded(container, stream, first=0), least))) == least
    except (UnreadableVideo, OSError):
        return False


def verify_video(path: Path) -> VideoRecord:
    """Decode a whole file once in one thread, and try whether seeking and skipping give the same frames.

    The trial of seeking seeks to every keyframe and compares the next 12 frames of its group of pictures, as crc32. The
    trial of skipping takes place in files with B-frames only. It reads a quarter of all frames, spread over the file,
    as training would read them, and compares each of them in the same way.

    Raises:
        UnreadableVideo: there is no such file, it is empty, it cannot be opened, it has no video stream, no frame
            decodes, decoding ends in an error, a frame is corrupt, or the frame size changes. A file that fails late
            fails as a whole, because the frames that a broken stream gives before the error is noticed cannot be
            trusted.
    """
    pts: list[int] = []
    keyframes: list[int] = []
    checksums: dict[int, int] = {}  # frame number -> crc32, for the frames that a trial will compare
    b_frames = interlaced = oblique = False
    display = AS_CODED
    height = width = duration = 0
    reformatter = VideoReformatter()
    with _opened(path) as (container, stream), _error_log() as log:
        declared, video_streams = stream.frames, len(_video_streams(container))
        may_skip = stream.codec_context.name in _SKIPPING_CODECS
        notices_damage = stream.codec.canonical_name in _CODECS_THAT_NOTICE_DAMAGE
        trial_frames = _TRIAL_FRAMES if notices_damage else sys.maxsize
        for number, frame in enumerate(_decoded(container, stream, first=0)):
            if number == 0:
                height, width = frame.height, frame.width
                display, oblique = _display_of(stream, frame)
            _check_size(frame, number, height, width)
            pts.append(_pts(frame))
            if frame.key_frame:
                keyframes.append(number)
            duration = frame.duration or 0
            b_frames = b_frames or frame.pict_type == PictureType.B
            interlaced = interlaced or frame.interlaced_frame
            after_seek = keyframes and keyframes[-1] > 0 and number < keyframes[-1] + trial_frames
            if after_seek or (may_skip and _in_skipping_trial(number)):
                checksums[number] = _checksum(frame, reformatter)
            del log[_MOST_ERRORS:]
        if not pts:
            raise UnreadableVideo("opens, but no frame decodes")
        if len(pts) == 1 and _holds_pictures(container):
            raise UnreadableVideo(_STILL_IMAGE)
        seconds, promised = _seconds(pts, duration, stream), _promised_seconds(container, stream)
        reported = any(end in text for _, _, text in log for end in _END_MISSING)
        # An edit list of mp4 drops frames on purpose, so its duration proves nothing.
        by_time = container.format.name not in _INDEXED and 0 < seconds < _EARLY * promised
        ends_early = reported or by_time or _end_is_missing(container, stream)
        expected = round(len(pts) * promised / seconds) if seconds else 0
        cut_from = max(declared, expected, len(pts)) if ends_early else 0
    damage = [f"{name}: {text.strip()}" for _, name, text in log if not any(end in text for end in _END_MISSING)]

    record = VideoRecord(
        frames=len(pts),
        declared=declared,
        height=height,
        width=width,
        pts=np.array(pts, dtype=np.int64),
        keyframes=np.array(keyframes, dtype=np.int64),
        seekable=False,
        skippable=False,
        display=display,
        oblique=oblique,
        interlaced=interlaced,
        video_streams=video_streams,
        cut_from=cut_from,
        damage=damage[0] if damage else "",
    )
    if pts[0] == NO_PTS or any(earlier >= later for earlier, later in pairwise(pts)):
        return record
    record = replace(record, seekable=_seeks_exactly(path, record, checksums, trial_frames))
    return replace(record, skippable=may_skip and b_frames and _skips_exactly(path, record, checksums))


@contextmanager
def _error_log() -> Iterator[list[tuple[int, str, str]]]:
    """Collect FFmpeg's messages of errors in this thread, as (level, name of the part of FFmpeg, text)."""
    level = av.logging.get_level()
    av.logging.set_skip_repeated(False)  # otherwise the second file with an error would give no message
    av.logging.set_level(av.logging.ERROR)
    try:
        with av.logging.Capture() as messages:
            yield messages
    finally:
        av.logging.set_level(level)


def _end_is_missing(container: InputContainer, stream: VideoStream) -> bool:
    """Return whether the index of a file, or the header of an AVI, tells of bytes after the end of the file.

    FFmpeg reports no error if such a file ends between two frames.
    """
    if any(entry.pos + entry.size > container.size for entry in stream.index_entries):
        return True
    if container.format.name != "avi":
        return False
    with Path(container.name.removeprefix("file:")).open("rb") as file:
        _, size = struct.unpack("<4sI", file.read(8))
    return size + 8 > container.size


def _seconds(pts: list[int], duration: int, stream: VideoStream) -> float:
    """Return the time that frames cover in seconds; 0 if it is unknown.

    `duration`: of the last frame, in the unit of `pts`.
    """
    if not stream.time_base or NO_PTS in pts:
        return 0.0
    return float((max(pts) - min(pts) + duration) * stream.time_base)


def _promised_seconds(container: InputContainer, stream: VideoStream) -> float:
    """Return the duration of the video stream by the header of its file in seconds; 0 if there is none."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    if match := re.fullmatch(r"(\d+):(\d\d):(\d\d\.\d+)", stream.metadata.get("DURATION", "")):  # Matroska
        return 3600 * int(match[1]) + 60 * int(match[2]) + float(match[3])
    return container.duration / av.time_base if container.duration and len(container.streams) == 1 else 0.0


def _seeks_exactly(path: Path, record: VideoRecord, checksums: dict[int, int], trial_frames: int) -> bool:
    """Return whether a seek to each keyframe after frame 0 gives the frames of the sequential decode.

    `trial_frames`: number of frames to compare after each seek, up to the next keyframe.
    """
    keyframes = record.keyframes[record.keyframes > 0].tolist()
    if not keyframes:
        return False
    reformatter = VideoReformatter()
    try:
        with _opened(path) as (container, stream):
            # From the last one to the first. Damaged frames may take over what the decoder holds from before. In this
            # order, the decoder never holds what it held in the sequential decode.
            for keyframe, next_keyframe in reversed(list(pairwise([*keyframes, record.frames]))):
                _seek(container, stream, keyframe, record)
                frames = _decoded(container, stream, first=keyframe)
                for number in range(keyframe, min(next_keyframe, keyframe + trial_frames)):
                    frame = next(frames, None)
                    if frame is None or _pts(frame) != record.pts[number]:
                        return False
                    if _checksum(frame, reformatter) != checksums[number]:
                        return False
    except UnreadableVideo:
        return False
    return True


def _skips_exactly(path: Path, record: VideoRecord, checksums: dict[int, int]) -> bool:
    """Return whether each packet holds one frame, and reading with skipping gives the frames of the sequential
    decode."""
    reformatter = VideoReformatter()
    trial = [number for number in range(record.frames) if _in_skipping_trial(number)]
    try:
        with _opened(path) as (container, stream):
            packets = []
            for packet in _packets(container, stream):
                report_progress()
                if packet.size:
                    packets.append(_pts(packet))
        if sorted(packets) != record.pts.tolist():
            return False
        for number, frame in _frames_by_time(path, record, trial):
            if _checksum(frame, reformatter) != checksums[number]:
                return False
            trial.remove(number)
    except (UnreadableVideo, av.error.FFmpegError):
        return False
    return not trial


def _in_skipping_trial(number: int) -> bool:
    """Return whether the trial of skipping reads this frame.

    It reads pairs with gaps of two among 32 frames, then leaves a gap of 32. So some frames are wanted and some are
    skipped, whatever the order of B-frames is.
    """
    return number % 64 < 32 and number % 4 < 2


def _checksum(frame: VideoFrame, reformatter: VideoReformatter) -> int:
    """Return the crc32 of the decoded planes; for a frame that is not 4:2:0 with 8 bits, the crc32 of its RGB."""
    if frame.format.name not in _PLANES_420:
        return zlib.crc32(_rgb(frame, reformatter).data)
    checksum = 0
    for plane in frame.planes:
        checksum = zlib.crc32(np.ascontiguousarray(_lines(plane)).data, checksum)
    return checksum


# ---------------------------------------------------------------- reading


def read_planes(
    path: Path, record: VideoRecord, wanted: np.ndarray | Sequence[int], into: Planes | None = None
) -> YuvFrames:
    """Return the wanted frames of a video in YUV 4:2:0, in the order in which they are wanted.

    Most decoders give this format. It has half the bytes of RGB and needs no conversion. Frames in another format
    (4:2:2, 4:4:4, 10 bits, RGB) are converted to 4:2:0. Frames of a matrix that is neither BT.601's nor BT.709's are
    converted to BT.709. A stream that names no matrix is taken for BT.601, as FFmpeg's own conversion to RGB does.

    Args:
        wanted: (N,) frame numbers in decode order, each in [0, record.frames), in any order and with repeats. One call
            should ask for all frames that are wanted from a file, because a call decodes only what they need.
        into: planes of N frames, at least as large as the video's. The frames are written to their top left corner, the
            rest is left unchanged, and the result has views of them. Without `into`, the frames are in new memory.

    Raises:
        ValueError: a frame number is out of range.
        UnreadableVideo: the file has changed since it was verified.
    """
    numbers = check_frame_numbers(wanted, record.frames)
    height, width = record.height, record.width
    y, u, v = into or empty_planes(len(numbers), height, width)
    y = y[:, :height, :width]
    u, v = (plane[:, : (height + 1) // 2, : (width + 1) // 2] for plane in (u, v))
    bt709 = full_range = False
    reformatter = VideoReformatter()
    for goal, frame in _frames_of(path, record, numbers):
        positions = np.flatnonzero(numbers == goal).tolist()
        bt709, full_range = _copy_planes(frame, reformatter, (y, u, v), positions)
        del frame  # see `_decoded`
    return YuvFrames(y, u, v, bt709, full_range, record.display)


def _copy_planes(
    frame: VideoFrame, reformatter: VideoReformatter, targets: Planes, positions: list[int]
) -> tuple[bool, bool]:
    """Copy a frame to these positions of the target planes. Return whether its matrix is BT.709's, and whether it is
    in full range."""
    frame, bt709, full_range = _yuv420(frame, reformatter)
    for target, plane in zip(targets, _plane_views(frame), strict=True):
        for position in positions:
            target[position] = plane
    return bt709, full_range


def check_frame_numbers(wanted: np.ndarray | Sequence[int], frames: int) -> np.ndarray:
    """Return the wanted frame numbers as (N,) int64. Raises ValueError: a number is not in [0, frames)."""
    numbers = np.asarray(wanted, dtype=np.int64)
    if numbers.ndim != 1:
        raise ValueError(f"wanted must be a list of frame numbers, got shape {numbers.shape}")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= frames):
        raise ValueError(f"wanted must be in [0, {frames}), got {numbers.min()} to {numbers.max()}")
    return numbers


def resized_planes(path: Path, record: VideoRecord, height: int, width: int) -> Iterator[YuvFrames]:
    """Yield every frame of a video in order, one at a time (N = 1), scaled to `height` x `width` by swscale (bicubic).

    Matrix and range stay the same. In the video's own size, the planes are byte for byte those of `read_planes`.
    Raises UnreadableVideo: the file has changed since it was verified.
    """
    converter, scaler = VideoReformatter(), VideoReformatter()
    decoded = 0
    with _opened(path) as (container, stream):
        for number, frame in enumerate(_decoded(container, stream, first=0)):
            _check_size(frame, number, record.height, record.width)
            if number >= record.frames or _pts(frame) != record.pts[number]:
                raise UnreadableVideo(f"frame {number} is not the one that was verified: the file changed")
            decoded += 1
            frame, bt709, full_range = _yuv420(frame, converter)
            if (height, width) != (record.height, record.width):
                # The plain frame names neither matrix nor range, so swscale converts neither.
                frame = scaler.reformat(
                    plain_frame(*_plane_views(frame)), width=width, height=height, format="yuv420p",
                    interpolation=_BICUBIC, threads=1,
                )  # fmt: skip
            y, u, v = _plane_views(frame)
            yield YuvFrames(y[None], u[None], v[None], bt709, full_range, record.display)
    if decoded < record.frames:
        raise UnreadableVideo(f"ends before frame {decoded} of the {record.frames} verified: the file changed")


def _frames_of(path: Path, record: VideoRecord, numbers: np.ndarray) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (number, frame) for each frame in `numbers` once."""
    # Not np.unique: it imports numpy.ma, which takes 8 MB in each worker, 16 MB if Python has to compile it.
    goals = sorted(set(numbers.tolist()))
    missing = set(goals)
    if record.skippable:
        # Frames that skipping does not give are read by counting instead. The trial cannot show that every choice of
        # frames works, and counting explains better how a file has changed.
        with suppress(UnreadableVideo):
            for number, frame in _frames_by_time(path, record, goals):
                yield number, frame
                missing.remove(number)
    if missing:
        yield from _frames_by_count(path, record, sorted(missing))


def _frames_by_count(path: Path, record: VideoRecord, goals: list[int]) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (number, frame) for each goal. Decodes every frame from the start, or from a keyframe, up to the goal and
    counts."""
    with _opened(path) as (container, stream):
        for start, run in _runs(record, goals):
            if start > 0:
                _seek(container, stream, start, record)
            frames = _decoded(container, stream, first=start)
            coming = start  # the frame that the decoder gives next
            for goal in run:
                frame = next(islice(frames, goal - coming, None), None)
                coming = goal + 1
                if frame is None:
                    raise UnreadableVideo(f"ends before frame {goal} of the {record.frames} verified: the file changed")
                _check_size(frame, goal, record.height, record.width)
                if _pts(frame) != record.pts[goal]:
                    raise UnreadableVideo(f"frame {goal} is not the one that was verified: the file changed")
                yield goal, frame
                del frame  # see `_decoded`


def _frames_by_time(path: Path, record: VideoRecord, goals: list[int]) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (number, frame) for each goal, found by its timestamp. Skips frames that no goal needs.

    It works only for files in which every packet holds one frame and its timestamp.
    """
    every = set(record.pts.tolist())
    with _opened(path) as (container, stream):
        for start, run in _runs(record, goals):
            if start > 0:
                _seek(container, stream, start, record)
            number_of = dict(zip(record.pts[run].tolist(), run, strict=True))
            frames = _needed(container, stream, waiting=set(number_of), unwanted=every - number_of.keys())
            for decoded, frame in enumerate(frames):
                if decoded == 0 and frame.pts != record.pts[start]:
                    raise UnreadableVideo(f"frame {start} is not where it was: the file changed")
                if (number := number_of.pop(frame.pts, None)) is not None:
                    _check_size(frame, number, record.height, record.width)
                    yield number, frame


def _runs(record: VideoRecord, goals: list[int]) -> list[tuple[int, list[int]]]:
    """Divide the goals (increasing) into runs that are decoded without a break, each with the frame to start from.

    A run starts from frame 0 or from a keyframe. It ends where a keyframe lies between two goals.
    """
    starting_points = np.append(0, record.keyframes) if record.seekable else np.zeros(1, dtype=np.int64)
    last_up_to_goal = np.searchsorted(starting_points, goals, side="right") - 1
    runs: list[tuple[int, list[int]]] = []
    for start, goal in zip(starting_points[last_up_to_goal].tolist(), goals, strict=True):
        if not runs or start > runs[-1][1][-1] + 1:
            runs.append((start, []))
        runs[-1][1].append(goal)
    return runs


# ---------------------------------------------------------------- colours and sizes


def rgb_of(frames: YuvFrames) -> np.ndarray:
    """Return frames as (N, H, W, 3) uint8 RGB by FFmpeg's conversion, for figures. It is the RGB of the video if that
    is in 4:2:0. The frames stay as coded: `display.shown` turns them upright."""
    count, height, width = frames.y.shape
    rgb = np.empty((count, height, width, 3), dtype=np.uint8)
    image, reformatter = VideoFrame(width, height, "yuv420p"), VideoReformatter()
    image.colorspace = Colorspace.ITU709 if frames.bt709 else Colorspace.ITU601
    image.color_range = ColorRange.JPEG if frames.full_range else ColorRange.MPEG
    for number in range(count):
        for plane, source in zip(_plane_views(image), (frames.y, frames.u, frames.v), strict=True):
            plane[...] = source[number]
        rgb[number] = _rgb(image, reformatter)
    return rgb


def converted(frames: YuvFrames, height: int, width: int, bt709: bool, full_range: bool) -> YuvFrames:
    """Return frames in another size (bicubic), matrix and range, by swscale; unchanged if they have these already."""
    if (*frames.y.shape[1:], frames.bt709, frames.full_range) == (height, width, bt709, full_range):
        return frames
    spaces = {True: Colorspace.ITU709, False: Colorspace.ITU601}
    ranges = {True: ColorRange.JPEG, False: ColorRange.MPEG}
    planes, reformatter = empty_planes(len(frames.y), height, width), VideoReformatter()
    for number, source in enumerate(zip(frames.y, frames.u, frames.v, strict=True)):
        image = reformatter.reformat(
            plain_frame(*source), width=width, height=height, format="yuv420p", interpolation=_BICUBIC, threads=1,
            src_colorspace=spaces[frames.bt709], dst_colorspace=spaces[bt709],
            src_color_range=ranges[frames.full_range], dst_color_range=ranges[full_range],
        )  # fmt: skip
        for target, plane in zip(planes, _plane_views(image), strict=True):
            target[number] = plane
    return YuvFrames(*planes, bt709, full_range, frames.display)


def plain_frame(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> VideoFrame:
    """Return a frame of FFmpeg in 4:2:0 with a copy of these planes (H, W), which names neither matrix nor range."""
    height, width = y.shape
    frame = VideoFrame(width, height, "yuv420p")
    for target, plane in zip(_plane_views(frame), (y, u, v), strict=True):
        target[...] = plane
    return frame


def _yuv420(frame: VideoFrame, reformatter: VideoReformatter) -> tuple[VideoFrame, bool, bool]:
    """Return the frame in 4:2:0 with 8 bits, whether its matrix is BT.709's, and whether it is in full range."""
    full_range = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    bt709 = frame.colorspace == Colorspace.ITU709
    known = bt709 or frame.colorspace in _BT601
    is_yuv = not frame.format.is_rgb and len(frame.format.components) >= 3
    if frame.format.name in _PLANES_420 and known:
        return frame, bt709, full_range
    if is_yuv and known:
        space = Colorspace.ITU709 if bt709 else Colorspace.ITU601
        range_ = ColorRange.JPEG if full_range else ColorRange.MPEG
        frame = reformatter.reformat(
            frame, format="yuv420p", src_colorspace=space, dst_colorspace=space, src_color_range=range_,
            dst_color_range=range_, threads=1,
        )  # fmt: skip
        return frame, bt709, full_range
    # Convert through RGB, which has no matrix.
    rgb = VideoFrame.from_ndarray(_rgb(frame, reformatter), format="rgb24")
    frame = reformatter.reformat(
        rgb, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
    )
    return frame, True, False


def _rgb(frame: VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """Return the frame as (height, width, 3) uint8. PyAV's default of one thread per core triples the cost for frames
    of this size."""
    return np.ascontiguousarray(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())


def _plane_views(frame: VideoFrame) -> Planes:
    """Return views (H, W) of the planes of a 4:2:0 frame, without the padding at the end of their lines."""
    y, u, v = map(_lines, frame.planes)
    return y, u, v


def _lines(plane: VideoPlane) -> np.ndarray:
    """Return a view (height, width) uint8 of a plane with one byte per value."""
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


# ---------------------------------------------------------------- the file


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its best video stream (`_best_stream`), set to decode in the calling thread only.

    One thread per file and several processes are fastest: FFmpeg's own threads cost 15 to 35 % more CPU time.
    """
    if not path.is_file():
        raise UnreadableVideo("no such file")
    if path.stat().st_size == 0:
        raise UnreadableVideo("empty file")
    try:
        # With "file:", FFmpeg does not read a colon in a relative path as a protocol. metadata_errors: HMDB51 has
        # titles that are not UTF-8, and PyAV raises on them by default.
        container = av.open(f"file:{path}", metadata_errors="ignore")
    except (av.error.FFmpegError, UnicodeEncodeError) as error:
        raise UnreadableVideo(f"cannot be opened: {_reason(error)}") from error
    with container:
        if container.format.name in _PLAYLISTS:
            raise UnreadableVideo(f"a playlist ({container.format.name}), which names other files")
        if container.format.name in _TEXT_FORMATS:
            raise UnreadableVideo("text, not a video")
        if container.format.name.startswith("image2") or container.format.name.endswith("_pipe"):
            raise UnreadableVideo(_STILL_IMAGE)
        stream = _best_stream(container)
        if stream.codec_context is None:
            raise UnreadableVideo("no decoder for its video codec")
        _check_pixels(stream.codec_context.width, stream.codec_context.height)
        # max_pixels: a later frame may declare another size.
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS), "err_detect": _STRICT}
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield container, stream


def _best_stream(container: InputContainer) -> VideoStream:
    """Return the video stream to read: the default one of the file, or else the largest, or else the first.

    A stream that declares fewer than `_MOVING` frames is read only if no other stream declares more.

    Phones write photos as such streams next to the video. The photos are larger, and both are marked as default.

    Raises UnreadableVideo: there is no video stream.
    """
    streams = _video_streams(container)
    if not streams:
        raise UnreadableVideo("no video stream, only a cover" if container.streams.video else "no video stream")

    def value(stream: VideoStream) -> tuple[bool, int, bool, int]:
        codec = stream.codec_context
        pixels = codec.width * codec.height if codec else 0  # 0 too if the file holds no data of the stream
        frames = min(stream.frames or _MOVING, _MOVING)  # most containers do not declare the number
        return pixels > 0, frames, bool(stream.disposition & Disposition.default), pixels

    return max(streams, key=value)  # the first one of equal value


def _video_streams(container: InputContainer) -> list[VideoStream]:
    """Return the video streams that are neither covers nor thumbnails.

    Matroska files of some programs do not mark a cover. So a stream of a picture codec counts only if there is no
    other stream.
    """
    streams = [stream for stream in container.streams.video if not stream.disposition & _NO_VIDEO]
    moving = [stream for stream in streams if not stream.codec_context or stream.codec.name not in _PICTURE_CODECS]
    return moving or streams


def _holds_pictures(container: InputContainer) -> bool:
    """Return whether the file's format is one for pictures, which may move or stand still."""
    return container.format.name in _PICTURE_FORMATS or container.metadata.get("major_brand") in _HEIF_BRANDS


def _decoded(container: InputContainer, stream: VideoStream, first: int) -> Iterator[VideoFrame]:
    """Yield the frames from the container's current position to its end.

    A caller must not hold a frame after it has asked for the next one. The decoder puts the memory of free frames to
    use again, and a damaged frame leaves parts of its memory unwritten. So a damaged frame would depend on which frames
    a caller holds, and a window would differ from the sequential decode.

    Args:
        first: number of the next frame, for error messages.
    """
    frames = (frame for packet in _packets(container, stream) for frame in packet.decode())
    for number in count(first):
        try:
            frame = next(frames, None)
        except av.error.FFmpegError as error:
            raise UnreadableVideo(f"decoding stops at frame {number}: {_reason(error)}") from error
        if frame is None:
            return
        report_progress()
        if frame.is_corrupt:
            raise UnreadableVideo(f"frame {number} is corrupt")
        yield frame


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Yield the packets from the container's current position to its end, then an empty packet.

    Closes PyAV's own iterator when the caller stops before the end. If that iterator is only dropped, it never frees a
    packet of 150 bytes for each file that is read in part (PyAV 18.0).

    Raises UnreadableVideo: the packets have no end.
    """
    left = _MOST_DATA * container.size
    with closing(container.demux(stream)) as packets:  # type: ignore[type-var]  # it is a generator
        for packet in packets:
            # The packet at the end and those of dropped frames are empty, but each takes space in the file.
            left -= max(packet.size, 1)
            if left < 0:
                raise UnreadableVideo(f"gives more than {_MOST_DATA} times the data that it holds")
            yield packet


def _needed(
    container: InputContainer, stream: VideoStream, waiting: set[int], unwanted: set[int]
) -> Iterator[VideoFrame]:
    """Yield frames from the container's current position, without the unwanted ones that no other frame refers to.

    Args:
        waiting: timestamps of the wanted frames. They are removed when their packets are read. When none is left, the
            decoder is drained: the frames that it still holds need no further packet.
        unwanted: timestamps of the frames that are not wanted.
    """
    decoder = stream.codec_context
    try:
        for packet in _packets(container, stream):
            decoder.skip_frame = "NONREF" if packet.pts in unwanted else "DEFAULT"
            waiting.discard(packet.pts)
            frames = decoder.decode(packet)
            if not waiting:
                frames += decoder.decode(None)
            for frame in frames:
                report_progress()
                if frame.is_corrupt:
                    raise UnreadableVideo("a frame is corrupt")
                yield frame
            if not waiting:
                return
    except av.error.FFmpegError as error:
        raise UnreadableVideo(f"decoding stops: {_reason(error)}") from error


def _seek(container: InputContainer, stream: VideoStream, keyframe: int, record: VideoRecord) -> None:
    """Seek to a keyframe, given its number. The caller checks which frame comes next."""
    try:
        container.seek(int(record.pts[keyframe]), stream=stream)
    except av.error.FFmpegError as error:
        raise UnreadableVideo(f"cannot seek to frame {keyframe}: {_reason(error)}") from error


def _display_of(stream: VideoStream, frame: VideoFrame) -> tuple[Display, bool]:
    """Return how a frame is to be shown, and whether it is turned by an angle that is not a multiple of 90 degrees."""
    aspect = stream.sample_aspect_ratio
    pixel = aspect.as_integer_ratio() if aspect and aspect > 0 else (1, 1)
    try:
        every: Any = frame.side_data  # PyAV's type hints call each of them a str
        matrices = [bytes(data) for data in every if data.type == Type.DISPLAYMATRIX]
    except ValueError:  # the frame has other data that PyAV cannot name, such as EXIF; this angle knows no mirroring
        return Display(round(-frame.rotation / 90) % 4, *pixel), frame.rotation % 90 != 0
    orientation, exact = orientation_of(np.frombuffer(matrices[0], np.int32)) if matrices else (0, True)
    return Display(orientation, *pixel), not exact


def _pts(timed: VideoFrame | Packet) -> int:
    return NO_PTS if timed.pts is None else timed.pts


def _check_pixels(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise UnreadableVideo(f"frames of {width} x {height} pixels: more than 8192 x 8192 are not read")


def _check_size(frame: VideoFrame, number: int, height: int, width: int) -> None:
    if (frame.height, frame.width) != (height, width):
        raise UnreadableVideo(
            f"the frame size changes at frame {number}: {width} x {height} becomes {frame.width} x {frame.height}"
        )


def _reason(error: Exception) -> str:
    """Return FFmpeg's message without the error number and the C function."""
    return str(getattr(error, "strerror", None) or error)
