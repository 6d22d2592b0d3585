"""How a video is shown: its display matrix, its pixel aspect and interlacing, read from files that the tests encode.

The oracle for a display matrix moves every pixel by FFmpeg's definition of the matrix.
"""

import itertools
import math
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import VideoFrame

from dclr.config import DataConfig
from dclr.data import augmentation, check, decode, pack
from dclr.data.datasets import open_data
from dclr.data.display import AS_CODED, Display, collect_displays, orientation_of, shown, turned, turned_back
from dclr.data.samples import PairSamples, TestClips, stack_frames
from dclr.data.videos import VideoSet, open_videos
from dclr.evaluation import composites, view_sheet
from dclr.evaluation.retrieval import middle_frame
from dclr.kernels import augment
from dclr.kernels.types import MEAN, STD

ORIENTATIONS = range(8)


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    """Return smooth colours without symmetry, (H, W, 3) uint8."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * y / height, 255 * x / width, 128 + 100 * np.sin(x / 9 + y / 14)], axis=-1).astype(np.uint8)


def matrix_of(orientation: int, angle: float = 0.0) -> list[int]:
    """Return the display matrix of an orientation, turned by a further angle in degrees clockwise, in fixed point."""
    angle = math.radians(90 * (orientation & 3) + angle)
    a, b, c, d = math.cos(angle), math.sin(angle), -math.sin(angle), math.cos(angle)
    if orientation & 4:
        a, c = -a, -c
    a, b, c, d = (round(65536 * value) for value in (a, b, c, d))
    return [a, b, 0, c, d, 0, 0, 0, 1 << 30]


def moved(image: np.ndarray, matrix: list[int]) -> np.ndarray:
    """Move each pixel (p, q) of an image (H, W, 3) to (a p + c q, b p + d q), then everything to the origin."""
    a, b, _, c, d = (value // 65536 for value in matrix[:5])
    pixels = {(a * p + c * q, b * p + d * q): image[q, p] for q, p in itertools.product(*map(range, image.shape[:2]))}
    left, top = (min(point[axis] for point in pixels) for axis in (0, 1))
    width, height = (max(point[axis] for point in pixels) - low + 1 for axis, low in ((0, left), (1, top)))
    found = np.zeros((height, width, 3), np.uint8)
    for (x, y), colour in pixels.items():
        found[y - top, x - left] = colour
    return found


def encode(
    path: Path,
    image: np.ndarray,
    matrix: list[int] | None = None,
    aspect: Fraction | None = None,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
) -> Path:
    """Write ten frames of an image, with this display matrix and pixel aspect."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
        if matrix:
            stream.set_display_matrix(matrix)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for _ in range(10):
            container.mux(stream.encode(VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_file_is_shown_by_its_display_matrix(tmp_path: Path, orientation: int) -> None:
    path = encode(tmp_path / "a.mp4", picture(), matrix_of(orientation))
    record = decode.verify_video(path)
    assert (record.display, record.oblique) == (Display(orientation), False)
    frames = decode.read_planes(path, record, [0, 3])
    assert frames.display == record.display
    assert frames.y.shape == (2, 48, 64)  # as coded
    upright = shown(decode.rgb_of(frames), record.display)[1].astype(int)
    assert np.abs(upright - moved(picture(), matrix_of(orientation))).mean() < 4


def test_a_phones_quarter_turn(tmp_path: Path) -> None:
    """FFmpeg's own words for the clip of a phone held upright: a rotation by -90 degrees, counterclockwise."""
    path = encode(tmp_path / "a.mov", picture(), [0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30])
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).rotation == -90
    assert decode.verify_video(path).display == Display(1)


@pytest.mark.parametrize("angle", [-30.0, 20.0, 44.0])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_another_angle_gives_the_nearest_quarter_turn(orientation: int, angle: float) -> None:
    assert orientation_of(np.array(matrix_of(orientation, angle))) == (orientation, False)


def test_a_matrix_without_direction_is_ignored() -> None:
    assert orientation_of(np.zeros(9, np.int32)) == (0, True)


@pytest.mark.parametrize(
    ("declared", "aspect"),
    [
        pytest.param(None, 1.0, id="none"),
        pytest.param(Fraction(16, 11), 16 / 11, id="PAL, wide"),
        pytest.param(Fraction(10, 11), 10 / 11, id="NTSC"),
        pytest.param(Fraction(1, 20), 1.0, id="absurd"),
        pytest.param(Fraction(20, 1), 1.0, id="absurd, wide"),
        pytest.param(Fraction(256, 255), 1.0, id="rounded by a program that resized the video"),
    ],
)
def test_pixel_aspect(tmp_path: Path, declared: Fraction | None, aspect: float) -> None:
    path = encode(tmp_path / "a.mp4", picture(), aspect=declared)
    display = decode.verify_video(path).display
    assert display == Display(0, *(declared or Fraction(1)).as_integer_ratio())
    assert display.aspect == aspect
    found = collect_displays([(AS_CODED, False, False), (display, False, False)]).unusual()
    assert found["pixels_not_square"].tolist() == [1] * (aspect != 1)
    assert found["pixel_aspect_ignored"].tolist() == [1] * (declared in (Fraction(1, 20), Fraction(20)))


@pytest.mark.parametrize("top_field_first", [0, 1])
def test_interlaced(tmp_path: Path, top_field_first: int) -> None:
    options = {"x264-params": f"{'tff' if top_field_first else 'bff'}=1"}
    assert decode.verify_video(encode(tmp_path / "a.mp4", picture(), options=options)).interlaced
    assert not decode.verify_video(encode(tmp_path / "b.mp4", picture())).interlaced
    flags = {"flags": "+ildct+ilme"}
    assert decode.verify_video(encode(tmp_path / "c.mpg", picture(), codec="mpeg2video", options=flags)).interlaced


@pytest.mark.parametrize(
    ("display", "size"),
    [
        (AS_CODED, (48, 64)),
        (Display(3), (64, 48)),
        (Display(6), (48, 64)),
        (Display(0, 16, 11), (48, 93)),
        (Display(1, 16, 11), (93, 48)),
        (Display(0, 1, 2), (96, 64)),
        (Display(0, 1, 9), (48, 64)),
    ],
)
def test_shown_size(display: Display, size: tuple[int, int]) -> None:
    assert display.size(48, 64) == size
    assert shown(np.zeros((2, 48, 64, 3)), display).shape == (2, *size, 3)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_box_of_the_shown_frame_holds_the_same_pixels_when_coded(orientation: int) -> None:
    coded = np.arange(7 * 11).reshape(1, 7, 11)
    display = Display(orientation)
    upright = shown(coded, display)
    for box in ((0, 0, *upright.shape[1:]), (2, 1, 3, 5), (4, 3, 1, 1), (1, 0, 5, 2)):
        top, left, height, width = display.coded_box(box, 7, 11)
        crop = turned(coded[:, top : top + height, left : left + width], orientation)
        top, left, height, width = box
        assert np.array_equal(crop, upright[:, top : top + height, left : left + width])
    assert np.array_equal(turned_back(upright, orientation), coded)


@pytest.mark.parametrize("display", [Display(orientation, 3, 2) for orientation in ORIENTATIONS])
def test_a_shown_box_is_the_inverse_of_a_coded_box(display: Display) -> None:
    assert display.shown_box((0, 0, 20, 30), 20, 30) == (0, 0, *display.size(20, 30))
    for box in ((2, 4, 5, 6), (0, 10, 20, 20), (19, 0, 1, 2)):
        assert display.coded_box(display.shown_box(box, 20, 30), 20, 30) == box


@pytest.mark.parametrize("display", [Display(0, 16, 11), Display(5, 16, 11), Display(1, 1, 3), Display(2, 3, 1)])
def test_a_box_with_pixel_aspect_is_within_a_pixel(display: Display) -> None:
    """Count the coded pixels under the shown box, which `shown` gives by repeating pixels."""
    height, width = 37, 53
    numbers = np.arange(height * width).reshape(1, height, width)
    upright = shown(numbers, display)[0]
    rng = np.random.default_rng(0)
    for _ in range(50):
        tops, lefts = (np.sort(rng.choice(count + 1, 2, replace=False)) for count in upright.shape)
        box = (int(tops[0]), int(lefts[0]), int(tops[1] - tops[0]), int(lefts[1] - lefts[0]))
        top, left, box_height, box_width = display.coded_box(box, height, width)
        assert min(top, left, box_height - 1, box_width - 1, height - top - box_height, width - left - box_width) >= 0
        rows, columns = np.divmod(np.unique(upright[tops[0] : tops[1], lefts[0] : lefts[1]]), width)
        ends = (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1)
        assert np.abs(np.subtract(ends, (top, top + box_height, left, left + box_width))).max() <= 1


# ---------------------------------------------------------------- every reader of frames


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight videos that show the same picture upright, each coded in another orientation."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    videos = tmp_path / "videos"
    videos.mkdir()
    for orientation in ORIENTATIONS:
        coded = turned_back(picture()[None], orientation)[0]
        encode(videos / f"{orientation}.mp4", np.ascontiguousarray(coded), matrix_of(orientation))
    return videos


CONFIG = DataConfig(clip_length=4, clip_stride=1, crop_size=40, workers=0)


def opened(folder: Path) -> VideoSet:
    return open_videos(open_data(DataConfig(data=str(folder), workers=1)), "train", 1, progress=False)


def pixels(view: torch.Tensor) -> np.ndarray:
    """Return the first frame of a view (3, T, h, w) in 0..255."""
    return (view[:, 0].permute(1, 2, 0).numpy() * STD + MEAN) * 255


def test_clips_of_all_orientations_are_upright(folder: Path) -> None:
    videos = opened(folder)
    top, left, height, width = augmentation.centre_box(48, 64)
    expected = picture()[top : top + height, left : left + width].astype(int)
    for index in ORIENTATIONS:
        frames = TestClips(videos, CONFIG).read(index, [0])
        row = augmentation.centre_crop(*frames.y.shape[1:], frames.display)
        view = augment(stack_frames([frames]), augmentation.to_augmentation([row]), (height, width))
        assert np.abs(pixels(view[0]) - expected).mean() < 5, index
        assert np.abs(middle_frame(videos, index).astype(int) - picture()).mean() < 5, index


def test_pretraining_draws_the_same_crop_of_the_shown_frame(folder: Path) -> None:
    """The random numbers do not depend on how the frame is coded."""
    videos = opened(folder)
    samples = PairSamples(videos, CONFIG, seed=3)
    for index in ORIENTATIONS:
        sample = samples.read(0, index)
        display = sample.frames.display
        assert display == Display(index)
        rng = np.random.default_rng(7)
        upright = augmentation.draw_augmentation(rng, 48, 64, augmentation.PRETRAIN)
        rng = np.random.default_rng(7)
        coded = augmentation.draw_augmentation(rng, *sample.frames.y.shape[1:], augmentation.PRETRAIN, display)
        assert display.shown_box(coded["box"].tolist(), *coded["size"].tolist()) == tuple(upright["box"])
        for name in ("flip", "grayscale", "jitter", "factors", "order", "sigma"):
            assert np.array_equal(coded[name], upright[name])
        assert (sample.rows["orientation"] == index).all()


@pytest.mark.parametrize("compact", [False, True])
def test_a_store_keeps_how_videos_are_shown(folder: Path, tmp_path: Path, compact: bool) -> None:
    store = tmp_path / "store"
    pack.pack(DataConfig(data=str(folder), workers=1), str(store), short_side=32, compact=compact)
    videos = opened(store)
    for index in ORIENTATIONS:
        frames = videos.read(index, np.array([5]))
        assert frames.display == Display(index)
        assert sorted(frames.y.shape[1:]) == [32, 42]


def test_a_stored_size_is_that_of_the_shown_frame() -> None:
    assert pack.small_size(576, 352, 128, Display(0, 24, 11)) == (128, 78)
    assert pack.small_size(480, 720, 128, Display(1, 10, 11)) == (116, 174)
    assert pack.small_size(100, 50, 128, Display(0, 2, 1)) == (100, 50)


@pytest.mark.parametrize("size", [(48, 64), (47, 63)])
@pytest.mark.parametrize("own", ORIENTATIONS)
@pytest.mark.parametrize("other", [0, 1, 6])
def test_a_background_is_turned_like_the_clip(size: tuple[int, int], own: int, other: int) -> None:
    def coded(orientation: int, colours: list[int]) -> decode.YuvFrames:
        """Return a frame whose left half, when shown, has other luma and chroma than its right half."""
        height, width = size if orientation % 2 == 0 else size[::-1]
        shown_y, shown_u = (np.full((1, *(sides if orientation % 2 == 0 else sides[::-1])), colours[0], np.uint8)
                            for sides in ((height, width), ((height + 1) // 2, (width + 1) // 2)))  # fmt: skip
        for plane in (shown_y, shown_u):
            plane[:, :, plane.shape[2] // 2 :] = colours[1]
        y, u = (np.ascontiguousarray(turned_back(plane, orientation)) for plane in (shown_y, shown_u))
        return decode.YuvFrames(y, u, u.copy(), False, False, Display(orientation))

    clip, background = coded(other, [90, 90]), coded(own, [50, 200])
    composites.composite(clip, np.zeros(clip.y.shape, bool), background)
    for plane in (clip.y, clip.u, clip.v):
        upright = turned(plane, other)[0].astype(int)
        assert np.abs(upright[:, : upright.shape[1] // 2 - 4] - 50).max() <= 2
        assert np.abs(upright[:, upright.shape[1] // 2 + 4 :] - 200).max() <= 2


def test_check_counts_and_names_what_is_unusual(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode(folder / "wide.mp4", picture(), aspect=Fraction(16, 11))
    encode(folder / "strip.mp4", picture(), aspect=Fraction(1, 20))
    encode(folder / "fields.mp4", picture(), options={"x264-params": "tff=1"})
    encode(folder / "oblique.mp4", picture(), matrix_of(0, 30))
    check.check(DataConfig(data=str(folder), workers=1))
    printed = capsys.readouterr().out
    lines = [
        "rotated when shown: 7 videos, such as 1.mp4; views are turned upright",
        "rotated by an angle that is not a multiple of 90 degrees: 1 video, such as oblique.mp4; the nearest is used",
        "pixels not square: 1 video, such as wide.mp4; views are made in square pixels",
        "pixel aspect outside 1:4 to 4:1: 1 video, such as strip.mp4; pixels are taken as square",
        "interlaced: 1 video, such as fields.mp4; both fields stay in one frame",
    ]
    assert "\n".join(lines) in printed
    pack.pack(DataConfig(data=str(folder), workers=1), str(tmp_path / "store"), short_side=32)
    check.check(DataConfig(data=str(tmp_path / "store"), workers=1))
    assert "\n".join(lines) in capsys.readouterr().out


def test_the_view_sheet_shows_the_source_upright(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple] = []
    monkeypatch.setattr(view_sheet, "plot_view_sheet", lambda *arguments: seen.append(arguments))
    for orientation in (0, 1, 6):
        view_sheet.write_view_sheet(folder / f"{orientation}.mp4", Path("unused.png"), seed=2)
    upright, *others = (samples for samples, *_ in seen)
    for samples in others:
        for (_, source, still, row, still_row, views), expected in zip(samples, upright, strict=True):
            assert np.abs(source.astype(int) - expected[1]).mean() < 5
            assert np.abs(still.astype(int) - expected[2]).mean() < 5
            assert (row["box"] == expected[3]["box"]).all()
            assert (still_row["box"] == expected[4]["box"]).all()
            for view, same in zip(views, expected[5], strict=True):
                assert np.abs(view.astype(int) - same).mean() < 6
