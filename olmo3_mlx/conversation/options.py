"""The settings of an answer: what a caller asks for, over what the checkpoint says."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict, Unpack

from olmo3_mlx.config import GenerationConfig
from olmo3_mlx.errors import OptionError
from olmo3_mlx.generation.sampling import SamplingOptions
from olmo3_mlx.model import Olmo3
from olmo3_mlx.option_checks import check_keywords, check_number
from olmo3_mlx.text.stop_strings import StopStrings
from olmo3_mlx.text.tokenizer import Tokenizer


class Options(TypedDict, total=False):
    """The settings of an answer as keywords of `stream`, `generate` and Chat. None is the same as left out:
    then the checkpoint's generation_config.json decides.

    max_tokens  end after so many; as many as the context takes if nothing says otherwise
    stop        end before this text, or one of these
    the others  see SamplingOptions
    """

    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str] | None


@dataclass(frozen=True)
class GenerationOptions:
    """The settings of an answer, decided and checked. Raises OptionError for values outside their range."""

    sampling: SamplingOptions
    max_tokens: int | None = None  # None: as many as the context takes
    stop: tuple[str, ...] = ()
    eos_token_ids: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_number("max_tokens", self.max_tokens, lambda n: n >= 1, "of at least 1", whole=True)
        StopStrings(self.stop)  # refuses an empty one

    @classmethod
    def of(cls, model: Olmo3, tokenizer: Tokenizer, **options: Unpack[Options]) -> "GenerationOptions":
        """What is given, over the defaults of a checkpoint. An answer ends at every end token that one of its
        files names: generation_config.json, config.json, or the tokenizer's `eos_token`, which alone is right
        in some fine-tunes.
        """
        defaults = model.generation_config
        ends = tuple(dict.fromkeys(defaults.eos_token_ids + tokenizer.eos_token_ids))
        return cls.over(replace(defaults, eos_token_ids=ends), **options)

    @classmethod
    def over(
        cls,
        defaults: GenerationConfig,
        **options: Unpack[Options],
    ) -> "GenerationOptions":
        """What is given, over the checkpoint's own defaults.

        A filter given to a checkpoint that is greedy by default asks for sampling: at temperature 1.
        """
        check_keywords(options, Options)
        given: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
        stop = given.pop("stop", defaults.stop_strings)
        max_tokens = given.pop("max_tokens", defaults.max_new_tokens)
        filters = ("top_p", "top_k", "min_p")
        if not defaults.temperature and any(key in given for key in filters):
            given.setdefault("temperature", 1.0)
        for key in ("temperature", "repetition_penalty", *filters):
            given.setdefault(key, getattr(defaults, key))
        return cls(
            sampling=SamplingOptions(**given),
            max_tokens=max_tokens,
            stop=_stop_strings(stop),
            eos_token_ids=frozenset(defaults.eos_token_ids),
        )


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = [stop] if isinstance(stop, str) else stop or ()
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) for s in strings):
        raise OptionError(f"stop must be a string or a list of strings, not {stop!r}")
    return tuple(strings)
