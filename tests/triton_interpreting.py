"""What Triton's interpreter lacks, and what it does again and again."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import triton
import triton.language as tl
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


def remember_what_does_not_change() -> None:
    """Halve the interpreter's time. Results and checks stay as they are; other versions than 3.6 stay slow.

    It wraps the language's functions anew for each launch and for each call from one kernel to another, and works out shapes, their
    names and NumPy's dtypes for each number that it handles.
    """
    if triton.__version__.startswith("3.6."):
        _wrap_once()
        _look_up_dtypes()
        _share_shapes()


class _Noted:
    """A scope that changes nothing."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, object]] = []

    def set_attr(self, owner: object, name: str, value: object) -> None:
        self.changes.append((name, value))


def _wrap_once() -> None:
    wrap, patch, launch = interpreting._patch_builtin, interpreting._patch_lang, interpreting.GridExecutor.__call__
    wrapped: dict[object, list[tuple[str, object]]] = {}  # By module or class.
    running: set[str] = set()

    def wrap_as_before(package: Any, builder: Any, scope: Any) -> None:
        if package not in wrapped:
            noted = _Noted()
            wrap(package, builder, noted)
            wrapped[package] = noted.changes
        for name, value in wrapped[package]:
            scope.set_attr(package, name, value)

    def patch_unless_running(function: Any) -> Any:
        """What a launch has patched stays so until it ends."""
        seen = {value.__name__ for value in function.__globals__.values() if value is tl or value is tl.core}
        if seen and seen <= running:
            return interpreting._LangPatchScope()
        scope = patch(function)
        running.update(seen)
        return scope

    def launch_alone(self: Any, *args: Any, **keywords: Any) -> Any:
        running.clear()
        try:
            return launch(self, *args, **keywords)
        finally:
            running.clear()

    interpreting._patch_builtin = wrap_as_before
    interpreting._patch_lang = patch_unless_running
    interpreting.GridExecutor.__call__ = launch_alone


def _look_up_dtypes() -> None:
    of_scalars = functools.cache(interpreting._get_np_dtype)
    pointer = np.dtype(np.uint64)

    def of(dtype: Any) -> Any:
        scalar = dtype.scalar
        return pointer if isinstance(scalar, tl.pointer_type) else of_scalars(scalar)

    interpreting._get_np_dtype = of


def _share_shapes() -> None:
    make_type, equal = tl.block_type.__init__, tl.tuple.__eq__
    types: dict[tuple[int, ...], tuple[Any, int, str]] = {}

    def whole(values: Any) -> bool:
        return all(type(value) is int for value in values)

    @functools.cache
    def of_tensors(shape: tuple[int, ...]) -> tuple[Any, Any]:
        return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(size) for size in shape])

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = of_tensors(tuple(type.shape.values) if type.is_block() else ())

    def make_type_of(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(shape.values if type(shape) is tl.tuple else shape)
        if not whole(sizes) or type(shape) not in (list, tl.tuple):
            make_type(self, element_ty, shape)
            return
        if sizes not in types:
            make_type(self, element_ty, shape)  # which refuses bad ones
            types[sizes] = self.shape, self.numel, f"<{self.shape}, "
        self.element_ty = element_ty
        self.shape, self.numel, name = types[sizes]
        self.name = f"{name}{element_ty}>"

    def equal_sizes(self: Any, other: Any) -> Any:
        values = other.values if type(other) is tl.tuple else other
        if isinstance(values, (list, tuple)) and whole(values):
            return tl.constexpr(self.values == list(values))
        return equal(self, other)

    tl.tensor.__init__ = make_tensor
    tl.block_type.__init__ = make_type_of
    tl.tuple.__eq__ = equal_sizes
