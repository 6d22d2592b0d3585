"""Untrusted files: no code in them is run, and impossible contents are refused in one line."""

import ast
import json
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import REPOSITORY, as_flags, read_store
from safetensors.torch import load_file, save_file

from dclr.commands import evaluate as evaluation
from dclr.config import DataConfig
from dclr.data import pack, store, store_files
from dclr.data.datasets import open_catalog
from dclr.data.encode import write_video
from dclr.errors import UserError
from dclr.evaluation import demo_table, view_sheet
from dclr.models import build_backbone, load_backbone, load_classifier, save_backbone
from dclr.training.checkpoint import newest, read

# ---------------------------------------------------------------- malicious files


class Payload:
    """An object that creates the folder `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        import os

        return os.makedirs, (str(self.marker), 0o777, True)


def plain_pickle(path: Path, payload: object) -> None:
    path.write_bytes(pickle.dumps(payload))


def torch_zip(path: Path, payload: object) -> None:
    torch.save({"state_dict": payload}, path)


def torch_legacy(path: Path, payload: object) -> None:
    torch.save({"state_dict": payload}, path, _use_new_zipfile_serialization=False)


def npy(path: Path, payload: object) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([payload], dtype=object), allow_pickle=True)


def npz(path: Path, payload: object) -> None:
    """Write the payload under every name that the project reads from such a file."""
    names = ("version", "paths", "frames", "compact", "source", "plan", "reasons")
    with path.open("wb") as file:
        np.savez(file, **dict.fromkeys(names, np.array([payload], dtype=object)), allow_pickle=True)


def npz_with_digest(path: Path, payload: object) -> None:
    """Write the payload with a digest, as packed stores have. Anybody can compute the digest."""
    npz(path, payload)
    sign(path)


def sign(path: Path) -> None:
    import hashlib

    content = path.read_bytes()
    path.write_bytes(content + hashlib.sha256(content).digest())


KINDS = (plain_pickle, torch_zip, torch_legacy, npy, npz, npz_with_digest)

READERS: dict[Callable[[Path, object], None], Callable[[Path], object]] = {
    plain_pickle: lambda path: pickle.loads(path.read_bytes()),
    torch_zip: lambda path: torch.load(path, weights_only=False),
    torch_legacy: lambda path: torch.load(path, weights_only=False),
    npy: lambda path: np.load(path, allow_pickle=True),
    npz: lambda path: np.load(path, allow_pickle=True)["version"],
    npz_with_digest: lambda path: np.load(path, allow_pickle=True)["version"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_malicious_file_runs_its_code_when_unpickled(kind, tmp_path):
    kind(tmp_path / "file", Payload(tmp_path / "marker"))
    READERS[kind](tmp_path / "file")
    assert (tmp_path / "marker").is_dir()


# ---------------------------------------------------------------- every path that takes a file


@pytest.fixture(scope="module")
def originals(one_process, demo_videos, float32, tmp_path_factory) -> Path:
    """Make a pretraining run, a finetuning run and both kinds of store: `run`, `classifier`, `planes`, `compact`."""
    root = tmp_path_factory.mktemp("originals")
    tiny = {
        "data": demo_videos, "ds_config": float32, "width": 4, "clip_length": 8, "crop_size": 32, "batch_size": 4,
        "epochs": 1, "workers": 0, "log_every": 1,
    }  # fmt: skip
    method = {"queue_length": 18, "embedding_dim": 32, "mined_positives": 2, "fill_steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        run = train_in_process(patch, one_process)
        run("pretrain", *as_flags({**tiny, **method, "out": root / "run"}))
        run("finetune", *as_flags({**tiny, "out": root / "classifier"}))
    for name in ("planes", "compact"):
        pack.pack(DataConfig(data=str(demo_videos), workers=1), str(root / name), 32, compact=name == "compact")
    return root


def train_in_process(patch: pytest.MonkeyPatch, device: torch.device) -> Callable[..., None]:
    from dclr.commands import train

    patch.setattr("dclr.training.engine.start_processes", lambda: device)
    patch.setattr("dclr.training.engine.stop_processes", lambda: None)
    return lambda *arguments: train.main(list(arguments))


class Workspace:
    """The folder in which a test copies and replaces files, and the commands that read them."""

    def __init__(
        self, folder: Path, originals: Path, demo: Path, float32: Path, patch: pytest.MonkeyPatch, device: Any
    ):
        self.folder, self._originals, self._demo, self._patch = folder, originals, demo, patch
        self.train, self.eval = train_in_process(patch, device), lambda *arguments: evaluation.main(list(arguments))
        self.data = ["--data", str(demo)]
        self.tiny = as_flags(
            {
                "ds_config": float32, "width": 4, "clip_length": 8, "crop_size": 32, "batch_size": 4, "epochs": 1,
                "workers": 0, "out": folder / "out",
            }
        )  # fmt: skip

    def copy(self, name: str) -> Path:
        """Return a new copy of an original, or of the demo videos."""
        source = self._demo if name == "demo" else self._originals / name
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return Path(shutil.copytree(source, self.folder / name))

    def views(self, video: Path) -> None:
        self._patch.setattr(sys, "argv", ["view_sheet", "--video", str(video), "--out", str(self.folder / "views.png")])
        view_sheet.main()


Use = tuple[Path, Callable[[], object]]
"""The file to replace, and the call that reads it."""


def pretrained(command: str, name: str) -> Callable[[Workspace], Use]:
    def use(at: Workspace) -> Use:
        file = at.copy("run") / name
        given = file.parent if name == "backbone.safetensors" else file
        return file, lambda: at.train(command, *at.data, *at.tiny, "--pretrained", str(given))

    return use


def checkpoint(command: str, name: str, folder: bool) -> Callable[[Workspace], Use]:
    def use(at: Workspace) -> Use:
        file = at.copy("classifier") / name
        given = str(file.parent if folder else file)
        return file, lambda: at.eval(command, *at.data, "--checkpoint", given, "--out", str(at.folder / "out"))

    return use


def list_file(name: str) -> Callable[[Workspace], Use]:
    def use(at: Workspace) -> Use:
        file = at.copy("demo") / name
        return file, lambda: at.train(
            "check", "--data", str(file if name == "mine.txt" else file.parents[0 if "/" not in name else 1])
        )

    return use


def in_a_layout(name: str, *others: str) -> Callable[[Workspace], Use]:
    """Use a list file of an official layout. The other files only need the right names."""

    def use(at: Workspace) -> Use:
        for path in (name, *others):
            (at.folder / "layout" / path).parent.mkdir(parents=True, exist_ok=True)
            (at.folder / "layout" / path).write_text("[]" if path.endswith("json") else "1 A\n")
        return at.folder / "layout" / name, lambda: at.train("check", "--data", str(at.folder / "layout"))

    return use


def in_a_store(kind: str, name: str, command: str) -> Callable[[Workspace], Use]:
    def use(at: Workspace) -> Use:
        folder = at.copy(kind)
        if name == store_files.PLAN and command != "pack":
            (folder / store_files.INDEX).unlink()
        if command == "pack":
            flags = ["--out", str(folder), "--short-side", "32", "--workers", "1", *["--compact"][: kind == "compact"]]
            return folder / name, lambda: at.train("pack", *at.data, *flags)
        if command == "check":
            return folder / name, lambda: at.train("check", "--data", str(folder), "--workers", "1")
        # Training reads the shard itself.
        return folder / name, lambda: at.train("finetune", "--data", str(folder), *at.tiny)

    return use


def resumed(at: Workspace) -> Use:
    run = at.copy("run")
    return run / "config.json", lambda: at.train("pretrain", "--resume", str(run))


def metrics(at: Workspace) -> Use:
    run = at.copy("run")
    return run / "metrics.jsonl", lambda: at.train("pretrain", "--resume", str(run), "--epochs", "2")


def beside_a_checkpoint(at: Workspace) -> Use:
    run = at.copy("classifier")
    return run / "config.json", lambda: at.eval("accuracy", *at.data, "--checkpoint", str(run))


def config_file(name: str) -> Callable[[Workspace], Use]:
    def use(at: Workspace) -> Use:
        file = at.copy("run") / name
        return file, lambda: at.train("pretrain", *at.data, *at.tiny, "--config", str(file))

    return use


def ds_config(at: Workspace) -> Use:
    file = at.folder / "ds.json"
    flags = [*at.tiny, "--ds_config", str(file)]
    return file, lambda: at.train("pretrain", *at.data, *flags)


def video(at: Workspace) -> Use:
    data = at.copy("demo")
    file = next(data.rglob("*.mp4"))
    return file, lambda: at.train("check", "--data", str(data), "--workers", "1")


def video_of_views(at: Workspace) -> Use:
    return at.folder / "video.mp4", lambda: at.views(at.folder / "video.mp4")


def manifest(at: Workspace) -> Use:
    """Verify the videos once, so that there is a cache to replace."""
    data = at.copy("demo")
    at._patch.setenv("XDG_CACHE_HOME", str(at.folder / "cache"))
    at.train("check", "--data", str(data), "--workers", "1")
    (file,) = (at.folder / "cache" / "dclr" / "manifests").glob("*.npz")
    return file, lambda: at.train("check", "--data", str(data), "--workers", "1")


def report(at: Workspace) -> Use:
    for _, run in (*demo_table.ACCURACY, *demo_table.RETRIEVAL):
        (at.folder / "demo" / run).mkdir(parents=True)
    return at.folder / "demo" / "finetune/accuracy/report.json", lambda: demo_table.table(at.folder / "demo")


PATHS: dict[str, Callable[[Workspace], Use]] = {
    "finetune --pretrained FILE.pth": pretrained("finetune", "weights.pth"),
    "finetune --pretrained FILE.pth.tar": pretrained("finetune", "checkpoint_0199.pth.tar"),
    "finetune --pretrained FILE.safetensors": pretrained("finetune", "other.safetensors"),
    "finetune --pretrained RUN": pretrained("finetune", "backbone.safetensors"),
    "linear --pretrained FILE.pth": pretrained("linear", "weights.pth"),
    "linear --pretrained RUN": pretrained("linear", "backbone.safetensors"),
    "eval.py accuracy --checkpoint FILE": checkpoint("accuracy", "classifier.safetensors", folder=False),
    "eval.py accuracy --checkpoint FILE.pth": checkpoint("accuracy", "weights.pth", folder=False),
    "eval.py accuracy --checkpoint RUN": checkpoint("accuracy", "classifier.safetensors", folder=True),
    "eval.py accuracy: RUN/config.json": beside_a_checkpoint,
    "eval.py retrieval --checkpoint FILE.pth.tar": checkpoint("retrieval", "checkpoint_0199.pth.tar", folder=False),
    "eval.py retrieval --checkpoint RUN": checkpoint("retrieval", "backbone.safetensors", folder=True),
    "--resume: RUN/config.json": resumed,
    "--resume: RUN/metrics.jsonl": metrics,
    "--config FILE.toml": config_file("settings.toml"),
    "--config RUN/config.json": config_file("config.json"),
    "--ds_config": ds_config,
    "--data LIST.txt": list_file("mine.txt"),
    "--data: splits/train.txt": list_file("splits/train.txt"),
    "--data: splits/classes.txt": list_file("splits/classes.txt"),
    "--data: Kinetics' *.csv": in_a_layout("train.csv"),
    "--data: Diving48_*.json": in_a_layout("Diving48_V2_train.json", "Diving48_V2_test.json"),
    "--data: Diving48_vocab.json": in_a_layout(
        "Diving48_vocab.json", "Diving48_V2_train.json", "Diving48_V2_test.json"
    ),
    "--data: ucfTrainTestlist/classInd.txt": in_a_layout("ucfTrainTestlist/classInd.txt"),
    "--data: ucfTrainTestlist/trainlist01.txt": in_a_layout(
        "ucfTrainTestlist/trainlist01.txt", "ucfTrainTestlist/classInd.txt"
    ),
    "--data: HMDB51's lists": in_a_layout("testTrainMulti_7030_splits/run_test_split1.txt"),
    "--data: dclr-index.npz": in_a_store("planes", store_files.INDEX, "check"),
    "--data: dclr-plan.npz": in_a_store("planes", store_files.PLAN, "check"),
    "--data: a shard": in_a_store("planes", "shard-00000.yuv", "finetune"),
    "--data: a shard's small video": in_a_store("compact", "shard-00000/00000000.avi", "finetune"),
    "--data: a video": video,
    "pack --out STORE: dclr-plan.npz": in_a_store("planes", store_files.PLAN, "pack"),
    "pack --out STORE: shard-00000.npz": in_a_store("planes", "shard-00000.npz", "pack"),
    "pack --compact --out STORE: shard-00000.npz": in_a_store("compact", "shard-00000.npz", "pack"),
    "the list of verified videos": manifest,
    "dclr.evaluation.view_sheet --video": video_of_views,
    "dclr.evaluation.demo_table FOLDER": report,
}


@pytest.fixture
def workspace(one_process, originals, demo_videos, float32, tmp_path, monkeypatch) -> Workspace:
    return Workspace(tmp_path, originals, demo_videos, float32, monkeypatch, one_process)


def ends_well(use: Callable[[], object], marker: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error line or the printed text. Check that no code of the file ran and no bug was raised."""
    capsys.readouterr()
    try:
        use()
        said = "".join(capsys.readouterr())
    except UserError as error:
        said = str(error)
        assert said.isprintable()
        assert len(said) < 2000
    except SystemExit as left:  # dclr.evaluation.view_sheet prints its own
        status, said = left.code, capsys.readouterr().err
        assert (status, said.count("\n")) == (2, 1)
    assert not marker.exists(), said
    assert "Traceback" not in said
    return said


