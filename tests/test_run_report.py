"""The page of a run, `eval.py report`: one HTML file of any run, and wrong input."""

import base64
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PageReader, make_list
from PIL import Image

from dclr.commands import evaluate
from dclr.config import make_config
from dclr.errors import UserError
from dclr.evaluation import run_sections
from dclr.evaluation.run_page import shown_name
from dclr.training.finetune import finetune
from dclr.training.pretrain import pretrain

MEASURED = ["Views", "Nearest neighbours", "What the features know of motion and scene"]


@pytest.fixture(scope="module")
def runs(demo_videos, float32, one_process, tmp_path_factory) -> Path:
    """Return a folder with the run `pretrain` and the run `finetune` that starts from its weights, of 4 steps each."""
    folder = tmp_path_factory.mktemp("runs")
    settings: dict[str, Any] = {
        "data": str(demo_videos), "ds_config": str(float32), "width": 4, "clip_length": 4, "crop_size": 16,
        "batch_size": 8, "epochs": 2, "workers": 0, "log_every": 1,
    }  # fmt: skip
    own = {"queue_length": 16, "embedding_dim": 32, "mined_positives": 2, "fill_steps": 1, "knn_every": 0}
    pretrain(make_config("pretrain", {**settings, **own, "out": str(folder / "pretrain")}), "demo", one_process)
    start = {"pretrained": str(folder / "pretrain"), "out": str(folder / "finetune")}
    config = make_config("finetune", {**settings, **start})
    finetune("finetune", config, "demo", one_process)
    return folder


def write(run: Path, *arguments: object) -> tuple[PageReader, str]:
    """Write the page of a run and return it, read and as text."""
    evaluate.main(["report", str(run), *map(str, arguments), "--workers", "0"])
    out = Path(str(arguments[arguments.index("--out") + 1])) if "--out" in arguments else run / "report.html"
    content = out.read_text(encoding="utf-8")
    assert all(source.startswith("data:image/png;base64,") for source in PageReader(content).sources)
    assert re.findall(r"https?://|<script|<link|@import|url\(", content) == []
    return PageReader(content), content


def change_config(run: Path, **changes: Any) -> None:
    stored = json.loads((run / "config.json").read_text())
    stored["data"] |= changes
    (run / "config.json").write_text(json.dumps(stored))


def test_the_page_of_pretraining_has_every_section_and_picture(runs, capsys):
    found, content = write(runs / "pretrain")
    assert found.title == "pretrain: pretrain"
    assert found.headings == ["pretrain: pretrain", "Is it healthy?", "The run", "Curves", *MEASURED, "Settings"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))) for source in found.sources]
    assert all(min(picture.size) > 200 for picture in pictures)
    assert [text.split(",")[0] for text in found.descriptions][:3] == [
        "Loss", "Loss of each pair", "Similarity of positive and hardest negative",
    ]  # fmt: skip
    assert found.descriptions[-2].startswith("source frames and the rgb, static and dynamic view")
    assert found.descriptions[-1] == "6 videos, each with its nearest training videos"
    scores = found.cells[found.cells.index("motion, nearest video") + 1 : found.cells.index("setting")]
    assert {"this run", "untrained network", "chance"} <= set(scores)
    assert "4 of 4, batches of 8" in found.cells
    assert "8 test videos, with frozen features. Probes are fitted to 16 training videos" in content
    printed = capsys.readouterr().out
    assert "ok            end: The run has ended after 4 steps.\n" in printed
    assert printed.endswith(f"{runs / 'pretrain' / 'report.html'} written\n")
    names = {row for row in found.cells if row in ("clip_length", "queue_length", "embedding_dim")}
    assert names == {"clip_length", "queue_length", "embedding_dim"}
    assert str(runs) not in content  # folders are private


def test_the_page_of_finetuning_has_the_confusion_matrix(runs, tmp_path):
    found, content = write(runs / "finetune", "--out", tmp_path / "new" / "page.html")
    assert found.headings[3:] == ["Curves", "Accuracy", "Settings"]
    assert found.descriptions[-1] == "confusion matrix: true class by predicted class"
    first = found.cells.index("classifier")
    row = found.cells[first + 3 : first + 6]
    assert row[0] == "this run"
    assert 0 <= float(row[1].rstrip("%")) <= float(row[2].rstrip("%")) <= 100
    assert found.cells[first + 6 : first + 9] == ["chance", "12.5%", "62.5%"]
    assert not (runs / "finetune" / "report.html").exists()
    assert found.cells[found.cells.index("start") + 1].startswith("backbone.safetensors: r2plus1d_10 (width 4), ")
    assert str(runs) not in content


