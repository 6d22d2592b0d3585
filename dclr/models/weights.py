"""Files of a backbone's weights: written as safetensors, read from four kinds of file.

    a run's folder, or its backbone.safetensors    as `save_backbone` writes it
    torchvision's weights, .pth                    a state dict; `fc` is ignored
    a checkpoint that contains a state dict        under "state_dict", names with or without "module."
    the DCLR authors' checkpoint_*.pth.tar         the query encoder "module.encoder_q."; its heads are ignored

All but safetensors are read with torch.load(weights_only=True), so no file can run code.
"""

import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dclr.errors import UserError
from dclr.files import atomic_write
from dclr.models.backbone import BACKBONES, MAX_WIDTH, Backbone, build_backbone

FILE_NAME = "backbone.safetensors"
"""The name of the query backbone's file in a run's folder."""

# Prefixes of parameters in foreign files that are not the backbone's: a classifier, and the authors' five heads.
_CLASSIFIER = ("fc.",)
_AUTHORS_HEADS = ("fc.", "fvv.", "fvs.", "fvd.", "fsv.", "fdv.")


def save_backbone(backbone: Backbone, path: Path) -> None:
    """Write a backbone as safetensors under torchvision's parameter names, with its name and width as metadata."""
    metadata = {"format": "dclr", "backbone": backbone.name, "width": str(backbone.width)}
    write_safetensors(backbone.state_dict(), metadata, path)


def write_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write tensors and metadata as safetensors. The write is atomic: `path` never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, save(content, metadata))


def load_backbone(path: Path, backbone: Backbone) -> str:
    """Load weights from one of the four kinds of file into `backbone`. An error leaves the backbone as it was.

    Returns:
        one line that says which weights were loaded, and from which file.

    Raises:
        UserError: the file does not exist, cannot be read, needs unsafe unpickling, or holds another network.
    """
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        if path.is_dir():
            raise UserError(f"{path} holds no {FILE_NAME}: give the folder of a run that has one, or a file")
        raise UserError(f"no such file: {path}")

    if file.suffix == ".safetensors":
        tensors, metadata = read_safetensors(file)
        kind = "written by dclr"
        if metadata.get("format") != "dclr":
            tensors, kind = _without(tensors, _CLASSIFIER), "a state dict"
    else:
        tensors, kind = _read_torch(file)
    check_fits(file, tensors, backbone)
    # Not strict, because `check_fits` accepts files without BatchNorm's step counters.
    backbone.load_state_dict(tensors, strict=False)
    return f"{file}: {backbone.name} (width {backbone.width}), {kind}"


def read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. The tensors are at most as large as the file.

    Raises:
        UserError: the file is damaged or is not safetensors.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118  (not a dict)
    except Exception as error:  # a damaged file can cause any error in the reader
        raise UserError(f"{file} cannot be read as safetensors: {_first_line(error)}") from error


def _read_torch(file: Path) -> tuple[dict[str, Tensor], str]:
    if zipfile.is_zipfile(file):
        with suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise UserError(f"{file} is compressed, which torch.save never does: it could fill the memory")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{file} is not a file of plain tensors, and reading other objects could run code: "
            "give a file that holds only a state dict"
        ) from error
    except Exception as error:  # a damaged file can cause any error in the reader
        raise UserError(f"{file} cannot be read by torch.load: {_first_line(error)}") from error

    if isinstance(content, dict) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and _is_plain(tensor) for name, tensor in content.items()
    ):
        raise UserError(
            f"{file} holds no state dict: give a dictionary of tensors, or a dictionary with one under state_dict"
        )

    tensors = {name.removeprefix("module."): tensor for name, tensor in content.items()}
    query = {name.removeprefix("encoder_q."): t for name, t in tensors.items() if name.startswith("encoder_q.")}
    if query:
        return _without(query, _AUTHORS_HEADS), "the query encoder of a MoCo checkpoint"
    return _without(tensors, _CLASSIFIER), "a state dict"


def _is_plain(value: object) -> bool:
    """Return whether `value` is a dense tensor in memory. Files may also hold sparse, quantized and meta tensors."""
    if not isinstance(value, Tensor):
        return False
    return (
        value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized and not value.is_nested
    )


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]


def _without(tensors: dict[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def check_fits(file: Path, tensors: dict[str, Tensor], backbone: Backbone) -> None:
    """Raise UserError unless names and shapes of the tensors are the backbone's. The error names the likely network."""
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
        raise UserError(f"{file} holds {name} (width {width}), but {problem}")

    differences = [f"lacks {name}" for name in expected if name not in found]
    differences += [f"has an unknown {name}" for name in found if name not in expected]
    differences += [
        f"has {name} of shape {tuple(found[name])}, not {tuple(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
    raise UserError(f"{file} does not hold {backbone.name} (width {backbone.width}): it {differences[0]}{more}")


def _identify(found: dict[str, torch.Size]) -> tuple[str, int] | None:
    """Return the name and the width of the backbone that has exactly these shapes, or None."""
    first_norm = found.get("layer1.0.conv1.1.weight")  # its length is the width, in every backbone
    if first_norm is None or len(first_norm) != 1 or not 1 <= first_norm[0] <= MAX_WIDTH:
        return None
    width = first_norm[0]
    for name in BACKBONES:
        with torch.device("meta"):  # shapes without memory
            candidate = build_backbone(name, width)
        if _shapes(candidate.state_dict()) == found:
            return name, width
    return None


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """Return shapes by name, without BatchNorm's step counters: no code uses them, and torch before 0.4.1 had none."""
    counters = {name for name, tensor in tensors.items() if name.endswith("num_batches_tracked") and tensor.ndim == 0}
    return {name: tensor.shape for name, tensor in tensors.items() if name not in counters}
