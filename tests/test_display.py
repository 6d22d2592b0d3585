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
from av.video.frame import VideoFrame

from dclr.data import decode
from dclr.data.display import AS_CODED, Display, collect_displays, orientation_of, shown, turned, turned_back

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
