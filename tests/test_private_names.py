"""The private names of other packages in docs/versions.md: each exists, and the table has all that the code uses."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "torchvision", "triton", "deepspeed", "numpy", "kornia", "tensorboard")

PUBLIC = ("deepspeed.utils.", "triton.language", "torch.__version__", "triton.__version__")
"""Documented names that look private: all else below deepspeed.X and triton.X is taken for private."""

ONLY_WITH_CUDA = ("torch._C._cuda_getCurrentRawStream",)

STANDARD = {"_replace", "_fields", "_asdict", "_exit"}
"""Attributes of the standard library that begin with an underscore. Tests also look into argparse's parsers."""
ARGPARSE = {"_actions", "_action_groups", "_optionals", "_group_actions", "_subparsers", "_option_string_actions"}
ARGPARSE |= {"_SubParsersAction"}

OF_THE_RELEASED_CODE = {"_momentum_update_key_encoder", "torchvision.transforms._transforms_video"}


class Row(NamedTuple):
    """A row of the table."""

    name: str
    files: tuple[str, ...]
    need: str


def read_table() -> list[Row]:
    """Return the rows of the table in docs/versions.md."""
    rows = []
    for line in (ROOT / "docs" / "versions.md").read_text().splitlines():
        if match := re.fullmatch(r"\| `([^`]+)` \| (`[^|]+`) \| (.+) \|", line):
            rows.append(Row(match[1], tuple(re.findall("`([^`]+)`", match[2])), match[3]))
    return rows


ROWS = read_table()


def find(name: str) -> Any:
    """Return the object of a dotted name. Raises AttributeError or KeyError if it does not exist."""
    name, _, word = name.partition(": ")
    name, _, key = name.partition("[")
    words, found = name.split("."), None
    for count in range(len(words), 0, -1):
        try:
            found = importlib.import_module(".".join(words[:count]))
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or " "):  # the module exists, and lacks something else
                raise
            continue
        break
    for word_of_name in words[count:]:
        found = getattr(found, word_of_name)
    if key:
        return found[ast.literal_eval(key.rstrip("]"))]  # type: ignore[index]
    if word and word not in inspect.getsource(found):  # type: ignore[arg-type]
        raise AttributeError(f"no {word!r} in its source")
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_private_name_exists(row):
    if row.name in ONLY_WITH_CUDA and torch.version.cuda is None:
        pytest.skip("this build of torch has no CUDA")
    package = row.name.split(".")[0]
    try:
        find(row.name)
    except (AttributeError, KeyError, ImportError) as error:
        version = importlib.import_module(package).__version__
        pytest.fail(f"{package} {version} has no {row.name} ({error}). Used in {', '.join(row.files)}: {row.need}")


@pytest.mark.parametrize(
    "name",
    [
        "torch._no_such_name",
        "torch._no_such.name",
        'deepspeed.ops.__compatible_ops__["none"]',
        "torch.optim.sgd: no_such",
    ],
)
def test_a_name_that_has_disappeared_is_seen(name):
    row = Row(name, ("dclr/x.py",), "nothing")
    with pytest.raises(pytest.fail.Exception, match=r"has no .* Used in dclr/x\.py: nothing"):
        test_a_private_name_exists(row)


# -------------------------------------------------------------------------------------------- the table and the code


def is_private(name: str) -> bool:
    """Return whether a dotted name belongs to another package, which may rename it without notice."""
    package, *rest = name.split(".")
    if package not in PACKAGES or name.startswith(PUBLIC) or name in OF_THE_RELEASED_CODE:
        return False
    return any(word.startswith("_") for word in rest) or (package in ("triton", "deepspeed") and len(rest) > 1)


def chain(node: ast.expr) -> list[str]:
    """Return the words of a dotted expression. The first one is empty if it does not begin with a name."""
    words = []
    while isinstance(node, ast.Attribute):
        words.append(node.attr)
        node = node.value
    return [node.id if isinstance(node, ast.Name) else "", *reversed(words)]


def names_of(tree: ast.Module) -> tuple[set[str], set[str], set[str]]:
    """Return names of a file: private ones of other packages, attributes that begin with _, and those it defines."""
    known, found, attributes, own, inner = dict[str, str](), set[str](), set[str](), set[str](), set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                known[alias.asname or top] = alias.name if alias.asname else top
                found.add(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module:
            known |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= {node.value} if re.fullmatch(r"\w+(\.\w+)+", node.value) else set()
        elif isinstance(node, ast.Attribute):
            own |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
            if id(node) in inner:  # a parent comes before its children
                continue
            first, *rest = chain(node)
            if first in known:
                found.add(".".join([known[first], *rest]))
            else:
                attributes |= {word for word in rest if re.match("_[A-Za-z]", word)}
            part = node.value
            while isinstance(part, ast.Attribute):
                inner.add(id(part))
                part = part.value
    return {name for name in found if is_private(name)}, attributes, own


def test_the_table_has_all_private_names_that_the_code_uses():
    folders = [ROOT / name for name in ("dclr", "kernels", "benchmarks", "experiments", "tests")]
    files = [file for folder in folders for file in folder.rglob("*.py") if file != Path(__file__).resolve()]
    names = {str(file.relative_to(ROOT)): names_of(ast.parse(file.read_text())) for file in files}
    listed = {re.split(r"\[|: ", row.name)[0] for row in ROWS} | {row.name.replace(": ", ".") for row in ROWS}
    attributes = {name.rpartition(".")[2] for name in listed} | STANDARD | ARGPARSE | OF_THE_RELEASED_CODE
    attributes |= set[str]().union(*(own for _, _, own in names.values()))
    missing = {
        name: file
        for file, (used, used_attributes, _) in names.items()
        for name in (used | used_attributes)
        if name not in listed | attributes and not any(other.startswith(f"{name}.") for other in listed)
    }
    assert not missing, f"docs/versions.md lacks {missing}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_private_name_is_used_where_the_table_says(row):
    name = row.name.partition(": ")[2] or row.name
    word = re.findall(r"\w+", name)[-1]
    for file in row.files:
        assert word in (ROOT / file).read_text(), f"{file} does not use {row.name}: correct docs/versions.md"
