"""What is remembered of this machine from one run to the next: its probe, and how far predictions were off. Torch-free.

One JSON file a machine, under ROWCAST_CACHE, else $XDG_CACHE_HOME/rowcast, else ~/.cache/rowcast. Its name is a digest of the hardware
and the driver, not of the host's name: other cards or another driver mean another file, containers on one machine share it. Files
that are damaged, or of another format, are left out with a warning; what cannot be written is not kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rowcast.placement import host, nvml
from rowcast.placement.measured import Probe
from rowcast.settings import settings

FORMAT = 1
KEPT_RATIOS = 16
"""Of one kind of prediction: the latest count."""

_LARGEST_BYTES = 4 << 20
"""A file of ours is some KiB."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Identity:
    """What a file is keyed by."""

    cpu: str
    cores: int
    driver: str
    cards: tuple[str, ...]
    """Names, by the driver's order."""
    visible: str = ""
    """CUDA_VISIBLE_DEVICES: a process that sees fewer cards measures another machine."""

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits."""
        facts = json.dumps([self.cpu, self.cores, self.driver, self.cards, self.visible])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]


def this_machine() -> Identity:
    """As the system and the driver name it; takes some milliseconds."""
    facts, found = host.read(), nvml.read()
    cards = () if found is None else tuple(gpu.name for gpu in found.gpus)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return Identity(facts.cpu, facts.cores, "" if found is None else found.driver, cards, visible)


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the files lie. It need not exist."""
    given = settings(environ).cache
    if given is not None:
        return Path(given).expanduser()
    base = environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "rowcast"


def load_probe(machine: Identity | None = None) -> Probe | None:
    """The latest probe of this machine; None: none was kept, or not by this version."""
    content, path = _load(machine)
    if content.get("probe") is None:
        return None
    try:
        return Probe.from_json(content["probe"])
    except ValueError as error:
        logger.warning("%s holds no probe that this version reads (%s): run rowcast probe", path, error)
        return None


def store_probe(probe: Probe, machine: Identity | None = None) -> Path | None:
    """Keep it, in place of an earlier one. Returns the file, None where it cannot be written."""
    return _store({"probe": probe.to_json()}, machine)


def corrections(machine: Identity | None = None) -> dict[str, float]:
    """By kind of prediction, what measured figures were of predicted ones: the median of the latest runs."""
    content, _ = _load(machine)
    return {name: median(ratios) for name, ratios in _ratios(content).items()}


def add_correction(kind: str, *, predicted: float, measured: float, machine: Identity | None = None) -> None:
    """Remember one run of a plan. Figures that are not above 0 teach nothing and are left out."""
    if not (0 < predicted < math.inf and 0 < measured < math.inf):
        return
    content, _ = _load(machine)
    ratios = _ratios(content)
    ratios[kind] = [*ratios.get(kind, []), measured / predicted][-KEPT_RATIOS:]
    _store({"corrections": ratios}, machine)


def _ratios(content: Mapping[str, Any]) -> dict[str, list[float]]:
    """What is well-formed of the corrections."""
    found = content.get("corrections")
    if not isinstance(found, dict):
        return {}
    good = {
        name: [float(ratio) for ratio in ratios if type(ratio) in (int, float) and 0 < ratio < math.inf]
        for name, ratios in found.items()
        if isinstance(ratios, list)
    }
    return {name: ratios for name, ratios in good.items() if ratios}


def _load(machine: Identity | None) -> tuple[dict[str, Any], Path]:
    """The machine's file, empty where there is none that can be used, and its path."""
    machine = machine or this_machine()
    path = folder() / f"{machine.digest}.json"
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST_BYTES + 1)
    except FileNotFoundError:
        return {}, path
    except OSError as error:
        logger.warning("cannot read %s (%s): it is left out", path, error.strerror)
        return {}, path
    try:
        content = json.loads(data[:_LARGEST_BYTES])
    except (ValueError, RecursionError):
        logger.warning("%s is damaged: it is left out", path)
        return {}, path
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("machine") != machine.digest:
        logger.warning("%s is not a file of this version and machine: it is left out", path)
        return {}, path
    return content, path


def _store(parts: Mapping[str, Any], machine: Identity | None) -> Path | None:
    """Write the file with these parts new, all of it or nothing."""
    machine = machine or this_machine()
    content, path = _load(machine)
    content |= {"format": FORMAT, "machine": machine.digest, **parts}
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f"{path.stem}.", suffix=".tmp", delete=False) as file:
            temporary = file.name
            json.dump(content, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("cannot write %s (%s): nothing is remembered", path, error.strerror)
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        return None
    return path
