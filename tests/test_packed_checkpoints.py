"""Weights that GPTQ, AWQ and compressed-tensors packed, read as what they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rowcast import LLM, SamplingParams
from rowcast.errors import UserError
from rowcast.runtime.checkpoint.packed_source import PackedSource
from rowcast.runtime.checkpoint.packing import packing_of
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource

MADE = Path(__file__).parent / "data" / "quantised"
"""By the formats' own libraries, see its README."""
OUTPUTS, INPUTS, GROUP = 96, 128, 32
AWQ_NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of eight, that each nibble of a word holds, from the lowest."""


def packed(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes [r, n] as words [r, n bits / 32] int32, one bit after the other; `order`: of the codes within a word."""
    rows = []
    for row in codes.tolist():
        if order is not None:
            row = [row[start + place] for start in range(0, len(row), len(order)) for place in order]
        stream = sum(code << (bits * i) for i, code in enumerate(row))
        words = [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(len(row) * bits // 32)]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


class Layer:
    """Random codes, zero points and scales, and the weight that they stand for."""

    def __init__(self, bits: int, *, sorted_groups: bool = True, symmetric: bool = False) -> None:
        draw = torch.Generator().manual_seed(bits)
        most = 1 << bits
        self.codes = torch.randint(most, (OUTPUTS, INPUTS), generator=draw)
        self.zeros = torch.randint(1, most, (OUTPUTS, INPUTS // GROUP), generator=draw)
        if symmetric:
            self.zeros[:] = most // 2
        self.scales = torch.rand(OUTPUTS, INPUTS // GROUP, generator=draw).half() + 0.1
        self.groups = torch.arange(INPUTS) // GROUP
        if not sorted_groups:
            self.groups = self.groups[torch.randperm(INPUTS, generator=draw)]
        self.weight = (self.codes - self.zeros[:, self.groups]) * self.scales.float()[:, self.groups]


def source(folder: Path, tensors: dict[str, Tensor], **config: Any) -> PackedSource:
    tensors = {f"a.{name}": tensor.contiguous() for name, tensor in tensors.items()} | {"norm.weight": torch.ones(4)}
    save_file(tensors, str(folder / "model.safetensors"))
    return PackedSource(SafetensorsSource.open(folder), packing_of({"quantization_config": config}))


def gptq(folder: Path, bits: int, layout: str = "gptq", *, sorted_groups: bool = True) -> tuple[PackedSource, Tensor]:
    layer = Layer(bits, sorted_groups=sorted_groups)
    tensors = {
        "qweight": packed(layer.codes, bits).T,
        "qzeros": packed(layer.zeros.T - int(layout == "gptq"), bits),
        "scales": layer.scales.T,
        "g_idx": layer.groups.int(),
        "bias": torch.ones(OUTPUTS),
    }
    return source(folder, tensors, quant_method="gptq", bits=bits, group_size=GROUP, checkpoint_format=layout), layer.weight


def awq(folder: Path) -> tuple[PackedSource, Tensor]:
    layer = Layer(4)
    tensors = {
        "qweight": packed(layer.codes.T, 4, AWQ_NIBBLES),
        "qzeros": packed(layer.zeros.T, 4, AWQ_NIBBLES),
        "scales": layer.scales.T,
    }
    return source(folder, tensors, quant_method="awq", bits=4, group_size=GROUP, version="GEMM"), layer.weight


def compressed(folder: Path, bits: int, *, symmetric: bool) -> tuple[PackedSource, Tensor]:
    layer = Layer(bits, symmetric=symmetric)
    tensors = {
        "weight_packed": packed(layer.codes, bits),
        "weight_scale": layer.scales,
        "weight_shape": torch.tensor([OUTPUTS, INPUTS]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = packed(layer.zeros.T, bits).T
    scheme = {"weights": {"num_bits": bits, "type": "int", "group_size": GROUP}, "input_activations": None}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": scheme}}
    return source(folder, tensors, **config), layer.weight


CASES: dict[str, Callable[[Path], tuple[PackedSource, Tensor]]] = {
    **{f"gptq-{bits}": partial(gptq, bits=bits) for bits in (2, 3, 4, 8)},
    "gptq-v2": lambda folder: gptq(folder, 4, "gptq_v2"),
    "gptq-act-order": lambda folder: gptq(folder, 4, sorted_groups=False),
    "awq": awq,
    **{
        f"compressed-{bits}-{symmetric}": partial(compressed, bits=bits, symmetric=symmetric)
        for bits in (4, 8)
        for symmetric in (True, False)
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_weight_and_its_slices(case: str, tmp_path: Path) -> None:
    found, weight = CASES[case](tmp_path)
    assert found.shape("a.weight") == (OUTPUTS, INPUTS)
    assert torch.equal(found.read("a.weight"), weight)
    for rows, cols in (
        (slice(5, 70), None),
        (None, slice(33, 100)),
        (slice(31, 33), slice(1, 2)),
        (slice(64, 96), slice(64, 128)),
        (slice(3, 3), None),
    ):
        assert torch.equal(found.read("a.weight", rows, cols), weight[rows or slice(None), cols or slice(None)])
    turned = torch.empty(INPUTS, OUTPUTS, dtype=torch.bfloat16)
    found.read("a.weight", out=turned.T)
    assert torch.equal(turned.T, weight.bfloat16())
    assert "norm.weight" in found and found.shape("norm.weight") == (4,)
    assert "a.weight" in found and {"a.qweight", "a.weight_packed", "a.scales"}.isdisjoint(found.names())


def test_a_group_of_all_inputs(tmp_path: Path) -> None:
    layer = Layer(4)
    tensors = {"weight": (layer.codes - 8).to(torch.int8), "weight_scale": layer.scales[:, :1]}
    scheme = {"weights": {"num_bits": 8, "type": "int", "group_size": None, "strategy": "channel"}}
    config = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": scheme}}
    found = source(tmp_path, tensors, **config)
    assert torch.equal(found.read("a.weight"), (layer.codes - 8) * layer.scales[:, :1].float())


@pytest.mark.parametrize(("config", "words"), [
    ({"quant_method": "bitsandbytes"}, "quantised by 'bitsandbytes'.*GGUF"),
    ({"quant_method": "gptq", "bits": 5}, "bits 5 .known: 2, 3, 4, 8"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "layout 'marlin'"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"x": {}}}, "dynamic"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "group_size 0"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
    ({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {}}, "format 'float-quantized'"),
    ({"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"a": {
        "weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}}}, "activations"),
    ("gptq", "quantised by 'gptq'"),
])  # fmt: skip
def test_what_is_not_read(config: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        packing_of({"quantization_config": config})


def test_tensors_that_do_not_go_together(tmp_path: Path) -> None:
    gptq(tmp_path, 4)
    stored = load_file(str(tmp_path / "model.safetensors"))
    packing = packing_of({"quantization_config": {"quant_method": "gptq", "bits": 8, "group_size": GROUP}})
    del stored["a.g_idx"]
    save_file(stored, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match=r"a\.qweight of shape \[16, 96\].*not one layer of 8 bits"):
        PackedSource(SafetensorsSource.open(tmp_path), packing)
    stored["a.g_idx"] = torch.full((INPUTS,), 9, dtype=torch.int32)
    save_file(stored, str(tmp_path / "model.safetensors"))
    packing = packing_of({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP}})
    with pytest.raises(UserError, match="group outside 0 to 3"):
        PackedSource(SafetensorsSource.open(tmp_path), packing).read("a.weight")
    save_file({"norm.weight": torch.ones(4)}, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="no layer is"):
        PackedSource(SafetensorsSource.open(tmp_path), packing)


def test_zero_points_that_are_not_packed(tmp_path: Path) -> None:
    """A byte for each, of which a part would be taken for words."""
    compressed(tmp_path, 4, symmetric=False)
    stored = load_file(str(tmp_path / "model.safetensors"))
    stored["a.weight_zero_point"] = torch.zeros(OUTPUTS, INPUTS // GROUP, dtype=torch.int8)
    save_file(stored, str(tmp_path / "model.safetensors"))
    scheme = {"weights": {"num_bits": 4, "type": "int", "group_size": GROUP}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": scheme}}
    packing = packing_of({"quantization_config": config})
    with pytest.raises(UserError, match=r"weight_zero_point has the shape \[96, 4\], not \[12, 4\]"):
        PackedSource(SafetensorsSource.open(tmp_path), packing)
    stored["a.weight_zero_point"] = torch.zeros(OUTPUTS * 4 // 32, INPUTS // GROUP, dtype=torch.int32)
    stored["a.weight_shape"] = torch.tensor([OUTPUTS])
    save_file(stored, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError, match="weight_shape says 0 inputs"):
        PackedSource(SafetensorsSource.open(tmp_path), packing)


@pytest.mark.parametrize("weights", ["unpacked", "packed"])
@pytest.mark.parametrize("folder", sorted(path.name for path in MADE.iterdir() if path.is_dir()))
def test_what_the_formats_own_libraries_wrote(folder: str, weights: str, tmp_path: Path) -> None:
    """Log-probabilities are those that Transformers gives; with GPTQ it rounds unpacked weights to 16 bits."""
    if weights == "packed" and folder == "gptq-4-act-order":
        pytest.skip("inputs are grouped in the order of their activations")
    shutil.copytree(MADE / folder, tmp_path, dirs_exist_ok=True)
    expected = json.loads((tmp_path / "expected.json").read_text())
    llm = LLM(tmp_path, ladder="plain", dtype="float32", weights=weights, max_model_len=64)
    assert llm.plan.weights == weights
    params = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
    [output] = llm.generate([expected["prompt"]], params)
    assert output.prompt_logprobs is not None
    found = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs if entry is not None]
    assert found == pytest.approx(expected["logprobs"], abs=5e-3 if folder.startswith("gptq") else 1e-4)