# These continue without the file and say so. Every other path refuses the file.
IGNORED = {
    "--resume: RUN/metrics.jsonl": "done:",
    "--data: a video": "unreadable: 1",
    "pack --out STORE: shard-00000.npz": "shard-00000.npz is damaged: its shard is made again",
    "pack --compact --out STORE: shard-00000.npz": "shard-00000.npz is damaged: its shard is made again",
    "the list of verified videos": "cannot be used",
}


@pytest.mark.parametrize("path", PATHS)
def test_no_code_of_a_malicious_file_is_run_and_the_user_is_told(path, workspace, tmp_path, capsys):
    marker = tmp_path / "marker"
    file, use = PATHS[path](workspace)
    for kind in KINDS:
        file.unlink(missing_ok=True)
        kind(file, Payload(marker))
        said = ends_well(use, marker, capsys)
        assert IGNORED.get(path, str(workspace.folder)) in said, (kind.__name__, said)
        shutil.rmtree(workspace.folder / "out", ignore_errors=True)


def test_no_code_of_a_malicious_file_in_a_checkpoint_is_run(workspace, originals, tmp_path, capsys):
    marker = tmp_path / "marker"
    files = [file.relative_to(originals) for file in (originals / "run" / "checkpoints").rglob("*") if file.is_file()]
    assert files
    for name in files:
        for kind in KINDS:
            run = workspace.copy("run")
            (tmp_path / name).unlink()
            kind(tmp_path / name, Payload(marker))
            resume = ["pretrain", "--resume", str(run), "--epochs", "2"]
            said = ends_well(lambda: workspace.train(*resume), marker, capsys)  # noqa: B023
            assert said.startswith("--resume") or "resumed at step" in said, (name, kind.__name__, said)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -1}, {"step": "1"}, {"step": 10**9}, {"processes": None}, {"processes": 10**12}, {"videos": "16"},
        {"fingerprint": None}, {"summary": []}, {"last": None}, {"failures": []}, {"failures": [[], 1]},
        {"failures": {}}, {"seconds": "1"}, {"skipped": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_with_an_impossible_state_is_refused(change, workspace, tmp_path, capsys):
    run = workspace.copy("run")
    path = newest(run / "checkpoints")
    tensors, state = read(path)
    save_file(tensors, path, {"format": "dclr checkpoint 1", "state": json.dumps({**state, **change})})
    said = ends_well(
        lambda: workspace.train("pretrain", "--resume", str(run), "--epochs", "2"), tmp_path / "none", capsys
    )
    assert said.startswith("--resume"), said


def test_no_file_of_the_project_unpickles():
    """Search the syntax trees for torch.load without weights_only=True, pickle's readers, and allow_pickle=True."""
    sources = [REPOSITORY / "train.py", REPOSITORY / "eval.py"]
    for folder in ("dclr", "kernels", "benchmarks"):
        sources += sorted((REPOSITORY / folder).rglob("*.py"))
    assert len(sources) > 40
    found = [
        source.relative_to(REPOSITORY).as_posix()
        for source in sources
        for line in unpickles(source.read_text(encoding="utf-8"))
    ]
    # The decoder process unpickles requests and answers from a pipe to the process that forked it. The ranks of a
    # machine unpickle a temporary file that the first of them has just made, and that only this user can write.
    assert set(found) == {"dclr/data/decoder_process.py", "dclr/training/sharing.py"}


RUNS_WHAT_IT_READS = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "torch.jit.load", "torch.hub.load", "joblib.load",
    "marshal.load", "marshal.loads", "shelve.open", "yaml.load", "yaml.unsafe_load",
    "eval", "exec", "os.system", "os.popen",
}  # fmt: skip


