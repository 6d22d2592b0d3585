"""Measurements during training: nearest neighbours in pretraining, test accuracy in finetuning, and what is printed."""

import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, as_flags
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dclr.commands import evaluate as evaluation
from dclr.commands import train
from dclr.config import AUTOMATIC, FinetuneConfig, MethodConfig, ModelConfig, make_config
from dclr.data.encode import write_video
from dclr.errors import UserError
from dclr.evaluation import monitor
from dclr.kernels import contrast
from dclr.methods import DCLR
from dclr.methods.encoder import PAIRS
from dclr.methods.simclr import in_batch_info_nce
from dclr.training import opening
from dclr.training.finetune import finetune
from dclr.training.pretrain import pretrain
from dclr.training.setup import choose_fill_steps


def lines_of(run) -> list[dict]:
    """Return metrics.jsonl without times and speeds, which differ between two runs."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    changing = ("milliseconds/", "memory/", "samples_per_second", "data_wait_share")
    return [{name: value for name, value in line.items() if not name.startswith(changing)} for line in lines]


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_a_measured_run_is_the_same_bit_for_bit_and_logs_what_was_measured(
    command, tiny, tiny_pretrain, one_process, tmp_path, monkeypatch
):
    shown: list[dict[str, str]] = []
    monkeypatch.setattr("dclr.progress.ProgressBar.show", lambda self, texts: shown.append(texts))

    def run(name: str, every: int):
        out = {"out": str(tmp_path / name), "epochs": 2}
        if command == "pretrain":
            config = make_config("pretrain", {**tiny_pretrain, **out, "knn_every": every})
            return pretrain(config, "demo", one_process, open_knn=monitor.open_knn)
        config = make_config("finetune", {**tiny, **out, "test_every": every, "dropout": 0.5})
        return finetune("finetune", config, "demo", one_process, open_accuracy=monitor.open_accuracy)

    plain, measured = run("plain", 0), run("measured", 1)
    assert not any(name.startswith(("knn/", "test/")) for line in lines_of(plain) for name in line)
    names = {"knn/top1", "knn/recall_at_1", "knn/chance"} if command == "pretrain" else {"test/top1", "test/chance"}
    for ours, theirs in zip(lines_of(plain), lines_of(measured), strict=True):
        assert theirs.keys() - ours.keys() == (names if theirs["step"] % 4 == 0 else set())
        assert {name: theirs[name] for name in ours} == ours
    last = lines_of(measured)[-1]
    assert all(0 <= last[name] <= 1 for name in names)
    assert last[next(name for name in names if "chance" in name)] == pytest.approx(1 / 8)
    weights = [load_file(folder / "backbone.safetensors") for folder in (plain, measured)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    if command == "pretrain":
        settings = {**tiny_pretrain, "out": str(tmp_path / "cut"), "knn_every": 1}
        pretrain(make_config("pretrain", {**settings, "epochs": 1}), "demo", one_process, open_knn=monitor.open_knn)
        again = make_config("pretrain", {**settings, "epochs": 2})
        pretrain(again, "demo", one_process, tmp_path / "cut", open_knn=monitor.open_knn)
        assert lines_of(tmp_path / "cut") == lines_of(measured)
    assert shown[-1].keys() >= ({"loss", "plateau", "nearest", "R@1"} if command == "pretrain" else {"loss", "test"})


def test_a_data_set_without_labelled_test_videos_is_refused_or_not_measured(
    tiny, tiny_pretrain, one_process, tmp_path, capfd, monkeypatch
):
    for number in range(4):
        for label in ("a", "b"):
            (tmp_path / "data" / label).mkdir(parents=True, exist_ok=True)
            write_video(
                tmp_path / "data" / label / f"{number}.mp4",
                np.full((9, 32, 32, 3), 20 * number + 9 * (label == "b"), np.uint8),
            )
    data = {"data": str(tmp_path / "data"), "out": str(tmp_path / "run")}
    config = make_config("pretrain", {**tiny_pretrain, **data, "knn_every": 1})
    with monkeypatch.context() as patch:
        patch.setattr(opening, "open_videos", None)  # the run is refused before its videos are verified
        with pytest.raises(UserError) as refusal:
            pretrain(config, "demo", one_process, open_knn=monitor.open_knn)
    needs = "--knn-every needs labelled training and test videos, and 0 measures nothing"
    assert str(refusal.value) == f"{needs}: {tmp_path / 'data'} has no test split"
    assert not (tmp_path / "run").exists()
    config = make_config("finetune", {**tiny, **data, "epochs": 1})
    finetune("finetune", config, "demo", one_process, open_accuracy=monitor.open_accuracy)
    assert "no test accuracy during training: " in capfd.readouterr().out


def test_a_measurement_that_fails_is_a_warning(tiny_pretrain, one_process, tmp_path, capfd):
    def open_broken(data, device):
        def measure(network):
            raise UserError("no video can be read")

        return measure

    config = make_config("pretrain", {**tiny_pretrain, "out": str(tmp_path / "run"), "epochs": 1, "knn_every": 1})
    run = pretrain(config, "demo", one_process, open_knn=open_broken)
    assert "warning: not measured after this epoch: no video can be read\n" in capfd.readouterr().err
    assert not any(name.startswith("knn/") for name in lines_of(run)[-1])


def test_knn_is_that_of_a_loop_in_float64():
    rng = np.random.default_rng(3)
    gallery, queries = rng.normal(size=(60, 5)), rng.normal(size=(40, 5))
    labels, truth = rng.integers(0, 4, 60), rng.integers(0, 4, 40)
    hits = first = 0
    for query, label in zip(queries - gallery.mean(0), truth, strict=True):
        centred = gallery - gallery.mean(0)
        cosine = centred @ query / (np.linalg.norm(centred, axis=1) * np.linalg.norm(query))
        nearest = np.argsort(-cosine)[: monitor.NEIGHBOURS]
        votes = [sum(math.exp(cosine[i] / monitor.TEMPERATURE) for i in nearest if labels[i] == c) for c in range(4)]
        hits += int(np.argmax(votes)) == label
        first += labels[nearest[0]] == label
    tensors = [torch.from_numpy(values) for values in (gallery, labels, queries, truth)]
    found = monitor.knn(tensors[0].float(), tensors[1], tensors[2].float(), tensors[3], 4)
    assert found == pytest.approx((hits / 40, first / 40))


def test_nearest_key_and_plateau_of_a_queue():
    network = DCLR(ModelConfig(width=2), MethodConfig(queue_length=12, embedding_dim=32, mined_positives=2))
    assert network.plateau() == pytest.approx(math.log(13))  # nothing is mined before the queue is full
    keys = torch.nn.functional.normalize(torch.randn(5, 16, 32), dim=2)
    network._enqueue(keys[:, :12])
    network._enqueue(keys[:, 12:])  # written over entries 0 to 3
    assert network.plateau() == pytest.approx(math.log(13 / 3))
    queries = keys[:, 12:].clone()
    assert network.nearest_key(queries).tolist() == [1.0] * 5
    queries[1, 0] = keys[1, 8]  # nearest to another entry
    queries[2] = keys[2, 12:].flip(0)  # each query is nearest to the key of another clip
    assert network.nearest_key(queries).tolist() == [1.0, 0.75, 0.0, 1.0, 1.0]
    expected = in_batch_info_nce(queries, keys[:, 12:], 0.07)
    assert network.batch_loss(queries).tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)
    network.queue[:, 4:] = 9.0  # older entries, which do not count
    assert network.batch_loss(queries).tolist() == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)
    constant = torch.ones(5, 4, 32) / 32**0.5
    network.queue[:] = constant[:, :1]
    mined = torch.tensor([0, 1]).expand(5, 4, 2)
    losses = contrast(constant, constant, network.queue, mined, 0.07).losses
    assert losses.tolist() == pytest.approx([network.plateau()] * 5, abs=1e-5)
    assert network.batch_loss(constant).tolist() == pytest.approx([math.log(4)] * 5, abs=1e-5)


@pytest.mark.parametrize(
    ("videos", "settings", "chosen"),
    [
        (9537, {}, 256),  # UCF101, as published
        (240_000, {"queue_length": 16384}, 256),  # Kinetics-400: as published, and as many as fill the queue
        (240_000, {"queue_length": 16384, "batch_size": 40}, 410),  # as many as fill the queue
        (640, {"epochs": 100}, 100),  # 1000 steps
        (640, {"epochs": 100, "queue_length": 12800}, 200),  # as many as fill the queue
        (128, {"epochs": 5, "mined_positives": 0}, 5),  # half of 10 steps
        (640, {"epochs": 100, "fill_steps": 3}, 3),
        (640, {"epochs": 100, "fill_steps": 0}, 0),
    ],
)
def test_the_default_of_fill_steps_follows_the_length_of_the_run(videos, settings, chosen):
    config = make_config("pretrain", settings)
    assert config.method.fill_steps == settings.get("fill_steps", AUTOMATIC)
    assert choose_fill_steps(config, videos).method.fill_steps == chosen


def test_a_run_prints_commands_that_work_as_they_are_printed(
    tiny, tiny_pretrain, train_main, demo_videos, tmp_path, monkeypatch, capfd
):
    """The data set is in a folder with a space, and the network and the clips are not those of a preset."""
    (tmp_path / "my videos").symlink_to(demo_videos)
    monkeypatch.chdir(tmp_path)
    flags = {"data": "my videos", "out": "my run", "epochs": 1, "clip_length": 6}
    train_main("pretrain", **{**tiny_pretrain, **flags})
    lines = [line.strip() for line in capfd.readouterr().out.splitlines()]
    commands = [line.split(": ", 1)[1] for line in lines if line.startswith(("next: ", "or: "))]
    assert [shlex.split(command)[:3] for command in commands] == [
        ["python", "train.py", "finetune"],
        ["python", "eval.py", "retrieval"],
    ]
    given = train.parse(shlex.split(commands[0])[2:])
    config, _, _ = train.resolve(given.pop("command"), given)
    assert isinstance(config, FinetuneConfig)
    assert (config.data.clip_length, config.model.width, config.transfer.pretrained) == (6, 4, "my run")
    evaluation.main([*shlex.split(commands[1])[2:], *as_flags({"workers": 0})])
    small = {name: tiny[name] for name in ("ds_config", "batch_size", "epochs", "workers")}
    train.main([*shlex.split(commands[0])[2:], *as_flags(small)])
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.strip().startswith("next: ")]
    evaluation.main([*shlex.split(line.strip())[3:], *as_flags({"workers": 0})])
    assert "by video" in capfd.readouterr().out


def test_on_a_cpu_the_published_size_is_said_to_be_slow(tiny_pretrain, train_main, monkeypatch, capfd):
    class Started(Exception):
        pass

    def stop(*arguments):
        raise Started

    monkeypatch.setattr("dclr.training.pretrain.Engine", stop)
    for size, warned in (({}, False), ({"width": 64, "crop_size": 112}, True)):
        with pytest.raises(Started):
            train_main("pretrain", **{**tiny_pretrain, **size, "out": ""})
        assert ("--preset demo has a small network" in capfd.readouterr().err) == warned


def test_the_page_of_curves_names_every_curve_that_a_run_writes(tiny, tiny_pretrain, one_process, tmp_path):
    def pretraining(name: str, **changes):
        settings = {**tiny_pretrain, "epochs": 1, "out": str(tmp_path / name), **changes}
        return pretrain(make_config("pretrain", settings), "demo", one_process, open_knn=monitor.open_knn)

    config = make_config("finetune", {**tiny, "epochs": 1, "out": str(tmp_path / "finetune")})
    runs = [
        pretraining("dclr", on_nonfinite="skip", knn_every=1),
        pretraining("moco", method="moco"),
        pretraining("simsiam", method="simsiam"),
        pretraining("videomoco", method="videomoco", adversarial_from=0),
        finetune("finetune", config, "demo", one_process, open_accuracy=monitor.open_accuracy),
    ]
    written: set[str] = set()
    for run in runs:
        (file,) = (run / "tensorboard").glob("events.out.tfevents.*")
        tags = EventAccumulator(str(file)).Reload().Tags()
        written |= {*tags["scalars"], *tags["images"]}
    named = set(re.findall(r"^\| `([^`]+)` \|", (REPOSITORY / "docs" / "curves.md").read_text(), re.M))
    assert {re.sub(rf"/({'|'.join(PAIRS)})$", "/PAIR", name) for name in written} == named
