"""README.md of a result, as the hub shows it: where it comes from, what was done, how to run it."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from convert.calibration.text import CalibratedOn
from convert.card.page import CARD, called, code
from convert.card.quality import Quality
from convert.card.verdict import verdict
from convert.recipe import Plan
from convert.size import Size

_RUNS = 4  # of layers that follow each other, named for one kind of them in a row of the table

T = TypeVar("T")

_PUBLISHER = "allenai/"  # all of whose Olmo 3 checkpoints are under this licence:
_LICENSE = "apache-2.0"
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)")


@dataclass(frozen=True)
class Made:
    """What a conversion made: `name` is what one calls it by, a folder or a repository, `source` what it was
    made from, which is `quantized` so, in words, if it is. `plain` are the layers that could be quantized and
    are not, with their dtypes, by path; `on` is what it was calibrated on, if it was.
    """

    name: str
    source: str
    quantized: str
    base: str | None
    license: str | None
    plan: Plan
    plain: Mapping[str, mx.Dtype]
    dtype: str
    size: Size
    on: CalibratedOn | None
    program: str
    chats: bool


def origin(folder: Path) -> tuple[str | None, str | None]:
    """The hub id of the original in a folder and its licence, as far as can be told.

    What an original's own card calls its base is the model that it was trained from.
    """
    front = _front_matter(folder / "README.md")
    converted = front.get("library_name") == "mlx"
    base = front.get("base_model") if converted else None
    base = base if isinstance(base, str) else _hub_id(folder.resolve())
    known = front.get("license")
    if not isinstance(known, str):
        known = _LICENSE if base is not None and base.startswith(_PUBLISHER) else None
    return base, known


def source_name(folder: Path) -> str:
    """What a checkpoint's folder is called: the hub id if it is a download, else its own name."""
    return _hub_id(folder.resolve()) or called(folder)


def _hub_id(folder: Path) -> str | None:
    """Whose download it is, if it lies in the hub's cache: models--owner--name/snapshots/COMMIT."""
    cached = _CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return f"{cached[1]}/{cached[2]}" if cached else None


def write_model_card(folder: Path, made: Made, quality: Quality | None = None) -> None:
    """Write README.md, with what was measured of its quality in a line or two."""
    from huggingface_hub import ModelCardData  # noqa: PLC0415  (slow to import)

    bits = sorted({how.bits for how in made.plan.layers.values()})
    data = ModelCardData(
        base_model=made.base,
        license=made.license,
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "olmo3", *(f"{count}-bit" for count in bits)],
    )
    if made.base and bits:
        data.base_model_relation = "quantized"  # type: ignore[attr-defined]  # the hub knows it
    verb, model = "chat" if made.chats else "generate", shlex.quote(made.name)
    text = f"""---
{data.to_yaml()}
---

# {Path(made.name).name}

{_what(made)}

{_how(made)}
{_quality(made, quality)}
## Run it

With [olmo3-mlx](https://pypi.org/project/olmo3-mlx/):

```
olmo3 {verb} {"" if made.chats else '"Once upon a time" '}--model {model}
```

With [mlx-lm](https://pypi.org/project/mlx-lm/):

```
mlx_lm.{verb} --model {model}{"" if made.chats else ' --prompt "Once upon a time"'}
```

Made by {made.program}.
"""
    (folder / "README.md").write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")


def _quality(made: Made, quality: Quality | None) -> str:
    if quality is None:
        return ""
    original = "the quantized checkpoint that it was made from" if made.quantized else "the original"
    before, after = quality.perplexity
    return (
        f"\n## Quality\n\nMeasured against {original}: **{verdict(quality)}**. Mean KL divergence "
        f"{quality.kl_mean:.5f} nats, the same top token at {quality.agreement:.1%} of {quality.tokens:,} "
        f"positions, perplexity {before:.3f} before and {after:.3f} after. [How, and where it is off]"
        f"({CARD}).\n"
    )


def _what(made: Made) -> str:
    size = f"{made.size.in_words}, {made.size.bits_per_weight:.3f} bits per weight"
    base = f"[{made.base}](https://huggingface.co/{made.base})" if made.base else ""
    if made.quantized:
        return (
            f"{base or 'An Olmo 3 model'}, dequantized for MLX to {made.dtype} from the quantized checkpoint "
            f"{code(made.source)} ({made.quantized}): {size}. What quantizing lost is not back."
        )
    how = "quantized for MLX" if made.plan.layers else f"in {made.dtype} for MLX"
    return f"{base or f'The Olmo 3 model {code(made.source)}'} {how}: {size}."


def _how(made: Made) -> str:
    if not made.plan.layers:
        return ""
    how_made = f"Calibrated on {made.on.in_words}, block by block." if made.on else "Rounded to nearest."
    blocks = len({_split(path)[0] for path in (*made.plan.layers, *made.plain)} - {None})
    lines = [how_made, "", "| layers | bits | group size | mode |", "|---|---|---|---|"]
    for how, paths in _alike(made.plan.layers):
        lines.append(f"| {_layers(paths, blocks)} | {how.bits} | {how.group_size} | {how.mode} |")
    for dtype, paths in _alike(made.plain):
        lines.append(f"| {_layers(paths, blocks)} | {8 * dtype.size} | – | not quantized |")
    more = " Each layer's bits are in config.json." if len(set(made.plan.layers.values())) > 1 else ""
    end = f"Norms are {made.dtype}.{_left_out(made.plan, blocks)}{more}"
    return "\n".join([*lines, "", end, ""])


def _alike(layers: Mapping[str, T]) -> list[tuple[T, list[str]]]:
    """The paths of layers that are alike, the most first."""
    alike: dict[T, list[str]] = {}
    for path, how in layers.items():
        alike.setdefault(how, []).append(path)
    return sorted(alike.items(), key=lambda item: -len(item[1]))


def _layers(paths: Iterable[str], blocks: int) -> str:
    """Layers of a model with so many blocks: `mlp.up_proj`, `mlp.down_proj` of layers 0, 3–5; `lm_head`"""
    kinds: dict[str, list[int]] = {}
    for path in paths:
        block, kind = _split(path)
        kinds.setdefault(kind, []).extend([] if block is None else [block])
    alike = _alike({kind: tuple(sorted(found)) for kind, found in kinds.items()})
    return "; ".join(f"`{'`, `'.join(names)}`{_which(found, blocks)}" for found, names in alike)


def _split(path: str) -> tuple[int | None, str]:
    """model.layers.3.mlp.up_proj -> 3, mlp.up_proj; lm_head -> None, lm_head."""
    inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    return (int(inside[1]), inside[2]) if inside else (None, path.removeprefix("model."))


def _which(found: Sequence[int], blocks: int) -> str:
    """Of which blocks, in few words."""
    if not found:
        return ""
    if len(found) == blocks:
        return f" of all {blocks} layers"
    runs: list[list[int]] = []
    for block in found:
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    if len(runs) > _RUNS:
        return f" of {len(found)} layers"
    said = (f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f" of layer{'s' if len(found) > 1 else ''} {', '.join(said)}"


def _left_out(plan: Plan, blocks: int) -> str:
    if not plan.left_out:
        return ""
    return f" Not quantized as the group size does not divide their inputs: {_layers(plan.left_out, blocks)}."


def _front_matter(path: Path) -> Mapping[str, Any]:
    """What a card's first lines say, nothing if there is no card or it cannot be read."""
    from huggingface_hub import metadata_load  # noqa: PLC0415  (slow to import)

    try:
        found = metadata_load(path)
    except Exception:  # whatever somebody wrote there
        return {}
    return found if isinstance(found, dict) else {}
