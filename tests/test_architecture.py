"""The house stays as docs/DESIGN.md draws it: imports run one way, and the map is complete."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "m2c"
RANKS = {"errors": 0, "units": 0, "bundle": 1, "kernels": 2, "tiers": 3, "model": 4, "cli": 6}
VERB = 5
FILES = sorted(SOURCE.rglob("*.py"))


def room_of(module: str) -> str:
    """The folder or top-level file of `m2c.x.y`; "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(file: Path) -> Iterator[str]:
    """Modules a file imports, also inside functions and for type checking only."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            if node.module == "m2c":
                yield from (f"m2c.{alias.name}" for alias in node.names)
            elif node.module:
                yield node.module


def rank(room: str) -> int:
    return 0 if room.startswith("_") or not room else RANKS.get(room, VERB)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_run_one_way(file: Path) -> None:
    own = room_of(module_of(file))
    for module in imports_of(file):
        if module.split(".")[0] == "m2c":
            room = room_of(module)
            assert rank(room) <= rank(own), f"{file} imports {module}"
            assert room != "cli" or own == "cli"
        if own == "bundle":
            assert module.split(".")[0] != "torch"


def test_verbs_do_not_import_each_other_in_circles() -> None:
    graph = {
        room_of(module_of(file)): {
            room_of(m)
            for m in imports_of(file)
            if m.startswith("m2c.") and rank(room_of(m)) == VERB
        }
        for file in SOURCE.glob("*.py")
    }
    done: set[str] = set()
    while ready := {name for name, needs in graph.items() if name not in done and needs <= done}:
        done |= ready
    assert set(graph) == done


def test_files_stay_readable_in_one_sitting() -> None:
    long = {str(f): n for f in FILES if (n := len(f.read_text().splitlines())) > 350}
    assert not long


def test_readme_maps_every_file_and_folder() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme[readme.index("## The tree") :]
    names = [f.name for f in SOURCE.glob("*.py") if f.name != "__init__.py"]
    names += [f"{d.name}/" for d in SOURCE.iterdir() if d.is_dir() and d.name[0] not in "_."]
    missing = [name for name in names if name not in tree]
    assert not missing


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["run", "--help"]])
def test_help_does_not_import_torch(words: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "m2c.cli.app", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "m2c.errors" in imported
    assert "torch" not in imported
