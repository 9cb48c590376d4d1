"""The rules of the project: which folder may import which, how many files a folder may hold, what needs a docstring."""

from __future__ import annotations

import ast
import collections
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data_pipeline", "training", "slurm")
ROOMS = {
    "data_pipeline": [
        "common",
        "config",
        "storage",
        "order",
        "content",
        "images",
        "tables",
        "shards",
        "shard_index",
        "reading",
        "commands",
    ],
    "training": [
        "config",
        "pictures",
        "processes",
        "text",
        "diffusion",
        "model",
        "optim",
        "engine",
        "plan",
        "evaluation",
        "checkpoint",
        "cli",
        "commandline",
        "cascade",
        "run",
        "train",
        "ablation",
        "commands",
    ],
}
"""Folders from the lowest to the highest: each imports only those before it."""
ONE_ROOM_KNOWS = {
    "deepspeed": ["training/engine"],
    "s3fs": ["data_pipeline/storage"],
    "wandb": ["training/run/reporting"],
}
"""Packages that only these folders import."""
MOST_FILES = 12
ONE_INTERFACE = (
    *("data_pipeline/storage/s3.py", "data_pipeline/storage/s3_errors.py", "data_pipeline/storage/other.py"),
    *(f"slurm/emitters/{path.name}" for path in (ROOT / "slurm/emitters").glob("*.py")),
)
"""Modules that implement one interface, and so share names on purpose."""


def sources() -> list[Path]:
    return [path.relative_to(ROOT) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(_parsed(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("package", ROOMS)
def test_a_folder_imports_only_the_folders_below_it(package: str) -> None:
    order = {room: place for place, room in enumerate(ROOMS[package])}
    upward = []
    for path in sources():
        if path.parts[0] != package or len(path.parts) < 2:
            continue
        room = path.with_suffix("").parts[1]
        if room == "__init__":
            continue
        assert room in order, f"{path}: give {room} its place in ROOMS"
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == package and len(parts) > 1 and parts[1] in order and order[parts[1]] > order[room]:
                if path == Path("training/train.py") and parts[1] == "cli":
                    continue  # under `if __name__ == "__main__"`
                upward.append(f"{path} imports {name}")
    assert not upward


def test_data_flows_one_way() -> None:
    wrong = [
        f"{path} imports {name}"
        for path in sources()
        for name in imports(path)
        if path.parts[0] == "data_pipeline" and name.split(".")[0] in ("training", "slurm")
    ]
    assert not wrong


@pytest.mark.parametrize("package", ONE_ROOM_KNOWS)
def test_only_one_folder_uses_the_package(package: str) -> None:
    users = {path.parent.as_posix() for path in sources() if any(n.split(".")[0] == package for n in imports(path))}
    assert users <= {*ONE_ROOM_KNOWS[package]}


def test_no_folder_holds_more_than_a_dozen_files() -> None:
    count = collections.Counter(path.parent for path in sources() if path.name != "__init__.py")
    assert not {str(folder): files for folder, files in count.items() if files > MOST_FILES}


def test_every_folder_says_what_belongs_there() -> None:
    silent = [str(path) for path in sources() if path.name == "__init__.py" and not ast.get_docstring(_parsed(path))]
    assert not silent


def public(path: Path) -> list[tuple[str, ast.ClassDef | ast.FunctionDef]]:
    """Public top-level definitions, and public methods as CLASS.NAME."""
    found: list[tuple[str, ast.ClassDef | ast.FunctionDef]] = []
    for node in _parsed(path).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            found.append((node.name, node))
            if isinstance(node, ast.ClassDef):
                methods = [n for n in node.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
                found += [(f"{node.name}.{method.name}", method) for method in methods]
    return found


def protocol_methods() -> set[str]:
    """Names of methods that a Protocol documents; implementations need not repeat it."""
    return {
        method.name
        for path in sources()
        for node in _parsed(path).body
        if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "Protocol" for base in node.bases)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and ast.get_docstring(method)
    }


def test_public_definitions_are_explained() -> None:
    promised = protocol_methods()
    silent = [
        f"{path}:{node.lineno} {name}"
        for path in sources()
        for name, node in public(path)
        if not ast.get_docstring(node) and not ("." in name and node.name in promised)
    ]
    assert not silent, silent


def test_a_public_name_is_defined_only_once() -> None:
    places = collections.defaultdict(list)
    for path in sources():
        for name, _ in public(path):
            if "." not in name and name != "main":
                places[name].append(path.as_posix())
    twice = {name: files for name, files in places.items() if len(files) > 1 and not {*files} <= {*ONE_INTERFACE}}
    assert not twice, twice


def test_imports_of_the_project_exist() -> None:
    """Also inside functions, where starting the program would not reveal a wrong one."""
    missing = []
    for path in sources():
        for node in ast.walk(_parsed(path)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in PACKAGES:
                module = node.module
                place = ROOT.joinpath(*module.split("."))
                if not (place.with_suffix(".py").exists() or (place / "__init__.py").exists()):
                    missing.append(f"{path}:{node.lineno} {module}")
    assert not missing


def _parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())
