"""A plan as a recipe's file, so that another conversion gives every layer the same: see convert.recipe."""

import errno
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from convert.recipe import Plan, Recipe
from olmo3_mlx.durable import replace_file
from olmo3_mlx.errors import ConvertError
from olmo3_mlx.quantization import MODES, Quantization

_OPENING = "# Which layers of "  # of every file that this writes


def recipe_of(plan: Plan, inputs: Mapping[str, int]) -> Recipe:
    """The shortest recipe that gives a model's layers what the plan does. `inputs` are those of all layers
    that can be quantized, by path, as in the plan. Kinds of which most layers agree share a rule.
    """

    def leaves_out(scheme: Quantization) -> bool:
        """Whether, as the default, it leaves out what the plan does: its group size divides none of those
        layers' inputs. "none" would be something else: nobody asked for these to stay as they are.
        """
        return all(inputs[path] % scheme.group_size for path in plan.left_out)

    used = [scheme for scheme, _ in Counter(plan.layers.values()).most_common()]
    others = [Quantization(4, group_size) for group_size in MODES["affine"][1]]
    defaults = list(filter(leaves_out, used)) or list(filter(leaves_out, others))[:1] or used[:1]
    recipes = [Recipe(default, tuple(_rules(plan, inputs, default))) for default in defaults]
    return min(recipes, key=lambda recipe: len(recipe.rules))


def _rules(
    plan: Plan, inputs: Mapping[str, int], default: Quantization
) -> Iterator[tuple[str, Quantization | None]]:
    """The rules beside a default: those of kinds, then those of single layers, which count more."""
    kinds: dict[str, dict[str, Quantization | None]] = {}
    for path, width in inputs.items():
        itself = path in plan.left_out and width % default.group_size
        kinds.setdefault(path.rpartition(".")[2], {})[path] = default if itself else plan.layers.get(path)
    single: list[tuple[str, Quantization | None]] = []
    common: Quantization | None
    for kind, layers in kinds.items():
        (most, count), common = Counter(layers.values()).most_common(1)[0], default
        unlike_default = sum(scheme != default for scheme in layers.values())
        if 1 + len(layers) - count < unlike_default and not layers.keys() & set(plan.left_out):
            yield f"*.{kind}", most
            common = most
        single += [(path, scheme) for path, scheme in layers.items() if scheme != common]
    yield from single


def in_toml(recipe: Recipe, name: str, facts: Iterable[str]) -> str:
    """The recipe's file, which says first of which model it is, `name`, and `facts` on how it came about."""
    assert recipe.default is not None
    lines = [f"{_OPENING}{name} got how many bits.", *(f"# {fact}" for fact in facts)]
    lines = ["".join(c if c.isprintable() else "?" for c in line) for line in lines]
    lines += [f"{key} = {value}" for key, value in _keys(recipe.default, None)]
    if recipe.rules:
        lines += ["", "[layers]"]
        lines += [f'"{pattern}" = {_value(scheme, recipe.default)}' for pattern, scheme in recipe.rules]
    return "\n".join(lines) + "\n"


def _keys(scheme: Quantization, outer: Quantization | None) -> list[tuple[str, str]]:
    """The keys and values of a scheme; the mode only where it is not that of `outer`, or else affine."""
    keys = [("bits", str(scheme.bits)), ("group_size", str(scheme.group_size))]
    if scheme.mode != (outer.mode if outer else "affine"):
        keys.append(("mode", f'"{scheme.mode}"'))
    return keys


def _value(scheme: Quantization | None, default: Quantization) -> str:
    if scheme is None:
        return '"none"'
    if (scheme.group_size, scheme.mode) == (default.group_size, default.mode):
        return str(scheme.bits)
    return f"{{ {', '.join(f'{key} = {value}' for key, value in _keys(scheme, default))} }}"


def new_file(name: str | Path, dest: Path, work: Path, *, resume: bool) -> Path:
    """The path of a recipe's file that can be written, beside the destination and the folder of its work.

    Raises ConvertError if it is there already, unless it is a recipe that a conversion has saved which goes
    on (`resume`); if its folder is not there or cannot be written, or is to become the result.
    """
    try:
        path = Path(name).expanduser().absolute()
        exists, folder = os.path.lexists(path), path.parent.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConvertError(f"the recipe cannot be saved as {name} ({error}): choose another file") from None
    if exists and not (resume and _is_saved(path)):
        raise ConvertError(f"{name} exists already: choose another file to save the recipe in, or remove it")
    if not folder:
        raise ConvertError(f"the recipe cannot be saved as {name}: there is no folder {path.parent}")
    if path == dest or {dest, work} & set(path.parents):
        raise ConvertError(
            f"the recipe cannot be saved as {name}, where the result is to be: choose another file"
        )
    if not os.access(path.parent, os.W_OK):
        raise ConvertError(f"the recipe cannot be saved as {name}: {path.parent} cannot be written")
    return path


def _is_saved(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as stream:
            return stream.read(len(_OPENING)) == _OPENING
    except (OSError, ValueError):
        return False


def save(path: Path, text: str) -> None:
    """Write a recipe's file, which is whole or not there. One that says the same may be there, of a run that
    was stopped behind this. Raises OSError.
    """
    try:
        if os.path.lexists(path):
            if path.read_bytes() == text.encode():
                return
            raise FileExistsError(errno.EEXIST, "another recipe is there")
        replace_file(path, lambda new: _write(new, text))
    except OSError as error:
        raise OSError(error.errno, f"the recipe {path}: {error.strerror}") from None


def _write(new: Path, text: str) -> None:
    new.unlink()  # nobody else may read it: the file written has the permissions that any new one has
    new.write_text(text, encoding="utf-8")
