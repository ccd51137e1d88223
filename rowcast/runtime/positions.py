"""What a config says of positions: the rotary embedding with its scaling, the slopes of ALiBi. Torch-free.

The slopes are Press et al.'s geometric sequence (arXiv 2108.12409, section 3). Families differ where the number of heads is not a
power of two.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping

from rowcast.errors import UserError
from rowcast.runtime.fields import Fields, short
from rowcast.runtime.spec import RopeSpec

MOST_TOKENS = 2**30


def rope_spec(fields: Fields, head_dim: int, default_context: int) -> tuple[RopeSpec, int]:
    """The rotary embedding and the longest context it serves.

    Linear and dynamic scaling stretch `max_position_embeddings`; YaRN stretches the original context; a llama3 config states the
    stretched one.
    """
    section = fields.section("rope_scaling" if fields.get("rope_scaling") else "rope_parameters")
    if any(isinstance(value, Mapping) for value in section.values.values()):
        raise section.wrong(next(k for k, v in section.values.items() if isinstance(v, Mapping)), "the same for all layers")
    for level in (fields, section):
        level.refuse("partial_rotary_factor", "use a model whose rotary embedding covers the whole head", allowed=(1, 1.0))
    section.refuse("mrope_section", "use a text model")
    if head_dim % 2:
        raise UserError(f"the model's config has head_dim = {head_dim}, rotary embeddings need an even one: correct config.json")

    context = fields.size("max_position_embeddings", default_context, most=MOST_TOKENS)
    theta = (fields if section.get("rope_theta") is None else section).number("rope_theta", 10000.0, least=2.0)
    kind = section.get("rope_type", section.get("type", "default"))
    if kind == "default":
        return RopeSpec(theta), context
    if kind not in ("linear", "dynamic", "yarn", "llama3"):
        raise UserError(
            f"the model's config has rope type {short(kind)}: use a model with default, linear, dynamic, yarn or llama3"
        )

    factor = section.number("factor", least=1.0)
    if kind == "linear":
        return RopeSpec(theta, "linear", factor), int(factor * context)
    if kind == "dynamic":
        if head_dim < 4:
            raise UserError(
                f"the model's config has head_dim = {head_dim}, dynamic rope scaling needs 4 or more: correct config.json"
            )
        return RopeSpec(theta, "dynamic", factor, original_context=context), int(factor * context)
    level = fields if fields.get("original_max_position_embeddings") is not None else section
    original = level.size("original_max_position_embeddings", context, most=MOST_TOKENS)
    if kind == "yarn":
        return _yarn(section, theta, factor, original), max(context, int(factor * original))
    low, high = section.number("low_freq_factor"), section.number("high_freq_factor")
    if high <= low:
        raise section.wrong("high_freq_factor", f"above low_freq_factor ({low:g})")
    return RopeSpec(theta, "llama3", factor, original, low_freq_factor=low, high_freq_factor=high), context


def _yarn(section: Fields, theta: float, factor: float, original: int) -> RopeSpec:
    """YaRN with its attention factor resolved (arXiv 2309.00071, section 3.4; mscale as DeepSeek has it)."""

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0

    if section.get("attention_factor") is not None:
        attention_factor = section.number("attention_factor")
    elif section.get("mscale") and section.get("mscale_all_dim"):
        attention_factor = temperature(section.number("mscale")) / temperature(section.number("mscale_all_dim"))
    else:
        attention_factor = temperature(1.0)
    return RopeSpec(
        theta,
        "yarn",
        factor,
        original,
        beta_fast=section.number("beta_fast", 32.0),
        beta_slow=section.number("beta_slow", 1.0),
        truncate=section.flag("truncate", True),
        attention_factor=attention_factor,
    )


def bloom_slopes(heads: int) -> tuple[float, ...]:
    """The sequence of the next lower power of two, then every other slope of the next higher one."""
    lower = 1 << heads.bit_length() - 1
    slopes = [2.0 ** (-8.0 * i / lower) for i in range(1, lower + 1)]
    slopes += [2.0 ** (-4.0 * i / lower) for i in range(1, 2 * (heads - lower), 2)]
    return tuple(slopes)


def mpt_slopes(heads: int, bias_max: float) -> tuple[float, ...]:
    """Every other slope of the next higher power of two, from the second on, then those left out, cut to the number of heads."""
    higher = 1 << (heads - 1).bit_length()
    slopes = [2.0 ** (-bias_max * i / higher) for i in range(1, higher + 1)]
    return tuple(slopes if higher == heads else (slopes[1::2] + slopes[::2])[:heads])


def round_to_bfloat16(value: float) -> float:
    """Round a positive number to bfloat16, to nearest even."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", rounded))[0])
