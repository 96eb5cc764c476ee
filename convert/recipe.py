"""Recipes: rules that give layers their schemes by patterns, and the plan that results for a model.

A scheme is one layer's bits, group size and mode. A recipe of one's own is a TOML file; the last pattern that
fits a layer's path decides:

    bits = 4                                         # what no pattern names
    group_size = 64
    [layers]
    "*.down_proj" = 6
    "model.layers.[01].*" = { bits = 8, group_size = 32 }
    "model.embed_tokens" = "none"                    # stays as it is

A quantized checkpoint is a recipe too: each layer gets what it has there.
"""

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from olmo3_mlx.checkpoints.checkpoint import Checkpoint
from olmo3_mlx.checkpoints.files import has_weights
from olmo3_mlx.errors import ConfigError, ConvertError, OptionError, Setting
from olmo3_mlx.fields import Fields
from olmo3_mlx.model import Olmo3
from olmo3_mlx.quantization import MODES, Quantization, one_of


@dataclass(frozen=True)
class Plan:
    """The schemes of the layers to quantize, by their paths. `left_out` are those that would be quantized too
    if their group size divided their inputs.
    """

    layers: Mapping[str, Quantization]
    left_out: tuple[str, ...] = ()

    def of(self, name: str) -> Quantization | None:
        """The scheme for the tensor `name` of an unquantized checkpoint; None if it is not quantized."""
        return self.layers.get(name.removesuffix(".weight"))


@dataclass(frozen=True)
class Recipe:
    """A scheme for every layer, `default`, if any, and `rules` for layers that differ: patterns of paths, of
    which the last that fits decides. `paths` are the layers of the checkpoint that it was read off, if it
    was.
    """

    default: Quantization | None
    rules: tuple[tuple[str, Quantization | None], ...] = ()
    paths: frozenset[str] = frozenset()

    def plan(self, model: Olmo3) -> Plan:
        """Give a model's linear layers, embedding and head their schemes.

        Raises ConvertError for a recipe of a model with other layers, a pattern that fits none of them, for
        "none" of them quantized, a group size that divides the inputs of no layer, or not those of a layer
        that a pattern names.
        """
        widths = {path: inputs for path, (_, inputs) in model.quantizable().items()}
        self._check_paths(widths)
        layers, left_out = {}, []
        for path, width in widths.items():
            scheme, named = self._of(path)
            if scheme is None:
                continue
            if width % scheme.group_size == 0:
                layers[path] = scheme
            elif named:
                raise ConvertError(
                    f"the recipe wants group size {scheme.group_size} for {path}, which does not divide its "
                    f"{width} inputs: take a smaller one"
                )
            else:
                left_out.append(path)
        if self.default is not None and not layers and not left_out:
            raise ConvertError(
                'the recipe quantizes nothing, its patterns say "none" of every layer: give one bits, or '
                "only cast (",
                Setting("bits", None),
                ")",
            )
        if self.default is not None and not layers:
            inputs = ", ".join(map(str, sorted({widths[path] for path in left_out})))
            raise ConvertError(
                f"group size {self.default.group_size} divides the inputs of no layer ({inputs}): nothing "
                f"would be quantized: take a smaller one"
            )
        return Plan(layers, tuple(sorted(left_out)))

    def _check_paths(self, paths: Collection[str]) -> None:
        """Raise ConvertError if the recipe speaks of other layers than those at `paths`."""
        blocks = _blocks(paths)
        for pattern, _ in self.rules:
            if not any(fnmatchcase(path, pattern) for path in paths):
                raise ConvertError(
                    f"the recipe's pattern {pattern!r} fits no layer: paths look like "
                    f"model.layers.0.self_attn.q_proj, model.layers.0.mlp.down_proj, model.embed_tokens"
                    f"{', lm_head' if 'lm_head' in paths else ''}; this model has {blocks} blocks, from 0 on"
                )
        if self.paths and self.paths != set(paths):
            other = min(self.paths.symmetric_difference(paths))
            raise ConvertError(
                f"the recipe is a checkpoint of another shape: it has {_blocks(self.paths)} blocks, this "
                f"model {blocks}, and {other} is in one of them only: take a recipe of a model with the same "
                f"layers"
            )

    def _of(self, path: str) -> tuple[Quantization | None, bool]:
        """The scheme of the layer at a path, and whether a rule names that."""
        for pattern, scheme in reversed(self.rules):
            if fnmatchcase(path, pattern):
                return scheme, True
        return self.default, False


def _blocks(paths: Collection[str]) -> int:
    """The number of blocks that have layers among these."""
    return len({path.split(".")[2] for path in paths if path.startswith("model.layers.")})


def _mixed(few: int, more: int, *kinds: str) -> "Recipe":
    """Give all layers `few` bits and these kinds of them `more`, in groups of 64."""
    return Recipe(Quantization(few, 64), tuple((f"*.{kind}", Quantization(more, 64)) for kind in kinds))


