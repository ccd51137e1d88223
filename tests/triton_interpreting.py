"""What Triton's interpreter lacks."""

from __future__ import annotations

from typing import Any

import triton.runtime.interpreter as interpreting


def take_arrays_as_bounds() -> None:
    """Let loops run up to a loaded number: Triton 3.6 converts its array of one number to int, which numpy 2.4 refuses."""
    patch = interpreting._patch_lang_tensor
    if patch.__name__ == "patched":
        return

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreting._patch_lang_tensor = patched
