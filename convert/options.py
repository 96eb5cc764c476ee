"""The options of a conversion, parsed and checked before any work."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import EllipsisType, NoneType
from typing import Any, TypedDict, Unpack

import mlx.core as mx

from convert.recipe import Recipe, named, recipe_conflict, uniform
from convert.target import OPTIONS, Target, asked_for
from convert.texts.given import ITSELF, NO_FILES, SAVED, Files, files_of, given
from convert.writer.upload import check_repository_name
from olmo3_mlx.checkpoints.weights import dtype_named
from olmo3_mlx.errors import OptionError, Setting
from olmo3_mlx.option_checks import check_keywords
from olmo3_mlx.quantization import Quantization


class ConvertKeywords(TypedDict, total=False):
    """The options of a conversion as `convert` takes them by keyword: see ConvertOptions."""

    bits: int | EllipsisType | None
    group_size: int | None
    mode: str
    recipe: str | Path | None
    dtype: str | mx.Dtype | None
    calibrate: bool | Files
    target_bpw: float | None
    target_gb: float | None
    save_recipe: str | Path | None
    revision: str | None
    tokenizer: str | Path | None
    resume: bool
    keep: bool
    card: bool | None
    text: Files | None
    upload_to: str | None


@dataclass(frozen=True)
class ConvertOptions:
    """What is asked of a conversion.

    bits        for every layer; left out (...) the mode's usual ones: 4, or 8 in mxfp8. None quantizes
                nothing, and dequantizes a quantized source
    group_size  weights that share a scale: 64, or what the mode has
    mode        MLX's: affine, mxfp4, nvfp4 or mxfp8
    recipe      which layers get how many bits: one of RECIPES, a TOML file or a quantized checkpoint's
                folder (see convert.recipe)
    dtype       casts what is not quantized, and the scales
    calibrate   True, a text file or several, "self" and "chats" among them: see `convert`
    target_bpw  calibrates to so many bits per weight in all, instead of `bits`
    target_gb   the same to so many GB (10^9 bytes) at most
    save_recipe a new file to write the bits of each layer to, as a recipe
    revision    branch, tag or commit of a source on the hub
    tokenizer   a checkpoint to take tokenizer and chat template from
    resume      go on with a conversion that was stopped
    keep        keep the files of a source on the hub in the cache
    card        measure the result and write QUALITY.md; None: if it can be
    text        a text file to measure on, or several
    upload_to   a repository on the hub

    Three values are parsed from these, once: `schemes`, the recipe that they mean, `cast`, the dtype, and
    `target`, the size that bits are chosen for, if one was asked for.

    Raises OptionError for options of other types, with unknown values, or that another option rules out or
    requires; ConfigError for what a recipe says, CheckpointError for a folder that is damaged;
    HubError for a name that no repository has.
    """

    bits: int | EllipsisType | None = ...
    group_size: int | None = None
    mode: str = "affine"
    recipe: str | Path | None = None
    dtype: str | mx.Dtype | None = None
    calibrate: bool | Files = False
    target_bpw: float | None = None
    target_gb: float | None = None
    save_recipe: str | Path | None = None
    revision: str | None = None
    tokenizer: str | Path | None = None
    resume: bool = False
    keep: bool = True
    card: bool | None = False
    text: Files | None = None
    upload_to: str | None = None
    schemes: Recipe = field(init=False, repr=False, compare=False)
    cast: mx.Dtype | None = field(init=False, repr=False, compare=False)
    target: Target | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, (types, expected) in _EXPECTED.items():
            check_type(name, getattr(self, name), types, expected)
        for name in ("calibrate", "text"):
            files_of(name, getattr(self, name), _EXPECTED[name][1])
        self._check_quantizing()
        object.__setattr__(self, "target", asked_for(self.target_bpw, self.target_gb))
        self._check_measuring()
        object.__setattr__(self, "schemes", self._schemes())
        object.__setattr__(self, "cast", None if self.dtype is None else dtype_named(self.dtype))
        self._check_calibrating()
        if self.upload_to is not None:
            check_repository_name(self.upload_to)

    @classmethod
    def of(
        cls, options: "ConvertOptions | None" = None, **keywords: Unpack[ConvertKeywords]
    ) -> "ConvertOptions":
        """Keywords over `options`, or over the defaults. Raises TypeError for a keyword that there is not."""
        check_type("options", options, (ConvertOptions, NoneType), "ConvertOptions or None")
        check_keywords(keywords, ConvertKeywords)
        return replace(options or cls(), **keywords) if keywords else options or cls()

    @property
    def only_casts(self) -> bool:
        """Whether nothing is quantized."""
        return self.bits is None and self.recipe is None

    @property
    def calibrates(self) -> bool:
        """Whether weights are calibrated on a text instead of rounded to nearest."""
        return bool(self.calibrate) or self.target is not None

    @property
    def calibration_files(self) -> tuple[Path, ...] | None:
        """The files to calibrate on; None for those that come with this package."""
        names = given(self.calibrate)
        return tuple(Path(name) for name in names if name not in NO_FILES) if names else None

    @property
    def calibrates_on_itself(self) -> bool:
        """Whether it is asked for that the model writes text to calibrate on, alone or beside files."""
        return ITSELF in given(self.calibrate)

    @property
    def calibrates_on_chats(self) -> bool:
        """Whether the conversations saved on this machine are to be calibrated on, alone or beside others."""
        return SAVED in given(self.calibrate)

    @property
    def text_files(self) -> tuple[Path, ...] | None:
        """The texts to measure on; None for those that come with this package."""
        return files_of("text", self.text)

    @property
    def chosen_by(self) -> str:
        """The option that chooses the layers' bits: "recipe", "target_bpw", "target_gb" or "bits"."""
        return "recipe" if self.recipe is not None else "bits" if self.target is None else self.target.option

    @property
    def settings(self) -> dict[str, str | int | float | bool]:
        """The options that shape the result, by name, in JSON's types; defaults are
        included where they shape the result.
        """
        settings: dict[str, Any] = {name: getattr(self, name) for name in (*OPTIONS, "recipe")}
        if self.chosen_by == "bits":
            settings["bits"] = uniform(mode=self.mode).bits if self.bits is ... else self.bits
            settings["group_size"] = self.group_size
            settings["mode"] = self.mode if self.mode != "affine" else None
        settings["calibrate"] = " ".join(map(str, given(self.calibrate))) or self.calibrate or None
        settings["dtype"] = self.dtype and str(self.dtype).rpartition(".")[2]
        settings["tokenizer"] = self.tokenizer
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in settings.items()
            if value is not None
        }

    def _schemes(self) -> Recipe:
        if self.recipe is not None:
            return named(self.recipe)
        if self.bits is None:
            return Recipe(None)
        bits = None if isinstance(self.bits, EllipsisType) else self.bits
        return Recipe(uniform(bits, self.group_size, self.mode))

    def _check_quantizing(self) -> None:
        """Raise OptionError for bits, group size, mode, recipe and target that exclude each other."""
        bits_given = isinstance(self.bits, int)
        others_given = self.group_size is not None or self.mode != "affine"
        if self.only_casts and others_given:
            raise OptionError(
                Setting("mode" if self.group_size is None else "group_size"),
                " is for quantizing: give ",
                Setting("bits"),
                " too, or leave it out to only cast",
            )
        if self.recipe is not None and (bits_given or others_given):
            raise recipe_conflict()
        if self.save_recipe is not None and self.only_casts:
            raise OptionError(
                "nothing is quantized, so there is no recipe to save: give ",
                Setting("bits"),
                ", or leave out ",
                Setting("save_recipe"),
            )
        target = next((name for name in OPTIONS if getattr(self, name) is not None), None)
        if target and (self.bits is not ... or others_given or self.recipe is not None):
            raise OptionError(
                Setting(target),
                " chooses bits and group sizes itself, in mode affine: leave out ",
                *_listed("bits", "group_size", "recipe", "mode"),
            )

    def _check_measuring(self) -> None:
        """Raise OptionError for a card or text that nothing would be measured for."""
        if (self.card or self.text is not None) and not self.keep:
            card = Setting("card", True) if self.card else Setting("text")
            raise OptionError(
                "a card needs the original again: give either ", card, " or ", Setting("keep", False)
            )
        if self.text is not None and self.card is False:
            raise OptionError(
                Setting("text"),
                " is what the card measures on: give ",
                Setting("card", True),
                " instead of ",
                Setting("card", False),
                ", or leave out the text",
            )
        if self.text is not None and self.card is None and self.only_casts:
            raise OptionError(
                Setting("text"),
                " is what the card measures on, and a cast gets none unless asked: give ",
                Setting("card", True),
                ", or leave out the text",
            )

    def _check_calibrating(self) -> None:
        """Raise OptionError for what calibration cannot do. The layers of a recipe are checked when they are
        known.
        """
        for name in NO_FILES:
            if given(self.calibrate).count(name) > 1:
                again = f' has "{name}" twice: name it once (a file of that name is ./{name})'
                raise OptionError(Setting("calibrate"), again)
        if self.calibrates and not self.keep:
            raise OptionError(
                "calibration reads the original more than once: leave out ", Setting("keep", False)
            )
        if self.calibrates and self.recipe is None:
            check_affine([] if self.schemes.default is None else [self.schemes.default])


