"""Files of weights: written as safetensors, read from files of other projects too.

    a run's folder, or a file in it                written by `save_weights`
    a run's checkpoint step-N, also of a run       the query encoder, with BatchNorm's statistics averaged over ranks
    that is still going or was stopped
    torchvision's weights, .pth                    a state dict; `fc` is ignored
    a checkpoint of any project with this network  safetensors or torch.save; the backbone's names may have any prefix;
                                                   its heads are ignored, and unusual ones are named
    the DCLR authors' checkpoint_*.pth.tar         the query encoder "module.encoder_q."; its heads are ignored

A file that this project writes tells all that is needed to use the weights. Its tensors have torchvision's names; names
of projection heads begin with "heads." and names of a classifier with "fc.". Its metadata are texts:

    format                               dclr, or "dclr checkpoint 1"
    backbone, width                      the architecture
    clip_length, clip_stride, crop_size  the clips of the training
    mean, std                            their statistics, JSON lists of three numbers
    heads                                JSON list of the heads' names
    classes                              JSON list of the classifier's classes
    normalised                           true: the classifier scales features to length 1. Else it has no such entry

Weights that are not finite are refused: every figure from them would be meaningless.
"""

import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from dclr import hub
from dclr.errors import UserError
from dclr.models.backbone import Backbone
from dclr.models.backbones import BACKBONES, MAX_WIDTH, backbone_without_memory
from dclr.models.clip_format import IMAGENET, KINETICS, Channels, ClipFormat, Statistics
from dclr.models.heads import NormalisedLinear, ProjectionHead
from dclr.models.tensor_file import read_metadata, read_tensors, write_safetensors

FILE_NAME = "backbone.safetensors"
"""The name of the query backbone's file in a run's folder."""

CLASSIFIER_FILE_NAME = "classifier.safetensors"
"""The name of the classifier's file in a run's folder. The file holds the backbone too."""

EXPORT_FILE_NAME = "model.safetensors"
"""The name of the file in a folder that was made for others to use."""

FORMAT = "dclr"
CHECKPOINT_FORMAT = "dclr checkpoint 1"
"""The metadata `format` of training checkpoints. Raise the number when the content of the file changes."""

# Modules of foreign files that are not the backbone's and cannot change its features.
_HEAD = re.compile(r"(fc\w*|classifier|\w*head\w*|proj\w*|pred\w*|fvv|fvs|fvd|fsv|fdv)\.")

_EXPECTED_HEADS = {"fc", "classifier", "fvv", "fvs", "fvd", "fsv", "fdv"}
"""Heads of torchvision's networks and of the released code. What is loaded does not name them."""

# torch adds these to names, anywhere, when it compiles, shards or checkpoints a module.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

MAX_NETWORKS = 100
"""The most networks in a foreign file. Without a limit, a file of a million names could take hours."""

_AVERAGE = re.compile(r"(^|[._/])(k|m|key|teacher|target|momentum|ema)([._/]|$)")
"""A part of a prefix that marks a moving average of another network in the file, such as encoder_k."""

_OF_A_HEAD = {"0.weight", "0.bias", "2.weight", "2.bias"}
"""The names of a projection head's tensors."""

_CHECKPOINT_NAME = re.compile(r"step-(\d{7,})\.safetensors")

_PUBLISHED = ("r2plus1d_18", "r3d_18", "mc3_18", "s3d")
"""The networks that torchvision publishes weights for, trained on the 400 classes of Kinetics-400."""

_KINETICS_CLASSES = 400


# ---------------------------------------------------------------- writing


def metadata_of(backbone: Backbone, clips: ClipFormat | None) -> dict[str, str]:
    """Return the metadata that describe a network. Statistics are those that the backbone's weights expect."""
    metadata = {"backbone": backbone.name, "width": str(backbone.width)}
    if clips is not None:
        metadata |= {name: str(value) for name, value in clips.settings.items()}
    mean, std = backbone.statistics
    return {**metadata, "mean": json.dumps(mean), "std": json.dumps(std)}


def metadata_of_classifier(fc: nn.Module) -> dict[str, str]:
    """Return the metadata that describe a classifier's layer, without its classes."""
    return {"normalised": "true"} if isinstance(fc, NormalisedLinear) else {}