def test_a_stopped_run_of_an_earlier_version_whose_data_is_gone_has_a_page(runs, tmp_path):
    """Its log ends in half a line. Each section that cannot be made says why."""
    run = tmp_path / "run"
    shutil.copytree(runs / "pretrain", run, ignore=shutil.ignore_patterns("report.*", "*.safetensors", "tensorboard"))
    lines = (run / "metrics.jsonl").read_text().splitlines()
    old = [{k: v for k, v in json.loads(line).items() if not k.startswith("nearest")} for line in lines[:3]]
    (run / "metrics.jsonl").write_text("\n".join([*map(json.dumps, old), lines[3][:40]]))
    change_config(run, data=f"{tmp_path}/gone/<videos>")
    found, content = write(run)
    reason = "the run was trained on &lt;videos&gt;, which is not there; --data names it at another place."
    assert content.count(f"<p>This section is missing: {reason}</p>") == 3
    assert str(tmp_path) not in content
    assert found.cells[found.cells.index("unreadable lines of the log") + 1] == "1"
    assert "The run has not ended: its last logged step is 3." in content
    assert "not yet" in found.cells


def test_videos_without_labels_have_neighbours_but_no_scores(runs, tmp_path, monkeypatch):
    """The weights of a run that still trains are those of its newest checkpoint."""
    run, videos = tmp_path / "run", tmp_path / "videos"
    shutil.copytree(runs / "pretrain", run, ignore=shutil.ignore_patterns("report.*", "*.safetensors", "tensorboard"))
    shutil.copytree(runs / "pretrain" / "checkpoints", run / "checkpoints", dirs_exist_ok=True)
    make_list(videos, train=[(f"{name}.mp4", 0) for name in "abcd"])
    for name in ("train.txt", "classes.txt"):
        (videos / name).unlink()
    monkeypatch.setattr(run_sections, "SHOWN_QUERIES", 2)
    found, content = write(run, "--data", videos)
    assert found.descriptions[-1] == "2 videos, each with its nearest training videos"
    assert "The training videos nearest to 2 train videos" in content
    assert content.count("This section is missing: ") == 1
    assert f"--data {videos.name}: its videos have no labels, which this section needs" in content
    assert str(tmp_path) not in content


def test_a_split_of_one_video_has_no_neighbours_and_no_scores(runs, tmp_path):
    """Its feature minus the mean of the split is zero."""
    make_list(tmp_path / "videos", train=[("a.mp4", 0), ("b.mp4", 1)], test=[("c.mp4", 0)])
    found, content = write(runs / "pretrain", "--data", tmp_path / "videos", "--out", tmp_path / "page.html")
    reason = (
        "--data videos: the test split has one video. This section subtracts the mean of a split from its features, so "
        "each split must have at least two videos."
    )
    assert content.count(f"<p>This section is missing: {reason}</p>") == 2
    assert found.descriptions[-1].startswith("source frames and the rgb, static and dynamic view")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: out of memory", 2)]
)
def test_the_page_is_written_although_the_gpu_has_no_free_memory(error, runs, tmp_path, monkeypatch):
    """A run that still trains may need all memory of the GPU."""

    def load_features(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(run_sections, "load_features", load_features)
    found, content = write(runs / "pretrain", "--out", tmp_path / "page.html")
    assert content.count("This section is missing: the GPU has no free memory: write the page again when the run") == 2
    assert found.descriptions[-1].startswith("source frames and the rgb, static and dynamic view")
    assert found.headings[-1] == "Settings"


def test_another_error_of_the_gpu_keeps_its_traceback(runs, tmp_path, monkeypatch):
    def load_features(*arguments: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    monkeypatch.setattr(run_sections, "load_features", load_features)
    with pytest.raises(torch.AcceleratorError):
        write(runs / "pretrain", "--out", tmp_path / "page.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "none: no such folder; give the folder of a training run"),
        (["{tmp}"], "config.json: No such file or directory; a run's folder holds its config.json"),
        (["{runs}/pretrain", "--out", "{tmp}/page.txt"], "page.txt: a page is an .html file; give such a name"),
        (["{runs}/pretrain", "--out", "{runs}/pretrain/config.json/page.html"], "config.json: cannot write there"),
        (["{runs}/split"], "holds runs on single splits: give one of them, "),
        ([], "the following arguments are required: RUN"),
        (["--checkpoint", "{runs}/pretrain"], "unrecognized arguments: --checkpoint"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, runs, tmp_path):
    (runs / "split" / "split-1").mkdir(parents=True, exist_ok=True)
    shutil.copy(runs / "pretrain" / "config.json", runs / "split" / "split-1" / "config.json")
    with pytest.raises(UserError) as caught:
        evaluate.main(["report", *(word.format(tmp=tmp_path, runs=runs) for word in arguments)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_processes_are_refused(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"eval.py report runs in one process, but 2 were started"):
        evaluate.main(["report", str(runs / "pretrain")])


def test_the_start_of_a_run_is_shown_without_folders():
    words = "r2plus1d_18 (names without the prefix state_dict/module.encoder_q.)"
    assert shown_name(f"/home/me/checkpoint_0199.pth.tar: {words}") == f"checkpoint_0199.pth.tar: {words}"
    assert shown_name("random weights") == "random weights"
