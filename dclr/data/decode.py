"""Video files to frames and back: the only module that imports av (PyAV, FFmpeg).

Frames are counted in the order the decoder gives them, never timed. Timestamps of genuine data sets are scrambled
(packed-B AVI files of HMDB51 and UCF101 give 1, 4, 3, 6, 5, ...), headers declare frames that do not exist (49 for 48),
and empty packets are flagged as keyframes. So `verify_video` decodes a file once from beginning to end and records what
is really there, and `read_frames` reads by that record: byte for byte what a decode from frame 0 gives.

Rotation metadata is not applied: frames come as they are coded.
"""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice, pairwise
from pathlib import Path

import av
import numpy as np
from av import Packet
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

NO_PTS = np.iinfo(np.int64).min
"""Stands in `VideoRecord.pts` for a frame without a timestamp (FFmpeg's own AV_NOPTS_VALUE)."""

_BT601 = (2, 5, 6)
"""FFmpeg's AVColorSpace: unspecified, BT.470BG and SMPTE 170M, which have the same matrix. PyAV names only the second."""

_TRIAL_FRAMES = 12
"""Frames compared after each trial seek. A keyframe alone proves little: the frames after a recovery point may still
refer to frames before it, and the nearest ones are the likeliest to. 12 is a whole group of pictures in UCF101."""


class UnreadableVideo(Exception):
    """A video file that does not give the frames it should; the message is the reason, without the file's name."""


@dataclass(frozen=True, kw_only=True)
class VideoRecord:
    """What one complete decode of a video file found."""

    frames: int
    """Frames that decode: the only count to rely on."""
    declared: int
    """Frames the header promises; 0 where it says nothing. More than `frames` may mean a file cut short."""
    height: int
    """Pixels, the same for all frames."""
    width: int
    """Pixels, the same for all frames."""
    pts: np.ndarray
    """(frames,) int64, timestamps in the stream's own unit, in decode order; NO_PTS where a frame has none."""
    keyframes: np.ndarray
    """(number of keyframes,) int64, increasing frame numbers of the decoded frames that are keyframes."""
    seekable: bool
    """True: there are keyframes after frame 0, and a trial seek to each of them gave exactly its frames."""


