"""Makes the calibration and evaluation texts from Debian's r-cran-janeaustenr package.

    python scripts/make_texts.py r-cran-janeaustenr_1.0.0-1_all.deb

Input is the .deb, or a folder it was extracted into. The novels lie in an R lazy-load database:
an index (.rdx) of byte ranges and a file (.rdb) of zlib streams of R's XDR serialisation.
Knows nothing about R beyond the six kinds of value that those two files hold.
"""

import argparse
import gzip
import re
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

CALIBRATION = (("emma", 150_000), ("persuasion", 150_000))
EVALUATION = (("northangerabbey", 80_000),)
ROOT = Path(__file__).resolve().parent.parent

NIL, REFERENCE, PAIRLIST, SYMBOL, STRING = 0xFE, 0xFF, 0x02, 0x01, 0x09
LOGICALS, INTEGERS, STRINGS, VECTOR = 0x0A, 0x0D, 0x10, 0x13
HAS_ATTRIBUTES, HAS_TAG = 0x200, 0x400


class Serialised:
    """Reads one value from R's binary XDR serialisation, format version 3."""

    def __init__(self, data: bytes) -> None:
        if data[:2] != b"X\n":
            raise SystemExit("not R's XDR serialisation")
        self.data = data
        self.position = 14  # magic, format version, writer version, oldest reader version
        self.take(self.integer())  # name of the native encoding
        self.symbols: list[str] = []

    def take(self, nbytes: int) -> bytes:
        chunk = self.data[self.position : self.position + nbytes]
        if nbytes < 0 or len(chunk) != nbytes:
            raise SystemExit("the R data ends too early")
        self.position += nbytes
        return chunk

    def integer(self) -> int:
        return struct.unpack(">i", self.take(4))[0]

    def value(self) -> Any:
        """A str, a list, or a dict for a list with names; None for R's NULL."""
        flags = self.integer()
        kind = flags & 0xFF
        if kind == PAIRLIST:
            return self.pairlist(flags)
        result = self.plain(kind, flags)
        if kind != STRING and flags & HAS_ATTRIBUTES:
            attributes = self.value()
            if "names" in attributes:
                return dict(zip(attributes["names"], result, strict=True))
        return result

    def plain(self, kind: int, flags: int) -> Any:
        if kind == NIL:
            return None
        if kind == REFERENCE:
            return self.symbols[(flags >> 8 or self.integer()) - 1]
        if kind == SYMBOL:
            self.symbols.append(self.value())
            return self.symbols[-1]
        length = self.integer()
        if kind == STRING:
            return "" if length == -1 else self.take(length).decode("utf-8")
        if kind in (LOGICALS, INTEGERS):
            return list(struct.unpack(f">{length}i", self.take(4 * length)))
        if kind in (STRINGS, VECTOR):
            return [self.value() for _ in range(length)]
        raise SystemExit(f"unexpected R type {kind:#x}")

    def pairlist(self, flags: int) -> dict[str, Any]:
        pairs: dict[str, Any] = {}
        while flags & 0xFF == PAIRLIST:
            if flags & HAS_ATTRIBUTES:
                self.value()
            name = self.value() if flags & HAS_TAG else ""
            pairs[name] = self.value()
            flags = self.integer()
        return pairs


def read_novels(folder: Path) -> dict[str, list[str]]:
    """The lines of each novel, by the name the package gives it."""
    index_path = next(folder.rglob("Rdata.rdx"), None)
    if index_path is None:
        raise SystemExit(f"no Rdata.rdx below {folder}: is it an extracted r-cran-janeaustenr?")
    index = Serialised(gzip.decompress(index_path.read_bytes())).value()
    database = index_path.with_suffix(".rdb").read_bytes()
    novels = {}
    for name, (offset, length) in index["variables"].items():
        # four bytes of length stand before each zlib stream
        stream = database[offset + 4 : offset + length]
        novels[name] = Serialised(zlib.decompress(stream)).value()
    return novels


def unwrap(lines: list[str]) -> list[str]:
    """Paragraphs, each on one line, without the underscores that stand for italics."""
    paragraphs = re.split(r"\n\s*\n", "\n".join(line.strip() for line in lines))
    joined = (" ".join(paragraph.replace("_", "").split()) for paragraph in paragraphs)
    return [paragraph for paragraph in joined if paragraph]


def excerpt(lines: list[str], nbytes: int) -> str:
    """The first whole paragraphs of a novel, at most `nbytes` of UTF-8."""
    text = ""
    for paragraph in unwrap(lines):
        longer = f"{text}\n\n{paragraph}" if text else paragraph
        if len(longer.encode()) > nbytes:
            break
        text = longer
    return text + "\n"


def write_text(
    path: Path, novels: dict[str, list[str]], parts: tuple[tuple[str, int], ...]
) -> None:
    text = "\n".join(excerpt(novels[name], nbytes) for name, nbytes in parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{path.relative_to(ROOT)}: {len(text.encode())} bytes", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="the .deb, or the folder it was extracted into")
    package = parser.parse_args().package
    with tempfile.TemporaryDirectory() as temporary:
        if package.is_file():
            subprocess.run(["dpkg-deb", "-x", str(package), temporary], check=True)
            package = Path(temporary)
        novels = read_novels(package)
    write_text(ROOT / "src/m2c/data/calibration.txt", novels, CALIBRATION)
    write_text(ROOT / "tests/data/austen_eval.txt", novels, EVALUATION)


if __name__ == "__main__":
    main()
