"""The form in which a model's caches hold keys and values, and how far they go back: one value for all."""

import re
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

import mlx.core as mx

from olmo3_mlx.caches.quantized import BITS, KVQuantization, check_bits, check_group_size
from olmo3_mlx.errors import OptionError, Setting
from olmo3_mlx.option_checks import check_keywords, check_number

_FORM = re.compile(r"\w+(?:, (\d+) bits in groups of (\d+) from (\d+) tokens on)?", re.ASCII)


class CacheKeywords(TypedDict, total=False):
    """CacheOptions as keywords, for whoever types them: `Session(model, kv_bits=8)`."""

    kv_bits: int | None
    kv_group_size: int | None
    kv_start: int
    rewind: int


@dataclass(frozen=True)
class CacheOptions:
    """What `make_caches`, a session, its files and the memory plan have to agree on. Checks itself; raises
    OptionError for values outside their range.

    bits        8 or 4 (then 5 for values); None holds keys and values as the model computes them
    group_size  values that share a scale: 32, 64 or 128; None means the most that divide a head
    start       quantize once more than so many tokens are held
    rewind      at least so many of the newest tokens can be taken back
    """

    bits: int | None = None
    group_size: int | None = None
    start: int = 0
    rewind: int = 512

    def __post_init__(self) -> None:
        for name, value in (("rewind", self.rewind), ("kv_start", self.start)):
            check_number(name, value, lambda n: n >= 0, "of at least 0", whole=True)
        if self.bits is not None:
            check_bits(self.bits)
        if self.group_size is not None:
            check_group_size(self.group_size)
        if self.bits is None:
            self._refuse_what_quantizing_needs()

    @classmethod
    def of(cls, options: "CacheOptions | None" = None, **keywords: Unpack[CacheKeywords]) -> "CacheOptions":
        """Keywords over `options`, or over the defaults. Raises OptionError for values outside their range,
        TypeError for a keyword that there is not.
        """
        if options is not None and not isinstance(options, CacheOptions):
            raise OptionError(f"expected CacheOptions, or keywords such as kv_bits=8, not {options!r}")
        options = options or cls()
        if not keywords:
            return options
        check_keywords(keywords, CacheKeywords)
        given: dict[str, Any] = {name.removeprefix("kv_"): value for name, value in keywords.items()}
        return replace(options, **given)

    def _refuse_what_quantizing_needs(self) -> None:
        """Raise OptionError for what would be without effect in caches that are not quantized."""
        for name, value in (("kv_group_size", self.group_size), ("kv_start", self.start or None)):
            if value is not None:
                raise OptionError(
                    Setting(name, value), " is for quantized caches: give ", Setting("kv_bits"), " too"
                )

    def quantization(self, head_dim: int) -> KVQuantization | None:
        """The form of quantized keys and values in heads of this size; None where they are not quantized.

        Raises OptionError if the group size does not divide it.
        """
        return None if self.bits is None else KVQuantization.of(self.bits, self.group_size, head_dim)

    def holding(self, tokens: int) -> "CacheOptions":
        """The form in which so many tokens are held: unquantized up to `start`."""
        if self.bits is None or tokens > self.start:
            return self
        return replace(self, bits=None, group_size=None, start=0)

    def position_bytes(self, heads: int, head_dim: int, itemsize: int = 2) -> int:
        """Bytes of a key and a value in `heads` key-value heads of size `head_dim`, at one position.

        `itemsize` is the bytes of a number that is not quantized, and of a scale (2: bfloat16). Raises
        OptionError as `quantization` does.
        """
        quantization = self.quantization(head_dim)
        if quantization is None:
            return 2 * heads * head_dim * itemsize
        scales = 2 * head_dim // quantization.group_size * itemsize
        return heads * (sum(BITS[quantization.bits]) * head_dim // 8 + scales)

    def form(self, head_dim: int, dtype: mx.Dtype) -> str:
        """A name, for files, of what must be equal for one cache to take in another's positions. `dtype` is
        what the model computes in.
        """
        name = str(dtype).rpartition(".")[2]
        quantization = self.quantization(head_dim)
        if quantization is None:
            return name
        bits, group_size = quantization.bits, quantization.group_size
        return f"{name}, {bits} bits in groups of {group_size} from {self.start} tokens on"

    @classmethod
    def of_form(cls, form: str) -> "CacheOptions | None":
        """The options that `form` gave this name; None for what is no such name."""
        found = _FORM.fullmatch(form)
        if found is None or found[1] is None:
            return None if found is None else cls()
        try:
            return cls(*(int(number) for number in found.groups()))
        except OptionError:
            return None

    def told_from(self, other: "CacheOptions") -> tuple[str | Setting, ...]:
        """How caches of these options are held, in words that tell it from how `other`'s are."""
        if self.bits is None:
            return ("without ", Setting("kv_bits"))
        told: tuple[str | Setting, ...] = ("with ", Setting("kv_bits", self.bits))
        if self.bits == other.bits and self.group_size != other.group_size:
            told += (" ", Setting("kv_group_size", self.group_size))
        if self.bits == other.bits and self.start != other.start:
            told += (" ", Setting("kv_start", self.start))
        return told
