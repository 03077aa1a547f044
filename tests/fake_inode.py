"""One file of a `fake_files.FaultyFiles`: its content in the page cache and on the disk, sector by sector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

SECTOR_BYTES = 512
# So many of the zeroes at the end of what is written are held in memory; a segment of the log has a mebibyte of them.
HELD_ZEROES_BYTES = 16 * 1024
_MANY_ZEROES = bytes(2 * HELD_ZEROES_BYTES)


class RandomBits(Protocol):
    def random(self) -> float: ...


# What a power loss leaves of a sector: (path, offset in the file, old content, new content) -> content.
Keep = Callable[[str, int, bytes, bytes], bytes]


def keep_nothing(path: str, offset: int, old: bytes, new: bytes) -> bytes:
    return old


def keep_everything(path: str, offset: int, old: bytes, new: bytes) -> bytes:
    return new


def keep_random(chance: RandomBits) -> Keep:
    """Each sector is kept, lost, or now and then cut somewhere."""

    def keep(path: str, offset: int, old: bytes, new: bytes) -> bytes:
        draw = chance.random()
        if draw < 0.45:
            return new
        if draw < 0.9:
            return old
        cut = int(chance.random() * len(new))
        return new[:cut] + old[cut:]

    return keep


def keep_prefix(size_bytes: int) -> Keep:
    """The first `size_bytes` of the sectors that were not synced, in the order of path and offset."""
    left = size_bytes

    def keep(path: str, offset: int, old: bytes, new: bytes) -> bytes:
        nonlocal left
        cut = min(left, len(new))
        left -= cut
        return new[:cut] + old[cut:]

    return keep


class Covered:
    """What one sync in a thread covers of a file: its size, and the sectors that were not on the disk."""

    __slots__ = ("sectors", "size_bytes")

    def __init__(self, size_bytes: int, sectors: dict[int, bytes]) -> None:
        self.size_bytes = size_bytes
        self.sectors = sectors


class Inode:
    """A file's content as the page cache has it, and how to get back to what is on the disk."""

    __slots__ = ("covered", "data", "durable_bytes", "forgotten", "links", "old", "size_bytes")

    def __init__(self) -> None:
        self.data = bytearray()  # up to the last byte that may not be zero; a sparse file's end is left out
        self.size_bytes = 0
        self.links = 0  # names in the page cache
        self.durable_bytes = 0  # size on the disk
        self.old: dict[int, bytes] = {}  # sector number -> content on the disk, where it differs
        self.forgotten: dict[int, bytes] = {}  # the same, where the page cache wrongly takes the sector for written
        self.covered: list[Covered] = []  # by syncs in threads that have not ended, oldest first

    def read(self, offset: int, size_bytes: int) -> bytes:
        end = min(offset + size_bytes, self.size_bytes)
        if end <= offset:
            return b""
        held = bytes(self.data[offset:end])
        return held if len(held) == end - offset else held.ljust(end - offset, b"\0")

    def sector(self, number: int) -> bytes:
        at = number * SECTOR_BYTES
        return bytes(self.data[at : at + SECTOR_BYTES]).ljust(SECTOR_BYTES, b"\0")

    def remember(self, start: int, end: int) -> None:
        """Called before bytes from `start` to `end` change."""
        for sector in range(start // SECTOR_BYTES, -(-end // SECTOR_BYTES)):
            if sector in self.old:
                continue
            if sector in self.forgotten:
                self.old[sector] = self.forgotten.pop(sector)
            else:
                self.old[sector] = self.sector(sector)

    def write(self, offset: int, content: bytes) -> None:
        end = offset + len(content)
        if end > self.size_bytes:
            self.size_bytes = end
        held = len(self.data)
        if end > held and content.endswith(_MANY_ZEROES) and not self.forgotten:
            # Where nothing is held, zeroes change nothing; some are held, for those who look at `data`.
            needed = max(held, offset + len(content.rstrip(b"\0")))
            content = content[: max(0, needed + HELD_ZEROES_BYTES - offset)]
            end = offset + len(content)
        if not content or (self.data[offset:end] == content and not self.forgotten):
            return  # as good as lost or kept
        self.remember(offset, end)
        if held < offset:
            self.data.extend(bytes(offset - held))
        self.data[offset:end] = content

    def resize(self, size_bytes: int) -> None:
        if size_bytes < len(self.data):
            self.remember(size_bytes, len(self.data))
            del self.data[size_bytes:]
        self.size_bytes = size_bytes

    def synced(self) -> None:
        self.old.clear()
        self.covered.clear()  # this sync covers all that they do, and more
        self.durable_bytes = self.size_bytes

    def sync_failed(self, chance: RandomBits) -> None:
        for sector, content in self.old.items():
            if chance.random() < 0.5:
                self.forgotten[sector] = content
            else:
                for covered in self.covered:
                    covered.sectors.pop(sector, None)
        self.old.clear()

    def cover(self) -> Covered:
        """A sync in a thread begins."""
        numbers = dict.fromkeys(self.old)
        for earlier in self.covered:  # which may end later, but before this one
            numbers.update(dict.fromkeys(earlier.sectors))
        covered = Covered(self.size_bytes, {number: self.sector(number) for number in numbers})
        self.covered.append(covered)
        return covered

    def sync_ended(self, covered: Covered) -> None:
        """A sync in a thread has ended: what it covered is on the disk, and what was written since is not."""
        if covered not in self.covered:
            return  # a later sync ended before it
        del self.covered[: self.covered.index(covered) + 1]
        self.durable_bytes = covered.size_bytes
        for number, content in covered.sectors.items():
            differs = self.forgotten if number in self.forgotten else self.old
            if content != self.sector(number):
                differs[number] = content
            else:
                differs.pop(number, None)

    def lose(self, path: str, keep: Keep, keep_size: bool, late: set[int]) -> None:
        """Become what the disk holds after a power loss; nothing is kept of the sectors in `late`."""
        self.covered.clear()
        if not keep_size:
            self.size_bytes = self.durable_bytes
        size = self.size_bytes
        for number, old in sorted((self.old | self.forgotten).items()):
            at = number * SECTOR_BYTES
            left = keep(path, at, old, self.sector(number)) if number in self.old and number not in late else old
            end = min(at + SECTOR_BYTES, size)
            if end > at:
                if len(self.data) < at:
                    self.data.extend(bytes(at - len(self.data)))
                self.data[at:end] = left[: end - at]
        del self.data[size:]
        self.old.clear()
        self.forgotten.clear()
        self.durable_bytes = size
