"""What a disk may hold after a power cut: any of the states that the calls up to it allow.

The model is that of ALICE (OSDI 2014) at its weakest. The fsync of a file keeps the bytes written
to it before, not its name; the fsync of a folder keeps the names changed in it before. All else may
be there or not, in any order, and bytes may be there in part. A rename is one step. Knows nothing
about bundles.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from syscalls import Event

_ROOT: Final = 0
_NEVER: Final = 1 << 60
KEEP, DROP, ZERO, TEAR = "keep", "drop", "zero", "tear"
Fate = str


@dataclass
class Effect:
    """One change. Of a folder's names: `gone` disappears, `name` then means `target` (-1: nothing).
    Of a file's bytes: `data` at `offset`."""

    inode: int  # the folder or file that changes
    step: int  # of the call
    durable: int = _NEVER  # the step after which it is sure
    name: str = ""
    target: int = -1
    gone: str = ""
    offset: int = 0
    data: bytes = b""


@dataclass
class History:
    """Calls, and the changes that they made. More calls may follow, of another process."""

    steps: int = 0
    effects: list[Effect] = field(default_factory=list)
    folders: dict[int, dict[str, int]] = field(default_factory=lambda: {_ROOT: {}})

    def extend(self, events: Iterable[Event]) -> None:
        for event in events:
            self._add(event)
            self.steps += 1

    def _add(self, event: Event) -> None:
        if event.call == "fsync":
            inode = self._find(event.path)
            for effect in self.effects:
                if effect.inode == inode:
                    effect.durable = min(effect.durable, self.steps)
        elif event.call == "write":
            self._change(self._find(event.path), offset=event.offset, data=event.data)
        elif event.call == "mkdir" or event.creates:
            inode = 1 + max((effect.target for effect in self.effects), default=_ROOT)
            parent, name = self._place(event.path)
            if name in self.folders[parent]:
                return  # was there already
            if event.call == "mkdir":
                self.folders[inode] = {}
            self._rename(parent, name, inode)
        elif event.call == "rename":
            (parent, old), (other, name) = self._place(event.path), self._place(event.target)
            assert parent == other
            self._rename(parent, name, self.folders[parent][old], gone=old)
        elif event.call == "unlink":
            parent, old = self._place(event.path)
            self._rename(parent, "", -1, gone=old)
        else:
            assert event.call in ("close", "open", "openat"), event

    def _change(self, inode: int, **facts: object) -> None:
        self.effects.append(Effect(inode, self.steps, **facts))  # type: ignore[arg-type]

    def _rename(self, parent: int, name: str, inode: int, *, gone: str = "") -> None:
        self.folders[parent].pop(gone, None)
        if name:
            self.folders[parent][name] = inode
        self._change(parent, name=name, target=inode, gone=gone)

    def _place(self, path: str) -> tuple[int, str]:
        inside = PurePosixPath(path)
        return self._find(str(inside.parent)), inside.name

    def _find(self, path: str) -> int:
        inode = _ROOT
        for part in PurePosixPath(path).parts:
            inode = self.folders[inode][part]
        return inode

    # -- what is left ------------------------------------------------------------------------------

    def open_effects(self, step: int) -> list[int]:
        """Changes that a cut before `step` may undo."""
        return [i for i, e in enumerate(self.effects) if e.step < step <= e.durable]

    def state(self, step: int, fates: Callable[[int], Fate]) -> dict[str, bytes | None]:
        """path -> bytes (None: a folder) after a cut before `step`; `fates` of open changes."""
        names: dict[int, dict[str, int]] = {}
        contents: dict[int, bytearray] = {}
        for i, effect in enumerate(self.effects):
            if effect.step >= step:
                break
            fate = KEEP if effect.durable < step else fates(i)
            if fate == DROP:
                continue
            if effect.name or effect.gone:
                folder = names.setdefault(effect.inode, {})
                folder.pop(effect.gone, None)
                if effect.name:
                    folder[effect.name] = effect.target
            else:
                _write(contents.setdefault(effect.inode, bytearray()), effect, fate)
        return dict(self._walk(_ROOT, "", names, contents))

    def _walk(
        self, inode: int, path: str, names: dict[int, dict[str, int]],
        contents: dict[int, bytearray],
    ) -> Iterator[tuple[str, bytes | None]]:  # fmt: skip
        for name, target in names.get(inode, {}).items():
            if target in self.folders:
                yield path + name, None
                yield from self._walk(target, f"{path}{name}/", names, contents)
            else:
                yield path + name, bytes(contents.get(target, b""))


def _write(content: bytearray, effect: Effect, fate: Fate) -> None:
    data = effect.data
    if fate == ZERO:
        data = bytes(len(data))
    elif fate == TEAR:
        data = data[: len(data) // 2]
    content.extend(bytes(max(0, effect.offset - len(content))))
    content[effect.offset : effect.offset + len(data)] = data


def cuts(history: History, step: int, rng: random.Random) -> Iterator[dict[str, bytes | None]]:
    """States after a cut before `step`: all gone, all there, names without bytes, all but one
    change, one change alone, and some of random choice."""
    is_open = history.open_effects(step)
    is_data = {i: not (e.name or e.gone) for i, e in enumerate(history.effects)}
    yield history.state(step, lambda i: DROP)
    yield history.state(step, lambda i: KEEP)
    for fate in (DROP, ZERO, TEAR):
        yield history.state(step, lambda i, fate=fate: fate if is_data[i] else KEEP)  # type: ignore[misc]
    for one in is_open:
        yield history.state(step, lambda i, one=one: DROP if i == one else KEEP)  # type: ignore[misc]
        yield history.state(step, lambda i, one=one: KEEP if i == one else DROP)  # type: ignore[misc]
    for _ in range(4):
        yield random_cut(history, step, rng)


def random_cut(history: History, step: int, rng: random.Random) -> dict[str, bytes | None]:
    fates = {
        i: rng.choice((KEEP, KEEP, DROP, DROP, ZERO, TEAR)) for i in history.open_effects(step)
    }
    return history.state(step, fates.__getitem__)


def put(state: dict[str, bytes | None], folder: Path) -> None:
    """Make `folder`, which is not there, hold `state`."""
    folder.mkdir()
    for path, data in state.items():  # a folder comes before what is in it
        if data is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(data)


def history_of(*runs: Sequence[Event]) -> History:
    history = History()
    for events in runs:
        history.extend(events)
    return history
