"""A network read from a file, with all that is needed to use it: backbone, clips, projection heads and classifier."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dclr.errors import UserError
from dclr.models.backbone import Backbone
from dclr.models.backbones import BACKBONES, backbone_without_memory, build_backbone
from dclr.models.classifier import Classifier
from dclr.models.clip_format import IMAGENET, KINETICS, ClipFormat
from dclr.models.heads import ProjectionHead
from dclr.models.weights import (
    CLASSIFIER_FILE_NAME,
    EXPORT_FILE_NAME,
    FILE_NAME,
    Weights,
    check_finite,
    check_fits,
    find_file,
    identify,
    read_weights,
    shapes_of,
)

NETWORK_FILES = (CLASSIFIER_FILE_NAME, FILE_NAME, EXPORT_FILE_NAME)
"""Names of files of weights in a folder. The file that holds most comes first."""

CLIP_SETTINGS = ("clip_length", "clip_stride", "crop_size")
"""Settings of a run's config.json that describe its clips. Metadata of files have the same names."""


@dataclass(frozen=True)
class Pretrained:
    """A network read from a file, in evaluation mode on the CPU.

    Attributes:
        backbone: takes clips normalised with ImageNet's statistics, whatever its weights expect.
        clips: the clips of its training. `loaded` says which of their sizes are assumed.
        heads: projection heads by the name of their pair ("vv", "vs", "vd", "sv", "dv"); empty if the file has none.
        classifier: a classifier on the same backbone; None if the file has none.
        classes: names of the classifier's classes; else empty.
        loaded: one line that says what was loaded, from which file.
        file: the file.
    """

    backbone: Backbone
    clips: ClipFormat
    heads: nn.ModuleDict
    classifier: Classifier | None
    classes: tuple[str, ...]
    loaded: str
    file: Path

    def fingerprint(self) -> str:
        """Return 16 hexadecimal characters that tell backbones apart.

        They are the start of a SHA-256 over names and bytes of the backbone's tensors, and over its statistics. Two
        files with the same backbone have the same fingerprint, for example those of a run with and without classifier.
        """
        digest = hashlib.sha256(repr(self.backbone.statistics).encode())
        for name, tensor in sorted(self.backbone.state_dict().items()):
            if not name.endswith("num_batches_tracked"):  # no code uses them, and files of old versions lack them
                digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def load_pretrained(source: str | Path) -> Pretrained:
    """Read a network from a run's folder (finished, stopped or still going) or from any file of weights.

    The architecture is that of the file: its metadata name it, or its shapes show it. The metadata are not trusted: the
    network is built without memory first, and with memory only if the file's tensors have its shapes. Clip sizes that
    the file does not state are taken from the config.json of its run, else from the published recipe.

    Raises:
        UserError: the file does not exist, cannot be read, needs unsafe unpickling, holds no known network, several
            networks, weights that are not finite, or metadata that do not fit its tensors.
    """
    return _build(read_weights(find_file(Path(source), NETWORK_FILES)))


def stated_settings(source: Path) -> dict[str, Any]:
    """Return what a file of weights states about its network and its clips, under the names of settings.

    Raises:
        UserError: see load_pretrained.
    """
    weights = read_weights(find_file(source, NETWORK_FILES))
    name, width, clips, _ = _check(weights)
    stated = {setting: size for setting, size in clips.settings.items() if setting in weights.metadata}
    return {"backbone": name, "width": width, **stated}


def load_classifier(path: Path) -> tuple[Classifier, tuple[str, ...]]:
    """Read a classifier and its class names from a file of `save_classifier`, or from the folder of a run.

    Raises:
        UserError: see load_pretrained; the file holds no classifier.
    """
    try:
        file = find_file(path, (CLASSIFIER_FILE_NAME,))
    except UserError as error:
        raise UserError(f"--checkpoint: {error}; only a finetune or linear run has a classifier") from None
    weights = read_weights(file)
    try:
        if not weights.fc:
            raise UserError("it holds no classes" if "classes" not in weights.metadata else "it holds no fc")
        _check(weights)
    except UserError as error:
        raise UserError(
            f"--checkpoint {file}: not a classifier written by train.py finetune or linear ({error})"
        ) from None
    pretrained = _build(weights)
    assert pretrained.classifier is not None
    return pretrained.classifier, pretrained.classes


