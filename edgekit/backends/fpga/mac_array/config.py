"""Size of the array of multiply-accumulate lanes, and the widths that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.errors import UsageError


def bits_for(values: int) -> int:
    """Bits that number `values` things, at least one."""
    return max(1, (values - 1).bit_length())


def words(channels: int, q: int) -> int:
    """Memory words of one pixel, q channels a word."""
    return -(-channels // q)


@dataclass(frozen=True)
class Config:
    """p: output channels computed at once. q: input channels of each that are multiplied in one cycle."""

    p: int
    q: int

    def __post_init__(self) -> None:
        if self.q < 1 or self.q & (self.q - 1) or self.p < self.q or self.p % self.q:
            raise UsageError(
                f"an array of {self.p} x {self.q} lanes is not possible",
                "q has to be a power of two and p a multiple of q",
            )

    @property
    def lanes(self) -> int:
        return self.p * self.q

    @property
    def banks(self) -> int:
        """Memory banks of q channels each that are read at once in steps by channel: a power of two."""
        return 1 << ((self.p // self.q).bit_length() - 1)

    @property
    def row(self) -> int:
        """Channels that steps by channel take at once."""
        return self.banks * self.q

    @property
    def levels(self) -> int:
        """Levels of the tree that adds q products."""
        return self.q.bit_length() - 1
