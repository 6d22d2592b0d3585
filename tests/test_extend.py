"""docs/extend.md: its programs are taken from the page and run. Also here: s3d trains, resumes and compiles."""

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import MODEL, REPOSITORY, as_flags, assert_same_end, free_port, make_views, metrics, run_program
from torch._dynamo.utils import counters

from dclr import config, programs
from dclr.commands import both, train
from dclr.errors import UserError
from dclr.evaluation.embedding import make_embedder
from dclr.kernels import Views
from dclr.methods import METHODS
from dclr.models import BACKBONES, build_backbone, load_backbone, load_pretrained

PAGE = REPOSITORY / "docs" / "extend.md"


def write_program(name: str, folder: Path) -> Path:
    """Write the program of the page whose first line is "# NAME", and return its path."""
    [code] = re.findall(rf"^```python\n(# {re.escape(name)}\n.*?)^```", PAGE.read_text(), re.M | re.S)
    (folder / name).write_text(code)
    return folder / name


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], dict[str, Any]]]:
    """Return a function that runs a program of the page and returns its names. Its entries are removed at the end."""
    before = [(entries, set(entries)) for entries in (METHODS, BACKBONES)]
    monkeypatch.syspath_prepend(tmp_path)

    def run(name: str) -> dict[str, Any]:
        # torch.compile looks for the module of a function in sys.modules.
        monkeypatch.delitem(sys.modules, Path(name).stem, raising=False)
        return vars(importlib.import_module(write_program(name, tmp_path).stem))

    yield run
    for entries, names in before:
        for name in set(entries) - names:
            del entries[name]


def embedding(run: Path) -> torch.Tensor:
    clips = torch.randn(2, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    return make_embedder(load_pretrained(run), ["pooled"])(clips)["pooled"]


def test_the_method_of_the_page_trains_resumes_and_needs_no_program_afterwards(
    add, train_main, tiny: dict[str, Any], tmp_path: Path, capfd
) -> None:
    add("byol.py")
    flags = {**tiny, "method": "byol", "embedding_dim": 32, "clip_length": 4, "key_momentum": 0.9}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train_main("pretrain", **flags, out=straight)
    train_main("pretrain", **{**flags, "epochs": 1}, out=resumed)
    train_main("pretrain", epochs=2, resume=resumed)
    assert_same_end(straight, resumed)
    assert "byol: rgb clips contrasted with rgb" in capfd.readouterr().out
    assert json.loads((straight / "config.json").read_text())["method"]["method"] == "byol"

    lines = metrics(straight)
    assert [line["step"] for line in lines] == list(range(1, 9))  # no step only fills a queue
    assert all(0 < line["loss"] < 4 for line in lines)
    assert not any(name.startswith(("queue/", "pair_loss")) for name in lines[0])

    del METHODS["byol"]
    assert embedding(straight).shape == (2, 32)


def test_the_method_of_the_page_contrasts_each_prediction_with_the_other_clips_key(add) -> None:
    """The loss is compared with squared distances. The key encoder gets no gradient and follows the query encoder."""
    torch.manual_seed(0)
    network = add("byol.py")["BYOL"](MODEL, config.MethodConfig(embedding_dim=32, key_momentum=0.75), seed=0)
    network.predict[-1].bias.data.normal_()
    query, key = make_views(1), make_views(2)
    output = network(query, key, 0)
    output.loss.backward()
    assert all(p.grad is None for p in network.key.parameters())
    assert all(p.grad.abs().sum() > 0 for p in network.query.parameters())

    def project(backbone: torch.nn.Module, perceptron: torch.nn.Module, views: Views) -> torch.Tensor:
        return perceptron(backbone(views.rgb).mean((2, 3, 4)))

    with torch.no_grad():
        q, k = (network.predict(project(network.query.backbone, network.project, views)) for views in (query, key))
        key_of_q, key_of_k = (project(*network.key, views) for views in (query, key))
        units = [(v / v.norm(dim=1, keepdim=True)).double() for v in (q, key_of_k, k, key_of_q)]
    expected = ((units[0] - units[1]).square().sum(1) + (units[2] - units[3]).square().sum(1)).mean() / 2
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-4)

    before = [p.clone() for p in network.key.parameters()]
    learned = [*network.query.backbone.parameters(), *network.project.parameters()]
    with torch.no_grad():
        for p in learned:
            p.add_(1.0)
    network.update_key()
    assert all(torch.allclose(p, old + 0.25) for p, old in zip(network.key.parameters(), before, strict=True))
    network.reset_key()
    assert all(torch.equal(p, new) for p, new in zip(network.key.parameters(), learned, strict=True))


