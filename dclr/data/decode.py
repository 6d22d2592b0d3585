"""Video files to frames and back: the only module that imports av (PyAV, FFmpeg).

Frames are numbered in the order the decoder gives them, never by time. Timestamps of genuine data sets are scrambled
(packed-B AVI files of HMDB51 and UCF101 give 1, 4, 3, 6, 5, ...), headers declare frames that do not exist (49 for 48),
and empty packets are flagged as keyframes. So `verify_video` decodes a file once from beginning to end and records what
is really there, and `read_frames` reads by that record: byte for byte what a decode from frame 0 gives.

Reading decodes as little as it can: it seeks, where a trial has shown that seeking gives the same frames, and it skips
frames that nothing refers to, where a trial has shown the same of that. Everywhere else it decodes and counts.

Rotation metadata is not applied: frames come as they are coded.
"""

import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count, islice, pairwise
from pathlib import Path

import av
import numpy as np
from av import Packet
from av.container import InputContainer
from av.video.frame import PictureType, VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from dclr.data.decoder_process import report_progress

NO_PTS = np.iinfo(np.int64).min
"""Stands in `VideoRecord.pts` for a frame without a timestamp (FFmpeg's own AV_NOPTS_VALUE)."""

_BT601 = (2, 5, 6)
"""FFmpeg's AVColorSpace: unspecified, BT.470BG and SMPTE 170M, which have the same matrix. PyAV names only the second."""

_PLANES_420 = ("yuv420p", "yuvj420p")
"""FFmpeg's names of YUV 4:2:0 with 8 bits, a plane each; the second is in full range."""

_TRIAL_FRAMES = 12
"""Frames compared after each trial seek. A keyframe alone proves little: the frames after a recovery point may still
refer to frames before it, and the nearest ones are the likeliest to. 12 is a whole group of pictures in UCF101."""

_SKIPPING_CODECS = ("h264", "mpeg4")
"""Decoders whose non-reference frames may be skipped: their standards let nothing refer to such a frame, and nothing else outlives it.
HEVC promises that within a temporal layer only, VP8 and VP9 carry probabilities and segment maps on from frame to frame, and AV1's
decoder takes the setting at its start alone, and then lost wanted frames."""


MOST_PIXELS = 8192 * 8192
"""Of a frame: twice what the largest video format in use has (8K, 8192 x 4320), 96 MiB as planes. A few changed bytes of a header can
announce a frame of gigabytes, and a decoder takes the memory before it finds that the file does not fill it."""

_MOST_DATA = 4
"""Times the size of its file that a video's packets may take. They are parts of the file, so once is what they take (1.00 at most in all
genuine videos); a demuxer that a damaged index leads in circles gives the same ones for ever. Four leaves room for tables that name a
part twice, and for containers that leave out what begins every packet."""

_PLAYLISTS = ("concat", "hls", "dash")
"""FFmpeg's names of what is no video but opens others: whatever it is called, what it shows is another file's."""


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
    skippable: bool
    """True: there are B-frames, and a trial that skipped those which nothing refers to gave exactly the others."""


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
    """Decodes the whole file once, in one thread, then tries a seek to every keyframe, and tries to skip frames where there are B-frames.

    After each trial seek the first 12 frames of that group of pictures are compared, as crc32. The trial of skipping reads
    a quarter of all frames, spread over the whole file, as training would read them, and compares each likewise.

    Raises UnreadableVideo: no such file, empty file, cannot be opened, no video stream, no frame decodes, decoding ends
    in an error, a frame is corrupt, the frame size changes. A file that fails late fails as a whole: what a broken
    stream gives before the error is noticed cannot be trusted.
    """
    pts: list[int] = []
    keyframes: list[int] = []
    checksums: dict[int, int] = {}  # frame number -> crc32, for the frames that a trial will compare
    b_frames = False
    height = width = 0
    reformatter = VideoReformatter()
    with _opened(path) as (container, stream):
        declared = stream.frames
        may_skip = stream.codec_context.name in _SKIPPING_CODECS
        for number, frame in enumerate(_decoded(container, stream, first=0)):
            if number == 0:
                height, width = frame.height, frame.width
            _check_size(frame, number, height, width)
            pts.append(_pts(frame))
            if frame.key_frame:
                keyframes.append(number)
            b_frames = b_frames or frame.pict_type == PictureType.B
            after_seek = keyframes and keyframes[-1] > 0 and number < keyframes[-1] + _TRIAL_FRAMES
            if after_seek or (may_skip and _in_skipping_trial(number)):
                checksums[number] = _checksum(frame, reformatter)
    if not pts:
        raise UnreadableVideo("opens, but no frame decodes")

    record = VideoRecord(
        frames=len(pts),
        declared=declared,
        height=height,
        width=width,
        pts=np.array(pts, dtype=np.int64),
        keyframes=np.array(keyframes, dtype=np.int64),
        seekable=False,
        skippable=False,
    )
    if pts[0] == NO_PTS or any(earlier >= later for earlier, later in pairwise(pts)):
        return record
    record = replace(record, seekable=_seeks_exactly(path, record, checksums))
    return replace(record, skippable=may_skip and b_frames and _skips_exactly(path, record, checksums))