# Which kinds get more was measured on the lab's checkpoints (BENCHMARKS.md): an error in v_proj and o_proj
# costs two to forty times what it does elsewhere, by the weight, and they are small; down_proj and gate_proj
# come next.
# Embedding and head are large and cost little by the weight.
RECIPES: Mapping[str, Recipe] = {
    "mixed_3_5": _mixed(3, 5, "v_proj", "o_proj", "down_proj"),
    "mixed_4_5": _mixed(4, 5, "v_proj", "o_proj", "gate_proj", "down_proj"),
    "mixed_4_6": _mixed(4, 6, "v_proj", "o_proj"),
}


def uniform(bits: int | None = None, group_size: int | None = None, mode: str = "affine") -> Quantization:
    """The scheme for all layers alike; bits (4, or 8 in mxfp8) and group size are the mode's usual ones
    unless given.

    Raises OptionError for a mode, bits or a group size that MLX does not have.
    """
    if mode not in MODES:
        raise OptionError(Setting("mode"), f" must be one of {', '.join(MODES)}, not {mode!r}")
    allowed_bits, allowed_groups = MODES[mode]
    if bits is None:
        bits = 4 if mode == "affine" else allowed_bits[0]
    if group_size is None:
        group_size = 64 if mode == "affine" else allowed_groups[0]
    if bits not in allowed_bits:
        raise OptionError(Setting("bits"), f" must be {one_of(allowed_bits)} in mode {mode}, not {bits}")
    if group_size not in allowed_groups:
        raise OptionError(
            Setting("group_size"), f" must be {one_of(allowed_groups)} in mode {mode}, not {group_size}"
        )
    return Quantization(bits, group_size, mode)


def recipe_conflict() -> OptionError:
    """The error for bits, group size or mode beside a recipe."""
    return OptionError(Setting("recipe"), " says bits, group size and mode: give either it or those")


def named(recipe: str | Path) -> Recipe:
    """Find one of RECIPES by its name, or read that in a file or in a quantized checkpoint's folder.

    Raises OptionError, ConfigError, and CheckpointError for a folder with a damaged checkpoint.
    """
    if str(recipe) in RECIPES:
        return RECIPES[str(recipe)]
    try:
        path = Path(recipe).expanduser()
        is_file, is_checkpoint = path.is_file(), (path / "config.json").is_file()
    except (OSError, RuntimeError):  # no name that the system could have
        is_file = is_checkpoint = False
    if is_checkpoint:
        return of_checkpoint(path)
    if not is_file:
        raise OptionError(
            f"no recipe {str(recipe)!r}: expected a file, a quantized checkpoint's folder, or one of "
            f"{', '.join(RECIPES)}"
        )
    return from_file(path)


def of_checkpoint(folder: Path) -> Recipe:
    """Read how a quantized checkpoint's layers are quantized, as this program, mlx-lm or another writes it.

    Raises OptionError for one that is not quantized, ConfigError, CheckpointError.
    """
    checkpoint = Checkpoint.in_folder(folder)
    quantization, layers = checkpoint.config.quantization, Olmo3(checkpoint.config).quantizable()
    if quantization is None:
        raise OptionError(
            f"the recipe {folder} is a checkpoint that is not quantized: expected one that is, or a TOML file"
        )
    schemes = {path: quantization.of(path) for path in layers}
    if has_weights(folder):  # config.json need not name a layer that is not quantized
        schemes = {p: s if f"{p}.scales" in checkpoint.headers else None for p, s in schemes.items()}
    default = quantization.default
    rules = [
        (path, scheme)
        for path, scheme in schemes.items()
        # What the group size does not divide is left out by itself.
        if scheme != default and (scheme is not None or layers[path][1] % default.group_size == 0)
    ]
    return Recipe(default, tuple(rules), frozenset(layers))


def from_file(path: Path) -> Recipe:
    """Read a recipe. Raises OptionError for a file that cannot be read or is no TOML, ConfigError for values
    that cannot be.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"the recipe {path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise OptionError(f"the recipe {path} is not TOML: {error}") from None
    unknown = sorted(data.keys() - {"bits", "group_size", "mode", "layers"})
    if unknown:
        raise ConfigError(f"{path}: expected bits, group_size, mode and layers, got {', '.join(unknown)}")
    fields = Fields({"bits": 4, "group_size": 64, **data} if "mode" not in data else data, str(path))
    default = Quantization.from_fields(fields)
    layers = data.get("layers", {})
    if not isinstance(layers, dict):
        raise fields.refuse("layers", "a table of patterns")
    return Recipe(
        default, tuple((pattern, _rule(path, pattern, v, default)) for pattern, v in layers.items())
    )


def _rule(path: Path, pattern: str, value: Any, default: Quantization) -> Quantization | None:
    if value == "none":
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"bits": value}
    if not isinstance(value, dict):
        raise ConfigError(
            f'{path}: expected bits, a table such as {{ bits = 6, group_size = 32 }} or "none" for '
            f"{pattern!r}, got {value!r}"
        )
    if unknown := sorted(value.keys() - {"bits", "group_size", "mode"}):
        raise ConfigError(
            f"{path}: expected bits, group_size and mode for {pattern!r}, got {', '.join(unknown)}"
        )
    return Quantization.from_fields(Fields(value, f"{path}, {pattern!r}"), default)
