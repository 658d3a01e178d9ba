"""A set of keys with a few flags each, in so little memory that a file of a million lines may have one."""

from __future__ import annotations

from hashlib import blake2b

_WIDTH = 16  # bytes of a digest: two of a million keys agree with a probability of 1e-27
_EMPTY = bytes(_WIDTH)


class KeyTable:
    """Keys are kept as digests in an open-addressed table: 34 to 68 bytes each, and no objects."""

    def __init__(self) -> None:
        self._count = 0
        self._reserve(1 << 10)

    def __len__(self) -> int:
        return self._count

    def mark(self, key: str, flag: int) -> int:
        """Set `flag` (1, 2, 4, ...) of a key and return the flags that it had before."""
        digest = blake2b(key.encode("utf-8", "surrogatepass"), digest_size=_WIDTH).digest()
        slot = self._find(digest)
        before = self._flags[slot]
        self._flags[slot] = before | flag
        if not before:
            self._digests[slot * _WIDTH : (slot + 1) * _WIDTH] = digest
            self._count += 1
            if 2 * self._count > self._size:
                self._grow()
        return before

    def _find(self, digest: bytes) -> int:
        """The slot of a digest, or the empty one where it belongs."""
        slot = int.from_bytes(digest[:8], "little") % self._size
        while (found := self._digests[slot * _WIDTH : (slot + 1) * _WIDTH]) != digest and found != _EMPTY:
            slot = (slot + 1) % self._size
        return slot

    def _reserve(self, size: int) -> None:
        self._size = size
        self._digests, self._flags = bytearray(size * _WIDTH), bytearray(size)

    def _grow(self) -> None:
        digests, flags = self._digests, self._flags
        self._reserve(2 * self._size)
        for old in range(len(flags)):
            if flags[old]:
                digest = bytes(digests[old * _WIDTH : (old + 1) * _WIDTH])
                slot = self._find(digest)
                self._digests[slot * _WIDTH : (slot + 1) * _WIDTH] = digest
                self._flags[slot] = flags[old]
