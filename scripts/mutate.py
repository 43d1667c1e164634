"""Do the tests notice? Takes one guard away at a time and runs them; they must go red.

    python scripts/mutate.py [--work DIR] [--only WORDS] [--whole]

Works on copies of src and tests in DIR and never touches the tree itself. First the tests that are
named with the guard; with --whole, where those stay green, the rest of the suite. What was found is
kept in DIR/found.json, so that a run that was broken off goes on; printed as rows for
docs/RELIABILITY.md. Exit code 1 where the tests notice fewer than 95 % of the guards.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from guards import GUARDS, Guard

ROOT: Final = Path(__file__).resolve().parent.parent
NAMED, WHOLE, NOBODY, BROKEN = "named tests", "the rest of the suite", "nobody", "not built"
_HANGS_S: Final = 1800


def trial(guard: Guard, work: Path, *, whole: bool) -> str:
    """Who noticed that the guard was gone."""
    tree = work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
    for name in ("src", "tests", "scripts", "docs"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "Makefile"):
        shutil.copy(ROOT / name, tree / name)
    file = tree / "src" / "m2c" / guard.file
    text = file.read_text()
    if text.count(guard.old) != 1:
        raise SystemExit(f"{guard.name}: its text occurs {text.count(guard.old)} times")
    file.write_text(text.replace(guard.old, guard.new))
    if guard.file.endswith((".c", ".h")) and not build(tree):
        return BROKEN
    named = [word for word in guard.tests.split() if (tree / word).exists()]
    if named and not passes(tree, named):
        return NAMED
    if whole and not passes(tree, [f"--ignore={word}" for word in named]):
        return WHOLE
    return NOBODY


def build(tree: Path) -> bool:
    code = "import hatch_build as h; h.compile_library(h.FOLDER, h.FOLDER / 'libm2c.so') or exit(1)"
    return subprocess.run([sys.executable, "-c", code], cwd=tree).returncode == 0


def passes(tree: Path, words: list[str]) -> bool:
    """Whether pytest is green; a suite that hangs is red, and one that crashes."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *words]
    try:
        done = subprocess.run(
            command, cwd=tree, env=environment, timeout=_HANGS_S, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return False
    if done.returncode > 1:  # below 0: a signal ended it
        raise SystemExit(f"pytest did not run:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "campaign" / "mutate")
    parser.add_argument("--only", default="", help="guards whose name or file holds these words")
    parser.add_argument("--whole", action="store_true", help="ask the rest of the suite too")
    given = parser.parse_args()
    kept = given.work / "found.json"
    found: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    asked = [guard for guard in GUARDS if given.only in guard.name or given.only in guard.file]
    for guard in asked:
        if guard.name not in found or (given.whole and found[guard.name] == NOBODY):
            begin = time.monotonic()
            found[guard.name] = trial(guard, given.work, whole=given.whole)
            kept.write_text(json.dumps(found, indent=1))
            print(f"{time.monotonic() - begin:5.0f} s  {found[guard.name]}: {guard.name}",
                  file=sys.stderr, flush=True)  # fmt: skip
        print(f"| {guard.name} | {guard.file} | {found[guard.name]} |", flush=True)
    noticed = sum(found[guard.name] in (NAMED, WHOLE) for guard in asked)
    print(f"{noticed} of {len(asked)} noticed")
    return 0 if noticed >= 0.95 * len(asked) else 1


if __name__ == "__main__":
    sys.exit(main())