Planes = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Writable planes y (N, H, W), u and v (N, ceil(H / 2), ceil(W / 2)), all uint8."""


@dataclass(frozen=True)
class YuvFrames:
    """N frames of one video as planes, chroma for every 2 x 2 pixels; the last row and column of an odd size share theirs with none."""

    y: np.ndarray  # (N, H, W) uint8
    u: np.ndarray  # (N, ceil(H / 2), ceil(W / 2)) uint8
    v: np.ndarray  # as u
    bt709: bool  # the matrix is BT.709's, not BT.601's
    full_range: bool  # 0..255 in all planes, not 16..235 in y and 16..240 in u and v


def verify_video(path: Path) -> VideoRecord:
    """Decodes the whole file once, in one thread, and tries a seek to every keyframe.

    After each trial seek the first 12 frames of that group of pictures are compared, as crc32 of their RGB bytes.

    Raises UnreadableVideo: no such file, empty file, cannot be opened, no video stream, no frame decodes, decoding ends
    in an error, a frame is corrupt, the frame size changes. A file that fails late fails as a whole: what a broken
    stream gives before the error is noticed cannot be trusted.
    """
    pts: list[int] = []
    keyframes: list[int] = []
    checksums: dict[int, int] = {}  # frame number -> crc32, for the frames that a trial seek will compare
    height = width = 0
    reformatter = VideoReformatter()
    with _opened(path) as (container, stream):
        declared = stream.frames
        for number, frame in enumerate(_decoded(container, stream, first=0)):
            if number == 0:
                height, width = frame.height, frame.width
            _check_size(frame, number, height, width)
            pts.append(_pts(frame))
            if frame.key_frame:
                keyframes.append(number)
            if keyframes and keyframes[-1] > 0 and number < keyframes[-1] + _TRIAL_FRAMES:
                checksums[number] = _checksum(frame, reformatter)
    if not pts:
        raise UnreadableVideo("opens, but no frame decodes")

    increasing = pts[0] != NO_PTS and all(earlier < later for earlier, later in pairwise(pts))
    return VideoRecord(
        frames=len(pts),
        declared=declared,
        height=height,
        width=width,
        pts=np.array(pts, dtype=np.int64),
        keyframes=np.array(keyframes, dtype=np.int64),
        seekable=increasing and _seeks_exactly(path, pts, keyframes, checksums),
    )


def read_frames(path: Path, record: VideoRecord, wanted: np.ndarray | Sequence[int]) -> np.ndarray:
    """The wanted frames of a video as (len(wanted), height, width, 3) uint8 RGB, in the order they are wanted.

    `wanted` holds frame numbers in decode order, each in [0, record.frames), in any order and with repeats. All that is
    wanted of one file belongs into one call, which decodes no frame twice and stops after the last one wanted.

    Raises ValueError for a number out of range, and UnreadableVideo when the file is no longer what the record says.
    """
    numbers = _checked_numbers(record, wanted)
    rgb = np.empty((len(numbers), record.height, record.width, 3), dtype=np.uint8)
    reformatter = VideoReformatter()
    for goal, frame in _frames_of(path, record, numbers):
        rgb[numbers == goal] = _rgb(frame, reformatter)
    return rgb


def read_planes(
    path: Path, record: VideoRecord, wanted: np.ndarray | Sequence[int], into: Planes | None = None
) -> YuvFrames:
    """The wanted frames as YUV 4:2:0, as most decoders give them: half the bytes of RGB, and no conversion. Otherwise as `read_frames`.

    They are written to the top left of the planes in `into`, one for each frame wanted and at least as large, and what is returned
    are views of them; what lies beside and below is left as it was. Without `into`, to new memory.

    Frames in another format (4:2:2, 4:4:4, 10 bits, RGB) are converted to 4:2:0, and those of a matrix that is neither BT.601's nor
    BT.709's to BT.709. A stream that names no matrix is taken for BT.601, as FFmpeg's own conversion to RGB does.
    """
    numbers = _checked_numbers(record, wanted)
    height, width = record.height, record.width
    y, u, v = into or empty_planes(len(numbers), height, width)
    y = y[:, :height, :width]
    u, v = (plane[:, : (height + 1) // 2, : (width + 1) // 2] for plane in (u, v))
    bt709 = full_range = False
    reformatter = VideoReformatter()
    for goal, frame in _frames_of(path, record, numbers):
        frame, bt709, full_range = _yuv420(frame, reformatter)
        places = np.flatnonzero(numbers == goal).tolist()
        for target, plane in zip((y, u, v), frame.planes, strict=True):
            lines = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
            for place in places:
                target[place] = lines[:, : plane.width]
    return YuvFrames(y, u, v, bt709, full_range)


def rgb_of(frames: YuvFrames) -> np.ndarray:
    """Frames as (N, H, W, 3) uint8 RGB, for pictures: by FFmpeg's conversion, as `read_frames` where the video is in 4:2:0."""
    count, height, width = frames.y.shape
    rgb = np.empty((count, height, width, 3), dtype=np.uint8)
    image, reformatter = VideoFrame(width, height, "yuv420p"), VideoReformatter()
    image.colorspace = Colorspace.ITU709 if frames.bt709 else Colorspace.ITU601
    image.color_range = ColorRange.JPEG if frames.full_range else ColorRange.MPEG
    for number in range(count):
        for plane, source in zip(image.planes, (frames.y, frames.u, frames.v), strict=True):
            lines = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
            lines[:, : plane.width] = source[number]
        rgb[number] = _rgb(image, reformatter)
    return rgb


