"""Typed values out of a JSON object, with errors that name the key, what was expected, what came."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmo3_mlx.errors import ConfigError
from olmo3_mlx.git_lfs import refuse_pointer

_REQUIRED = object()


class Fields:
    """Reads one JSON object; `where` opens every error message, "config.json: rope_scaling" say."""

    def __init__(self, data: Mapping[str, Any], where: str) -> None:
        self.data = data
        self.where = where

    def __contains__(self, key: str) -> bool:
        """True if the key is there with something other than null."""
        return self.data.get(key) is not None

    def refuse(self, key: str, expected: str) -> ConfigError:
        """The error that says what was expected under `key`, and what stands there."""
        came = repr(self.data[key]) if key in self.data else "nothing"
        return ConfigError(f"{self.where}: {key} must be {expected}, not {came}")

    def integer(self, key: str, default: Any = _REQUIRED, *, least: int = 1) -> int:
        """A whole number of at least `least`, which 31 bits can hold; null counts as absent."""
        value = self._get(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.refuse(key, f"a whole number of at least {least}")
        if value >= 2**31:
            raise self.refuse(key, "a whole number below 2147483648")
        return value

    def number(
        self,
        key: str,
        default: Any = _REQUIRED,
        *,
        least: float = 0.0,
        most: float = sys.float_info.max,
    ) -> float:
        """A finite number from `least` to `most`; null counts as absent."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refuse(key, "a number")
        if not least <= value <= most:
            upper = "" if most == sys.float_info.max else f" and at most {most:g}"
            raise self.refuse(key, f"a finite number of at least {least:g}{upper}")
        return float(value)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        """True or false; null counts as absent."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def fields(self, key: str) -> "Fields":
        """The object under `key`."""
        value = self.data.get(key)
        if not isinstance(value, dict):
            raise self.refuse(key, "an object")
        return Fields(value, f"{self.where}: {key}")

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of ids; empty if absent or null."""
        value = self.data.get(key)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self.refuse(key, "a token id or a list of them")
        return tuple(ids)

    def strings(self, key: str) -> tuple[str, ...]:
        """One text or a list of texts, none of them empty; empty if absent or null."""
        value = self.data.get(key)
        texts = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(text, str) and text for text in texts):
            raise self.refuse(key, "a text or a list of them")
        return tuple(texts)

    def _get(self, key: str, default: Any) -> Any:
        if key in self:
            return self.data[key]
        if default is _REQUIRED:
            raise self.refuse(key, "there")
        return default


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError if the file is no such thing."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a byte order mark first
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        refuse_pointer(path, ConfigError)
        raise ConfigError(f"{path}: expected a JSON object, could not read one: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data
