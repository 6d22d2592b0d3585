"""The picture of a training sample, and the command that writes it."""

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from dclr.config import resolve
from dclr.data import augmentation, clips, decode
from dclr.evaluation import view_sheet
from dclr.evaluation.view_sheet import write_view_sheet
from dclr.kernels import ViewParams, generate_views


def run_module(capfd, monkeypatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["views", *arguments])
    status = 0
    try:
        view_sheet.main()
    except SystemExit as error:
        status = error.code
    return status, *capfd.readouterr()


def test_a_picture_of_a_video(demo_videos, tmp_path, capfd, monkeypatch):
    video = next(iter(sorted(demo_videos.rglob("*.mp4"))))
    out = tmp_path / "views.png"
    status, printed, _ = run_module(capfd, monkeypatch, "--video", str(video), "--out", str(out), "--seed", "3")
    assert (status, printed) == (0, f"views by reference (plain torch and kornia; the device is cpu)\nwrote {out}\n")
    picture = plt.imread(out)
    assert picture.shape[0] > 1000
    assert picture.shape[1] > 1000
    colours = np.rint(picture[..., :3] * 255).astype(np.int64) @ [1, 256, 65536]
    assert len(np.unique(colours)) > 1000  # it shows frames, not a blank page


def test_what_the_picture_shows_is_the_sample_of_its_seed(demo_videos, tmp_path, monkeypatch):
    """The sheet gets the views that RGB frames and the same draws give, up to the conversion of colours."""
    seen = []
    monkeypatch.setattr("dclr.evaluation.view_sheet.plot_view_sheet", lambda *arguments: seen.append(arguments))
    video = next(iter(sorted(demo_videos.rglob("*.mp4"))))
    write_view_sheet(video, tmp_path / "views.png", seed=5)
    ((samples, shown, title, _),) = seen
    assert video.name in title
    assert shown == [0, 2, 4, 6, 9, 11, 13, 15]
    record = decode.verify_video(video)
    rng = clips.sample_rng(5, 0, 0)
    pair = clips.draw_pair(rng, record.frames, 16, 2)
    recipe = augmentation.pretrain_recipe(1.0, form=resolve("pretrain", "ucf101", {}).method.jitter_form)
    rows = [augmentation.draw_augmentation(rng, record.height, record.width, recipe) for _ in range(4)]
    for (name, source, still, row, still_row, pictures), numbers, still_number, expected in zip(
        samples, (pair.query, pair.key), (pair.query_still, pair.key_still), (rows[:2], rows[2:]), strict=True
    ):
        assert str(numbers[0]) in name
        assert np.array_equal(source, decode.rgb_of(decode.read_planes(video, record, numbers)))
        assert np.array_equal(still, decode.rgb_of(decode.read_planes(video, record, [still_number]))[0])
        assert (row == expected[0]).all()
        assert (still_row == expected[1]).all()
        params = ViewParams(augmentation.to_augmentation([row]), augmentation.to_augmentation([still_row]), (112, 112))
        views = generate_views(torch.from_numpy(source)[None], torch.from_numpy(still)[None], params)
        for picture, by_rgb in zip(pictures, augmentation.to_pixels(views, 0), strict=True):
            assert np.abs(picture.astype(int) - by_rgb).mean() < 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --video"),
        (["--video", "none.mp4"], "--video none.mp4: no such file"),
        (["--video", "README.md"], "--video README.md: cannot be opened"),
        (["--video", "VIDEO", "--out", "nowhere/a.png"], "--out nowhere/a.png: cannot write it"),
        (["--video", "VIDEO", "--out", "a.xyz"], "--out a.xyz: cannot write it"),
        (["--video", "VIDEO", "--seed", "-1"], "--seed is -1, but must be at least 0"),
    ],
)
def test_what_cannot_be_plotted_is_refused_in_one_line(demo_videos, capfd, monkeypatch, arguments, message):
    video = str(next(iter(sorted(demo_videos.rglob("*.mp4")))))
    status, _, error = run_module(capfd, monkeypatch, *(video if a == "VIDEO" else a for a in arguments))
    assert status == 2
    assert error.startswith(f"dclr.evaluation.view_sheet: error: {message}")
    assert error.count("\n") == 1
