"""The size that a result may have at most, for which bits are chosen: in bits per weight, or in GB."""

from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from math import inf

from convert.size import Size
from olmo3_mlx.errors import ConvertError, OptionError, Setting

OPTIONS = BPW, GB = "target_bpw", "target_gb"
_GB = 10**9  # as files, the hub and convert.size count


@dataclass(frozen=True)
class Target:
    """What was asked for: `value` of the option BPW or GB.

    Raises OptionError for a value that no result could have.
    """

    option: str
    value: float

    def __post_init__(self) -> None:
        least, most, said = (
            (1, 16, "above 1 and below 16") if self.option == BPW else (0, inf, "above 0 and finite")
        )
        if not least < self.value < most:
            raise OptionError(Setting(self.option), f" must be {said}, not {self.value}")

    @property
    def bytes(self) -> int:
        """The bytes that so many GB are: those of the number as it is written, 4.9 say, and not of the binary
        fraction beside it.
        """
        return int(Decimal(str(self.value)) * _GB)

    def bits_per_weight(self, parameters: int) -> float:
        """The same in bits per weight, for a model with so many weights. A plan has whole bytes, and a float
        that is far finer than those: what has at most so many bits per weight has at most these bytes.
        """
        return self.value if self.option == BPW else Size(parameters, self.bytes).bits_per_weight

    def check_reach(self, least: Size, most: Size) -> None:
        """Raise ConvertError if no plan has it between the smallest and the largest result."""
        if self.option == BPW:
            reached = least.bits_per_weight <= self.value <= most.bits_per_weight
            asked = f"{self.value:g} bits per weight"
            ends = f"{least.bits_per_weight:.3f} to {most.bits_per_weight:.3f}"
        else:
            reached = least.bytes <= self.bytes <= most.bytes
            asked = f"{self.value:g} GB"
            # Rounded inwards: both ends can be asked for.
            ends = f"{_in_gb(least.bytes, ROUND_CEILING)} to {_in_gb(most.bytes, ROUND_FLOOR)} GB"
        if not reached:
            raise ConvertError(f"{asked} cannot be reached: this model can have {ends}")


def _in_gb(count: int, rounding: str) -> str:
    return f"{Context(prec=4, rounding=rounding).divide(Decimal(count), Decimal(_GB)):f}"


def asked_for(target_bpw: float | None, target_gb: float | None) -> Target | None:
    """The target that two options mean, of which one at most is given. Raises OptionError."""
    if target_bpw is not None and target_gb is not None:
        raise OptionError(
            "two sizes were asked for: give either ", Setting(BPW, target_bpw), " or ", Setting(GB, target_gb)
        )
    if target_bpw is not None:
        return Target(BPW, target_bpw)
    return None if target_gb is None else Target(GB, target_gb)