@pytest.mark.parametrize(
    ("flag", "value", "why"),
    [
        ("queue_length", 8, ", which has no queue"),
        ("fill_steps", 8, ", which has no queue"),
        ("boundary", "wrap", ", which has neither static nor dynamic views"),
        ("temperature", 0.1, ""),
    ],
)
def test_settings_that_the_method_does_not_name_are_refused(add, flag: str, value: Any, why: str) -> None:
    add("byol.py")
    message = f"^--{flag.replace('_', '-')} has no effect with --method byol{why}: leave the flag out$"
    with pytest.raises(UserError, match=message):
        config.resolve("pretrain", "demo", {"method": "byol", flag: value})
    # A preset may set them, and a batch larger than the queue that is not used is accepted.
    resolved = config.resolve("pretrain", "demo", {"method": "byol", "batch_size": 1024, "key_momentum": 0.99})
    assert resolved.method.fill_steps == 0


def test_help_and_messages_name_the_entries_that_a_program_adds(add, capsys) -> None:
    add("byol.py")
    add("tsm.py")
    with pytest.raises(SystemExit):
        train.main(["pretrain", "--help"])
    text = capsys.readouterr().out
    assert f"--method {{{','.join(METHODS)}}}" in text
    assert list(METHODS)[-1] == "byol"
    assert "--backbone {r2plus1d_10,r2plus1d_18,r3d_10,r3d_18,mc3_18,s3d,tsm_18}" in text
    with pytest.raises(UserError, match=r"^--method is swav, but must be dclr, moco, .* or byol$"):
        config.resolve("pretrain", "demo", {"method": "swav"})


def test_the_backbone_of_the_page_trains_is_saved_and_found_in_files_of_others(
    add, train_main, tiny_pretrain: dict[str, Any], tmp_path: Path
) -> None:
    add("tsm.py")
    run = tmp_path / "run"
    train_main("pretrain", **{**tiny_pretrain, "width": 8, "epochs": 1}, backbone="tsm_18", out=run)
    assert metrics(run)[-1]["loss"] > 0
    assert embedding(run).shape == (2, 64)

    backbone = build_backbone("tsm_18", 8)
    assert "tsm_18 (width 8)" in load_backbone(run, backbone)
    state = {f"encoder.{name}": tensor for name, tensor in backbone.state_dict().items()}
    torch.save({**state, "head.weight": torch.zeros(3)}, tmp_path / "foreign.pth")
    found = load_pretrained(tmp_path / "foreign.pth").backbone
    assert (found.name, found.width) == ("tsm_18", 8)
    with pytest.raises(UserError, match=r"holds tsm_18 \(width 8\), but --backbone is r3d_10: pass --backbone tsm_18"):
        load_backbone(run, build_backbone("r3d_10", 8))

    del BACKBONES["tsm_18"]
    with pytest.raises(UserError, match=r"no backbone is called 'tsm_18': choose one of r2plus1d_10, .*, s3d$"):
        load_pretrained(run)


def test_shifts_move_channels_between_neighbouring_frames(add) -> None:
    """Of 16 channels, 2 come from the frame after, 2 from the frame before, and none from another clip."""
    shift = add("tsm.py")["shift"]
    clips = torch.arange(1.0, 7).view(2, 3, 1, 1, 1).expand(2, 3, 16, 1, 1)  # frames 1 2 3 and 4 5 6
    found = shift(clips.flatten(0, 1), 3).view(2, 3, 16)
    assert found[:, :, :2].unique(dim=2).flatten().tolist() == [2, 3, 0, 5, 6, 0]
    assert found[:, :, 2:4].unique(dim=2).flatten().tolist() == [0, 1, 2, 0, 4, 5]
    assert found[:, :, 4:].unique(dim=2).flatten().tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "entry"),
    [
        ([], "train"),
        (["--local_rank=0", "--method", "moco"], "train"),
        (["finetune"], "train"),
        (["retrieval", "--checkpoint", "random"], "eval"),
        (["--local_rank=1", "maps"], "eval"),
    ],
)
def test_one_program_has_the_subcommands_of_both(monkeypatch, arguments: list[str], entry: str) -> None:
    monkeypatch.setattr(programs, "_own", None)
    monkeypatch.setattr(sys, "argv", ["here/own.py", *arguments])
    monkeypatch.setattr(both.train, "start", lambda: "train")
    monkeypatch.setattr(both.evaluate, "start", lambda: "eval")
    assert both.start() == entry
    assert (programs.name_of("eval"), programs.command_of("train")) == ("own.py", "python here/own.py")
    assert programs.with_names("see train.py check") == "see own.py check"


