"""The layout of the code: which part imports which, checked in the import statements.

python tests/test_layout.py      prints the parts by level, with what each imports
"""

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("dclr", "benchmarks", "experiments")


@cache
def modules() -> dict[str, Path]:
    """Return every module of the packages and the two entries, by name. The folder kernels/ is dclr.kernels."""
    files = [ROOT / "train.py", ROOT / "eval.py", *(file for name in PACKAGES for file in (ROOT / name).rglob("*.py"))]
    found = {file.relative_to(ROOT): file for file in files}
    found |= {"dclr" / file.relative_to(ROOT): file for file in (ROOT / "kernels").rglob("*.py")}
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): file for path, file in found.items()}


@cache
def parsed(file: Path) -> ast.Module:
    """Return the statements of a file without its imports for the type checker, which do not run.

    dclr.methods needs the types of its settings, and dclr.config needs the names of the methods.
    """
    tree = ast.parse(file.read_text())
    for_types = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    tree.body = [node for node in tree.body if node not in for_types]
    return tree


@cache
def imports(name: str) -> set[tuple[str, str]]:
    """Return (module, name) of everything that a module imports from the others; the name is "" for a module."""
    known, found = modules(), set()
    for node in ast.walk(parsed(known[name])):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add((module, "") if module in known else (node.module, alias.name))
    return {(module, what) for module, what in found if module in known and module != name}


def part(module: str) -> str:
    """Return the part of the project that a module belongs to: a folder, or a file directly under dclr/."""
    words = module.split(".")
    return ".".join(words[:2]) if words[0] == "dclr" and len(words) > 1 else words[0]


@cache
def arrows(group=lambda module: module) -> dict[str, set[str]]:
    """Return module (or part) -> the modules (or parts) that it imports."""
    known = modules()
    found: dict[str, set[str]] = {group(name): set() for name in known}
    for name in known:
        found[group(name)] |= {group(module) for module, _ in imports(name)} - {group(name)}
    return found


def levels() -> dict[str, int]:
    """Return the level of each part: 1 if it imports no other part, else one more than the highest that it imports."""
    graph, found = arrows(part), {}
    for name in TopologicalSorter(graph).static_order():  # raises CycleError
        found[name] = 1 + max((found[other] for other in graph[name]), default=0)
    return found


PARTS = {part(name) for name in modules()}


def test_no_module_and_no_part_imports_itself_over_others():
    TopologicalSorter(arrows()).prepare()
    TopologicalSorter(arrows(part)).prepare()


def test_the_parts_of_dclr_are_few_and_lie_on_few_levels():
    parts = {name: level for name, level in levels().items() if name.startswith("dclr.")}
    assert len(parts) <= 17
    own = {name: {other for other in arrows(part)[name] if other.startswith("dclr.")} for name in parts}
    depth: dict[str, int] = {}
    for name in TopologicalSorter(own).static_order():
        depth[name] = 1 + max((depth[other] for other in own[name]), default=0)
    assert max(depth.values()) <= 9


@pytest.mark.parametrize(
    ("importer", "never"),
    [
        ("dclr.kernels", PARTS - {"dclr.kernels"}),
        ("dclr.data", {"dclr.distributed", "dclr.training", "dclr.evaluation", "dclr.models", "dclr.methods"}),
        ("dclr.models", {"dclr.data", "dclr.config", "dclr.methods", "dclr.training", "dclr.evaluation"}),
        ("dclr.methods", {"dclr.data", "dclr.training", "dclr.evaluation"}),
        # Evaluation divides the videos among ranks and gathers the results, as training does, by dclr.distributed.
        ("dclr.evaluation", {"dclr.training", "dclr.methods"}),
        ("dclr.training", {"dclr.evaluation"}),
    ],
)
def test_a_part_does_not_import(importer, never):
    names = {other for other in arrows(part)[importer] if other.split(".")[0] in never or other in never}
    assert not names


def test_no_module_imports_a_private_name_of_another():
    known = modules()
    private = {(name, what) for name in known for _, what in imports(name) if what.startswith("_")}
    assert not private


def test_one_module_each_imports_deepspeed_and_av():
    """Both are large dependencies that change often. `encode` writes videos, `decode` reads them."""
    importers: dict[str, set[str]] = {"deepspeed": set(), "av": set()}
    for name, file in modules().items():
        if not name.startswith("dclr"):
            continue
        for node in ast.walk(parsed(file)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for package in importers.keys() & {imported.split(".")[0] for imported in names}:
                importers[package].add(name)
    assert importers == {"deepspeed": {"dclr.training.engine"}, "av": {"dclr.data.decode", "dclr.data.encode"}}


if __name__ == "__main__":
    graph = arrows(part)
    for name, level in sorted(levels().items(), key=lambda item: (-item[1], item[0])):
        print(level, name, "imports", ", ".join(sorted(graph[name])))