READERS_BY_NAME = {*RUNS_WHAT_IT_READS, "torch.load"}


def unpickles(source: str) -> Iterator[int]:
    """Return the line numbers of calls that could run code from a file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and any(
            f"{node.module}.{name.name}" in READERS_BY_NAME for name in node.names
        ):
            yield node.lineno  # its calls would not be recognised
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        true = {word.arg for word in node.keywords if isinstance(word.value, ast.Constant) and word.value.value is True}
        loads = called == "torch.load" and "weights_only" not in true
        if loads or called in RUNS_WHAT_IT_READS or true & {"allow_pickle", "shell"}:
            yield node.lineno


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "pickle.load(x)",
        "np.load(x, allow_pickle=True)",
        "eval(x)",
        "exec(x)",
        "0; from torch import load",
        "0; from pickle import loads as json_loads",
        "subprocess.run(x, shell=True)",
    ],
)
def test_the_search_finds_calls_that_unpickle(line):
    assert list(unpickles(f"x = 1\ny = {line}")) == [2]


def test_the_search_accepts_calls_that_do_not_unpickle():
    fine = "torch.load(x, weights_only=True)\nnp.load(x, allow_pickle=False)\nnetwork.eval()\njson.load(x)"
    assert list(unpickles(fine)) == []


# ---------------------------------------------------------------- safetensors


def header(length: int, text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text + data


def entry(**changed: object) -> bytes:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changed}}).encode()


def tensors(text: bytes, data: bytes = b"\0" * 8) -> bytes:
    return header(len(text), text, data)


DEEP = b"[" * 100_000
OVERLAPPING = (
    b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'
)
HOSTILE = {
    "nothing": b"",
    "a header as large as the memory": header(2**63, b"{}"),
    "a header beyond the file": header(1000, b"{}"),
    "a deep header": tensors(DEEP),
    "no object": tensors(b"[]"),
    "offsets beyond the file": tensors(entry(data_offsets=[0, 2**40], shape=[2**38])),
    "offsets that are negative": tensors(entry(data_offsets=[-4, 0])),
    "offsets that fall": tensors(entry(data_offsets=[4, 0])),
    "offsets that overlap": tensors(OVERLAPPING),
    "a shape beyond its offsets": tensors(entry(shape=[2**62, 2**62])),
    "a shape of nothing": tensors(entry(shape=[0, 2**62], data_offsets=[0, 0]), b""),
    "an unknown type": tensors(entry(dtype="X99")),
    "a type of half a byte": tensors(entry(dtype="F4", shape=[16], data_offsets=[0, 8])),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_safetensors_file_is_refused_in_one_line(name, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(HOSTILE[name])
    for load in (lambda: load_backbone(file, build_backbone("r2plus1d_10", 4)), lambda: load_classifier(file)):
        with pytest.raises(UserError) as caught:
            load()
        assert str(file) in str(caught.value)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"width": "1000000000"}, id="a width of terabytes"),
        pytest.param({"width": "-4"}, id="a negative width"),
        pytest.param({"width": "9" * 5000}, id="a width of too many digits"),
        pytest.param({"width": "8"}, id="another width"),
        pytest.param({"backbone": "r3d_10"}, id="another backbone"),
        pytest.param({"backbone": "__class__"}, id="no backbone"),
        pytest.param({"classes": "{}"}, id="classes that are no list"),
        pytest.param({"classes": "[1,2,3,4,5,6,7,8]"}, id="classes that are no names"),
        pytest.param({"classes": "[[]]"}, id="a class that is a list"),
        pytest.param({"classes": '["a"]'}, id="too few classes"),
        pytest.param({"classes": json.dumps(["a"] * 1_000_000)}, id="a million classes"),
        pytest.param({"classes": "[" * 100_000}, id="classes in lists in lists"),
        pytest.param({"classes": "null"}, id="no classes"),
    ],
)
def test_the_metadata_of_a_classifier_must_agree_with_its_tensors(changed, originals, tmp_path):
    from safetensors import safe_open

    original = originals / "classifier" / "classifier.safetensors"
    with safe_open(original, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(original), tmp_path / "x.safetensors", {**metadata, **changed})
    with pytest.raises(UserError, match=r"not a classifier written by train\.py") as caught:
        load_classifier(tmp_path / "x.safetensors")
    assert str(caught.value).isprintable()
    load_classifier(original)


def test_a_classifier_whose_head_or_backbone_has_another_shape_is_refused(originals, tmp_path):
    from safetensors import safe_open

    original = originals / "classifier" / "classifier.safetensors"
    with safe_open(original, framework="pt") as opened:
        metadata = opened.metadata()
    weights = load_file(original)
    for name in ("fc.weight", "fc.bias", "layer1.0.conv1.1.weight", "layer1.0.conv1.1.num_batches_tracked"):
        for changed in ({name: torch.zeros(3, 5)}, {}):
            if not changed and name.endswith("tracked"):
                continue  # these may be missing, see load_backbone
            spoiled = {key: value for key, value in weights.items() if key != name} | changed
            save_file(spoiled, tmp_path / "x.safetensors", metadata)
            with pytest.raises(UserError, match=r"not a classifier written by train\.py"):
                load_classifier(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.zeros(4).to_sparse(), id="sparse"),
        pytest.param(torch.zeros(4, device="meta"), id="without memory"),
        pytest.param(torch.zeros(4, 4), id="another shape"),
        pytest.param(torch.zeros(1).expand(10**9), id="a width that memory repeats"),
    ],
)
def test_weights_other_than_plain_tensors_of_the_right_shape_are_refused(tensor, tmp_path):
    backbone = build_backbone("r2plus1d_10", 4)
    torch.save({**backbone.state_dict(), "layer1.0.conv1.1.weight": tensor}, tmp_path / "x.pth")
    with pytest.raises(UserError) as caught:
        load_backbone(tmp_path / "x.pth", backbone)
    assert str(caught.value).startswith(str(tmp_path / "x.pth"))


def test_a_compressed_file_of_weights_is_refused_before_it_fills_the_memory(tmp_path):
    save_backbone(build_backbone("r2plus1d_10", 4), tmp_path / "backbone.safetensors")
    torch.save(build_backbone("r2plus1d_10", 4).state_dict(), tmp_path / "x.pth")
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as whole,
        zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as pressed,
    ):
        for member in whole.infolist():
            pressed.writestr(member.filename, whole.read(member))
    load_backbone(tmp_path / "x.pth", build_backbone("r2plus1d_10", 4))
    with pytest.raises(UserError, match=r"y\.pth is compressed, which torch\.save never does"):
        load_backbone(tmp_path / "y.pth", build_backbone("r2plus1d_10", 4))


# ---------------------------------------------------------------- JSON


DEEP_JSON = '{"a":' * 100_000
NO_JSON = {
    "nothing": "",
    "deep": DEEP_JSON,
    "a list": "[]",
    "null": "null",
    "too many digits": "1" * 5000,
    "not UTF-8": "\udcff",
}
NO_REPORT = {
    "figures that are a list": '{"figures": []}',
    "figures that are texts": '{"figures": {"top1_video": "x"}}',
    "figures beyond a float": '{"figures": {"top1_video": 1' + "0" * 400 + "}}",
}
JSON_READERS = {
    "--resume: RUN/config.json": NO_JSON,
    "eval.py accuracy: RUN/config.json": NO_JSON,
    "--config RUN/config.json": NO_JSON,
    "--ds_config": NO_JSON,
    "dclr.evaluation.demo_table FOLDER": {**NO_JSON, **NO_REPORT},
}


@pytest.mark.parametrize(
    ("path", "content"),
    [
        pytest.param(path, text, id=f"{path}, {name}")
        for path, texts in JSON_READERS.items()
        for name, text in texts.items()
    ],
)
def test_hostile_json_is_refused_in_one_line(path, content, workspace, capsys):
    file, use = PATHS[path](workspace)
    if path == "dclr.evaluation.demo_table FOLDER":
        for _, run in (*demo_table.ACCURACY, *demo_table.RETRIEVAL):
            (workspace.folder / "demo" / run / "report.json").write_text("{}")
        (workspace.folder / "demo" / "pretrain" / "report.json").write_text("{}")
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    said = ends_well(use, workspace.folder / "none", capsys)
    assert str(workspace.folder) in said, said


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("optim", "epochs", "5"),
        ("optim", "epochs", 1.5),
        ("optim", "epochs", True),
        ("optim", "epochs", None),
        ("optim", "epochs", 10**400),
        ("optim", "epochs", [1]),
        ("optim", "lr", "0.1"),
        ("optim", "lr", float("nan")),
        ("optim", "lr", float("inf")),
        ("optim", "lr", {}),
        ("optim", "milestones", 5),
        ("optim", "milestones", ["a"]),
        ("run", "seed", 2**70),
        ("run", "compile", ["on"]),
        ("run", "ds_config", 3),
        ("data", "data", ["a"]),
        ("data", "workers", 10**9),
        ("data", "allow_outside", "maybe"),
        ("data", "allow_outside", 1),
        ("model", "width", 10**9),
        ("model", "backbone", {"a": 1}),
        ("method", "key_momentum", float("nan")),
        ("method", "mined_positives", "5"),
    ],
)
def test_a_config_value_that_no_flag_could_give_is_refused(group, name, value, workspace, capsys):
    file, use = resumed(workspace)
    content = json.loads(file.read_text())
    content[group][name] = value
    file.write_text(json.dumps(content))
    said = ends_well(use, workspace.folder / "none", capsys)
    assert name in said.replace("-", "_"), said
    assert "must be" in said


def test_invalid_lines_of_metrics_are_dropped_on_resume(workspace, capsys):
    file, use = metrics(workspace)
    good = file.read_text().splitlines()
    bad = ["[]", "3", '"step"', "{}", '{"step": "2"}', '{"step": null}', DEEP_JSON, "\udcff\udcfe"]
    file.write_bytes("\n".join([*bad, *good]).encode("utf-8", "surrogateescape"))
    ends_well(use, workspace.folder / "none", capsys)
    lines = file.read_text().splitlines()
    assert lines[: len(good)] == good
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


# ---------------------------------------------------------------- paths that leave the data folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Make a data folder with a video, and a video next to that folder that lists must not name."""
    for seed, name in enumerate(("data/inside.mp4", "outside.mp4")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_video(tmp_path / name, np.random.default_rng(seed).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8))
    return tmp_path