def read_frames(path: Path, record: VideoRecord, wanted: np.ndarray | Sequence[int]) -> np.ndarray:
    """The wanted frames of a video as (len(wanted), height, width, 3) uint8 RGB, in the order they are wanted.

    `wanted` holds frame numbers in decode order, each in [0, record.frames), in any order and with repeats. All that is
    wanted of one file belongs into one call, which decodes only what is needed for that.

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
            lines = _lines(plane)
            for place in places:
                target[place] = lines
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
            _lines(plane)[...] = source[number]
        rgb[number] = _rgb(image, reformatter)
    return rgb


def converted(frames: YuvFrames, height: int, width: int, bt709: bool, full_range: bool) -> YuvFrames:
    """The same pictures in another size (bicubic), matrix and range, by swscale; in their own they are returned as they are."""
    if (*frames.y.shape[1:], frames.bt709, frames.full_range) == (height, width, bt709, full_range):
        return frames
    spaces = {True: Colorspace.ITU709, False: Colorspace.ITU601}
    ranges = {True: ColorRange.JPEG, False: ColorRange.MPEG}
    planes, reformatter = empty_planes(len(frames.y), height, width), VideoReformatter()
    for number, source in enumerate(zip(frames.y, frames.u, frames.v, strict=True)):
        image = reformatter.reformat(
            _plain_frame(*source), width=width, height=height, format="yuv420p", interpolation=_BICUBIC, threads=1,
            src_colorspace=spaces[frames.bt709], dst_colorspace=spaces[bt709],
            src_color_range=ranges[frames.full_range], dst_color_range=ranges[full_range],
        )  # fmt: skip
        for target, plane in zip(planes, _plane_views(image), strict=True):
            target[number] = plane
    return YuvFrames(*planes, bt709, full_range)


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
    """(number, frame) of each frame in `numbers`, once."""
    goals = np.unique(numbers).tolist()
    missing = set(goals)
    if record.skippable:
        # What skipping does not bring is counted up to instead: the trial cannot show that every choice of frames comes, and counting
        # has the better words for a file that changed.
        with suppress(UnreadableVideo):
            for number, frame in _recognised(path, record, goals):
                yield number, frame
                missing.remove(number)
    if missing:
        yield from _counted(path, record, sorted(missing))


def _counted(path: Path, record: VideoRecord, goals: list[int]) -> Iterator[tuple[int, VideoFrame]]:
    """`_frames_of` by decoding every frame up to the goals, or from a keyframe up to them, and counting."""
    with _opened(path) as (container, stream):
        for start, run in _runs(record, goals):
            if start > 0:
                _seek(container, stream, start, record)
            frames = _decoded(container, stream, first=start)
            position = start  # the frame that the decoder gives next
            for goal in run:
                frame = next(islice(frames, goal - position, None), None)
                position = goal + 1
                if frame is None:
                    raise UnreadableVideo(f"ends before frame {goal} of the {record.frames} verified: the file changed")
                _check_size(frame, goal, record.height, record.width)
                if _pts(frame) != record.pts[goal]:
                    raise UnreadableVideo(f"frame {goal} is not the one that was verified: the file changed")
                yield goal, frame


def _recognised(path: Path, record: VideoRecord, goals: list[int]) -> Iterator[tuple[int, VideoFrame]]:
    """`_frames_of` by timestamps, without decoding what no goal needs. For files in which every packet holds one frame and has its pts."""
    every = set(record.pts.tolist())
    with _opened(path) as (container, stream):
        for start, run in _runs(record, goals):
            if start > 0:
                _seek(container, stream, start, record)
            number_of = dict(zip(record.pts[run].tolist(), run, strict=True))
            frames = _needed(container, stream, waiting=set(number_of), unwanted=every - number_of.keys())
            for place, frame in enumerate(frames):
                if place == 0 and frame.pts != record.pts[start]:
                    raise UnreadableVideo(f"frame {start} is not where it was: the file changed")
                if (number := number_of.pop(frame.pts, None)) is not None:
                    _check_size(frame, number, record.height, record.width)
                    yield number, frame


def _runs(record: VideoRecord, goals: list[int]) -> list[tuple[int, list[int]]]:
    """The goals (increasing) in runs that are decoded without a break, each with the frame to start from: 0, or a keyframe to be sought.

    A run ends where a keyframe lies between two goals.
    """
    starting_points = np.append(0, record.keyframes) if record.seekable else np.zeros(1, dtype=np.int64)
    last_up_to_goal = np.searchsorted(starting_points, goals, side="right") - 1
    runs: list[tuple[int, list[int]]] = []
    for start, goal in zip(starting_points[last_up_to_goal].tolist(), goals, strict=True):
        if not runs or start > runs[-1][1][-1] + 1:
            runs.append((start, []))
        runs[-1][1].append(goal)
    return runs


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
        if container.format.name in _PLAYLISTS:
            raise UnreadableVideo(f"a playlist ({container.format.name}), which names other files")
        if not container.streams.video:
            raise UnreadableVideo("no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UnreadableVideo("no decoder for its video codec")
        _check_pixels(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}  # a size may also come with a later frame
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
        report_progress()
        if frame.is_corrupt:
            raise UnreadableVideo(f"frame {number} is corrupt")
        yield frame


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """From where the container stands to its end, then an empty one. Goes between PyAV's own iterator and whoever may leave before the
    end: left, this one closes it. Merely dropped, it never frees a packet of 150 bytes (PyAV 18.0), a file that is read in part.

    Raises UnreadableVideo: there is no end to them."""
    left = _MOST_DATA * container.size
    with closing(container.demux(stream)) as packets:  # type: ignore[type-var]  # a generator, whatever PyAV calls it
        for packet in packets:
            # The end's own is empty, and so are those of dropped frames; each of these takes place in the file.
            left -= max(packet.size, 1)
            if left < 0:
                raise UnreadableVideo(f"gives more than {_MOST_DATA} times the data that it holds")
            yield packet


def _needed(
    container: InputContainer, stream: VideoStream, waiting: set[int], unwanted: set[int]
) -> Iterator[VideoFrame]:
    """From where the container stands, the frames whose timestamps are not in `unwanted`, and of those the ones that others refer to.

    Once nothing is `waiting` any more, which is used up, the decoder is drained: what it still holds back needs no further packet.
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
        raise UnreadableVideo(f"decoding stops: {_plain(error)}") from error


