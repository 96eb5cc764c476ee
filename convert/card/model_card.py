"""README.md of a result, which the hub shows: where it comes from, how it was quantized, how to run it."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx

from convert.calibration.text import CalibratedOn
from convert.card.command import own_name
from convert.card.comparison import Comparison
from convert.card.markdown import code, named, table, texts_table
from convert.card.page import CARD
from convert.card.quality import Figures
from convert.card.verdict import place
from convert.recipe import Plan
from convert.size import Size
from olmo3_mlx.checkpoints.names import is_hub_id
from olmo3_mlx.errors import CheckpointError

_RUNS = 4  # of layers that follow each other, named for one kind of them in a row of the table

T = TypeVar("T")

QUANTIZED, FINETUNE = "quantized", "finetune"  # relations of a model to its base, as the hub calls them
_PUBLISHER = "allenai/"  # all of whose Olmo 3 checkpoints are under this licence:
_LICENSE = "apache-2.0"
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)")


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a result that its model card tells.

    name                 what one calls it by: a folder or a repository
    source               the checkpoint that was converted
    source_quantization  how that one is quantized itself, in words; "" if it is not
    base, license        the original's hub id and licence, as far as they are known
    relation             how the source is related to the base: QUANTIZED if it is that one, FINETUNE if it
                         was trained from it, None if nobody knows
    plan                 which layers are quantized, and how
    plain                the layers that could be quantized and are not, with their dtypes, by path
    dtype                of what is not quantized
    size                 the result's
    calibrated_on        the texts that it was calibrated on, if it was
    program              the versions that converted it
    chats                whether it has a chat template
    """

    name: str
    source: str
    source_quantization: str
    base: str | None
    relation: str | None
    license: str | None
    plan: Plan
    plain: Mapping[str, mx.Dtype]
    dtype: str
    size: Size
    calibrated_on: CalibratedOn | None
    program: str
    chats: bool