def test_a_list_may_name_videos_outside_only_with_permission(elsewhere, workspace, capsys):
    data = elsewhere / "data"
    for path in (str(elsewhere / "outside.mp4"), "../outside.mp4", "a/../../outside.mp4"):
        (data / "train.txt").write_text(f"inside.mp4 0\n{path} 0\n")
        said = ends_well(lambda: workspace.train("check", "--data", str(data)), data / "none", capsys)
        assert said.startswith(
            f"{data / 'train.txt'}:2: {path} must be relative to the data folder and stay inside it"
        ), said
    (data / "a").mkdir()
    workspace.train("check", "--data", str(data), "--allow-outside", "--workers", "1")
    assert "readable: 2" in capsys.readouterr().out


def test_the_permission_is_kept_by_a_run_and_never_taken_from_a_checkpoint(elsewhere, workspace, capsys):
    data, out = elsewhere / "data", workspace.folder / "out"
    (data / "train.txt").write_text("inside.mp4 0\n../outside.mp4 1\n")
    (data / "test.txt").write_text("../outside.mp4 1\n")
    flags = ["--data", str(data), *workspace.tiny, "--batch-size", "2"]
    assert "--allow-outside" in ends_well(lambda: workspace.train("finetune", *flags), data / "none", capsys)
    assert not out.exists()
    workspace.train("finetune", *flags, "--allow-outside")
    assert json.loads((out / "config.json").read_text())["data"]["allow_outside"] is True
    workspace.train("finetune", "--resume", str(out), "--epochs", "2")
    message = ends_well(
        lambda: workspace.train("finetune", "--resume", str(out), "--no-allow-outside"), data / "none", capsys
    )
    assert message.startswith("--allow-outside is off, but the run in")

    measure = ["accuracy", "--data", str(data), "--checkpoint", str(out), "--workers", "0"]
    assert "--allow-outside" in ends_well(lambda: workspace.eval(*measure), data / "none", capsys)
    workspace.eval(*measure, "--allow-outside")
    assert json.loads((out / "accuracy" / "report.json").read_text())["videos"] == 1


