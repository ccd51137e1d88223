"""From what a user asks for to a `Workload`: what the planner knows of a model, its ladders and their acceptances. Torch-free.

Only a config is needed; a calibration is read where there is one. It knows ladders, and nothing of machines.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rowcast.errors import UserError
from rowcast.placement.models import RANDOM, find_config
from rowcast.placement.plan import DTYPE_BYTES, MODES
from rowcast.placement.resident import BLOCK_SIZE
from rowcast.placement.workload import Input, LadderUse, Workload
from rowcast.runtime.acceptances import Acceptances
from rowcast.runtime.checkpoint.packing import packing_of
from rowcast.runtime.checkpoint.safetensors_header import read_directory, tensors_fingerprint
from rowcast.runtime.checkpoint.shipped import place_of
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.hotness import hotness
from rowcast.runtime.ladder.feasible import check_density, check_kv_budget, check_sparse, check_views, offered, possible
from rowcast.runtime.ladder.presets import AUTO_KV, DENSITY, Circumstances, hire_rung, kv_for, resolve, sparse_rung
from rowcast.runtime.ladder.spec import PRESETS, Ladder, Place, Rung
from rowcast.runtime.ladder.uses import DraftConfig, plain_work_bytes
from rowcast.runtime.ladder.uses import gamma_grid as gamma_grid
from rowcast.runtime.ladder.uses import ladder_use as ladder_use
from rowcast.runtime.ladder.uses import with_gammas as with_gammas
from rowcast.runtime.packed_sizes import PackedForms, PackedSizes, forms_of_packing, packed_forms
from rowcast.runtime.sparse.artefact import Calibration, beside
from rowcast.runtime.sparse.sizes import expected_bytes, rung_shares
from rowcast.runtime.spec import ModelSpec, kv_bytes_per_token

CONTEXT = 4096
"""Tokens, or the model's own longest context, where none was asked for."""
GROUPS = 64
"""Of a layer's neurons, by hotness."""

_FALLBACKS = (Ladder((Rung(kind="self", bits=8),)), Ladder((Rung(kind="self", bits=4),)))
"""Ladders that take less memory than any whose output is the model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderWish:
    """What a caller asked for that decides which ladders there are to choose from."""

    ladder: str | Ladder = "auto"
    draft: str | None = None
    kv_budget: int | None = None
    density: float | None = None
    mode: str = "exact"
    calibration: Calibration | None = None
    calibration_given: bool = True
    """Or it is the model's own, which nothing has to read."""
    context: int = CONTEXT
    width: int = 2
    """Bytes of an element of weights and KV."""
    packed: PackedSizes | None = None
    """As which the model's weights are held."""


def open_spec(model: str) -> tuple[ModelSpec, str]:
    """What a model is, and the number format of its weights as its config says it ("" where it says nothing). As `open_model`."""
    spec, stored, _ = open_model(model)
    return spec, stored


def open_model(model: str) -> tuple[ModelSpec, str, PackedForms | None]:
    """The same, and how its weights are packed, if they are: as a config says it, or as a GGUF file has them.

    `model`: a directory with a config.json, a config.json, a GGUF file, DEFAULT_DRAFT, or the hub id or short name of a well-known
    model, also with "random:" before it, as `LLM` takes it. Reads no weights and no network. Raises UserError in one sentence.
    """
    model = model.removeprefix(RANDOM)
    path = place_of(model)
    try:
        if model and path.is_dir():
            ggufs = [] if (path / "config.json").is_file() else sorted(path.glob("*.gguf"))
            path = ggufs[0] if len(ggufs) == 1 else path / "config.json"
        if path.suffix == ".gguf" and path.is_file():
            return _open_gguf(path)
        if path.is_file():
            return _of_config(json.loads(path.read_bytes()), str(path))
    except OSError as error:
        raise UserError(f"the model {model!r:.80} cannot be read: {error.strerror or error}; check the path") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON ({error}); give a model's config.json") from error
    if path.name == "config.json" and path.parent.is_dir():
        raise UserError(
            f"{path.parent} has no config.json, which says what model it is; give a directory that has one, or a GGUF file"
        )
    return _of_config(find_config(model), model)