def empty_planes(count: int, height: int, width: int) -> Planes:
    """Memory for the planes of `count` frames, not set to anything."""
    y = np.empty((count, height, width), dtype=np.uint8)
    u, v = np.empty((2, count, (height + 1) // 2, (width + 1) // 2), dtype=np.uint8)
    return y, u, v


def _checked_numbers(record: VideoRecord, wanted: np.ndarray | Sequence[int]) -> np.ndarray:
    numbers = np.asarray(wanted, dtype=np.int64)
    if numbers.ndim != 1:
        raise ValueError(f"wanted must be a list of frame numbers, got shape {numbers.shape}")
    if numbers.size and (numbers.min() < 0 or numbers.max() >= record.frames):
        raise ValueError(f"wanted must be in [0, {record.frames}), got {numbers.min()} to {numbers.max()}")
    return numbers


def _frames_of(path: Path, record: VideoRecord, numbers: np.ndarray) -> Iterator[tuple[int, VideoFrame]]:
    """(number, frame) of each frame in `numbers`, once, in increasing order."""
    if not numbers.size:
        return
    with _opened(path) as (container, stream):
        frames = _decoded(container, stream, first=0)
        position = 0  # the frame that the decoder gives next
        for goal in np.unique(numbers).tolist():
            keyframe = _last_keyframe(record, goal)
            if record.seekable and keyframe > position:
                frames = _sought(container, stream, keyframe, int(record.pts[keyframe]))
                position = keyframe
            frame = next(islice(frames, goal - position, None), None)
            position = goal + 1
            if frame is None:
                raise UnreadableVideo(f"ends before frame {goal} of the {record.frames} verified: the file changed")
            _check_size(frame, goal, record.height, record.width)
            if _pts(frame) != record.pts[goal]:
                raise UnreadableVideo(f"frame {goal} is not the one that was verified: the file changed")
            yield goal, frame


def write_video(path: Path, frames: np.ndarray, fps: int = 25, keyframe_every: int = 12) -> None:
    """Writes (T, H, W, 3) uint8 RGB frames as h264 in 4:2:0, a keyframe exactly every `keyframe_every` frames.

    The container is what the path's suffix says (.mp4). H and W must be even, else ValueError.
    """
    _, height, width, channels = frames.shape
    if frames.dtype != np.uint8 or channels != 3 or height % 2 or width % 2:
        raise ValueError(f"frames must be uint8 (T, even H, even W, 3), got {frames.dtype} {frames.shape}")
    # sc_threshold=0: no further keyframes where x264 sees a scene change.
    # One thread and no assembly: with it, the same frames were encoded to other bytes from one call to the next (docs/LOG.md).
    options = {"preset": "veryfast", "crf": "18", "sc_threshold": "0", "threads": "1", "x264-params": "asm=0"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size = keyframe_every
        stream.codec_context.thread_count = 1
        for rgb in frames:
            container.mux(stream.encode(VideoFrame.from_ndarray(rgb, format="rgb24")))
        container.mux(stream.encode(None))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The open file and its first video stream, set to decode in the calling thread alone.

    One thread a file and processes across files: FFmpeg's own threads cost 15 to 35 % more CPU time.
    """
    if not path.is_file():
        raise UnreadableVideo("no such file")
    if path.stat().st_size == 0:
        raise UnreadableVideo("empty file")
    try:
        # "file:" keeps FFmpeg from reading a colon in a relative path as a protocol. metadata_errors: HMDB51 has titles
        # that are not UTF-8, and by default they make PyAV raise.
        container = av.open(f"file:{path}", metadata_errors="ignore")
    except (av.error.FFmpegError, UnicodeEncodeError) as error:
        raise UnreadableVideo(f"cannot be opened: {_plain(error)}") from error
    with container:
        if not container.streams.video:
            raise UnreadableVideo("no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UnreadableVideo("no decoder for its video codec")
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield container, stream


def _decoded(container: InputContainer, stream: VideoStream, first: int) -> Iterator[VideoFrame]:
    """The frames from where the container stands to its end; `first` is the number of the next one, for messages."""
    frames = (frame for packet in _packets(container, stream) for frame in packet.decode())
    for number in count(first):
        try:
            frame = next(frames, None)
        except av.error.FFmpegError as error:
            raise UnreadableVideo(f"decoding stops at frame {number}: {_plain(error)}") from error
        if frame is None:
            return
        if frame.is_corrupt:
            raise UnreadableVideo(f"frame {number} is corrupt")
        yield frame


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """From where the container stands to its end, then an empty one. Goes between PyAV's own iterator and whoever may leave before the
    end: left, this one closes it. Merely dropped, it never frees a packet of 150 bytes (PyAV 18.0), a file that is read in part."""
    yield from container.demux(stream)


def _sought(container: InputContainer, stream: VideoStream, keyframe: int, pts: int) -> Iterator[VideoFrame]:
    """`_decoded` from a keyframe on, given its frame number and timestamp; the caller checks where it landed."""
    try:
        container.seek(pts, stream=stream)
    except av.error.FFmpegError as error:
        raise UnreadableVideo(f"cannot seek to frame {keyframe}: {_plain(error)}") from error
    return _decoded(container, stream, first=keyframe)


def _seeks_exactly(path: Path, pts: list[int], keyframes: list[int], checksums: dict[int, int]) -> bool:
    """Whether a seek to each keyframe after frame 0 gives the frames that the sequential decode gave."""
    later_keyframes = [keyframe for keyframe in keyframes if keyframe > 0]
    if not later_keyframes:
        return False
    reformatter = VideoReformatter()
    try:
        with _opened(path) as (container, stream):
            for keyframe, next_keyframe in zip(later_keyframes, [*later_keyframes[1:], len(pts)], strict=True):
                compared = range(keyframe, min(next_keyframe, keyframe + _TRIAL_FRAMES))
                frames = _sought(container, stream, keyframe, pts[keyframe])
                for number in compared:
                    frame = next(frames, None)
                    if frame is None or _pts(frame) != pts[number]:
                        return False
                    if _checksum(frame, reformatter) != checksums[number]:
                        return False
    except UnreadableVideo:
        return False
    return True


def _rgb(frame: VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """(height, width, 3) uint8. PyAV's default of one thread a core triples the cost for frames of this size."""
    return np.ascontiguousarray(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())


def _yuv420(frame: VideoFrame, reformatter: VideoReformatter) -> tuple[VideoFrame, bool, bool]:
    """The frame in 4:2:0 with 8 bits, whether its matrix is BT.709's, and whether it is in full range."""
    full_range = frame.color_range == ColorRange.JPEG or frame.format.name.startswith("yuvj")
    bt709 = frame.colorspace == Colorspace.ITU709
    known = bt709 or frame.colorspace in _BT601
    is_yuv = not frame.format.is_rgb and len(frame.format.components) >= 3
    if frame.format.name in ("yuv420p", "yuvj420p") and known:
        return frame, bt709, full_range
    if is_yuv and known:
        space = Colorspace.ITU709 if bt709 else Colorspace.ITU601
        range_ = ColorRange.JPEG if full_range else ColorRange.MPEG
        frame = reformatter.reformat(
            frame, format="yuv420p", src_colorspace=space, dst_colorspace=space, src_color_range=range_,
            dst_color_range=range_, threads=1,
        )  # fmt: skip
        return frame, bt709, full_range
    # By way of RGB, which has no matrix.
    rgb = VideoFrame.from_ndarray(_rgb(frame, reformatter), format="rgb24")
    frame = reformatter.reformat(
        rgb, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
    )
    return frame, True, False


def _checksum(frame: VideoFrame, reformatter: VideoReformatter) -> int:
    return zlib.crc32(_rgb(frame, reformatter).data)


def _last_keyframe(record: VideoRecord, number: int) -> int:
    """The last keyframe at or before a frame; 0 where there is none, which is where reading starts anyway."""
    earlier = record.keyframes[record.keyframes <= number]
    return int(earlier[-1]) if earlier.size else 0


def _pts(frame: VideoFrame) -> int:
    return NO_PTS if frame.pts is None else frame.pts


def _check_size(frame: VideoFrame, number: int, height: int, width: int) -> None:
    if (frame.height, frame.width) != (height, width):
        raise UnreadableVideo(
            f"the frame size changes at frame {number}: {width} x {height} becomes {frame.width} x {frame.height}"
        )


def _plain(error: Exception) -> str:
    """FFmpeg's own words, without the error number and the C function."""
    return str(getattr(error, "strerror", None) or error)