def save_weights(
    path: Path,
    backbone: Backbone,
    clips: ClipFormat | None = None,
    heads: nn.Module | None = None,
    fc: nn.Module | None = None,
    classes: tuple[str, ...] = (),
) -> None:
    """Write a network as one safetensors file that tells all that is needed to use it (see above).

    Args:
        clips: the clips of the training; None: unknown.
        heads: projection heads by name. Other modules are skipped.
        fc: a linear classifier of `classes`.

    Raises:
        UserError: the weights are not finite. Nothing is written.
    """
    metadata = {"format": FORMAT, **metadata_of(backbone, clips)}
    tensors = dict(backbone.state_dict())
    if heads is not None:
        # A method that a user adds may have heads of another form, which a reader could not build.
        written = {name: head for name, head in heads.named_children() if isinstance(head, ProjectionHead)}
        for pair, head in written.items():
            tensors |= {f"heads.{pair}.{name}": tensor for name, tensor in head.state_dict().items()}
        metadata["heads"] = json.dumps(list(written))
    if fc is not None:
        tensors |= {f"fc.{name}": tensor for name, tensor in fc.state_dict().items()}
        metadata |= {"classes": json.dumps(classes), **metadata_of_classifier(fc)}
    check_finite(path, tensors)
    write_safetensors(tensors, metadata, path)


def save_backbone(
    backbone: Backbone, path: Path, clips: ClipFormat | None = None, heads: nn.Module | None = None
) -> None:
    """Write a backbone and its projection heads, if any. Raises UserError: see save_weights."""
    save_weights(path, backbone, clips, heads=heads)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Weights:
    """The tensors of a file of weights, by their use. Nothing is checked yet."""

    file: Path
    backbone: dict[str, Tensor]  # under torchvision's names
    heads: dict[str, dict[str, Tensor]]  # of each pair, under names such as 0.weight
    fc: dict[str, Tensor]  # weight and bias of a classifier whose classes are known
    metadata: dict[str, str]
    kind: str  # what the file is, in words
    removed: str  # which prefix the names no longer have, in words
    torchvision: bool  # whether this is a file of torchvision's published weights
    unused: str = ""  # which heads of a foreign file are not used, in words

    @property
    def statistics(self) -> Statistics:
        """The statistics that the weights expect. Raises UserError if the file states wrong ones."""
        return self.clips({}).statistics

    def clips(self, recorded: dict[str, object]) -> ClipFormat:
        """Return the clips that the file states, and for other values `recorded` or the published recipe.

        Raises:
            UserError: a value is not a number or outside its bounds.
        """
        known = IMAGENET if not self.torchvision else KINETICS
        stated = {**recorded, **self.metadata}
        try:
            sizes = {
                name: int(str(stated[key]))
                for name, key in (("length", "clip_length"), ("stride", "clip_stride"), ("crop", "crop_size"))
                if key in stated
            }
            mean, std = (
                tuple(float(value) for value in json.loads(self.metadata[name])) if name in self.metadata else default
                for name, default in zip(("mean", "std"), known, strict=True)
            )
            return ClipFormat(**sizes, mean=cast(Channels, mean), std=cast(Channels, std))
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"{self.file}: its metadata do not describe clips ({str(error)[:200]})") from None


def find_file(source: Path, names: tuple[str, ...] = (FILE_NAME, CLASSIFIER_FILE_NAME, EXPORT_FILE_NAME)) -> Path:
    """Return the file of weights that `source` names: a file, a checkpoint without suffix, a run's folder, or "hf:...".

    In a folder, the first of `names` that exists is the file; in the folder of a run that is still going or was
    stopped, the newest checkpoint.

    Raises:
        UserError: there is no such file, or a folder cannot be entered; see `hub.download`.
    """
    if hub.is_on_hub(source):
        return hub.download(str(source))
    try:
        return _find_on_disk(source, names)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}") from None


