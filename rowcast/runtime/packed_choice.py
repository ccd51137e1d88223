"""Whether a quantised checkpoint's weights are held as they are packed: asked for, or where that is right. Torch-free.

On a GPU a pass takes as long as its weights' bytes. On a CPU prompts, and everything where groups are of 32, are slower than with the
library's products over whole ones, so that there they are packed where memory is short, and only there. So are a GGUF file's on a GPU,
with which rungs that choose rows are used: those need whole weights, and a ladder should not change the numbers that weights are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rowcast.errors import OutOfMemoryError, UserError
from rowcast.placement.plan import Plan
from rowcast.runtime.packed_sizes import PackedForms, packed_forms
from rowcast.runtime.spec import ModelSpec

CHOICES = ("auto", "packed", "unpacked")

T = TypeVar("T")


def with_weights(
    wanted: str,
    forms: PackedForms | None,
    on_gpu: bool,
    make: Callable[[PackedForms | None, str], T],
    plan_of: Callable[[T], Plan],
) -> T:
    """What `make` makes for weights that are held packed (their forms), or unpacked (None); with a note, "" where there is no choice.

    `forms`: of the checkpoint; None: it has nothing packed. Raises UserError, and what `make` raises.
    """
    if wanted not in CHOICES:
        raise UserError(f"weights={wanted!r:.60} is not known: use {', '.join(CHOICES[:2])} or {CHOICES[2]}")
    if forms is None or not forms.any:
        if wanted == "packed":
            why = f" ({'; '.join(forms.why)})" if forms is not None and forms.why else ""
            raise UserError(
                f"weights=packed was given, but none of this checkpoint's can be held packed{why}: leave it out, or make a packed copy "
                "with rowcast quantize"
            )
        why = "; ".join(forms.why) if forms is not None else ""
        return make(None, f"weights unpacked: {why}" if why else "")
    exceptions = f"; {'; '.join(forms.why)}" if forms.why else ""
    if wanted == "unpacked":
        return make(None, "weights unpacked: asked for")
    if wanted == "packed":
        return make(forms, f"weights packed: asked for{exceptions}")
    if on_gpu and forms.unasked:
        try:
            return make(forms, f"weights packed: as the checkpoint has them{exceptions}")
        except OutOfMemoryError:
            raise
        except UserError as error:
            return make(None, f"weights unpacked: {error}")
    short = f"weights packed: memory is too short for unpacked ones{exceptions}"
    why = "packed were not asked for" if on_gpu else "a CPU runs prompts faster with them"
    try:
        made = make(None, f"weights unpacked: {why}")
    except OutOfMemoryError as error:
        try:
            return make(forms, short)
        except OutOfMemoryError:
            raise
        except UserError:  # nobody asked for packed ones
            raise error from None
    if not plan_of(made).places():
        return made
    try:
        return make(forms, short)
    except UserError:
        return made


def planned_forms(plan: Plan, source: object, spec: ModelSpec) -> PackedForms | None:
    """As which a plan's weights are packed; None: they are not. Raises UserError where this checkpoint has none that can be held so."""
    if plan.weights != "packed":
        return None
    forms = packed_forms(source, spec)
    if forms is None or not (forms.all if plan.places() else forms.any):
        raise UserError("the plan holds weights packed, and not all of this checkpoint's can be: make the plan again for it")
    return forms
