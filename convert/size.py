"""What a checkpoint's tensors take: bytes, bits per weight, and how that is said."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """What a checkpoint's tensors take, in bytes."""

    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Of everything stored, scales and unquantized tensors included, over all weights."""
        return self.bytes * 8 / self.parameters

    @property
    def in_words(self) -> str:
        """The bytes, in the unit that suits them."""
        return in_words(self.bytes)


def in_words(count: int) -> str:
    """Bytes as people read them: in GB (of 10^9, as files and the hub count), or in MB if less than one."""
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{count / unit:.2f} {name}"