def _find_on_disk(source: Path, names: tuple[str, ...]) -> Path:
    """Return the file of weights that a path names, see `find_file`. Raises OSError if a folder cannot be entered."""
    if source.is_dir():
        found = [source / name for name in names if (source / name).is_file()]
        found += reversed(checkpoints_in(source / "checkpoints") or checkpoints_in(source))
        if not found:
            raise UserError(f"{source} holds no {', '.join(names)} or checkpoint: give the folder of a run, or a file")
        return found[0]
    with_suffix = source.with_name(source.name + ".safetensors") if source.name else source
    file = with_suffix if with_suffix.is_file() and not source.is_file() else source
    if not file.is_file():
        raise UserError(f"no such file: {source}")
    return file


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, in the order of their steps. `folder` need not exist."""
    return sorted((path for path in folder.glob("step-*.safetensors") if step_of(path) >= 0), key=step_of)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint, or -1 if it is not the name of a checkpoint."""
    found = _CHECKPOINT_NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def read_weights(file: Path, backbone: Backbone | None = None) -> Weights:
    """Read a file of weights.

    Args:
        backbone: the network that is looked for in a foreign file; None: any known network.

    Raises:
        UserError: the file cannot be read, needs unsafe unpickling, or holds several networks that fit.
    """
    tensors, metadata = read_tensors(file)
    form = metadata.get("format")
    if form == FORMAT:
        return _by_use(file, tensors, metadata, "written by dclr")
    if form == CHECKPOINT_FORMAT:
        return _read_checkpoint(file, tensors, metadata)
    prefix, wrappers, found = _find_backbone(file, tensors, backbone)
    kind = "the query encoder of a MoCo checkpoint" if "encoder_q." in prefix else "a state dict"
    prefixes = [*wrappers, prefix] if prefix else wrappers
    removed = f" (names without the prefix {' and '.join(prefixes)})" if prefixes else ""
    torchvision = not prefixes and is_torchvisions(tensors, found)
    if torchvision:
        kind = "torchvision's weights (mean and standard deviation of Kinetics)"
    return Weights(file, found, {}, {}, {}, kind, removed, torchvision, _unused(tensors, prefix))


def is_torchvisions(tensors: dict[str, Tensor], backbone: dict[str, Tensor]) -> bool:
    """Return whether a file is taken for torchvision's published video weights, which expect Kinetics' statistics.

    Their names have no prefix, the network is one that torchvision publishes weights for, and the classifier has the
    400 classes of Kinetics. torchvision's networks have the same names and shapes whatever they are trained on, so a
    file finetuned on other classes is not recognised.
    """
    classifier = tensors.get("fc.weight", tensors.get("classifier.1.weight"))
    if classifier is None or classifier.ndim == 0 or classifier.shape[0] != _KINETICS_CLASSES:
        return False
    name, width = identify(shapes_of(backbone)) or ("", 0)
    return name in _PUBLISHED and width == 64


def _by_use(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str], kind: str) -> Weights:
    """Split the tensors of a file of this project into those of backbone, heads and classifier."""
    parts: dict[str, dict[str, Tensor]] = {"heads.": {}, "fc.": {}, "": {}}
    for name, tensor in tensors.items():
        # Without classes, the tensors of a classifier cannot be used: they stay with the backbone's, which is refused.
        uses = [use for use in ("heads.", "fc.") if name.startswith(use) and (use == "heads." or "classes" in metadata)]
        prefix = (uses or [""])[0]
        parts[prefix][name.removeprefix(prefix)] = tensor
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parts["heads."].items():
        pair, _, rest = name.partition(".")
        heads.setdefault(pair, {})[rest] = tensor
    return Weights(file, parts[""], heads, parts["fc."], metadata, kind, "", False)


