"""Checkpoints on disk, read by slice: safetensors directories, GGUF files, hub ids."""

from rowcast.runtime.checkpoint.opening import DEFAULT_MODEL, DEFAULT_MODEL_HUB_ID, Checkpoint, open_checkpoint

__all__ = ["DEFAULT_MODEL", "DEFAULT_MODEL_HUB_ID", "Checkpoint", "open_checkpoint"]
