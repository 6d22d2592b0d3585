"""Files of a backbone's weights: written as safetensors, read from files of other projects too.

    a run's folder, or its backbone.safetensors    as `save_backbone` writes it
    torchvision's weights, .pth                    a state dict; `fc` is ignored
    a checkpoint of any project with this network  safetensors or torch.save; the backbone's names may have any prefix
    the DCLR authors' checkpoint_*.pth.tar         the query encoder "module.encoder_q."; its heads are ignored

Weights that are not finite are refused: every figure from them would be meaningless.
"""

import re
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from dclr.errors import UserError
from dclr.models.backbone import Backbone
from dclr.models.backbones import BACKBONES, MAX_WIDTH, backbone_without_memory
from dclr.models.tensor_file import read_tensors, write_safetensors

FILE_NAME = "backbone.safetensors"
"""The name of the query backbone's file in a run's folder."""

# Prefixes of parameters in foreign files that are not the backbone's: a classifier, and the authors' five heads.
_CLASSIFIER = ("fc.", "classifier.")
_AUTHORS_HEADS = ("fc.", "fvv.", "fvs.", "fvd.", "fsv.", "fdv.")

# torch adds these to names, anywhere, when it compiles, shards or checkpoints a module.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

MAX_NETWORKS = 100
"""The most networks in a foreign file. Without a limit, a file of a million names could take hours."""

_AVERAGE = re.compile(r"(^|[._/])(k|m|key|teacher|target|momentum|ema)([._/]|$)")
"""A part of a prefix that marks a moving average of another network in the file, such as encoder_k."""


def save_backbone(backbone: Backbone, path: Path) -> None:
    """Write a backbone as safetensors under torchvision's parameter names, with its name and width as metadata.

    Raises:
        UserError: the weights are not finite. Nothing is written.
    """
    check_finite(path, backbone.state_dict())
    metadata = {"format": "dclr", "backbone": backbone.name, "width": str(backbone.width)}
    write_safetensors(backbone.state_dict(), metadata, path)


def load_backbone(path: Path, backbone: Backbone) -> str:
    """Load weights from a run's folder or a file into `backbone`. An error leaves the backbone as it was.

    Returns:
        one line that says which weights were loaded, from which file, and which prefix of their names was removed.

    Raises:
        UserError: the file does not exist, cannot be read, needs unsafe unpickling, holds another network, several
            networks that fit, or weights that are not finite.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        if path.is_dir():
            raise UserError(f"{path} holds no {FILE_NAME}: give the folder of a run that has one, or a file")
        raise UserError(f"no such file: {path}")

    tensors, metadata = read_tensors(file)
    kind, removed = "written by dclr", ""
    if metadata.get("format") != "dclr":
        prefix, wrappers, tensors = _find_backbone(file, tensors, backbone)
        kind = "the query encoder of a MoCo checkpoint" if "encoder_q." in prefix else "a state dict"
        prefixes = [*wrappers, prefix] if prefix else wrappers
        removed = f" (names without the prefix {' and '.join(prefixes)})" if prefixes else ""
    check_fits(file, tensors, backbone, removed)
    check_finite(file, tensors)
    # Not strict, because `check_fits` accepts files without BatchNorm's step counters.
    backbone.load_state_dict(tensors, strict=False)
    return f"{file}: {backbone.name} (width {backbone.width}), {kind}{removed}"


def _find_backbone(
    file: Path, tensors: dict[str, Tensor], backbone: Backbone
) -> tuple[str, list[str], dict[str, Tensor]]:
    """Find the backbone in a foreign file.

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
    # What stands before the backbone's first name in a file is the prefix of its names.
    first_name = next(iter(backbone.state_dict()))
    prefixes = [
        prefix
        for name in tensors
        if name.endswith(first_name) and (prefix := name.removesuffix(first_name))[-1:] in ("", ".", "/")
    ]
    if len(prefixes) > MAX_NETWORKS:
        raise UserError(f"{file} holds {len(prefixes):,} networks: give a file that holds only one")
    networks = {prefix: _below(tensors, prefix) for prefix in prefixes or [""]}
    expected = _shapes(backbone.state_dict())
    fitting = [prefix for prefix in networks if _shapes(networks[prefix]) == expected]
    candidates = fitting or list(networks)
    first, *others = [prefix for prefix in candidates if not _AVERAGE.search(prefix)] or candidates
    different = [prefix for prefix in others if not _equal(networks[first], networks[prefix])]
    if fitting and different:
        raise UserError(
            f"{file} holds {len(different) + 1} networks that fit, under the prefixes {first or 'none'} and "
            f"{', '.join(different)}: give a file that holds only one"
        )
    return first, wrappers, networks[first]


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, without the prefix and without the known heads."""
    heads = _AUTHORS_HEADS if "encoder_q." in prefix else _CLASSIFIER
    below = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in below.items() if not name.startswith(heads)}


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


def check_fits(file: Path, tensors: dict[str, Tensor], backbone: Backbone, removed: str = "") -> None:
    """Raise UserError unless names and shapes of the tensors are the backbone's. The error names the likely network.

    `removed` says at the end of the message which prefix the names no longer have.
    """
    expected = _shapes(backbone.state_dict())
    found = _shapes(tensors)
    if found == expected:
        return

    holds = _identify(found)
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


def _identify(found: dict[str, torch.Size]) -> tuple[str, int] | None:
    """Return the name and the width of the backbone that has exactly these shapes, or None."""
    for name in BACKBONES:
        standard = _shapes(backbone_without_memory(name, 64).state_dict())
        if standard == found:
            return name, 64
        if standard.keys() != found.keys():
            continue
        # The width is the length of some vector in the file.
        for width in sorted({shape[0] for shape in found.values() if len(shape) == 1 and 1 <= shape[0] <= MAX_WIDTH}):
            with suppress(UserError):  # the backbone has no such width
                if _shapes(backbone_without_memory(name, width).state_dict()) == found:
                    return name, width
    return None


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return shapes by name, without BatchNorm's step counters: no code uses them, and torch before 0.4.1 had none."""
    counters = {name for name, tensor in tensors.items() if name.endswith("num_batches_tracked") and tensor.ndim == 0}
    return {name: tensor.shape for name, tensor in tensors.items() if name not in counters}