def _seek(container: InputContainer, stream: VideoStream, keyframe: int, record: VideoRecord) -> None:
    """To a keyframe, given its number; the caller checks where this landed."""
    try:
        container.seek(int(record.pts[keyframe]), stream=stream)
    except av.error.FFmpegError as error:
        raise UnreadableVideo(f"cannot seek to frame {keyframe}: {_plain(error)}") from error


def _seeks_exactly(path: Path, record: VideoRecord, checksums: dict[int, int]) -> bool:
    """Whether a seek to each keyframe after frame 0 gives the frames that the sequential decode gave."""
    keyframes = record.keyframes[record.keyframes > 0].tolist()
    if not keyframes:
        return False
    reformatter = VideoReformatter()
    try:
        with _opened(path) as (container, stream):
            for keyframe, next_keyframe in pairwise([*keyframes, record.frames]):
                _seek(container, stream, keyframe, record)
                frames = _decoded(container, stream, first=keyframe)
                for number in range(keyframe, min(next_keyframe, keyframe + _TRIAL_FRAMES)):
                    frame = next(frames, None)
                    if frame is None or _pts(frame) != record.pts[number]:
                        return False
                    if _checksum(frame, reformatter) != checksums[number]:
                        return False
    except UnreadableVideo:
        return False
    return True


def _skips_exactly(path: Path, record: VideoRecord, checksums: dict[int, int]) -> bool:
    """Whether every packet is one frame's, and reading that skips what it can gives the frames that the sequential decode gave."""
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
        for number, frame in _recognised(path, record, trial):
            if _checksum(frame, reformatter) != checksums[number]:
                return False
            trial.remove(number)
    except (UnreadableVideo, av.error.FFmpegError):
        return False
    return not trial


def _in_skipping_trial(number: int) -> bool:
    """Pairs with gaps of two among 32 frames, then a gap of 32: whatever the order of B-frames, some are wanted and some are skipped."""
    return number % 64 < 32 and number % 4 < 2