def test_a_store_does_not_need_the_videos_outside_the_folder_any_more(elsewhere, workspace, capsys):
    data, packed = elsewhere / "data", elsewhere / "packed"
    (data / "train.txt").write_text(f"inside.mp4 0\n{elsewhere / 'outside.mp4'} 1\n")
    flags = ["pack", "--data", str(data), "--out", str(packed), "--short-side", "32", "--workers", "1"]
    assert "--allow-outside" in ends_well(lambda: workspace.train(*flags), data / "none", capsys)
    workspace.train(*flags, "--allow-outside")
    (elsewhere / "outside.mp4").unlink()
    shutil.rmtree(data)
    opened = read_store(packed)
    assert opened.read_planes(1, [0, 19]).y.shape == (2, 32, 32)
    assert [video.path for video in open_catalog(packed).videos("train")] == [
        "inside.mp4",
        str(elsewhere / "outside.mp4"),
    ]
    (packed / "shard-00000.yuv").write_bytes(b"")
    with pytest.raises(UserError, match="--short-side 32 --allow-outside`, which makes only these again"):
        workspace.train("check", "--data", str(packed))


def test_the_source_that_a_store_names_is_quoted_in_the_command_to_type(originals, tmp_path):
    from dclr.data.string_array import pack_strings

    shutil.copytree(originals / "planes", tmp_path / "planes")
    (tmp_path / "planes" / store_files.INDEX).unlink()
    plan, _ = store_files.load_arrays(tmp_path / "planes" / store_files.PLAN)
    source = pack_strings(["x; touch /tmp/owned\n\x1b[2J"])
    store_files.save_arrays(tmp_path / "planes" / store_files.PLAN, {**plan, "source": source})
    with pytest.raises(UserError) as caught:
        store.load_index(tmp_path / "planes")
    assert r"--data 'x; touch /tmp/owned\n\x1b[2J' --out" in str(caught.value)