def calibration_of(model: str, given: str | Path | None, fingerprint: str | None = None) -> Calibration | None:
    """As `Calibration.find`, of a model as `open_model` takes it: of random weights there is none but one that was given.

    `fingerprint` None: of the weights that lie where the config does, if any do.
    """
    if model.startswith(RANDOM):
        return Calibration.find(given, model, fingerprint)
    place = place_of(model)
    if fingerprint is None and (given is not None or beside(place) is not None):
        fingerprint = _fingerprint(place)
    return Calibration.find(given, place, fingerprint)


def _fingerprint(directory: Path) -> str | None:
    """Of the weights in a model's directory; None where there are none, or not whole."""
    try:
        return tensors_fingerprint(read_directory(directory))
    except (OSError, UserError):
        return None


def check_packed(ladder: Ladder) -> None:
    """Raise UserError for a rung that cannot run over weights that are packed."""
    for rung in ladder.rungs:
        if rung.sparse:
            raise UserError(
                f"weights=packed was given, and rung {rung} chooses rows of weights, which are not had of packed ones: use "
                "weights=unpacked, or another ladder"
            )


def spec_digest(spec: ModelSpec) -> str:
    """16 hex digits over all fields but `adapted`: what ties a plan that was made from a config to a model. The same in every run.

    Of numbers six digits count: a GGUF file holds in 32 bits what a config has in 64.
    """
    values = asdict(spec)
    del values["adapted"]
    return hashlib.sha256(json.dumps(_six_digits(values), sort_keys=True).encode()).hexdigest()[:16]


