"""Models that are part of this package, and where a model's name leads. Torch-free."""

from __future__ import annotations

from pathlib import Path

DEFAULT_DRAFT = "smollm2-draft"
"""Of the default model; `README.md` in its folder says how it was made and how often it is right."""

SHIPPED = {name: Path(__file__).parents[2] / "assets" / name for name in (DEFAULT_DRAFT,)}
"""Their folders by name."""


def place_of(model: str) -> Path:
    """The path that a user's name of a model means: as it stands, in the home folder behind "~/", or, where nothing has that path,
    the folder of a model that is part of this package. There need be nothing."""
    path = Path(model).expanduser() if model.startswith("~/") else Path(model)
    return SHIPPED[model] if model in SHIPPED and not path.exists() else path
