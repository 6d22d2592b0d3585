"""The files next to published weights: config.json, and README.md, a model card for the Hugging Face Hub.

Both hold what the weights and the reports of their run say, and nothing else. Folders of the training machine are not
named, because the files are published.
"""

import json
from pathlib import Path
from typing import Any

from dclr.config import read_config
from dclr.errors import UserError, printable
from dclr.evaluation.run_record import read_object
from dclr.files import atomic_write
from dclr.models import Pretrained

PUBLISHED = ("method", "optim")
"""The groups of a run's settings that are copied to the published config.json."""

CARD = """---
library_name: dclr
pipeline_tag: {task}
tags:
- video
- self-supervised-learning
- dclr
# Choose a licence and remove the "#" of the next line. See https://huggingface.co/docs/hub/repositories-licenses
# license:
---

# {title}

Weights of a video network, written by dclr, which implements
[Dual Contrastive Learning for Spatio-temporal Representation](https://arxiv.org/abs/2207.05340) (ACM MM 2022).

## Use

```python
import dclr

model = dclr.load("hf:ORGANISATION/NAME")  # or a folder with model.safetensors
model.embed("video.mp4")  # ({features},) float32{predict}
```

## The network

| | |
|---|---|
{network}

## Training

{training}

## Results

{results}
"""


CHANGED = "The weights were changed after they were read, or their file is gone. So no figures are given."
"""In place of the figures of a run, if the weights are not those of the run any more."""


def write_model_card(pretrained: Pretrained, folder: Path, changed: bool) -> None:
    """Write config.json and README.md for weights to `folder`.

    The figures are those of report.json in the folder of the run that the weights are from, and in the folders of its
    evaluations. config.json has the form of a run's, so eval.py reads it.

    Args:
        changed: the weights are not those of their file any more. The card then has no figures.

    Raises OSError: the folder cannot be written.
    """
    run = _run_folder(pretrained.file)
    config = make_config(pretrained, run)
    card = "\n".join(map(printable, make_card(pretrained, run, config, changed).split("\n")))
    atomic_write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    atomic_write(folder / "README.md", card.encode())


def _run_folder(file: Path) -> Path:
    """Return the folder of the run that a file of weights belongs to, if it belongs to one."""
    folder = file.resolve().parent
    return folder.parent if folder.name == "checkpoints" else folder


def make_config(pretrained: Pretrained, run: Path) -> dict[str, Any]:
    """Return the content of config.json: network, clips, and if known the method and optimization of its run."""
    backbone = pretrained.backbone
    settings = _settings(run)
    return {
        "command": settings.get("command", "finetune" if pretrained.classes else "pretrain"),
        "preset": settings.get("preset", ""),
        "data": pretrained.clips.settings,
        "model": {"backbone": backbone.name, "width": backbone.width},
        **{group: settings[group] for group in PUBLISHED if group in settings},
        "weights": {
            "feature_dim": backbone.feature_dim,
            "mean": backbone.statistics.mean,
            "std": backbone.statistics.std,
            "heads": list(pretrained.heads),
            "classes": list(pretrained.classes),
        },
    }


def make_card(pretrained: Pretrained, run: Path, config: dict[str, Any], changed: bool) -> str:
    """Return the content of README.md. `changed`: see write_model_card."""
    clips, backbone, classes = pretrained.clips, pretrained.backbone, pretrained.classes
    rows = {
        "backbone": f"{backbone.name}, width {backbone.width}, {backbone.feature_dim} features",
        "clips": f"{clips.length} frames, stride {clips.stride}, {clips.crop} x {clips.crop} pixels, RGB",
        "mean, standard deviation": f"{_numbers(clips.mean)}; {_numbers(clips.std)}",
        "projection heads": ", ".join(pretrained.heads) or "none",
        "classes": f"{len(classes)}: {', '.join(classes)}" if classes else "none",
    }
    return CARD.format(
        task="video-classification" if classes else "feature-extraction",
        title=f"{backbone.name} ({config['method']['method']})" if "method" in config else backbone.name,
        features=backbone.feature_dim,
        predict='\nmodel.predict("video.mp4")  # the most probable classes' if classes else "",
        network="\n".join(f"| {name} | {_shown(value)} |" for name, value in rows.items()),
        training=_training(pretrained.file, run, config),
        results=CHANGED if changed else _results(pretrained, run),
    )


def _is_final(file: Path, run: Path) -> bool:
    """Return whether a file holds the final weights of its run, and not those of a checkpoint during training."""
    return file.resolve().parent == run


def _training(file: Path, run: Path, config: dict[str, Any]) -> str:
    """Return what the run's report.json and config.json say about its training."""
    report = read_object(run / "report.json")
    data = report.get("data")
    if not isinstance(data, dict) or not {"folder", "layout", "videos"} <= data.keys():
        return "The weights are from no finished run of dclr, so nothing is known about their training."
    lines = [
        f"- command: {report.get('command')}",
        f"- data set: {Path(str(data['folder'])).name} ({data['layout']}), {data['videos']} training videos",
        f"- steps: {report.get('steps')}" + ("" if _is_final(file, run) else f"; the weights are those of {file.name}"),
    ]
    for group in PUBLISHED:
        lines += [f"- {name}: {_text(value)}" for name, value in config.get(group, {}).items()]
    return "\n".join(lines)


def _date(report: dict[str, Any]) -> str:
    """Return when a report was written, in ISO 8601 and UTC; empty if it does not say so."""
    environment = report.get("environment")
    return str(environment.get("date", "")) if isinstance(environment, dict) else ""


def _results(pretrained: Pretrained, run: Path) -> str:
    """Return a table of the figures in the reports of eval.py in the run's folder, for the clips of the weights."""
    file, rows = pretrained.file, []
    for path in sorted(run.glob("*/report.json")):
        report = read_object(path)
        figures, clips = report.get("figures"), report.get("clips")
        # An evaluation of other weights, such as random ones, may have been written to this folder too.
        own = (file.name, file.stem, run.name) if _is_final(file, run) else (file.name, file.stem)
        is_own = Path(str(report.get("checkpoint", ""))).name in own
        if _is_final(file, run) and _date(report) < _date(read_object(run / "report.json")):
            continue  # it is of the weights that the run had before it ended
        if not is_own or not isinstance(figures, dict) or not isinstance(clips, dict):
            continue
        if any(clips.get(name, value) != value for name, value in pretrained.clips.settings.items()):
            continue
        data = Path(str(clips.get("data") or "")).name or "the built-in demo videos of dclr"
        rows += [f"| {report.get('command')} | {data} | {name} | {_shown(value)} |" for name, value in figures.items()]
    if not rows:
        return "No evaluation of dclr was found next to the weights."
    return "\n".join(["| evaluation | data set | figure | value |", "|---|---|---|---:|", *rows])


def _settings(run: Path) -> dict[str, Any]:
    """Return the groups of a run's config.json, as far as read_config accepts it; empty if there is none."""
    try:
        read_config(run / "config.json")
    except UserError:
        return {}
    return read_object(run / "config.json")


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else _text(value)


def _text(value: Any) -> str:
    return str(value).replace("\n", " ").replace("|", "\\|")
