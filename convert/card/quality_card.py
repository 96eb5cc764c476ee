"""The quality card in a folder: QUALITY.md for people, quality.json for programs, and two pictures."""

import json
from contextlib import suppress
from pathlib import Path

from convert.card.comparison import Comparison
from convert.card.page import CARD, FIGURES, KL_PICTURE, LAYERS_PICTURE, page
from convert.card.pictures import kl_picture, layers_picture
from olmo3_mlx.durable import replace_file
from olmo3_mlx.errors import ConvertError


def write_card(folder: Path, comparison: Comparison) -> list[Path]:
    """Write the card into `folder`, over an older one; the files written.

    The same figures give the same bytes. Raises ConvertError if the folder is not there or the disk does
    not take them; then none is left.
    """
    contents = {
        LAYERS_PICTURE: layers_picture(comparison.quality),
        KL_PICTURE: kl_picture(comparison.quality),
        FIGURES: (json.dumps(comparison.figures(), indent=2, ensure_ascii=False) + "\n").encode(),
        CARD: page(comparison).encode(),
    }
    written = []
    for name, content in contents.items():
        try:
            path = replace_file(folder / name, lambda new, content=content: new.write_bytes(content))  # type: ignore[misc]
            path.chmod(0o644)
        except OSError as error:
            with suppress(OSError):
                remove_card(folder)
            raise ConvertError(f"{name} could not be written: {error.strerror}") from None
        written.append(path)
    return written


def remove_card(folder: Path) -> None:
    """Remove a card from `folder`, or what is left of it."""
    for name in (CARD, FIGURES, KL_PICTURE, LAYERS_PICTURE):
        (folder / name).unlink(missing_ok=True)
