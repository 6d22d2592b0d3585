"""Files of named tensors: safetensors, and the files of torch.save. The content decides how a file is read.

The files of torch.save are read with torch.load(weights_only=True), so no file can run code. Numbers of NumPy and
argparse.Namespace, which training scripts often save next to the weights, are read as an object that holds nothing.
"""

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dclr.errors import UserError, first_line
from dclr.files import atomic_write

START_BYTES = 1024
"""Bytes from the beginning of a file that show its kind."""

MAX_DEPTH = 5
"""The deepest nested dictionary whose tensors are read. No known checkpoint has more than three levels."""

# The first bytes of files that people give by mistake, and what to tell the user.
_OTHER_KINDS = {
    b"version https://git-lfs": "a Git LFS pointer, not weights: run git lfs pull in its repository",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"BZh": "compressed by bzip2: unpack it first",
    b"\xfd7zXZ": "compressed by xz: unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it first",
    b"7z\xbc\xaf": "a 7z archive: unpack it first",
    b"Rar!": "a rar archive: unpack it first",
    b"\x89HDF": "an HDF5 file, not weights written by PyTorch: give a state dict",
    b"\x93NUMPY": "a numpy array, not weights: give a state dict",
}
_TAR = slice(257, 262)  # the position of "ustar" in a tar archive


class _Skipped:
    """Stand-in for an object in a file of torch.save that is not a tensor. It ignores all that it is given.

    NumPy's own functions are not called: a file may give them an address of memory in place of an object.
    """

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


_SKIPPED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (_Skipped, name)
    for name in ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype", "argparse.Namespace")
]
"""The classes and functions that torch.load replaces by _Skipped."""


def write_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write tensors and metadata as safetensors. The write is atomic: `path` never holds half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    atomic_write(path, save(content, metadata))


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a file by name, and the metadata that only safetensors have.

    Tensors in nested dictionaries get names such as "state_dict/module.stem.0.weight". Other values are skipped.

    Raises:
        UserError: the file cannot be read, needs unsafe unpickling, holds no tensors, or is of another kind, which the
            message names.
    """
    try:
        with file.open("rb") as opened:
            start = opened.read(START_BYTES)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if other := _other_kind(start):
        raise UserError(f"{file} is {other}")
    if start[8:9] == b"{" or (file.suffix == ".safetensors" and not start.startswith(b"PK")):
        return _read_safetensors(file)
    if start.startswith(b"PK"):
        _check_zip(file)
    return _read_torch(file), {}


def _other_kind(start: bytes) -> str:
    """Return what a file is if its first bytes show that it holds no tensors; the empty string otherwise."""
    if not start:
        return "empty: copy or download it again"
    for magic, kind in _OTHER_KINDS.items():
        if start.startswith(magic):
            return kind
    if start[_TAR] == b"ustar":
        return "a tar archive: unpack it first"
    if (text := _as_text(start)) is None:
        return ""
    beginning = text.lstrip().lower()
    if beginning.startswith("<!doctype html") or "<html" in beginning or "<head>" in beginning:
        return "an HTML page, not weights: the download failed"
    if beginning.startswith("<"):
        return "an XML document, not weights: the download failed"
    if beginning.startswith(("{", "[")):
        return "JSON text, not weights: give the file of the weights"
    return f"a text file, not weights: it begins with {' '.join(text.split())[:40]!r}"


def _as_text(start: bytes) -> str | None:
    """Return the text that a file begins with, or None if it does not begin with text."""
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return start.decode("utf-16", errors="replace")
    for cut in range(4):  # the last character may be incomplete
        try:
            text = start[: len(start) - cut].decode("utf-8-sig")
        except UnicodeDecodeError:
            continue
        return text if all(character.isprintable() or character.isspace() for character in text) else None
    return None


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. The tensors are at most as large as the file."""
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118  (not a dict)
    except Exception as error:  # a damaged file can cause any error in the reader
        raise UserError(f"{file} cannot be read as safetensors: {first_line(error)}") from error


def read_metadata(file: Path) -> dict[str, str]:
    """Return the metadata of a safetensors file, without its tensors. Raises UserError if it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}
    except Exception as error:  # a damaged file can cause any error in the reader
        raise UserError(f"{file} cannot be read as safetensors: {first_line(error)}") from error


def _check_zip(file: Path) -> None:
    """Raise UserError unless a zip archive is a file of torch.save."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError):
        return  # torch.load says why it cannot read the file
    names = [member.filename for member in members]
    if not any(name.endswith("data.pkl") for name in names):
        holds = f"that holds {names[0]}" if names else "that is empty"
        raise UserError(f"{file} is a zip archive {holds}, not weights: unpack it, or give the file of the weights")
    if any(name.endswith("/constants.pkl") for name in names):
        raise UserError(f"{file} is a TorchScript program, not weights: give a file that holds only a state dict")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise UserError(f"{file} is compressed, which torch.save never does: it could fill the memory")


def _read_torch(file: Path) -> dict[str, Tensor]:
    try:
        # An open file has no name. By its name, torch 2.14 would choose another reader for FILE.safetensors.
        with torch.serialization.safe_globals(_SKIPPED), file.open("rb") as opened:
            content = torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))  # the class that torch refuses to unpickle
        holds = f" (it holds {found[1]})" if found else ""
        raise UserError(
            f"{file} is not a file of plain tensors{holds}, and reading other objects could run code: "
            "give a file that holds only a state dict, written by torch.save(checkpoint['state_dict'], FILE) "
            "where the checkpoint is trusted"
        ) from error
    except Exception as error:  # a damaged file can cause any error in the reader
        raise UserError(
            f"{file} cannot be read by torch.load, perhaps because it is incomplete: {first_line(error)}"
        ) from error
    tensors = _flattened(content)
    if not tensors:
        raise UserError(f"{file} holds no state dict: give a dictionary of tensors, or a dictionary with one inside")
    for name, tensor in tensors.items():
        if not _is_plain(tensor):
            raise UserError(f"{file}: {name} is not a plain tensor: give a file of dense tensors")
    return tensors


def _flattened(content: object) -> dict[str, Tensor]:
    """Return the tensors of nested dictionaries, with the keys on the way to a tensor joined by "/"."""
    tensors: dict[str, Tensor] = {}
    # A dictionary is visited once: a small file can name the same dictionary in a million places.
    visited: set[int] = set()

    def visit(level: object, path: str, depth: int) -> None:
        if not isinstance(level, dict) or id(level) in visited or depth > MAX_DEPTH:
            return
        visited.add(id(level))
        for key, value in level.items():
            if isinstance(key, str):
                if isinstance(value, Tensor):
                    tensors[path + key] = value
                visit(value, f"{path}{key}/", depth + 1)

    visit(content, "", 1)
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is dense and in memory. Files may also hold sparse, quantized and meta tensors."""
    return (
        tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_quantized
        and not tensor.is_nested
    )
