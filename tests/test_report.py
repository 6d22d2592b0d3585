"""Tests of a run's folder, its metrics files, the stopwatch, and the pictures, whose pixels are read back."""

import json
import math
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dclr import report
from dclr.errors import UserError
from dclr.evaluation import demo_table, figures
from dclr.training.run_log import RunLog


def opened(*arguments, **flags):
    """Open a run, write a file into its folder, and return the folder."""
    with report.open_run(*arguments, **flags) as folder:
        (folder / "file").touch()
    return folder


def test_runs_without_a_name_take_the_next_free_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(opened("", command)) for command in ("pretrain", "pretrain", "linear", "pretrain")]
    assert names == ["runs/pretrain-1", "runs/pretrain-2", "runs/linear-1", "runs/pretrain-3"]
    assert all((tmp_path / name).is_dir() for name in names)
    # The file that tested write permission is gone, and so is the lock.
    assert os.listdir(tmp_path / names[0]) == ["file"]


def test_a_folder_that_holds_a_run_is_refused_with_both_alternatives(tmp_path):
    folder = tmp_path / "a" / "run"
    opened(str(folder), "pretrain")
    opened(str(folder), "pretrain")  # a folder without a run may be used again
    (folder / "config.json").write_text("{}")
    message = f"--out {folder} already holds a run: --resume {folder} continues it, another --out keeps both"
    with pytest.raises(UserError) as caught:
        opened(str(folder), "pretrain")
    assert str(caught.value) == message
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-0000001.safetensors").touch()
    with pytest.raises(UserError) as caught:
        opened(str(folder), "pretrain", replace=True)
    assert str(caught.value) == message
    assert (folder / "config.json").exists()
    (folder / "checkpoints" / "step-0000001.safetensors").unlink()
    opened(str(folder), "pretrain", replace=True)
    assert not (folder / "config.json").exists()


def test_a_new_folder_in_which_nothing_was_written_is_deleted(tmp_path):
    with report.open_run(str(tmp_path / "a" / "b"), "pretrain") as folder:
        assert folder.is_dir()
    assert os.listdir(tmp_path) == []
    (tmp_path / "old").mkdir()
    with report.open_run(str(tmp_path / "old"), "pretrain"):
        pass
    assert os.listdir(tmp_path) == ["old"]


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^--out .*/file/run: cannot write there \(Not a directory\); choose a folder"):
        opened(str(tmp_path / "file" / "run"), "pretrain")


