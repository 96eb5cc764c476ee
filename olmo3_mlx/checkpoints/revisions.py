"""What a model's branches and tags on the hub say of its training, in the order of it.

Olmo's makers publish checkpoints on the way as branches named stage1-step1413814, stage2-ingredient1-step9,
stage1-step5000-tokens21B or step_0100. What a name does not tell stays None.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from olmo3_mlx.checkpoints.hub import HUB_ID, hub_errors
from olmo3_mlx.errors import CheckpointError

_NAME = re.compile(
    r"(?:stage(?P<stage>\d+))?"
    r"(?:(?:^|-)ingredient(?P<ingredient>\d+))?"
    r"(?:(?:^|-)step_?(?P<step>\d+))?"
    r"(?:-tokens(?P<tokens>\d+(?:\.\d+)?)(?P<unit>[KMBT]))?"
    r"(?:-.*)?"
)
_UNITS = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Revision:
    """A branch or tag, its commit, and what its name tells: `step` of its stage, `tokens` seen by then."""

    name: str
    kind: str
    commit: str
    stage: int | None = None
    ingredient: int | None = None
    step: int | None = None
    tokens: int | None = None

    @classmethod
    def named(cls, name: str, kind: str, commit: str) -> "Revision":
        """Read the name."""
        found = _NAME.fullmatch(name)
        if found is None or not (found["stage"] or found["ingredient"] or found["step"]):
            return cls(name, kind, commit)
        tokens = round(float(found["tokens"]) * _UNITS[found["unit"]]) if found["tokens"] else None
        stage, ingredient, step = (
            None if found[part] is None else int(found[part]) for part in ("stage", "ingredient", "step")
        )
        return cls(name, kind, commit, stage, ingredient, step, tokens)

    @property
    def _place(self) -> tuple[float, ...]:
        """Where it stands in training: other names come after it, main at the end."""
        if self.stage is None and self.step is None:
            return 2 if self.name == "main" else 1, 0, 0, 0
        return 0, self.stage or 0, self.ingredient or 0, math.inf if self.step is None else self.step


def in_training_order(revisions: Iterable[Revision]) -> list[Revision]:
    """By stage, ingredient and step, then by name."""
    return sorted(revisions, key=lambda revision: (revision._place, revision.name, revision.kind))


def list_revisions(hub_id: str) -> list[Revision]:
    """The branches and tags of a model on the hub, in training order; nothing is downloaded.

    Raises CheckpointError for what is no hub id, HubError for what the hub does not give.
    """
    if not HUB_ID.fullmatch(hub_id):
        raise CheckpointError(
            f"{hub_id or 'the empty name'}: no hub id (one looks like allenai/Olmo-3-1025-7B)"
        )
    from huggingface_hub import HfApi  # noqa: PLC0415  (slow to import, as in hub.py)

    with hub_errors(hub_id, doing="listing its revisions", advice="check the network, try again"):
        refs = HfApi().list_repo_refs(hub_id)
    kinds = (("branch", refs.branches), ("tag", refs.tags))
    return in_training_order(
        Revision.named(ref.name, kind, ref.target_commit) for kind, found in kinds for ref in found
    )
