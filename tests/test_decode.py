"""Frames equal those of a plain decode of the whole file on every genuine video, and broken videos are recognised."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from dclr.config import DataConfig
from dclr.data import decode
from dclr.data.check import check
from dclr.data.decode import (
    NO_PTS,
    UnreadableVideo,
    VideoRecord,
    YuvFrames,
    is_video,
    read_planes,
    resized_planes,
    verify_video,
)
from dclr.data.encode import write_video

GENUINE = [
    "ucf101_sample/UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi",
    "ucf101_sample/UCF-101/BaseballPitch/v_BaseballPitch_g01_c01.avi",
    "ucf101_sample/UCF-101/Bowling/v_Bowling_g01_c01.avi",
    "ucf101_sample/UCF-101/IceDancing/v_IceDancing_g01_c01.avi",
    "ucf101_sample/UCF-101/Rowing/v_Rowing_g16_c03.avi",
    "ucf101_sample/UCF-101/SoccerJuggling/v_SoccerJuggling_g23_c01.avi",
    "ucf101_sample/UCF-101/SoccerJuggling/v_SoccerJuggling_g24_c01.avi",
    "hmdb51_sample/videos/cartwheel/hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi",
    "hmdb51_sample/videos/wave/RATRACE_wave_f_nm_np1_fr_goo_37.avi",
    "hmdb51_sample/videos/wave/SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi",
    "hmdb51_sample/videos/wave/TrumanShow_wave_f_nm_np1_fr_med_26.avi",
    "kinetics_sample/R6llTwEh07w.mp4",
    "kinetics_sample/SOX5yA1l24A.mp4",
    "kinetics_sample/WUzgd7C1pWA.mp4",
    "kinetics_sample/mmaction2_demo.mp4",
    "weizmann/bend/daria_bend.mp4",
    "weizmann/walk/lyova_walk.mp4",
    "weizmann/wave2/ido_wave2.mp4",
    "faulty/non_utf8_metadata.3gp",  # h263, and the only 3gp
    "faulty/rotated_90.mov",  # 3 frames: every window loops
]


def decode_all(path: Path) -> np.ndarray:
    """Return every frame of a video in YUV 4:2:0 by PyAV's plain decode, without seeking: the expected frames.

    Returns:
        (frames, H * W * 3 / 2) uint8: y, u and v of each frame, one after the other.
    """
    with av.open(str(path), metadata_errors="ignore") as container:
        return np.stack([frame.to_ndarray().ravel() for frame in container.decode(video=0)])


def read_all(path: Path, record: VideoRecord, wanted: np.ndarray | Sequence[int]) -> np.ndarray:
    """Return the wanted frames by `read_planes`, in the form of `decode_all`."""
    planes = read_planes(path, record, wanted)
    return np.concatenate([plane.reshape(len(plane), -1) for plane in (planes.y, planes.u, planes.v)], axis=1)


def decode_rgb(path: Path) -> np.ndarray:
    """Return every frame of a video, (frames, H, W, 3) uint8 RGB, by PyAV's own conversion."""
    with av.open(str(path), metadata_errors="ignore") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("name", GENUINE)