@pytest.mark.slow
def test_a_program_runs_under_the_launcher_with_two_processes_and_workers(
    clean_environment, tiny: dict[str, Any], tmp_path: Path
) -> None:
    """Afterwards the same program evaluates the run."""
    write_program("tsm.py", tmp_path)
    code = write_program("byol.py", tmp_path).read_text()
    program = tmp_path / "own.py"
    program.write_text(code.replace("if __name__", "import tsm\n\nif __name__"))
    flags = {**tiny, "workers": 1, "epochs": 1, "method": "byol", "backbone": "tsm_18", "embedding_dim": 32}
    environment = {**clean_environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}

    def run(*command: str, **flags: Any) -> str:
        done = subprocess.run(
            [*command, *as_flags(flags)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    launcher = str(Path(sys.executable).parent / "deepspeed")
    start = [launcher, "--num_accelerators", "2", "--master_port", str(free_port()), str(program)]
    assert "2 process(es) on cpu" in run(*start, **flags, out="run")
    evaluation = as_flags({"checkpoint": "run", "data": tiny["data"], "workers": 0})
    found = run_program(program, "retrieval", *evaluation, environment=environment, folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "R@1" in found.stdout


# ---------------------------------------------------------------- s3d of torchvision


@pytest.mark.slow
def test_s3d_trains_and_resumes_bit_for_bit(train_main, tiny_pretrain: dict[str, Any], tmp_path: Path) -> None:
    flags = {**tiny_pretrain, "backbone": "s3d", "width": 64, "method": "moco", "clip_length": 5, "crop_size": 32}
    del flags["mined_positives"]
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train_main("pretrain", **flags, out=straight)
    train_main("pretrain", **{**flags, "epochs": 1}, out=resumed)
    train_main("pretrain", epochs=2, resume=resumed)
    assert_same_end(straight, resumed)
    assert embedding(straight).shape == (2, 1024)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 16}, r"^--width is 16, but s3d has only the width 64: pass --width 64$"),
        ({"clip_length": 4}, r"^s3d takes clips of at least 5 frames of 17 x 17 pixels, not 4 of 32 x 32: raise"),
        ({"crop_size": 16}, r"^s3d takes clips of at least 5 frames of 17 x 17 pixels, not 8 of 16 x 16: raise"),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "finetune", "linear"])
def test_s3d_refuses_what_it_cannot_take_before_the_videos_are_opened(
    train_main, tiny, tmp_path: Path, command: str, changes: dict[str, int], message: str
) -> None:
    flags = {**tiny, "backbone": "s3d", "width": 64, "data": tmp_path / "gone", **changes}
    with pytest.raises(UserError, match=message):
        train_main(command, **flags, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("s3d", "r2plus1d_10")), "tsm_18"]
)
def test_a_backbone_compiles_as_one_graph_with_the_same_result(add, name: str) -> None:
    """The backend "aot_eager" traces without generating code, which is slow.

    In float64, because in float32 rounding errors of the gradient of s3d reach 20 % of the largest value. Of the 16
    layers of s3d, the first 7 are enough: those that follow are of the same kinds.
    """
    add("tsm.py")
    torch.compiler.reset()
    counters.clear()
    width = 64 if name == "s3d" else 4
    torch.manual_seed(0)
    plain, compiled = build_backbone(name, width).double(), build_backbone(name, width).double()
    compiled.load_state_dict(plain.state_dict())
    if name == "s3d":
        plain.features, compiled.features = plain.features[:7], compiled.features[:7]
    compiled.pad_channels(8)
    compiled.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    clip = torch.randn(2, 3, 5, 24, 24, generator=torch.Generator().manual_seed(0)).double()
    for network in (plain, compiled):
        network(clip).square().mean().backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    for (parameter, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        tolerance = 1e-6 * theirs.grad.abs().max().item() + 1e-12  # some gradients are 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=tolerance, msg=parameter)
    for (buffer, ours), theirs in zip(compiled.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=buffer)