def check_affine(schemes: Collection[Quantization]) -> None:
    """Raise OptionError for layers that calibration cannot quantize: of another mode than affine, or none."""
    if not schemes:
        raise OptionError(
            "nothing is quantized, so there is nothing to calibrate: give ",
            Setting("bits"),
            ", or leave out ",
            Setting("calibrate"),
        )
    if any(scheme.mode != "affine" for scheme in schemes):
        raise OptionError(
            "calibration is for affine quantization: leave out ",
            Setting("mode"),
            ", or ",
            Setting("calibrate"),
        )


def check_type(name: str, value: object, types: tuple[type, ...], expected: str) -> None:
    """Raise OptionError for a value of another type than an option takes; True and False are no numbers."""
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        raise OptionError(Setting(name), f" must be {expected}, not {value!r}")


def _listed(*names: str) -> Iterator[str | Setting]:
    """Options as an error lists them: a, b and c."""
    for place, name in enumerate(names):
        if place:
            yield " and " if place == len(names) - 1 else ", "
        yield Setting(name)


_EXPECTED: Mapping[str, tuple[tuple[type, ...], str]] = {
    "bits": ((int, NoneType, EllipsisType), "a whole number or None"),
    "group_size": ((int, NoneType), "a whole number or None"),
    "mode": ((str,), "a name"),
    "recipe": ((str, Path, NoneType), "a name, a file, a folder or None"),
    "dtype": ((str, mx.Dtype, NoneType), "a name or None"),
    "calibrate": ((bool, str, Path, list, tuple), "True, False, a text file or several"),
    **dict.fromkeys(OPTIONS, ((float, int, NoneType), "a number or None")),
    "save_recipe": ((str, Path, NoneType), "a file or None"),
    "revision": ((str, NoneType), "a branch, tag or commit, or None"),
    "tokenizer": ((str, Path, NoneType), "a folder, a hub id or None"),
    "resume": ((bool,), "True or False"),
    "keep": ((bool,), "True or False"),
    "card": ((bool, NoneType), "True, False or None"),
    "text": ((str, Path, list, tuple, NoneType), "a text file, several or None"),
    "upload_to": ((str, NoneType), "a repository's name or None"),
}
