"""The bytes that a checkpoint's tensors take, as bits per weight and in words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A number of parameters, and the bytes that they take."""

    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """All bits that are stored, scales and unquantized tensors included, over the number of weights."""
        return self.bytes * 8 / self.parameters

    @property
    def in_words(self) -> str:
        """The bytes in the unit that suits them, "1.89 MB" say."""
        return in_words(self.bytes)


def in_words(count: int) -> str:
    """Write bytes as people read them: in GB (of 10^9, as files and the hub count), or in MB if less."""
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{count / unit:.2f} {name}"