def _rgb(frame: VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """(height, width, 3) uint8. PyAV's default of one thread a core triples the cost for frames of this size."""
    return np.ascontiguousarray(reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())


def _yuv420(frame: VideoFrame, reformatter: VideoReformatter) -> tuple[VideoFrame, bool, bool]:
    """The frame in 4:2:0 with 8 bits, whether its matrix is BT.709's, and whether it is in full range."""
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
    # By way of RGB, which has no matrix.
    rgb = VideoFrame.from_ndarray(_rgb(frame, reformatter), format="rgb24")
    frame = reformatter.reformat(
        rgb, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
    )
    return frame, True, False


def _checksum(frame: VideoFrame, reformatter: VideoReformatter) -> int:
    """Of the planes as they are decoded; of RGB where they are not 4:2:0 with 8 bits."""
    if frame.format.name not in _PLANES_420:
        return zlib.crc32(_rgb(frame, reformatter).data)
    checksum = 0
    for plane in frame.planes:
        checksum = zlib.crc32(np.ascontiguousarray(_lines(plane)).data, checksum)
    return checksum


def _lines(plane: VideoPlane) -> np.ndarray:
    """(height, width) uint8, a view of a plane with one byte a value."""
    return np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


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


def _plain(error: Exception) -> str:
    """FFmpeg's own words, without the error number and the C function."""
    return str(getattr(error, "strerror", None) or error)


# ---------------------------------------------------------------- for the packed store: resizing, and files that are quick to read

_BICUBIC = int(Interpolation.BICUBIC) | 0x40000 | 0x80000
"""With FFmpeg's SWS_ACCURATE_RND and SWS_BITEXACT, which PyAV names from version 18 on: without, black (0) becomes 1 in places, and the
result depends on the processor. They cost 6 % of the scaling."""

_COMPACT_QUANTIZER = 3
_COMPACT_KEYFRAME_EVERY = 12


def resized_planes(path: Path, record: VideoRecord, height: int, width: int) -> Iterator[YuvFrames]:
    """Every frame of a video in order, one at a time (N = 1), its planes scaled to `height` x `width` by swscale (bicubic).

    Matrix and range stay as they are. In the video's own size the planes are byte for byte those of `read_planes`.
    Raises UnreadableVideo: the file is no longer what the record says.
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
                # A frame that names neither matrix nor range, so that swscale converts neither.
                frame = scaler.reformat(
                    _plain_frame(*_plane_views(frame)), width=width, height=height, format="yuv420p",
                    interpolation=_BICUBIC, threads=1,
                )  # fmt: skip
            y, u, v = _plane_views(frame)
            yield YuvFrames(y[None], u[None], v[None], bt709, full_range)
    if decoded < record.frames:
        raise UnreadableVideo(f"ends before frame {decoded} of the {record.frames} verified: the file changed")


def compact_video(frames: Iterable[YuvFrames], height: int, width: int) -> bytes:
    """An AVI file of these frames as mpeg4: a keyframe exactly every 12 frames, no B-frames, quantizer 3, in one thread.

    Sample values are coded as they are; the file names neither matrix nor range. Read by `compact_record`.

    mpeg4 and not h264: at 170 x 128 it reads 1.5 times as fast as the quickest h264 of the same quality (without deblocking and CABAC), in
    1.3 to 1.4 times the bytes. AVI reads as fast as Matroska and a little faster than mp4; in NUT seeking fails.
    """
    # sc_threshold: no further keyframes where the encoder sees a scene change.
    options = {"qmin": str(_COMPACT_QUANTIZER), "qmax": str(_COMPACT_QUANTIZER), "sc_threshold": "1000000000"}
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.gop_size = _COMPACT_KEYFRAME_EVERY
        stream.codec_context.max_b_frames = 0
        stream.codec_context.thread_count = 1
        for planes in frames:
            for y, u, v in zip(planes.y, planes.u, planes.v, strict=True):
                container.mux(stream.encode(_plain_frame(y, u, v)))
        container.mux(stream.encode(None))
    return file.getvalue()


def compact_record(frames: int, height: int, width: int) -> VideoRecord:
    """What `verify_video` finds in a file that `compact_video` made of so many frames."""
    return VideoRecord(
        frames=frames,
        declared=frames,
        height=height,
        width=width,
        pts=np.arange(frames),
        keyframes=np.arange(0, frames, _COMPACT_KEYFRAME_EVERY),
        seekable=frames > _COMPACT_KEYFRAME_EVERY,
        skippable=False,
    )


def _plane_views(frame: VideoFrame) -> Planes:
    """The planes of a 4:2:0 frame without the bytes that fill up its lines; they are the frame's own memory."""
    y, u, v = map(_lines, frame.planes)
    return y, u, v


def _plain_frame(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> VideoFrame:
    """A 4:2:0 frame with a copy of these planes, that says nothing of its colours."""
    height, width = y.shape
    frame = VideoFrame(width, height, "yuv420p")
    for target, plane in zip(_plane_views(frame), (y, u, v), strict=True):
        target[...] = plane
    return frame