def _six_digits(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return {key: _six_digits(item) for key, item in value.items()}
    return [_six_digits(item) for item in value] if isinstance(value, (list, tuple)) else value


def candidates(spec: ModelSpec, wish: LadderWish) -> list[Ladder]:
    """The ladder that was named or, for `auto`, all that the planner may choose from, plain first; gammas are left open.

    Raises UserError for what the model, the calibration, the context or the mode does not allow.
    """
    calibration = wish.calibration
    here = Circumstances(
        max_context=wish.context,
        kv_bytes_per_token=kv_bytes_per_token(spec, wish.width),
        pass_bytes=lambda rung: expected_bytes(spec, rung, wish.width, calibration, wish.packed),
        calibrated=None if calibration is None else offered(calibration),
        adapted=None if spec.adapted is None or wish.packed is not None else spec.adapted.density,
    )
    check_density(wish.density)
    check_kv_budget(wish.kv_budget)
    if wish.mode not in MODES:
        raise UserError(f"mode={wish.mode!r:.60} is not known: use {' or '.join(MODES)}")
    if wish.ladder == "auto":
        found = [resolve(ladder, here, mode=wish.mode)[0] for ladder in _auto(wish, here)]
    else:
        asked, _, _ = resolve(wish.ladder, here, mode=wish.mode, draft=wish.draft, kv_budget=wish.kv_budget, density=wish.density)
        found = [asked]
    for ladder in found:
        check_views(ladder, wish.context)
        check_sparse(ladder, spec, calibration, wish.ladder == "auto" or not wish.calibration_given)
        if wish.packed is not None:
            check_packed(ladder)
    return list(dict.fromkeys(found))


def workload(
    *,
    model: str,
    ladder: str | Ladder = "auto",
    draft: str | None = None,
    kv_budget: int | None = None,
    density: float | None = None,
    mode: str = "exact",
    calibration: str | Path | None = None,
    dtype: str = "auto",
    context: int | None = None,
    prompt: int | None = None,
    batch: int = 1,
    acceptance: str | float | None = None,
    hit_rate: float | None = None,
    fingerprint: str | None = None,
    forms: PackedForms | None = None,
) -> Workload:
    """What a plan is for, from what was asked for, under the command line's names.

    `context` None: `CONTEXT` tokens at most. `prompt` None: the whole context. `fingerprint`: of the model's weights, for the
    calibration to be of; as of `calibration_of`. `forms`: its weights are held so. Ladders come with all gammas to choose from.
    Raises UserError.
    """
    spec, _ = open_spec(model)
    context, inputs = _checked_context(spec, context)
    prompt = context if prompt is None else prompt
    rate = 0.0 if hit_rate is None else hit_rate
    for name, value, most in (("prompt", prompt, context), ("batch", batch, 1 << 16)):
        if not 1 <= value <= most:
            raise UserError(f"{name}={value} has to be from 1 to {most}")
    if not 0 <= rate <= 1:
        raise UserError(f"hit_rate={rate} is not a share: give a number from 0 to 1")
    width = _width(dtype)
    packed = None if forms is None else forms.sizes(spec, width)
    learnt = calibration_of(model, calibration, fingerprint)
    wish = LadderWish(
        ladder=ladder,
        draft=draft,
        kv_budget=kv_budget,
        density=density,
        mode=mode,
        calibration=learnt,
        calibration_given=calibration is not None,
        context=context,
        width=width,
        packed=packed,
    )
    found = candidates(spec, wish)
    drafts = _open_drafts(found, spec)
    models = {name: DraftConfig(each) for name, each in drafts.items()}
    found = [Ladder(tuple(possible(rung, models, BLOCK_SIZE, ladder == "auto", []) for rung in each.rungs)) for each in found]
    chances = Acceptances.of(acceptance, spec, learnt)
    chances.check(found)

    def use(ladder: Ladder) -> LadderUse:
        return ladder_use(
            ladder,
            spec,
            width=width,
            context=context,
            calibration=learnt,
            acceptance=chances,
            drafts=drafts,
            batch=batch,
            packed=packed,
        )

    density, shares = 1.0, None
    if sparse := [(rung.mlp, rung) for each in found for rung in each.rungs if rung.mlp is not None]:
        density, rung = min(sparse, key=lambda pair: pair[0])
        shares = rung_shares(rung, spec.num_layers, learnt)
        inputs.append(_density_input(density, wish, spec))
    if hit_rate is None:
        inputs.append(Input("hit rate", 0.0, "assumed", "no row that is fetched is in the GPU's cache"))
    else:
        inputs.append(Input("hit rate", rate, "given"))
    return Workload(
        model=model,
        spec=spec,
        width=width,
        context=context,
        prompt=prompt,
        batch=batch,
        ladders=tuple(use(with_gammas(each, gammas)) for each in found for gammas in gamma_grid(each)),
        fallbacks=tuple(map(use, _FALLBACKS)) if mode == "exact" else (),
        hotness=hotness(spec, learnt, density, GROUPS, shares),
        hit_rate=rate,
        work_bytes=plain_work_bytes(spec, width, batch, context),
        inputs=tuple(inputs),
    )


def _of_config(config: object, model: str) -> tuple[ModelSpec, str, PackedForms | None]:
    if not isinstance(config, dict):
        raise UserError(f"{model} is not a config: it has to be a JSON object, such as a model's config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    packing = packing_of(config) if config.get("quantization_config") else None
    spec = spec_from_config({key: value for key, value in config.items() if key != "quantization_config"})
    forms = None if packing is None else forms_of_packing(packing, spec)
    return spec, stored.removeprefix("torch.") if isinstance(stored, str) else "", forms


def _open_gguf(path: Path) -> tuple[ModelSpec, str, PackedForms | None]:
    try:
        from rowcast.runtime.checkpoint.opening import open_checkpoint
    except ImportError as error:
        raise UserError(f"{path} is a GGUF file, which is read with {error.name}: install that, or give a config.json") from error
    checkpoint = open_checkpoint(str(path))
    spec, source = spec_from_config(checkpoint.config), checkpoint.source
    return spec, checkpoint.stored_dtype, packed_forms(source, spec)


def _width(dtype: str) -> int:
    """Bytes of an element; auto is 16 bits on a GPU, whatever the checkpoint's own format."""
    if dtype != "auto" and dtype not in DTYPE_BYTES:
        raise UserError(f"dtype={dtype!r:.60} is not known: use auto, {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype] if dtype != "auto" else 2


def _checked_context(spec: ModelSpec, context: int | None) -> tuple[int, list[Input]]:
    if context is None:
        found = min(CONTEXT, spec.max_context)
        return found, [Input("context", found, "assumed", "none was given")]
    if not 2 <= context <= spec.max_context:
        raise UserError(f"context={context} has to be from 2 to the {spec.max_context} tokens that the model was made for")
    return context, [Input("context", context, "given")]


def _auto(wish: LadderWish, here: Circumstances) -> list[str | Ladder]:
    """Ladders to choose from. KV budgets and densities as presets choose them, where the wish names none."""
    calibrated, plain = here.calibrated, Rung(kind="plain")
    kv = wish.kv_budget
    if kv is None and wish.context >= 2 * AUTO_KV[0]:
        kv = kv_for(wish.context)
    known = here.adapted if calibrated is None or calibrated.density is None else calibrated.density
    density = wish.density if wish.density is not None else known
    if density is None and (calibrated is not None or wish.mode == "approximate"):
        density = DENSITY
    light = [] if density is None or wish.packed is not None else [sparse_rung(density, calibrated, [])]
    if wish.packed is None or wish.mode == "approximate":
        light += [Rung(kind="self", bits=8), Rung(kind="self", bits=4)]
    found: list[tuple[Rung, ...]] = []
    if wish.mode == "approximate":
        if density is not None:
            found.append((hire_rung(density, calibrated, []),))
        for rung in light:
            found += [(rung,), *([(replace(rung, kv=kv, view="retrieval"), rung)] if kv else [])]
        return [Ladder(rungs) for rungs in found]
    views = [Rung(kind="self", kv=kv)] if kv else []
    found += [(plain,), *((view, plain) for view in views)]
    if wish.draft is not None:
        places: list[Place] = ["ranks", "first", "driver"]
        at = [Rung(kind="ngram")] if wish.draft == "ngram" else [Rung(kind="draft", model=wish.draft, at=at) for at in places]
        found += [rungs for draft in at for rungs in ((draft, plain), *((draft, view, plain) for view in views))]
    for rung in light:
        found += [(rung, plain), *([(replace(rung, kv=kv, view="retrieval"), plain)] if kv else [])]
    return [Ladder(rungs) for rungs in found]


def _density_input(density: float, wish: LadderWish, spec: ModelSpec) -> Input:
    """Where the share of a token's neurons is from."""
    if wish.density is not None or (wish.ladder not in PRESETS and "mlp=" in str(wish.ladder)):
        return Input("density", density, "given")
    if wish.calibration is not None and wish.calibration.description.get("density") == density:
        return Input("density", density, "measured", f"calibration {wish.calibration.path}: what its target asks for")
    if spec.adapted is not None and spec.adapted.density == density:
        return Input("density", density, "given", "the model's config: what it was adapted to")
    return Input("density", density, "assumed", "none was given")


def _open_drafts(ladders: Sequence[Ladder], spec: ModelSpec) -> dict[str, ModelSpec]:
    """By the names that rungs give them. Raises UserError for one that is not known, and for another vocabulary."""
    found: dict[str, ModelSpec] = {}
    for name in dict.fromkeys(rung.model for ladder in ladders for rung in ladder.lower if rung.model is not None):
        try:
            found[name], _ = open_spec(name)
        except UserError as error:
            raise UserError(f"the draft {name} cannot be used: {str(error).rstrip('.')}") from error
        if found[name].vocab_size != spec.vocab_size:
            raise UserError(
                f"the draft {name} has a vocabulary of {found[name].vocab_size} tokens and the model one of {spec.vocab_size}: use a "
                "draft that was made for this model's tokenizer"
            )
    return found