def test_any_window_equals_a_full_decode_byte_for_byte(genuine: Path, name: str) -> None:
    path = genuine / name
    record, frames = verify_video(path), decode_all(path)
    assert frames.shape == (record.frames, record.height * record.width * 3 // 2)
    count = record.frames
    rng = np.random.default_rng(0)
    windows = [
        np.arange(16) * 2 % count,  # from the start
        (count - 5 + np.arange(16) * 2) % count,  # loops over the end
        np.array([count - 1]),  # the last frame: the decoder must be drained
        np.array([count - 1, 0, count - 1, count // 2, 0]),  # backwards, with repeats
        record.keyframes,  # lands on each keyframe
        np.clip(record.keyframes - 1, 0, None),  # just before each
    ]
    for _ in range(6):  # two windows and two stills, as training draws them
        starts = rng.integers(0, count, 2)
        windows.append(
            np.concatenate([(starts[:, None] + 2 * np.arange(16)).ravel() % count, rng.integers(0, count, 2)])
        )
        windows.append(rng.integers(0, count, 1))
    for wanted in windows:
        got = read_all(path, record, wanted)
        assert got.dtype == np.uint8
        assert np.array_equal(got, frames[wanted]), f"frames {wanted}"


def test_a_late_window_is_reached_by_seeking(genuine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = genuine / "kinetics_sample/SOX5yA1l24A.mp4"
    record = verify_video(path)
    assert record.keyframes.tolist() == [0, 138, 219, 292]
    assert record.seekable
    sought = []
    real = decode._seek
    monkeypatch.setattr(
        "dclr.data.decode._seek",
        lambda container, stream, keyframe, of: sought.append(keyframe) or real(container, stream, keyframe, of),
    )
    read_all(path, record, [300, 301, 150, 5])
    assert sought == [138, 292]


SKIPPABLE = {"kinetics_sample", "weizmann"}  # h264 with B-frames; the B-frames of mpeg4 here have scrambled timestamps


@pytest.mark.parametrize("name", GENUINE)
def test_which_genuine_files_may_be_skipped_in(genuine: Path, name: str) -> None:
    assert verify_video(genuine / name).skippable == (name.partition("/")[0] in SKIPPABLE)


def counting(monkeypatch: pytest.MonkeyPatch, name: str) -> list[int]:
    """Return a list that collects the timestamps of all frames that pass through a function of the module from now
    on."""
    came: list[int] = []
    real = getattr(decode, name)

    def watched(*arguments: Any, **named: Any) -> Iterator[av.VideoFrame]:
        for frame in real(*arguments, **named):
            came.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode, name, watched)
    return came


def test_frames_that_nothing_refers_to_are_not_decoded(genuine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = genuine / "kinetics_sample/SOX5yA1l24A.mp4"
    record = verify_video(path)
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.skip_frame = "NONREF"
        referred_to = {frame.pts for frame in container.decode(video=0)}
    assert len(referred_to) == 185  # of 332
    counted, needed = counting(monkeypatch, "_decoded"), counting(monkeypatch, "_needed")
    wanted = np.concatenate([np.arange(100, 132, 2), np.arange(250, 282, 2)])
    got = read_planes(path, record, wanted)
    assert counted == []
    assert set(needed) <= referred_to | set(record.pts[wanted].tolist())
    assert len(needed) == 127
    monkeypatch.undo()
    counted = counting(monkeypatch, "_decoded")
    expected = read_planes(path, replace(record, skippable=False), wanted)
    assert len(counted) == 131 + 62  # from frame 0 to 130, from keyframe 219 to 280
    for name in "yuv":
        assert np.array_equal(getattr(got, name), getattr(expected, name))


def test_nothing_is_decoded_behind_the_last_frame_wanted(genuine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that must be decoded before the last one are decoded: a B-frame may refer to three later frames of a
    pyramid."""
    path = genuine / "kinetics_sample/SOX5yA1l24A.mp4"
    record = verify_video(path)
    came = counting(monkeypatch, "_needed")
    for wanted in range(0, 130, 7):
        came.clear()
        read_planes(path, record, [wanted])
        assert record.pts[wanted] in came
        assert sum(pts > record.pts[wanted] for pts in came) <= 3


HMDB51 = {  # file: (declared, decoded, keyframes)
    "cartwheel/hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi": (84, 83, [0]),
    "wave/RATRACE_wave_f_nm_np1_fr_goo_37.avi": (73, 72, [0]),
    "wave/SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi": (75, 74, [0]),
    "wave/TrumanShow_wave_f_nm_np1_fr_med_26.avi": (49, 48, [0, 19]),
}


@pytest.mark.parametrize("name", HMDB51)
def test_hmdb51_declares_a_frame_too_many_and_cannot_be_sought(genuine: Path, name: str) -> None:
    record = verify_video(genuine / "hmdb51_sample/videos" / name)
    assert (record.declared, record.frames, record.keyframes.tolist()) == HMDB51[name]
    assert not (np.diff(record.pts) > 0).all()
    assert not record.seekable


READABLE = {  # file of faulty/: (frames, declared, height, width, seekable)
    "no_duration.webm": (74, 0, 720, 1280, False),  # one keyframe
    "non_utf8_metadata.3gp": (71, 71, 288, 352, True),
    "rotated_90.mov": (3, 3, 320, 568, False),  # as coded: not turned
}
REFUSED = {
    "audio_only.mp4": "no video stream",
    "one_tiny_frame.mp4": "no video stream",  # of a kind that FFmpeg makes no stream of
    "declares_frames_has_none.mp4": "opens, but no frame decodes",  # 5544 declared
    "invalid_bitstream.webm": "decoding stops at frame 0: Invalid data found when processing input",
    "mid_stream_error.mp4": "decoding stops at frame 28: Invalid data found when processing input",
    "open_fails.mp4": "cannot be opened: Invalid data found when processing input",
    "zero_bytes.avi": "empty file",
}


def test_every_faulty_file_has_a_verdict(genuine: Path) -> None:
    assert {file.name for file in (genuine / "faulty").iterdir()} == READABLE.keys() | REFUSED.keys()


@pytest.mark.parametrize("name", READABLE)
def test_odd_but_readable(genuine: Path, name: str) -> None:
    record = verify_video(genuine / "faulty" / name)
    assert (record.frames, record.declared, record.height, record.width, record.seekable) == READABLE[name]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(genuine: Path, name: str) -> None:
    with pytest.raises(UnreadableVideo) as refusal:
        verify_video(genuine / "faulty" / name)
    assert str(refusal.value) == REFUSED[name]


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVideo, match="no such file"):
        verify_video(tmp_path / "none.mp4")


def moving_noise(frames: int = 30, size: int = 32) -> np.ndarray:
    rng = np.random.default_rng(0)
    still = np.kron(rng.integers(0, 256, (size // 8, size // 8, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    return np.stack([np.roll(still, 2 * number, axis=1) for number in range(frames)])


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, VideoRecord]:
    path = tmp_path / "small.mp4"
    write_video(path, moving_noise())
    return path, verify_video(path)


def test_what_is_written_is_read(small: tuple[Path, VideoRecord]) -> None:
    path, record = small
    assert (record.frames, record.height, record.width) == (30, 32, 32)
    assert record.keyframes.tolist() == [0, 12, 24]
    assert record.seekable
    error = np.abs(decode.rgb_of(read_planes(path, record, range(30))).astype(int) - moving_noise())
    assert error.mean() < 8  # h264 and half the colour resolution; another frame of this video is off by 28 and more
    assert np.abs(np.roll(moving_noise(), 1, axis=0).astype(int) - moving_noise()).mean() > 24
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 25)


@pytest.mark.parametrize("shape", [(2, 31, 32, 3), (2, 32, 31, 3), (2, 32, 32, 4)])
def test_shapes_that_cannot_be_written(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="even"):
        write_video(tmp_path / "x.mp4", np.zeros(shape, np.uint8))


@pytest.mark.parametrize("wanted", [[-1], [30], [0, 5, 30]])
def test_numbers_out_of_range(small: tuple[Path, VideoRecord], wanted: list[int]) -> None:
    with pytest.raises(ValueError, match=r"\[0, 30\)"):
        read_planes(*small, wanted)


def test_nothing_wanted(small: tuple[Path, VideoRecord]) -> None:
    assert read_planes(*small, []).y.shape == (0, 32, 32)


def test_a_file_that_changed_since_is_not_read_as_if_it_had_not(small: tuple[Path, VideoRecord]) -> None:
    path, record = small
    write_video(path, moving_noise(frames=20))
    with pytest.raises(UnreadableVideo, match="ends before frame 23"):
        read_planes(path, record, [23])
    with pytest.raises(UnreadableVideo, match="frame 29"):  # record says: seek to 24
        read_planes(path, record, [29])
    write_video(path, moving_noise(size=64))
    with pytest.raises(UnreadableVideo, match="frame size changes at frame 3: 32 x 32 becomes 64 x 64"):
        read_planes(path, record, [3])


def test_a_codec_without_decoder(genuine: Path, tmp_path: Path) -> None:
    content = (genuine / GENUINE[1]).read_bytes()
    path = tmp_path / "unknown.avi"
    path.write_bytes(content.replace(b"xvid", b"zqzq"))
    with pytest.raises(UnreadableVideo, match="no decoder for its video codec"):
        verify_video(path)


def test_a_damaged_frame_is_refused(genuine: Path, tmp_path: Path) -> None:
    """Bytes in the middle are overwritten. By default, every library returns such frames without an error."""
    content = bytearray((genuine / "kinetics_sample/R6llTwEh07w.mp4").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    with pytest.raises(UnreadableVideo, match=r"is corrupt|decoding stops at frame \d+"):
        verify_video(path)


def test_a_truncated_avi(genuine: Path, tmp_path: Path) -> None:
    """Cut between two packets, the file has fewer frames than declared. Cut inside a packet, its last frame does not
    decode."""
    whole = genuine / GENUINE[4]
    with av.open(str(whole)) as container:
        start = [packet.pos for packet in container.demux(video=0)][90]  # of the 91st frame, which is number 90
    path = tmp_path / "cut.avi"
    path.write_bytes(whole.read_bytes()[: start - 8])
    record = verify_video(path)
    assert (record.declared, record.frames, record.cut_from) == (135, 90, 135)
    assert np.array_equal(read_all(path, record, range(90)), decode_all(whole)[:90])
    path.write_bytes(whole.read_bytes()[: start + 500])
    with pytest.raises(UnreadableVideo, match="decoding stops at frame 90: "):
        verify_video(path)


def test_the_frame_size_changes(tmp_path: Path) -> None:
    """The file has two h264 streams one after the other, as in broadcasts."""
    path = tmp_path / "both.h264"
    write_video(tmp_path / "a.h264", moving_noise(frames=10))
    write_video(tmp_path / "b.h264", moving_noise(frames=10, size=64))
    path.write_bytes((tmp_path / "a.h264").read_bytes() + (tmp_path / "b.h264").read_bytes())
    with pytest.raises(UnreadableVideo, match="the frame size changes at frame 10: 32 x 32 becomes 64 x 64"):
        verify_video(path)


def test_without_timestamps_nothing_is_sought(tmp_path: Path) -> None:
    path = tmp_path / "bare.h264"
    write_video(path, moving_noise())
    record = verify_video(path)
    assert (record.pts == NO_PTS).all()
    assert record.keyframes.tolist() == [0, 12, 24]
    assert not record.seekable
    wanted = [29, 3, 15]
    assert np.array_equal(read_all(path, record, wanted), decode_all(path)[wanted])


def test_a_colon_in_a_relative_path_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", moving_noise())
    (tmp_path / "a.mp4").rename(tmp_path / "concat:a.mp4")
    monkeypatch.chdir(tmp_path)
    assert verify_video(Path("concat:a.mp4")).frames == 30


def write_with_b_frames(path: Path, codec: str, **options: str) -> None:
    """Write 48 frames of 96 x 64 pixels, a pattern that moves and changes, with a keyframe every 20 frames."""
    frames = np.concatenate([moving_noise(48, 64), moving_noise(48, 64)[::-1, :, :32]], axis=2)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.gop_size = 20
        stream.codec_context.thread_count = 1
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("suffix", "codec", "options", "skippable"),
    [
        pytest.param("mp4", "libx264", {"bf": "2", "b-pyramid": "none"}, True, id="h264"),
        pytest.param("mkv", "libx264", {"bf": "7", "b_strategy": "0"}, True, id="h264, B-frames of B-frames"),
        pytest.param("mp4", "libx264", {"bf": "3", "x264-params": "open-gop=1"}, True, id="h264, open groups"),
        pytest.param("ts", "libx264", {"bf": "3", "x264-params": "tff=1"}, True, id="h264, interlaced, in ts"),
        pytest.param("avi", "libx264", {"bf": "3"}, False, id="h264 in AVI: scrambled timestamps"),
        pytest.param("mp4", "libx264", {"bf": "0"}, False, id="h264 without B-frames: nothing to skip"),
        pytest.param("mp4", "mpeg4", {"bf": "2"}, True, id="mpeg4"),
        pytest.param("avi", "mpeg4", {"bf": "2"}, True, id="mpeg4 in AVI, not packed"),
        pytest.param("mp4", "libx265", {"x265-params": "log-level=none:bframes=4"}, False, id="hevc: not relied upon"),
        pytest.param("webm", "libvpx-vp9", {"deadline": "realtime"}, False, id="vp9: not relied upon"),
        pytest.param("mp4", "libsvtav1", {"preset": "12"}, False, id="av1: not relied upon"),
    ],
)  # fmt: skip
def test_any_choice_of_frames_equals_a_full_decode(
    tmp_path: Path, suffix: str, codec: str, options: dict[str, str], skippable: bool
) -> None:
    path = tmp_path / f"video.{suffix}"
    write_with_b_frames(path, codec, **options)
    record, frames = verify_video(path), decode_all(path)
    assert record.frames == len(frames) == 48
    assert record.skippable == skippable
    rng = np.random.default_rng(0)
    for number in range(48):  # each alone, which skips the most, and with any others
        assert np.array_equal(read_all(path, record, [number]), frames[[number]])
        wanted = np.append(rng.integers(0, 48, rng.integers(0, 20)), number)
        assert np.array_equal(read_all(path, record, wanted), frames[wanted]), f"frames {wanted}"


@pytest.fixture
def av1(tmp_path: Path) -> Path:
    """FFmpeg's AV1 decoder reads the setting to skip only when it opens, and then skips frames that are wanted
    later."""
    path = tmp_path / "video.mp4"
    write_with_b_frames(path, "libsvtav1", preset="12")
    return path


def test_the_trial_notices_frames_that_are_lost(av1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = verify_video(av1)
    monkeypatch.setattr(decode, "_in_skipping_trial", lambda number: number % 2 == 1)
    monkeypatch.setattr(decode, "_checksum", lambda *_: 0)  # the frames that come are right
    assert not decode._skips_exactly(av1, record, dict.fromkeys(range(48), 0))


def test_frames_that_skipping_loses_are_decoded_all_the_same(av1: Path) -> None:
    record = replace(verify_video(av1), skippable=True)
    wanted = np.arange(1, 48, 2)
    assert np.array_equal(read_all(av1, record, wanted), decode_all(av1)[wanted])


def test_the_trial_notices_a_changed_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "video.mp4"
    write_with_b_frames(path, "libx264", bf="3")
    assert verify_video(path).skippable
    real = decode._frames_by_time

    def another_frame_once(*arguments: Any) -> Iterator[tuple[int, av.VideoFrame]]:
        frames = dict(real(*arguments))
        yield from (frames | {20: frames[21]}).items()

    monkeypatch.setattr(decode, "_frames_by_time", another_frame_once)
    assert not verify_video(path).skippable


def test_a_file_with_b_frames_that_changed_since(tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    write_with_b_frames(path, "libx264", bf="3")
    record, content = verify_video(path), bytearray(path.read_bytes())
    assert record.skippable
    middle = len(content) // 2
    content[middle : middle + 500] = bytes(500)
    path.write_bytes(content)
    with pytest.raises(UnreadableVideo, match=r"is corrupt|decoding stops at frame \d+"):
        read_planes(path, record, range(48))
    write_video(path, moving_noise(frames=30, size=32))
    with pytest.raises(UnreadableVideo, match="frame size changes at frame 5"):
        read_planes(path, record, [5])
    write_with_b_frames(tmp_path / "slower.mkv", "libx264", bf="3")
    write_with_b_frames(path, "libx264", bf="3")
    (tmp_path / "slower.mkv").rename(path)  # other timestamps
    with pytest.raises(UnreadableVideo, match="frame 5 is not the one that was verified: the file changed"):
        read_planes(path, record, [5])


@pytest.mark.parametrize("name", GENUINE)
def test_the_colour_space_of_genuine_videos(genuine: Path, name: str) -> None:
    planes = read_planes(genuine / name, verify_video(genuine / name), [0])
    assert planes.bt709 == (name == "faulty/rotated_90.mov")  # the only one here that names a matrix
    assert not planes.full_range


@pytest.mark.parametrize("name", GENUINE[::3])
def test_rgb_for_figures_is_that_of_the_video(genuine: Path, name: str) -> None:
    path = genuine / name
    record = verify_video(path)
    wanted = [record.frames - 1, 0]
    assert np.array_equal(decode.rgb_of(read_planes(path, record, wanted)), decode_rgb(path)[wanted])


def rgb_of(planes: YuvFrames) -> np.ndarray:
    """Return RGB by the formula of the recommendations BT.601 and BT.709, (N, H, W, 3) float64, with repeated
    chroma."""
    H, W = planes.y.shape[1:]
    kr, kb = (0.2126, 0.0722) if planes.bt709 else (0.299, 0.114)
    y, u, v = (
        planes.y.astype(float),
        *(p.astype(float).repeat(2, 1).repeat(2, 2)[:, :H, :W] - 128 for p in (planes.u, planes.v)),
    )
    if not planes.full_range:
        y, u, v = (y - 16) * 255 / 219, u * 255 / 224, v * 255 / 224
    r, b = y + 2 * (1 - kr) * v, y + 2 * (1 - kb) * u
    return np.stack([r, (y - kr * r - kb * b) / (1 - kr - kb), b], axis=3).clip(0, 255)


@pytest.mark.parametrize("name", [*GENUINE, "faulty/no_duration.webm"])
def test_planes_have_the_colours_of_the_rgb_frames(genuine: Path, name: str) -> None:
    """FFmpeg's fast conversion rounds down by one level on average and interpolates chroma: 98 % differ by under 3
    levels."""
    path = genuine / name
    record = verify_video(path)
    wanted = [0, record.frames // 2]
    difference = np.abs(rgb_of(read_planes(path, record, wanted)) - decode_rgb(path)[wanted])
    assert difference.mean() < 1.5
    assert np.percentile(difference, 98) < 3


def write_other(path: Path, rgb: np.ndarray, codec: str, pix_fmt: str, matrix: int = 2, color_range: int = 0) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"qp": "0"} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *rgb.shape[1:3], pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, color_range
        for image in rgb:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            converted = VideoReformatter().reformat(
                frame, format=pix_fmt, dst_colorspace=1 if matrix == 1 else 5, dst_color_range=color_range or 1
            )
            container.mux(stream.encode(converted))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "matrix", "color_range", "bt709", "full_range"),
    [
        pytest.param("libx264", "yuv420p", 2, 0, False, False, id="nothing named: BT.601, limited range"),
        pytest.param("libx264", "yuv420p", 6, 1, False, False, id="SMPTE 170M, which is BT.601's matrix"),
        pytest.param("libx264", "yuv420p", 1, 1, True, False, id="BT.709"),
        pytest.param("libx264", "yuv420p", 1, 2, True, True, id="BT.709, full range"),
        pytest.param("libx264", "yuvj420p", 5, 2, False, True, id="BT.601, full range, by the format's name too"),
        pytest.param("libx264", "yuv444p", 1, 1, True, False, id="4:4:4 is reduced, and keeps its matrix"),
        pytest.param("libx264", "yuv422p10le", 2, 1, False, False, id="10 bits"),
        pytest.param("ffv1", "bgr0", 0, 0, True, False, id="RGB"),
        pytest.param("ffv1", "gray", 2, 0, True, False, id="grey"),
    ],
)
def test_colour_space_comes_from_the_stream(
    tmp_path: Path, codec: str, pix_fmt: str, matrix: int, color_range: int, bt709: bool, full_range: bool
) -> None:
    squares = np.array(
        [[200, 40, 30], [30, 180, 60], [20, 60, 210], [220, 220, 220], [90, 90, 90], [10, 10, 10]], np.uint8
    )
    rgb = np.broadcast_to(squares.repeat(16, 0), (3, 32, 96, 3)).copy()
    if pix_fmt == "gray":
        rgb[:] = rgb[..., 1:2]
    path = tmp_path / "video.mkv"
    write_other(path, rgb, codec, pix_fmt, matrix, color_range)
    planes = read_planes(path, verify_video(path), [2, 0])
    assert (planes.bt709, planes.full_range) == (bt709, full_range)
    assert planes.y.shape == (2, 32, 96)
    assert planes.u.shape == planes.v.shape == (2, 16, 48)
    inside = np.arange(96) % 16 // 4 % 3 != 0  # of the squares: where they meet, chroma of 4:4:4 is averaged
    assert np.abs(rgb_of(planes) - rgb[:2])[:, :, inside].max() < 4  # a wrong matrix or range errs by 10 and more
    assert np.abs(decode.rgb_of(planes).astype(int) - rgb[:2])[:, :, inside].max() < 6


def test_planes_of_odd_sizes(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (2, 17, 23, 3), np.uint8)
    path = tmp_path / "odd.mkv"
    write_other(path, rgb, "ffv1", "yuv420p")
    planes = read_planes(path, verify_video(path), [1])
    assert planes.y.shape == (1, 17, 23)
    assert planes.u.shape == planes.v.shape == (1, 9, 12)
    assert np.array_equal(decode.rgb_of(planes), decode_rgb(path)[[1]])


def test_planes_are_written_into_larger_ones(genuine: Path) -> None:
    path = genuine / "ucf101_sample" / "UCF-101" / "Rowing" / "v_Rowing_g16_c03.avi"
    record = verify_video(path)
    expected = read_planes(path, record, [7, 3, 7])
    into = tuple(np.full(shape, 9, np.uint8) for shape in ((3, 250, 330), (3, 125, 165), (3, 125, 165)))
    found = read_planes(path, record, [7, 3, 7], into)
    for name, buffer in zip("yuv", into, strict=True):
        own = getattr(found, name)
        assert np.array_equal(own, getattr(expected, name))
        assert np.shares_memory(own, buffer)
        height, width = own.shape[1:]
        assert np.array_equal(buffer[:, :height, :width], own)
        assert (buffer[:, height:] == 9).all()
        assert (buffer[:, :, width:] == 9).all()


def test_the_same_frames_are_written_as_the_same_bytes(tmp_path: Path) -> None:
    """With assembly, x264 encoded 7 of 12 demo videos to different bytes within four calls."""
    rng = np.random.default_rng(0)
    written = set()
    frames = rng.integers(0, 256, (20, 64, 64, 3), np.uint8)
    for i in range(4):
        write_video(tmp_path / f"{i}.mp4", frames)
        written.add((tmp_path / f"{i}.mp4").read_bytes())
    assert len(written) == 1


def test_a_playlist_that_calls_itself_a_video_is_refused(tmp_path):
    """FFmpeg recognises a playlist by its content and would decode the file that it names."""
    write_video(tmp_path / "other.mp4", np.zeros((4, 32, 32, 3), np.uint8))
    (tmp_path / "a.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    with pytest.raises(UnreadableVideo, match=r"^a playlist \(concat\), which names other files$"):
        verify_video(tmp_path / "a.mp4")


# ---------------------------------------------------------------- which stream is read


def write_streams(path: Path, *streams: tuple[str, int, int], default: int | None = None) -> None:
    """Write a file with video streams of (codec, size in pixels, frames). The stream `default` is the only default."""
    with av.open(str(path), "w") as container:
        made = []
        for number, (codec, size, frames) in enumerate(streams):
            stream = container.add_stream(codec, rate=25)
            stream.height = stream.width = size
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.codec_context.thread_count = 1
            if default is not None:
                stream.disposition = Disposition.default if number == default else Disposition(0)
            made.append((stream, frames))
        for number in range(max(frames for _, frames in made)):
            for stream, frames in made:
                if number < frames:
                    image = np.full((stream.height, stream.width, 3), 8 * number, dtype=np.uint8)
                    frame = av.VideoFrame.from_ndarray(image)
                    frame.pts = number
                    container.mux(stream.encode(frame))
        for stream, _ in made:
            container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "streams", "default", "size", "count"),
    [
        ("default_last.mp4", [("mpeg4", 64, 10), ("mpeg4", 32, 20)], 1, 32, 2),
        ("default_first.mkv", [("mpeg4", 32, 10), ("mpeg4", 64, 20)], 0, 32, 2),
        ("largest.ts", [("mpeg2video", 32, 10), ("mpeg2video", 64, 20), ("mpeg2video", 64, 5)], None, 64, 3),
        ("cover_first.mkv", [("mjpeg", 128, 1), ("mpeg4", 64, 20)], 0, 64, 1),
        ("cover_last.mp4", [("mpeg4", 64, 20), ("mjpeg", 128, 1)], None, 64, 1),
        ("photos_first.mp4", [("mpeg4", 128, 2), ("mpeg4", 64, 20)], 0, 64, 2),
        ("only_mjpeg.mkv", [("mjpeg", 64, 20)], None, 64, 1),
    ],
)
def test_the_best_stream_is_read(
    tmp_path: Path, name: str, streams: list[tuple[str, int, int]], default: int | None, size: int, count: int
) -> None:
    path = tmp_path / name
    write_streams(path, *streams, default=default)
    record = verify_video(path)
    assert (record.height, record.width, record.video_streams) == (size, size, count)
    assert record.frames == next(frames for _, its_size, frames in streams if its_size == size)
    assert read_planes(path, record, [0, record.frames - 1]).y.shape == (2, size, size)
    assert sum(1 for _ in resized_planes(path, record, 16, 16)) == record.frames
    assert is_video(path)


def test_a_cover_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuvj420p"
        stream.disposition = Disposition.attached_pic
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), dtype=np.uint8))))
        container.mux(stream.encode(None))
    with pytest.raises(UnreadableVideo, match="no video stream, only a cover"):
        verify_video(path)
    assert not is_video(path)


def write_picture(path: Path, codec: str, format: str, pix_fmt: str, frames: int = 1) -> None:
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, pix_fmt
        for number in range(frames):
            image = np.full((64, 64, 3), 100 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image).reformat(format=pix_fmt)))
        container.mux(stream.encode(None))


@pytest.mark.parametrize(
    ("name", "codec", "format", "pix_fmt"),
    [
        ("photo.mp4", "mjpeg", "image2pipe", "yuvj420p"),
        ("photo.mov", "png", "image2pipe", "rgb24"),
        ("photo.jpg", "mjpeg", "image2pipe", "yuvj420p"),
        ("photo.avi", "bmp", "image2pipe", "bgr24"),
        ("photo.mkv", "gif", "gif", "rgb8"),
        ("photo.mjpg", "mjpeg", "mjpeg", "yuvj420p"),
    ],
)
def test_a_still_image_is_no_video(tmp_path: Path, name: str, codec: str, format: str, pix_fmt: str) -> None:
    path = tmp_path / name
    write_picture(path, codec, format, pix_fmt)
    with pytest.raises(UnreadableVideo, match="a still image, not a video"):
        verify_video(path)
    assert not is_video(path)


def test_moving_pictures_and_videos_of_one_frame_are_videos(tmp_path: Path) -> None:
    write_picture(tmp_path / "moving.gif", "gif", "gif", "rgb8", frames=3)
    write_picture(tmp_path / "one.mp4", "mpeg4", "mp4", "yuv420p", frames=1)
    for name, frames in [("moving.gif", 3), ("one.mp4", 1)]:
        assert verify_video(tmp_path / name).frames == frames
        assert is_video(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("page.mp4", b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n" * 20),
        ("pointer.avi", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1048576\n"),
        ("code.ts", b"export const answer: number = 42;\n" * 200),
        ("list.m3u8", b"#EXTM3U\n#EXTINF:1,\nvideo.mp4\n"),
        ("lines.srt", b"1\n00:00:01,000 --> 00:00:02,000\nHello\n\n" * 50),
        ("art.ans", b"\x1b[31mHello\x1b[0m\n" * 50),
        ("notes.nfo", b"Hello\n" * 500),
        ("archive.bin", bytes(range(256)) * 64),
        ("archive.zip", b"PK\x03\x04" + bytes(4096)),
        ("empty.mkv", b""),
    ],
)
def test_other_files_are_no_videos(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert not is_video(tmp_path / name)
    with pytest.raises(UnreadableVideo):
        verify_video(tmp_path / name)


def test_a_video_of_any_name_is_a_video(small: tuple[Path, VideoRecord], tmp_path: Path) -> None:
    path = small[0].rename(tmp_path / "clip.unknown")
    assert is_video(path)
    assert not is_video(tmp_path)
    assert not is_video(tmp_path / "missing.mp4")


# ---------------------------------------------------------------- damaged files


def write_textured(path: Path, codec: str, pix_fmt: str, frames: int = 30, size: int = 96) -> list[tuple[int, int]]:
    """Write moving waves with noise. Return (position, size) in bytes of each frame in the file."""
    y, x = np.mgrid[:size, :size]
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = size, size, pix_fmt
        stream.codec_context.gop_size = 10
        stream.codec_context.thread_count = 1
        for number in range(frames):
            waves = [100 * np.sin((x + 3 * number) / 9), 100 * np.cos((y - 2 * number) / 7), (x * y) % 256 - 128]
            image = 128 + np.stack(waves, axis=-1) + rng.integers(0, 20, (size, size, 1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8))))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size and packet.pos]


def flip_bits(path: Path, packets: list[tuple[int, int]], seed: int) -> None:
    """Flip two bits in each of four frames."""
    content, rng = bytearray(path.read_bytes()), np.random.default_rng(seed)
    for number in rng.choice(np.arange(3, len(packets)), 4, replace=False):
        start, size = packets[number]
        for offset in rng.integers(size // 3, size, 2):
            content[start + int(offset)] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)


def differing_windows(path: Path, record: VideoRecord) -> list[int]:
    """Return the starts of windows of two frames that differ from a read of all frames."""
    frames = read_all(path, record, np.arange(record.frames))
    starts = range(0, record.frames, 3)
    windows = [[start, (start + 7) % record.frames] for start in starts]
    return [window[0] for window in windows if not np.array_equal(read_all(path, record, window), frames[window])]


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt"),
    [
        ("mjpeg.avi", "mjpeg", "yuvj420p"),
        ("wmv2.wmv", "wmv2", "yuv420p"),
        ("msmpeg4.avi", "msmpeg4", "yuv420p"),
        ("ffv1.mkv", "ffv1", "yuv420p"),
        ("vp8.webm", "libvpx", "yuv420p"),
        ("mpeg2.ts", "mpeg2video", "yuv420p"),
        ("huffyuv.avi", "huffyuv", "yuv422p"),
    ],
)
def test_a_damaged_file_is_unreadable_or_gives_the_same_frames_in_every_window(
    tmp_path: Path, name: str, codec: str, pix_fmt: str
) -> None:
    path = tmp_path / name
    packets = write_textured(path, codec, pix_fmt)
    healthy = path.read_bytes()
    assert differing_windows(path, verify_video(path)) == []
    for seed in range(5):
        path.write_bytes(healthy)
        flip_bits(path, packets, seed)
        try:
            record = verify_video(path)
        except UnreadableVideo:
            continue
        assert differing_windows(path, record) == [], f"seed {seed}"


def test_a_frame_that_ends_in_the_middle_makes_the_file_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "cut_frame.avi"
    start, size = write_textured(path, "mjpeg", "yuvj420p")[12]
    content = bytearray(path.read_bytes())
    content[start + size // 2 : start + size] = b"\xff\xd9".ljust(size - size // 2, b"\0")
    path.write_bytes(content)
    with pytest.raises(UnreadableVideo, match="decoding stops at frame 12"):
        verify_video(path)


@pytest.mark.parametrize(
    ("name", "codec", "frames"),
    [
        ("cut.webm", "libvpx", 30),
        ("cut.mkv", "mpeg4", 30),
        ("cut.avi", "mpeg4", 30),
        ("cut.mp4", "mpeg4", 30),
        ("cut.flv", "flv", 32),  # its duration is longer than its frames
    ],
)
def test_a_file_whose_end_is_missing_is_named(tmp_path: Path, name: str, codec: str, frames: int) -> None:
    path = tmp_path / name
    write_textured(path, codec, "yuv420p")
    if name.endswith("mp4"):  # with the index before the frames, as cameras and web sites write it
        with (
            av.open(str(path)) as source,
            av.open(str(tmp_path / "fast.mp4"), "w", options={"movflags": "faststart"}) as to,
        ):
            stream = to.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    to.mux(packet)
        path = tmp_path / "fast.mp4"
    assert verify_video(path).cut_from == 0
    with av.open(str(path)) as container:
        position = [packet.pos for packet in container.demux(video=0) if packet.size][17]
    path.write_bytes(path.read_bytes()[: position - (8 if name == "cut.avi" else 0)])
    record = verify_video(path)
    assert (record.frames, record.cut_from, record.damage) == (17, frames, "")


def test_errors_that_lose_no_file_are_named(tmp_path: Path) -> None:
    for name in ["first.gif", "second.gif"]:  # FFmpeg does not report the same error twice in a row by default
        path = tmp_path / name
        write_textured(path, "gif", "rgb8")
        assert verify_video(path).damage == ""
        path.write_bytes(path.read_bytes()[:-5000])
        assert verify_video(path).damage == "gif: LZW decode failed"


def test_check_names_files_with_several_streams_without_their_end_and_with_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_textured(tmp_path / "good.mkv", "mpeg4", "yuv420p")
    write_streams(tmp_path / "two.mp4", ("mpeg4", 64, 10), ("mpeg4", 32, 20), default=1)
    packets = write_textured(tmp_path / "cut.mkv", "mpeg4", "yuv420p")
    (tmp_path / "cut.mkv").write_bytes((tmp_path / "cut.mkv").read_bytes()[: packets[17][0]])
    write_textured(tmp_path / "damaged.gif", "gif", "rgb8")
    (tmp_path / "damaged.gif").write_bytes((tmp_path / "damaged.gif").read_bytes()[:-5000])
    write_picture(tmp_path / "photo.mp4", "mjpeg", "image2pipe", "yuvj420p")
    check(DataConfig(data=str(tmp_path), workers=1))
    printed = capsys.readouterr().out
    for line in [
        "several video streams, the default or else the largest is read: 1",
        "  two.mp4: 2 streams, read the one of 32 x 32",
        "end early, because the end of the file is missing: 1",
        "  cut.mkv: holds 17 of about 30 frames",
        "readable, but FFmpeg reports errors, so frames may be missing or damaged: 1",
        "  damaged.gif: 30 frames; gif: LZW decode failed",
        "unreadable: 1",
        "  photo.mp4: a still image, not a video",
    ]:
        assert line in printed.splitlines()
    assert "good.mkv" not in printed
