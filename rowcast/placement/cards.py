"""The cards that are known without having them, each figure with its source. Torch-free.

Rates of products are those of dense matrices in 16 bits with 32-bit accumulation. Where a datasheet prints the rate with sparsity only,
half of it stands here, and says so; rates with 16-bit accumulation, twice as high on GeForce cards, are not used. NVLink is printed
as both directions' sum, half of it stands here. Memory is what the driver reports as total (`nvidia-smi`): less than what is printed on
the box where a part is reserved or holds error correction.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from functools import partial
from typing import Literal

from rowcast.errors import UserError
from rowcast.placement.hardware import PCIE_LANE_RATE, Board, Card, Quantity

MIB = 1 << 20


def _card(
    name: str,
    sheet: str,
    *,
    gb: int,
    mib: int,
    memory: float,
    tflops: float,
    sparse: bool = False,
    pcie: int,
    peers: float = 0.0,
    peer_access: bool = True,
    nvlink: Literal["none", "bridge", "built-in"] = "none",
    board: Board = "server",
) -> Card:
    """`memory` in GB/s; `tflops` dense, `sparse` where `sheet` prints twice as many; `peers` in GB/s, both directions' sum."""
    link = f"{sheet}: NVLink {peers:g} GB/s in both directions" if peers else "no NVLink"
    return Card(
        name=name,
        memory_bytes=mib * MIB,
        nominal_gib=gb,
        memory_rate=Quantity(memory * 1e9, "datasheet", sheet),
        bus_rate=Quantity(PCIE_LANE_RATE[pcie] * 16, "datasheet", f"{sheet}: PCIe {pcie}.0 x16"),
        peer_rate=Quantity(peers / 2 * 1e9, "datasheet", link),
        flops=Quantity(tflops * 1e12, "datasheet", f"{sheet}, half of the rate with sparsity" if sparse else sheet),
        peer_access=peer_access,
        nvlink=nvlink,
        pcie_generation=pcie,
        pcie_lanes=16,
        board=board,
    )


_geforce = partial(_card, peer_access=False, board="desktop")
_sxm = partial(_card, nvlink="built-in")

_GA102 = "NVIDIA Ampere GA102 GPU Architecture whitepaper, appendix A"
_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet"
_B200 = "NVIDIA DGX B200 datasheet, an eighth"
_L4 = "NVIDIA L4 Tensor Core GPU datasheet"
_A10 = "NVIDIA A10 Tensor Core GPU datasheet"
_T4 = "NVIDIA T4 Tensor Core GPU datasheet"
_V100 = "NVIDIA V100 Tensor Core GPU datasheet"
_A6000 = "NVIDIA RTX A6000 datasheet"

CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        _geforce("RTX3090", _GA102, gb=24, mib=24576, memory=936, tflops=71, pcie=4, peers=112.5, nvlink="bridge"),
        _geforce("RTX4090", _ADA, gb=24, mib=24564, memory=1008, tflops=165.2, pcie=4),
        _geforce("RTX5090", _BLACKWELL, gb=32, mib=32607, memory=1792, tflops=209.5, pcie=5),
        _sxm("A100-40GB", _A100, gb=40, mib=40536, memory=1555, tflops=312, pcie=4, peers=600),
        _sxm("A100-80GB", _A100, gb=80, mib=81920, memory=2039, tflops=312, pcie=4, peers=600),
        _card("A100-80GB-PCIe", _A100, gb=80, mib=81920, memory=1935, tflops=312, pcie=4, peers=600, nvlink="bridge"),
        _sxm("H100", _H100, gb=80, mib=81559, memory=3350, tflops=989, sparse=True, pcie=5, peers=900),
        _card("H100-PCIe", _H100, gb=80, mib=81559, memory=2000, tflops=756, sparse=True, pcie=5, peers=600, nvlink="bridge"),
        _sxm("H200", _H200, gb=141, mib=143771, memory=4800, tflops=989, sparse=True, pcie=5, peers=900),
        _sxm("B200", _B200, gb=180, mib=183359, memory=8000, tflops=2250, sparse=True, pcie=5, peers=1800),
        _card("L4", _L4, gb=24, mib=23034, memory=300, tflops=121, sparse=True, pcie=4),
        _card("L40S", "NVIDIA L40S datasheet", gb=48, mib=46068, memory=864, tflops=362, pcie=4),
        _card("A10", _A10, gb=24, mib=23028, memory=600, tflops=125, pcie=4),
        _card("T4", _T4, gb=16, mib=15360, memory=320, tflops=65, pcie=3),
        _sxm("V100-16GB", _V100, gb=16, mib=16160, memory=900, tflops=125, pcie=3, peers=300),
        _sxm("V100-32GB", _V100, gb=32, mib=32510, memory=900, tflops=125, pcie=3, peers=300),
        _card(
            "RTXA6000", _A6000, gb=48, mib=49140, memory=768, tflops=154.8, sparse=True, pcie=4, peers=112.5, nvlink="bridge",
            board="workstation",
        ),
        _card("RTX6000Ada", _ADA, gb=48, mib=49140, memory=960, tflops=364.2, pcie=4, board="workstation"),
    )
}  # fmt: skip
"""By name, as `--gpus` takes them."""

_ALIASES = {
    "3090": "RTX3090", "4090": "RTX4090", "5090": "RTX5090",
    "a100sxm40gb": "A100-40GB", "a100sxm440gb": "A100-40GB", "a10040g": "A100-40GB",
    "a100sxm80gb": "A100-80GB", "a100sxm480gb": "A100-80GB", "a10080g": "A100-80GB", "a100sxm": "A100-80GB",
    "a100pcie": "A100-80GB-PCIe", "a100pcie80gb": "A100-80GB-PCIe",
    "h100sxm": "H100", "h100sxm5": "H100", "h10080gbhbm3": "H100", "h10080gb": "H100", "h200sxm": "H200", "h200141gb": "H200",
    "b200sxm": "B200", "b200180gb": "B200",
    "v100sxm216gb": "V100-16GB", "v100sxm232gb": "V100-32GB",
    "a6000": "RTXA6000", "6000ada": "RTX6000Ada", "rtx6000adageneration": "RTX6000Ada",
}  # fmt: skip
"""Other names in normal form: what people write, what the driver reports, what Ray calls an accelerator type."""


def find_card(name: str) -> Card:
    """The card of this name, in any case, with or without spaces, dashes and the maker's words.

    Raises UserError for an unknown or an incomplete name ("A100"), with the nearest ones and all.
    """
    card = known_card(name)
    if card is None:
        key = _normal(name)
        names = {_normal(known): known for known in CARDS} | _ALIASES
        near = [known for key_of, known in names.items() if key and key_of.startswith(key)]
        near = near or [names[match] for match in get_close_matches(key, names, n=3, cutoff=0.5)]
        meant = f" (did you mean {', '.join(dict.fromkeys(near))}?)" if near else ""
        raise UserError(
            f"the card {name!r:.60} is not in the table{meant}: use one of {', '.join(CARDS)}, or measure the machine with rowcast "
            "probe"
        )
    return card


def known_card(name: str) -> Card | None:
    """As `find_card`, None where there is none. Laptop and other variants are not the card that they are named after."""
    return _BY_KEY.get(_normal(name))


def _normal(name: str) -> str:
    """ "NVIDIA GeForce RTX 4090" -> "rtx4090"."""
    return re.sub(r"[^a-z0-9]|nvidia|geforce|tesla", "", name.lower())


_BY_KEY = {_normal(name): card for name, card in CARDS.items()} | {key: CARDS[name] for key, name in _ALIASES.items()}
