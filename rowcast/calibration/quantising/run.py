"""`quantise`: a model and text in, an ordinary checkpoint of 3, 4 or 8 bits out. One layer is in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rowcast.calibration.learning.judge import Figures, judge
from rowcast.calibration.learning.module import copy_tokenizer
from rowcast.calibration.learning.part import Part
from rowcast.calibration.learning.progress import LearningProgress
from rowcast.calibration.learning.state import WorkFolder, load_tensors, save_tensors
from rowcast.calibration.quantising.gptq import Rounded, gptq, nearest
from rowcast.calibration.quantising.layers import PRODUCTS, LayerMatrices, OpenLayers
from rowcast.calibration.quantising.writing import Stored, packed_tensors, quantization_config, write_tensors
from rowcast.calibration.recording import OneLayerKV, window_steps
from rowcast.calibration.text import check_held_out, read_text, read_windows
from rowcast.errors import UserError
from rowcast.runtime import device as devices
from rowcast.runtime.checkpoint import Checkpoint, open_checkpoint
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import ADAPTED, spec_from_config
from rowcast.runtime.decoder import Decoder, tokens_of
from rowcast.runtime.spec import ModelSpec
from rowcast.runtime.step import SeqStep
from rowcast.runtime.tokenizer import load_tokenizer

BITS = (3, 4, 8)
METHODS = ("gptq", "nearest")
BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Settings:
    """What a copy is made with. The same settings and text make the same files."""

    bits: int = 4
    group: int = 64
    """Inputs that share a scale and a zero point."""
    method: str = "gptq"
    """gptq: errors are made good by the columns behind. nearest: each weight to its nearest level, for comparison."""
    tokens: int = 65536
    """Most tokens of the texts that are run."""
    window: int = 1024
    """Tokens that see each other."""
    judged: int = 8192
    """Most held-out tokens that the copy is judged on."""

    def check(self, spec: ModelSpec) -> None:
        """Raise UserError for what cannot be, of a model like this."""
        if self.bits not in BITS:
            raise UserError(f"--bits {self.bits} is not one of {', '.join(map(str, BITS))}: choose one")
        if self.method not in METHODS:
            raise UserError(f"--method {self.method!r:.60} is not known: use {' or '.join(METHODS)}")
        inputs = (spec.hidden_size, spec.num_heads * spec.head_dim, spec.intermediate_size)
        common = gcd(*inputs)
        fits = [size for size in (32, *range(64, common + 1, 64)) if common % size == 0]
        if not fits:
            raise UserError(
                f"no group divides the model's {', '.join(map(str, inputs))} inputs: it cannot be quantised in groups"
            )
        if self.group not in fits:
            shown = fits if len(fits) < 9 else [*fits[:8], "..."]
            raise UserError(
                f"--group {self.group} does not divide the model's {', '.join(map(str, inputs))} inputs, or is no multiple of 32: use "
                f"one of {', '.join(map(str, shown))}"
            )
        if self.window > spec.max_context:
            raise UserError(f"--window {self.window} is longer than the model's context of {spec.max_context}: lower it")


def quantise(
    model: str | Path | Checkpoint,
    texts: Sequence[str | Path],
    output: str | Path,
    settings: Settings | None = None,
    *,
    held_out: Sequence[str | Path] = (),
    dtype: str = "auto",
    device: str = "auto",
    restart: bool = False,
    part_minutes: float | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write the checkpoint `output` and return its description: figures beside the original on held-out text, bytes.

    Killed and called again in the same way it goes on at the layer where it was, to the same files; finished it does nothing. Raises
    UserError for bad input, `Unfinished` after `part_minutes` or a signal, with all saved.
    """
    settings = settings or Settings()
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(str(model))
    spec = spec_from_config(checkpoint.config)
    settings.check(spec)
    tokenizer = load_tokenizer(checkpoint)
    if held_out:
        digests = [(Path(text), read_text(Path(text))[1]) for text in (*texts, *held_out)]
        check_held_out((digest for _, digest in digests[: len(texts)]), digests[len(texts) :])
    windows = read_windows([Path(text) for text in texts], tokenizer, tokens=settings.tokens, window=settings.window)
    fit, held, names = windows.fit, windows.held, [*windows.texts]
    if held_out:
        others = read_windows(
            [Path(text) for text in held_out], tokenizer, tokens=max(settings.judged, 2 * settings.window), window=settings.window,
            option="--held-out",
        )  # fmt: skip
        fit, held = torch.cat([fit, held]), torch.cat([others.fit, others.held])
        names += others.texts
    held = held[: max(1, settings.judged // settings.window)]
    chosen, _ = devices.choose_device(device)
    dtype_name, _ = devices.choose_dtype(dtype, checkpoint.stored_dtype, chosen)
    stored = "float16" if checkpoint.stored_dtype in ("float32", "float64") else checkpoint.stored_dtype
    begun_with = {
        "command": "quantize", "fingerprint": checkpoint.source.fingerprint(), "texts": names, "dtype": dtype_name,
        "device": chosen.type, "stored": stored, "held_out": bool(held_out), **windows.settings, **asdict(settings),
    }  # fmt: skip
    inputs = (checkpoint.path, *map(Path, texts), *map(Path, held_out))
    work = WorkFolder(Path(output), begun_with, restart=restart, reads=inputs)
    if work.finished:
        return work.description()
    with work.worked_in():
        job = _Job(checkpoint, spec, settings, work, fit, held, devices.DTYPES[dtype_name], devices.DTYPES[stored], chosen)
        with Part(part_minutes) as part:
            return job.run(part, progress)


class _Job:
    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        settings: Settings,
        work: WorkFolder,
        fit: Tensor,
        held: Tensor,
        dtype: torch.dtype,
        stored: torch.dtype,
        device: torch.device,
    ) -> None:
        self._checkpoint, self._spec, self._settings, self._work = checkpoint, spec, settings, work
        self._fit, self._held = fit, held
        self._dtype, self._stored, self._device = dtype, stored, device
        self._calibrated = settings.method == "gptq"
        """Whether the texts matter."""
        self._view = OpenLayers(spec, checkpoint.source, dtype, device)
        self._decoder = Decoder(self._view, SoloComm(), device)

    def run(self, part: Part, show: bool | None) -> dict[str, Any]:
        spec = self._spec
        each = 2 * self._fit.numel() * self._calibrated + 2 * self._held.numel()
        with LearningProgress("quantising", each * spec.num_layers, show) as bar:
            done = self._done()
            bar.advance(each * done, new=False)
            streams = self._streams(done)
            for layer in range(done, spec.num_layers):
                if part.over and (part.asked or layer > done):  # each part gets further, however short it is
                    raise part.stop()
                self._layer(layer, streams)
                bar.say(f"layer {layer + 1} of {spec.num_layers}")
                bar.advance(each)
        figures = self._judge(streams)
        description = self._describe(figures)
        self._work.publish(lambda folder: self._write(folder, description), description)
        return self._work.description()

    def _done(self) -> int:
        count = 0
        while self._path(count).exists():
            count += 1
        return count

    def _path(self, layer: int) -> Path:
        return self._work.path / f"layer-{layer}.safetensors"

    def _streams(self, done: int) -> dict[str, Tensor]:
        """What enters layer `done`, [tokens, D] each: the copy's of both texts, and the original's of the held-out one."""
        if done:
            return load_tensors(self._work.path / f"stream-{(done - 1) % 2}.safetensors")[0]
        fit, held = self._embedded(self._fit), self._embedded(self._held)
        return {"fit": fit, "held": held, "original": held.clone()}

    @torch.no_grad()
    def _embedded(self, windows: Tensor) -> Tensor:
        return torch.cat(
            [self._decoder.embed(tokens_of(steps, self._device), kv)[0].cpu() for _, steps, kv in self._bound(windows)]
        )

    def _layer(self, layer: int, streams: dict[str, Tensor]) -> None:
        """Collect what its products read in the copy so far, round them, and go on with both."""
        matrices = self._view.read(layer)
        self._view.use(layer, matrices)
        if self._calibrated:
            self._view.collect = True
            self._through(layer, self._fit, streams["fit"].clone())
            self._view.collect = False
        self._through(layer, self._held, streams["original"])
        rounded = self._rounded(matrices)
        copies = {product: {stem: rounded[stem].weight() for stem in stems} for product, stems in matrices.by_product.items()}
        self._view.use(layer, LayerMatrices(copies, matrices.biases))
        if self._calibrated:
            self._through(layer, self._fit, streams["fit"])
        self._through(layer, self._held, streams["held"])
        save_tensors(self._work.path / f"stream-{layer % 2}.safetensors", streams, {})
        tensors: dict[str, Tensor] = {}
        for stem, found in rounded.items():
            tensors |= packed_tensors(stem, found)
        save_tensors(self._path(layer), tensors, {})

    def _rounded(self, matrices: LayerMatrices) -> dict[str, Rounded]:
        """By stem. Matrices of one product read the same: they are rounded as one."""
        settings, found = self._settings, {}
        for product in PRODUCTS:
            stems = matrices.by_product[product]
            whole = torch.cat([matrix.float() for matrix in stems.values()])
            if settings.method == "gptq":
                rounded = gptq(whole, matrices.moments[product], settings.bits, settings.group, self._stored)
            else:
                rounded = nearest(whole, settings.bits, settings.group, self._stored)
            start = 0
            for stem, matrix in stems.items():
                rows = slice(start, start + len(matrix))
                parts = (rounded.codes[rows], rounded.scales[rows], rounded.zeros[rows])
                found[stem] = Rounded(*parts, settings.bits, settings.group)
                start = rows.stop
        return found

    @torch.no_grad()
    def _through(self, layer: int, windows: Tensor, stream: Tensor) -> None:
        """All tokens through one layer, in place."""
        for rows, steps, kv in self._bound(windows):
            _, rotation = self._decoder.embed(tokens_of(steps, self._device), kv)
            stream[rows] = self._decoder.layer(layer, stream[rows].to(self._device), rotation, kv).to(stream.device)

    def _bound(self, windows: Tensor) -> Iterator[tuple[slice, Sequence[SeqStep], OneLayerKV]]:
        """Some windows at a time: their places in a stream, and what they are bound to."""
        window = windows.shape[1]
        count = min(len(windows), max(1, BATCH_TOKENS // window))
        kv, start = OneLayerKV(self._spec, count, window, dtype=self._dtype, device=self._device), 0
        for part in torch.split(windows, count):
            steps = window_steps(part, prompt_length=window)
            kv.bind(steps)
            yield slice(start, start + part.numel()), steps, kv
            start += part.numel()

    def _judge(self, streams: Mapping[str, Tensor]) -> Figures:
        """Of the copy beside the original, on the held-out windows."""
        subjects = {name: _Ran(self._decoder, streams[name], self._device) for name in ("held", "original")}
        return judge(subjects["original"], {"copy": subjects["held"]}, self._held, device=self._device)["copy"]

    def _describe(self, figures: Figures) -> dict[str, Any]:
        names = [stem for layer in range(self._spec.num_layers) for stems in self._view.stems(layer).values() for stem in stems]
        packed = sum(
            tensor.nbytes for layer in range(self._spec.num_layers) for tensor in load_tensors(self._path(layer))[0].values()
        )
        shapes = [self._checkpoint.source.shape(f"{name}.weight") for name in names]
        weights = sum(rows * columns for rows, columns in shapes)
        return {
            "made_from": {"name": self._checkpoint.path.name, "fingerprint": self._checkpoint.source.fingerprint()},
            "bits_per_weight": 8 * packed / weights,
            "tokens": self._fit.numel() * self._calibrated,
            "quality": figures.to_json(),
        }

    def _write(self, folder: Path, description: Mapping[str, Any]) -> None:
        source, settings = self._checkpoint.source, self._settings
        rounded = {
            f"{stem}.weight"
            for layer in range(self._spec.num_layers)
            for stems in self._view.stems(layer).values()
            for stem in stems
        }
        whole = [name for name in source.names() if name not in rounded]
        stored = [self._whole(name) for name in whole]
        for layer in range(self._spec.num_layers):
            for name, tensor in load_tensors(self._path(layer))[0].items():
                stored.append(Stored(name, tensor.nbytes, lambda tensor=tensor: tensor))  # type: ignore[misc]
        write_tensors(folder, stored)
        config = dict(self._checkpoint.config)
        kept = [name.removesuffix(".weight") for name in whole if len(source.shape(name)) == 2]
        ignored = sorted({"lm_head", *(name for name in kept if "project" in name.rsplit(".", 1)[-1])})
        config |= {"dtype": str(self._stored).removeprefix("torch.")}
        config.pop("torch_dtype", None)
        if ADAPTED in config:  # its acceptances were measured on other weights
            config[ADAPTED] = {key: value for key, value in config[ADAPTED].items() if key != "acceptance"}
        config["quantization_config"] = quantization_config(settings.bits, settings.group, ignored)
        (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if self._checkpoint.generation_config:
            (folder / "generation_config.json").write_text(json.dumps(self._checkpoint.generation_config, indent=2) + "\n")
        copy_tokenizer(self._checkpoint, folder)

    def _whole(self, name: str) -> Stored:
        source, size = self._checkpoint.source, self._stored.itemsize
        count = 1
        for each in source.shape(name):
            count *= each
        return Stored(name, count * size, lambda: source.read(name).to(self._stored))


class _Ran:
    """Implements `judge.Subject`: hidden states that are there already, of windows that are asked for in order."""

    def __init__(self, decoder: Decoder, stream: Tensor, device: torch.device) -> None:
        self._decoder, self._stream, self._device, self._at = decoder, stream, device, 0

    def hidden(self, ids: Tensor) -> Tensor:
        rows = slice(self._at, self._at + ids.numel())
        self._at = rows.stop
        return self._stream[rows].to(self._device).view(*ids.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._decoder.logits(hidden)