def origin(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
    """The hub id of the original in a folder with this config.json, how a result is related to it, and the
    licence; each as far as it can be told.

    A download, and what the card of a conversion calls its base, are the original itself: QUANTIZED. What
    any other card calls its base is the model that it was trained from: FINETUNE. What config.json calls
    _name_or_path may be either.
    """
    front = _front_matter(folder / "README.md")
    base, relation = None, None
    if front.get("library_name") == "mlx":
        base = _one_id(front.get("base_model"))
        relation = FINETUNE if front.get("base_model_relation") == FINETUNE else QUANTIZED
    if base is None:
        base, relation = _hub_id(folder.resolve()), QUANTIZED
    known = front.get("license")
    if not isinstance(known, str):
        known = _LICENSE if base is not None and base.startswith(_PUBLISHER) else None
    if base is None:
        base, relation = _one_id(config.get("_name_or_path")), None
    if base is None:
        base, relation = _one_id(front.get("base_model")), FINETUNE
    return base, relation if base else None, known


def _one_id(value: object) -> str | None:
    """The hub id that a value is, or holds as the only one; a path that is one here, too, may be a folder."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    try:
        return value if isinstance(value, str) and is_hub_id(value) else None
    except CheckpointError:  # a file here
        return None


def source_name(folder: Path) -> str:
    """The name of a checkpoint's folder: the hub id if it is a download, else its own name."""
    return _hub_id(folder.resolve()) or own_name(folder)


def _hub_id(folder: Path) -> str | None:
    """The hub id whose download lies in a folder of the hub's cache: models--owner--name/snapshots/COMMIT."""
    cached = _CACHED.fullmatch(folder.parent.parent.name) if folder.parent.name == "snapshots" else None
    return f"{cached[1]}/{cached[2]}" if cached else None


def write_model_card(folder: Path, facts: ModelFacts, comparison: Comparison | None = None) -> None:
    """Write README.md, with the quality in a line or two if it was measured."""
    from huggingface_hub import ModelCardData  # noqa: PLC0415  (slow to import)

    bits = sorted({scheme.bits for scheme in facts.plan.layers.values()})
    data = ModelCardData(
        base_model=facts.base,
        license=facts.license,
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=["mlx", "olmo3", *(f"{count}-bit" for count in bits)],
    )
    if facts.relation == FINETUNE or (facts.relation == QUANTIZED and bits):
        data.base_model_relation = facts.relation  # type: ignore[attr-defined]  # the hub knows it
    verb, model = "chat" if facts.chats else "generate", shlex.quote(facts.name)
    text = f"""---
{data.to_yaml()}
---

# {Path(facts.name).name}

{_summary(facts)}

{_quantization(facts)}
{_quality(facts, comparison)}
## Run it

With olmo3-mlx:

```
olmo3 {verb} {"" if facts.chats else '"Once upon a time" '}--model {model}
```

With [mlx-lm](https://pypi.org/project/mlx-lm/):

```
mlx_lm.{verb} --model {model}{"" if facts.chats else ' --prompt "Once upon a time"'}
```

Made by {facts.program}.
"""
    (folder / "README.md").write_text(re.sub(r"\n{3,}", "\n\n", text), encoding="utf-8")


def _quality(facts: ModelFacts, comparison: Comparison | None) -> str:
    if comparison is None:
        return ""
    original = (
        "the quantized checkpoint that it was made from" if facts.source_quantization else "the original"
    )
    quality, worst = comparison.quality, comparison.quality.kinds[comparison.decided_by]
    kind = named(comparison.decided_by)
    of = f", said of {kind}, where it is farthest off" if comparison.said_of else ""
    rows: list[tuple[str, ...]] = [
        ("text", "mean KL, nats", "same top token", "perplexity, ratio"),
        ("---", "---:", "---:", "---:"),
        (kind, *_of_text(worst)),
    ]
    if len(quality.kinds) > 1:
        rows.append((f"all {len(quality.kinds)} kinds of text", *_of_text(quality)))
    return (
        f"\n## Quality\n\nMeasured against {original}: **{comparison.verdict}** ({comparison.meaning}){of}.\n"
        f"\n{table(rows)}\n\nThe mean KL on {kind} lies {place(worst.kl_mean)} (a small model's KL is not a "
        f"large one's). [On which texts, how, and where it is off]({CARD}).\n"
    )


def _of_text(figures: Figures) -> tuple[str, ...]:
    return (
        f"{figures.kl_mean:.5f} ± {figures.kl_error:.5f}",
        f"{figures.agreement:.1%} of {figures.tokens:,}",
        f"{figures.perplexity_ratio:.4f} ± {figures.perplexity_ratio_error:.4f}",
    )


def _summary(facts: ModelFacts) -> str:
    size = f"{facts.size.in_words}, {facts.size.bits_per_weight:.3f} bits per weight"
    base = f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else ""
    itself = base if facts.relation == QUANTIZED else ""
    if facts.source_quantization:
        return (
            f"{itself or 'An Olmo 3 model'}, dequantized for MLX to {facts.dtype} from the quantized "
            f"checkpoint {code(facts.source)} ({facts.source_quantization}): {size}. What quantizing "
            "lost is not back."
        )
    form = "quantized for MLX" if facts.plan.layers else f"in {facts.dtype} for MLX"
    model = itself or f"The Olmo 3 model {code(facts.source)}"
    if base and not itself:
        model += f", trained from {base}," if facts.relation == FINETUNE else f" (its config names {base})"
    return f"{model} {form}: {size}."


def _quantization(facts: ModelFacts) -> str:
    if not facts.plan.layers:
        return ""
    rounding = "Rounded to nearest."
    if facts.calibrated_on:
        rounding = f"Calibrated on {facts.calibrated_on.in_words}, block by block."
    blocks = len({_split(path)[0] for path in (*facts.plan.layers, *facts.plain)} - {None})
    if facts.calibrated_on and len(facts.calibrated_on.texts) > 1:
        rounding += f"\n\n{texts_table(facts.calibrated_on.texts)}"
    lines = [rounding, "", "| layers | bits | group size | mode |", "|---|---|---|---|"]
    for scheme, paths in _alike(facts.plan.layers):
        lines.append(f"| {_layers(paths, blocks)} | {scheme.bits} | {scheme.group_size} | {scheme.mode} |")
    for dtype, paths in _alike(facts.plain):
        lines.append(f"| {_layers(paths, blocks)} | {8 * dtype.size} | – | not quantized |")
    more = " Each layer's bits are in config.json." if len(set(facts.plan.layers.values())) > 1 else ""
    end = f"Norms are {facts.dtype}.{_left_out(facts.plan, blocks)}{more}"
    return "\n".join([*lines, "", end, ""])


def _alike(layers: Mapping[str, T]) -> list[tuple[T, list[str]]]:
    """The paths of layers that have the same value, the most first."""
    alike: dict[T, list[str]] = {}
    for path, value in layers.items():
        alike.setdefault(value, []).append(path)
    return sorted(alike.items(), key=lambda item: -len(item[1]))


def _layers(paths: Iterable[str], blocks: int) -> str:
    """Name layers of a model with so many blocks: `mlp.up_proj`, `mlp.down_proj` of layers 3–5; `lm_head`."""
    kinds: dict[str, list[int]] = {}
    for path in paths:
        block, kind = _split(path)
        kinds.setdefault(kind, []).extend([] if block is None else [block])
    alike = _alike({kind: tuple(sorted(numbers)) for kind, numbers in kinds.items()})
    return "; ".join(f"`{'`, `'.join(names)}`{_blocks(numbers, blocks)}" for numbers, names in alike)


def _split(path: str) -> tuple[int | None, str]:
    """Split a path into block and kind: 3, mlp.up_proj of model.layers.3.mlp.up_proj; None, lm_head."""
    inside = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", path)
    return (int(inside[1]), inside[2]) if inside else (None, path.removeprefix("model."))


def _blocks(numbers: Sequence[int], blocks: int) -> str:
    """Name the blocks in few words: " of layers 0, 3–5"."""
    if not numbers:
        return ""
    if len(numbers) == blocks:
        return f" of all {blocks} layers"
    runs: list[list[int]] = []
    for block in numbers:
        if runs and runs[-1][-1] == block - 1:
            runs[-1].append(block)
        else:
            runs.append([block])
    if len(runs) > _RUNS:
        return f" of {len(numbers)} layers"
    spans = (f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f" of layer{'s' if len(numbers) > 1 else ''} {', '.join(spans)}"


def _left_out(plan: Plan, blocks: int) -> str:
    if not plan.left_out:
        return ""
    return f" Not quantized as the group size does not divide their inputs: {_layers(plan.left_out, blocks)}."


def _front_matter(path: Path) -> Mapping[str, Any]:
    """Read what a card's first lines say: nothing if there is no card or it cannot be read."""
    from huggingface_hub import metadata_load  # noqa: PLC0415  (slow to import)

    try:
        front = metadata_load(path)
    except Exception:  # whatever somebody wrote there
        return {}
    return front if isinstance(front, dict) else {}