def test_a_url_is_refused_and_not_taken_for_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^--out s3:/bucket/run is a URL, but must be local: write to a disk, then"):
        opened("s3://bucket/run", "pretrain")
    with pytest.raises(UserError, match=r"^--out gs:/bucket is a URL"):
        report.require_new_file(Path("gs://bucket/model.onnx"))
    assert os.listdir() == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_json_lacks_are_refused_and_the_old_file_stays(tmp_path, value):
    report.write_json(tmp_path / "report.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_json(tmp_path / "report.json", {"a": {"b": [value]}})
    assert json.loads((tmp_path / "report.json").read_text()) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_the_environment_names_device_versions_commit_and_date():
    found = report.environment(torch.device("cpu"))
    assert found["versions"].keys() >= {"torch", "deepspeed", "numpy"}
    assert found["cores"] >= 1
    assert found["date"].endswith("+00:00")
    assert found["device"]
    assert found["commit"]


def test_the_stopwatch_adds_up_sections_and_divides_by_steps():
    watch = report.Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch.section("a"):
            time.sleep(0.02)
        with watch.section("b", host=True):
            time.sleep(0.01)
        with watch.section("b"):
            time.sleep(0.01)
        watch.step()
    time.sleep(0.02)  # outside of all sections: 10 ms a step
    found = watch.read()
    assert found.keys() == {"a", "b", "total"}
    assert 20 <= found["a"] < 200  # a sleep is never shorter, and it is longer only on a busy machine
    assert 20 <= found["b"] < 200
    assert found["a"] + found["b"] + 10 <= found["total"] + 1e-6
    again = watch.read()
    assert again.keys() == {"total"}
    assert again["total"] < found["total"]


def read_board(folder):
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_numbers_of_steps_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    first = RunLog(tmp_path, "test", 6)
    for step in range(1, 6):
        first.write(step, {"loss": float(step)}, {})
    first.close()
    again = RunLog(tmp_path, "test", 6, start_step=3)
    again.write(4, {"loss": 40.0}, {})
    again.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert read_board(tmp_path) == {"loss": [(1, 1), (2, 2), (3, 3), (4, 40)]}


def test_a_line_that_a_kill_cut_short_is_dropped_on_resume(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    RunLog(tmp_path, "test", 6, start_step=1).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_a_new_run_starts_from_empty_files_and_nan_is_written_as_null(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 9}\n')
    log = RunLog(tmp_path, "test", 6)
    log.write(1, {"loss": math.nan, "lr": 0.5}, {})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null, "lr": 0.5}\n'


# ---------------------------------------------------------------- pictures


def test_a_confusion_matrix_is_darkest_where_its_shares_are_highest(tmp_path):
    counts = np.array([[4, 0, 0], [3, 1, 0], [0, 0, 0]])
    figures.plot_confusion_matrix(counts, ("one", "two", "three"), "title", tmp_path / "confusion.png")
    pixels = np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB")).astype(int)
    height, width = pixels.shape[:2]
    assert 200 < height < 1000
    assert 300 < width < 1200
    # The matrix is the largest square of the ends of the colour map: blue (8, 48, 107), nearly white (247, 251, 255).
    full = np.abs(pixels - (8, 48, 107)).sum(2) < 6
    rows, columns = np.where(full[:, : int(width * 0.72)])  # left of the colour bar
    side_y, side_x = np.ptp(rows), np.ptp(columns)
    assert side_y == pytest.approx(side_x, abs=2)  # one square cell: row "one", column "one"
    assert side_x > 40
    centre = np.array([rows.min() + side_y / 2, columns.min() + side_x / 2])

    def cell(row, column):
        """Return a pixel a third of a cell away from the centre, where there is no number."""
        y, x = centre + np.array([row + 0.33, column + 0.33]) * (side_x + 1)
        return tuple(pixels[round(y), round(x)])

    import matplotlib

    def shade(share):
        return pytest.approx(tuple(np.array(matplotlib.colormaps["Blues"](float(share))[:3]) * 255), abs=2)

    expected = [[1, 0, 0], [0.75, 0.25, 0], [0, 0, 0]]  # share by true class, 0 for a class without videos
    for row in range(3):
        for column in range(3):
            assert cell(row, column) == shade(expected[row][column]), (row, column)


def test_a_confusion_matrix_of_many_classes_still_fits(tmp_path):
    classes = [f"class {i}" for i in range(101)]
    figures.plot_confusion_matrix(np.eye(101, dtype=int), classes, "title", tmp_path / "confusion.png")
    with Image.open(tmp_path / "confusion.png") as image:
        assert 1500 < image.height < 4000


def test_a_sheet_of_nearest_videos_frames_right_ones_green_and_wrong_ones_red(tmp_path):
    def frame(value):
        return np.full((24, 32, 3), value, np.uint8)

    rows = [
        (
            (frame((0, 0, 200)), "query: a"),
            [(frame((90, 90, 90)), "a 0.9", figures.RIGHT), (frame((120, 120, 120)), "b 0.5", figures.WRONG)],
        ),
        ((frame((0, 0, 200)), "query: b"), [(frame((90, 90, 90)), "a 0.9", figures.WRONG)]),
    ]  # fmt: skip
    figures.plot_search_sheet(rows, "title", tmp_path / "retrieval.png")
    pixels = np.asarray(Image.open(tmp_path / "retrieval.png").convert("RGB")).astype(int)
    # 3 columns of 1.7 inches, 2 rows of 1.75 inches, the title and the legend, at 100 dots per inch.
    assert pixels.shape[:2] in ((450, 510), (450, 509))  # matplotlib up to 3.10 rounds down
    pixels, legend = np.split(pixels, [420])
    height, width = pixels.shape[:2]

    def boxes(colour):
        """Return the (row, column) of the cells, of 2 rows and 3 columns, that show the colour."""
        near = np.abs(pixels - colour).sum(2) < 12
        return {
            (row, column) for row in range(2) for column in range(3)
            if near[row * height // 2 :, column * width // 3 :][: height // 2, : width // 3].sum() > 80
        }  # fmt: skip

    green, red = (44, 160, 44), (214, 39, 40)  # matplotlib's tab:green and tab:red
    assert boxes(green) == {(0, 1)}
    assert boxes(red) == {(0, 2), (1, 1)}
    assert boxes((0, 0, 200)) == {(0, 0), (1, 0)}
    assert boxes((120, 120, 120)) == {(0, 2)}
    for colour in (green, red, (0, 0, 0)):  # the legend explains each
        assert (np.abs(legend - colour).sum(2) < 12).sum() > 40


def test_the_sheet_of_mistakes_shows_every_frame_and_names_that_are_no_formula(tmp_path):
    """A $ would start a formula of matplotlib, and this one would raise an error."""
    colours = [(0, 0, 40 + 20 * i) for i in range(8)]
    name = "跑 $\\no$ " + 40 * "long "
    cells = [(np.full((24, 32, 3), colour, np.uint8), name, "b", 0.5) for colour in colours]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figures.plot_mistakes(cells, "title $\\no$", tmp_path / "mistakes.png")
    pixels = np.asarray(Image.open(tmp_path / "mistakes.png").convert("RGB")).astype(int)
    assert all((pixels == colour).all(2).sum() > 5000 for colour in colours)
    assert pixels.shape[1] in (6 * 170, 6 * 170 - 1)  # matplotlib up to 3.10 rounds down


def test_a_title_longer_than_the_picture_is_broken_into_lines(tmp_path):
    cells = [(np.zeros((24, 32, 3), np.uint8), "a", "b", 0.5)]
    figures.plot_mistakes(cells, 30 * "words ", tmp_path / "mistakes.png")
    pixels = np.asarray(Image.open(tmp_path / "mistakes.png").convert("L"))
    assert (pixels[:, [0, -1]] > 250).all()  # nothing is cut at the left or the right edge


# ---------------------------------------------------------------- the table of `make demo`


def write_reports(folder):
    def put(name, content):
        (folder / name).mkdir(parents=True)
        (folder / name / "report.json").write_text(json.dumps(content))

    figures = {"top1_video": 0.5, "top5_video": 0.75, "top1_clip": 0.4375, "chance_top1": 0.125, "chance_top5": 0.625}
    put("finetune/accuracy", {"figures": figures, "videos": 128})
    put("scratch/accuracy", {"figures": {**figures, "top1_video": 0.25}, "videos": 128})
    found = {"recall_at_1": 0.375, "recall_at_5": 0.6875, "chance_at_1": 0.125, "chance_at_5": 0.49}
    put("pretrain/retrieval", {"figures": found})
    put("random/retrieval", {"figures": {**found, "recall_at_1": 0.1875}})
    environment = {"device": "some CPU"}
    (folder / "pretrain" / "report.json").write_text(
        json.dumps(
            {"seconds": 61.2, "samples_per_second": 33.5, "environment": environment, "precision": "float32: why"}
        )
    )
    (folder / "finetune" / "accuracy" / "pictures").mkdir()
    (folder / "finetune" / "accuracy" / "pictures" / "confusion.png").touch()


def test_the_table_of_the_demo_has_chance_next_to_each_figure_and_names_all_files(tmp_path):
    write_reports(tmp_path / "demo")
    lines = demo_table.table(tmp_path / "demo")
    assert lines[0].split() == ["figure", "here", "chance"]
    numbers = [line.split()[-2:] for line in lines[1:11]]
    assert numbers[:6] == [
        ["50.0%", "12.5%"], ["75.0%", "62.5%"], ["43.8%", "12.5%"],
        ["25.0%", "12.5%"], ["75.0%", "62.5%"], ["43.8%", "12.5%"],
    ]  # fmt: skip
    assert numbers[6:] == [["37.5%", "12.5%"], ["68.8%", "49.0%"], ["18.8%", "12.5%"], ["68.8%", "49.0%"]]
    text = "\n".join(lines)
    assert "128 test videos" in text
    assert "61 s (33.5 samples/s) on some CPU" in text
    assert str(tmp_path / "demo" / "finetune" / "accuracy" / "pictures" / "confusion.png") in text
    for run in ("pretrain", "finetune/accuracy", "scratch/accuracy", "pretrain/retrieval", "random/retrieval"):
        assert str(tmp_path / "demo" / run / "report.json") in text


def test_a_missing_report_is_named_with_the_command_that_writes_it(tmp_path):
    write_reports(tmp_path)
    (tmp_path / "scratch" / "accuracy" / "report.json").unlink()
    with pytest.raises(UserError, match=r"scratch/accuracy/report.json is missing: `make demo` writes it"):
        demo_table.table(tmp_path)
