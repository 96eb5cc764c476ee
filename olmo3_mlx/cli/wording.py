"""Errors of the library as the command line words them: options as flags, and the verb that helps."""

from olmo3_mlx.errors import Olmo3Error, Setting, UnknownNameError, UnknownRevisionError
from olmo3_mlx.published import SIZES

# Where a flag is not the option's name with dashes, and where it is another's.
_SPELLED = {"raw=True": "`olmo3 generate --raw`", "bits=None": "--dtype alone"}
_NAMES = {"upload_to": "upload"}


def worded(error: Olmo3Error) -> str:
    """One line on an error."""
    line = error.worded(flag)
    if isinstance(error, UnknownRevisionError):
        line += f": `olmo3 revisions {error.hub_id}` lists them"
    if isinstance(error, UnknownNameError) and error.name.lower() in SIZES:
        line += "; `olmo3 inspect` alone knows it, as a size"
    return line


def flag(setting: Setting) -> str:
    """How the command line spells an option: `--context 512`, `--resume`, `--no-keep`."""
    if str(setting) in _SPELLED:
        return _SPELLED[str(setting)]
    name = _NAMES.get(setting.name, setting.name).replace("_", "-")
    if setting.value is False:
        return f"--no-{name}"
    return f"--{name}" if setting.value is ... or setting.value is True else f"--{name} {setting.value}"