def _read_checkpoint(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Weights:
    """Return the weights in a training checkpoint: the query encoder of pretraining, or a classifier.

    Their BatchNorm statistics are averaged over the ranks (see training/batchnorm.py).
    """
    try:
        state = json.loads(metadata.get("state", ""))
        step, classes = state["step"], state.get("classes")
        if not isinstance(step, int):
            raise ValueError("its step is not a number")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{file} is not a checkpoint of a training run ({str(error)[:200]})") from None
    if classes is not None:
        metadata = {"classes": json.dumps(classes), **metadata}
    prefix = "model/query." if any(name.startswith("model/query.") for name in tensors) else "model/"
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    own = {name.removeprefix("backbone."): tensor for name, tensor in own.items()}
    weights = _by_use(file, own, metadata, f"the checkpoint of step {step:,}")
    # save_weights skips heads of another form too.
    return replace(weights, heads={pair: head for pair, head in weights.heads.items() if head.keys() == _OF_A_HEAD})


def stored_statistics(checkpoint: Path) -> Statistics:
    """Return the statistics that a training checkpoint states: ImageNet's if it states none, as in earlier versions.

    A file that cannot be read gives ImageNet's too: resuming from it fails with an error that says why.
    """
    try:
        metadata = read_metadata(checkpoint)
        return Weights(checkpoint, {}, {}, {}, metadata, "", "", False).statistics
    except UserError:
        return IMAGENET


def load_backbone(path: Path, backbone: Backbone, heads: nn.ModuleDict | None = None) -> str:
    """Load weights from a run's folder or a file into `backbone`. An error leaves the backbone as it was.

    The backbone also gets the statistics that the weights expect.

    Args:
        heads: projection heads, which get the weights of the file's heads of the same name and shape. Other heads stay
            as they are. None: heads in the file are ignored.

    Returns:
        one line that says which weights were loaded, from which file, and which prefix of their names was removed.

    Raises:
        UserError: the file does not exist, cannot be read, needs unsafe unpickling, holds another network, several
            networks that fit, or weights that are not finite.
    """
    weights = read_weights(find_file(path), backbone)
    check_fits(weights.file, weights.backbone, backbone, weights.removed)
    check_finite(weights.file, weights.backbone)
    statistics = weights.statistics
    # Not strict, because `check_fits` accepts files without BatchNorm's step counters.
    backbone.load_state_dict(weights.backbone, strict=False)
    backbone.statistics = statistics
    loaded = (
        f"{weights.file}: {backbone.name} (width {backbone.width}), {weights.kind}{weights.removed}{weights.unused}"
    )
    return loaded if heads is None else f"{loaded}; {_load_heads(weights, heads)}"


def _load_heads(weights: Weights, heads: nn.ModuleDict) -> str:
    """Load the heads of the file that fit into `heads`. Return which ones these are, in words.

    Raises:
        UserError: a weight is not finite.
    """
    found = {}
    for pair, head in heads.items():
        own = weights.heads.get(pair, {})
        if own and shapes_of(own) == shapes_of(head.state_dict()):
            found[pair] = own
    check_finite(weights.file, {f"heads.{pair}.{name}": t for pair, own in found.items() for name, t in own.items()})
    for pair, tensors in found.items():
        heads[pair].load_state_dict(tensors)
    random = [pair for pair in heads if pair not in found]
    if not found:
        return "heads are random"
    return f"heads {' '.join(found)}" + (f"; random heads {' '.join(random)}" if random else "")


def _find_backbone(
    file: Path, tensors: dict[str, Tensor], backbone: Backbone | None
) -> tuple[str, list[str], dict[str, Tensor]]:
    """Find `backbone`, or any known one, in a foreign file.

    Returns:
        the prefix of its names, the wrappers that torch added to them, and its tensors under their names without
        prefix and wrappers. If no network of the file fits, those of the first.

    Raises:
        UserError: several networks fit, or the file holds more than MAX_NETWORKS.
    """
    wrappers = [wrapper for wrapper in _WRAPPERS if any(wrapper in name for name in tensors)]
    bare = {_without_wrappers(name): tensor for name, tensor in tensors.items()}
    if len(bare) == len(tensors):
        tensors = bare
    # What stands before a backbone's first name in a file is the prefix of its names.
    sought = [backbone] if backbone is not None else [backbone_without_memory(name, 64) for name in BACKBONES]
    prefixes = [
        prefix
        for first_name in dict.fromkeys(next(iter(network.state_dict())) for network in sought)
        for name in tensors
        if name.endswith(first_name) and (prefix := name.removesuffix(first_name))[-1:] in ("", ".", "/")
    ]
    if len(prefixes) > MAX_NETWORKS:
        raise UserError(f"{file} holds {len(prefixes):,} networks: give a file that holds only one")
    networks = {prefix: _below(tensors, prefix) for prefix in prefixes or [""]}
    fitting = [prefix for prefix, network in networks.items() if _is_sought(network, backbone)]
    candidates = fitting or list(networks)
    first, *others = [prefix for prefix in candidates if not _AVERAGE.search(prefix)] or candidates
    different = [prefix for prefix in others if not _equal(networks[first], networks[prefix])]
    if fitting and different:
        raise UserError(
            f"{file} holds {len(different) + 1} networks that fit, under the prefixes {first or 'none'} and "
            f"{', '.join(different)}: give a file that holds only one"
        )
    return first, wrappers, networks[first]


def _is_sought(network: dict[str, Tensor], backbone: Backbone | None) -> bool:
    """Return whether tensors have the shapes of `backbone`, or of any known backbone if that is None."""
    found = shapes_of(network)
    return identify(found) is not None if backbone is None else found == shapes_of(backbone.state_dict())


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without the prefix and without heads."""
    below = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in below.items() if not _HEAD.match(name)}


def _unused(tensors: dict[str, Tensor], prefix: str) -> str:
    """Return which heads next to the backbone are not used, in words. Heads of the usual names are not counted."""
    heads = Counter(
        head[1]
        for name in map(_without_wrappers, tensors)
        if name.startswith(prefix)
        and (head := _HEAD.match(name.removeprefix(prefix)))
        and head[1] not in _EXPECTED_HEADS
    )
    counts = ", ".join(f"{name} ({count} tensor{'s' * (count > 1)})" for name, count in sorted(heads.items()))
    return f"; not used: {counts}" if heads else ""


def _equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def check_finite(file: Path, tensors: dict[str, Tensor]) -> None:
    """Raise UserError for a weight that is not a finite float32 number, and for a negative variance of BatchNorm.

    `file`: the file that holds the tensors or shall hold them. The message names it.
    """
    faults = []
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        if not tensor.is_floating_point():
            faults.append(f"{name} holds {str(tensor.dtype).removeprefix('torch.')} numbers, not floats")
        elif wrong := int((~torch.isfinite(tensor.float())).sum()):
            values = "1 value that is" if wrong == 1 else f"{wrong} values that are"
            faults.append(
                f"{name} holds {values} not finite: the run diverged; "
                "use an earlier checkpoint, or train with a lower --lr"
            )
        elif name.endswith("running_var") and (wrong := int((tensor < 0).sum())):
            faults.append(f"{name} holds {wrong} negative variances: the file is damaged; use an earlier checkpoint")
    if faults:
        more = f" (the same file has {len(faults) - 1} more such tensors)" if len(faults) > 1 else ""
        raise UserError(f"{file}: {faults[0]}{more}")


def check_fits(file: Path, tensors: dict[str, Tensor], backbone: Backbone, removed: str) -> None:
    """Raise UserError unless names and shapes of the tensors are the backbone's. The error names the likely network.

    `removed` says at the end of the message which prefix the names no longer have.
    """
    expected = shapes_of(backbone.state_dict())
    found = shapes_of(tensors)
    if found == expected:
        return

    holds = identify(found)
    if holds is not None:
        name, width = holds
        if name != backbone.name:
            problem = f"--backbone is {backbone.name}: pass --backbone {name}"
        else:
            problem = f"--width is {backbone.width}: pass --width {width}"
        raise UserError(f"{file} holds {name} (width {width}), but {problem}{removed}")

    differences = [f"lacks {name}" for name in expected if name not in found]
    differences += [f"has an unknown {name}" for name in found if name not in expected]
    differences += [
        f"has {name} of shape {tuple(found[name])}, not {tuple(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
    foreign = "" if found.keys() & expected.keys() or not found else f"; its first tensor is {next(iter(found))}"
    raise UserError(
        f"{file} does not hold {backbone.name} (width {backbone.width}): it {differences[0]}{more}{foreign}{removed}"
    )


def identify(found: dict[str, torch.Size]) -> tuple[str, int] | None:
    """Return the name and the width of the backbone that has exactly these shapes, or None."""
    for name in BACKBONES:
        standard = shapes_of(backbone_without_memory(name, 64).state_dict())
        if standard == found:
            return name, 64
        if standard.keys() != found.keys():
            continue
        # The width is the length of some vector in the file.
        for width in sorted({shape[0] for shape in found.values() if len(shape) == 1 and 1 <= shape[0] <= MAX_WIDTH}):
            with suppress(UserError):  # the backbone has no such width
                if shapes_of(backbone_without_memory(name, width).state_dict()) == found:
                    return name, width
    return None


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return shapes by name, without BatchNorm's step counters: no code uses them, and torch before 0.4.1 had none."""
    counters = {name for name, tensor in tensors.items() if name.endswith("num_batches_tracked") and tensor.ndim == 0}
    return {name: tensor.shape for name, tensor in tensors.items() if name not in counters}
