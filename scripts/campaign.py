"""Counts that a campaign reached, as rows of a table: what docs/RELIABILITY.md quotes.

    python scripts/campaign.py DIR

DIR: that of `make campaign`, which ends with this. Exit code 1 where a trial failed.
"""

import json
import sys
from pathlib import Path


def main(folder: Path) -> int:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    for facts in found:
        failed = ", ".join(map(str, facts["failed"])) or "none"
        print(
            f"| {facts['promise']} | {facts['done']:,} of {facts['of']:,} | {failed} "
            f"| {facts['seconds']:,.0f} s | {facts['date']} | {facts['machine']} |"
        )
    return 1 if any(facts["failed"] for facts in found) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