def _build(weights: Weights) -> Pretrained:
    """Build the network of a file. Raises UserError: see load_pretrained."""
    file = weights.file
    name, width, clips, classes = _check(weights)
    check_finite(file, weights.backbone)
    for pair, head in weights.heads.items():
        check_finite(file, {f"heads.{pair}.{name}": tensor for name, tensor in head.items()})
    check_finite(file, {f"fc.{name}": tensor for name, tensor in weights.fc.items()})
    backbone = build_backbone(name, width)
    # Not strict, because `check_fits` accepts files without BatchNorm's step counters.
    backbone.load_state_dict(weights.backbone, strict=False)
    backbone.statistics = clips.statistics
    heads = nn.ModuleDict()
    for pair, tensors in weights.heads.items():
        heads[pair] = ProjectionHead(backbone.feature_dim, tensors["2.bias"].shape[0])
        heads[pair].load_state_dict(tensors)
    classifier = None
    if weights.fc:
        classifier = Classifier(backbone, len(classes), normalised="normalised" in weights.metadata)
        classifier.fc.load_state_dict(weights.fc)
        classifier.eval()
    loaded = f"{file}: {name} (width {width}), {weights.kind}{weights.removed}{weights.unused}"
    loaded += f", a classifier of {len(classes)} classes" if classes else ""
    loaded += " on features of length 1" if classes and "normalised" in weights.metadata else ""
    loaded += f", heads {' '.join(heads)}" if heads else ""
    if clips.statistics not in (IMAGENET, KINETICS):
        loaded += f", mean {clips.mean}, standard deviation {clips.std}"
    missing = [setting for setting in CLIP_SETTINGS if setting not in weights.metadata]
    if missing and not recorded_clips(file):
        loaded += f"; assumed: clips of {clips.length} frames, stride {clips.stride}, {clips.crop} pixels"
    return Pretrained(backbone.eval(), clips, heads.eval(), classifier, classes, loaded, file)


def _check(weights: Weights) -> tuple[str, int, ClipFormat, tuple[str, ...]]:
    """Return architecture, width, clips and classes of a file whose metadata fit its tensors.

    Raises:
        UserError: they do not fit.
    """
    file, metadata = weights.file, weights.metadata
    if "backbone" in metadata:
        name, width = metadata["backbone"], _number(file, metadata.get("width", ""))
    elif (found := identify(shapes_of(weights.backbone))) is not None:
        name, width = found
    else:
        first = next(iter(weights.backbone), "none")
        raise UserError(
            f"{file} holds no network of this project ({', '.join(BACKBONES)}): its first tensor is {first}"
            f"{weights.removed}"
        )
    backbone = backbone_without_memory(name, width)
    check_fits(file, weights.backbone, backbone, weights.removed)
    for pair, tensors in weights.heads.items():
        F = backbone.feature_dim
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        out = shapes.get("2.bias", (0,))
        if shapes != {"0.weight": (F, F), "0.bias": (F,), "2.weight": (*out, F), "2.bias": out} or len(out) != 1:
            raise UserError(f"{file}: its head {pair} is not a projection head on {F} features")
    classes = _classes(file, weights, backbone.feature_dim) if weights.fc else ()
    return name, width, weights.clips(recorded_clips(file)), classes


def _number(file: Path, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{file}: its metadata have no width") from None


def _classes(file: Path, weights: Weights, features: int) -> tuple[str, ...]:
    """Return the names of the classes. Raises UserError unless the metadata fit the classifier's tensors."""
    try:
        classes = json.loads(weights.metadata["classes"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: its classes are not a list of names ({str(error)[:200]})") from None
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{file}: its classes are not a list of names")
    if weights.metadata.get("normalised", "true") != "true":
        raise UserError(f"{file}: its metadata say normalised {weights.metadata['normalised']!r:.80}, not true")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.fc.items()}
    if shapes != {"weight": (len(classes), features), "bias": (len(classes),)}:
        raise UserError(f"{file}: fc does not have {len(classes)} classes by {features} features")
    return tuple(classes)


def recorded_clips(file: Path) -> dict[str, object]:
    """Return the clip sizes in the config.json of the run that `file` belongs to; empty if there are none."""
    for folder in (file.parent, file.parent.parent) if file.parent.name == "checkpoints" else (file.parent,):
        try:
            data = json.loads((folder / "config.json").read_text(encoding="utf-8"))["data"]
            return {name: data[name] for name in CLIP_SETTINGS if isinstance(data[name], int)}
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue  # no run's configuration: for example that of another project
    return {}
