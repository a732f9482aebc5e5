"""The models that come with this package, and the folder that a model's name means."""

from pathlib import Path

from nvlm_runtime.presets import PRESETS

BUNDLED = Path(__file__).parents[1] / "models"


def checkpoint_folder(name: str | Path) -> Path:
    """Finds the folder of a model.

    Args:
        name: a bundled name or a folder.

    Returns:
        The folder, which exists.

    Raises:
        ValueError: there is none; says what was expected.
    """
    bundled = sorted(path.parent.name for path in BUNDLED.glob("*/config.json"))
    if str(name) in bundled:
        return BUNDLED / str(name)
    if not isinstance(name, str | Path):
        raise ValueError(f"a model is a name or a folder, got {type(name).__name__}")
    if Path(name).is_dir():
        return Path(name)
    if str(name) in PRESETS:
        raise ValueError(f"{name} has no weights in this package: give the folder of its checkpoint")
    raise ValueError(f"unknown model {str(name)!r}: expected a checkpoint folder or one of {', '.join(bundled)}")
