"""In 16 bits, too, a token's logits are the same bits whatever the number of tokens in the pass: so verifying equals decoding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_speculation import ids, prompts
from tiny import tiny_model
from torch import Tensor

from rowcast import LLM, SamplingParams
from rowcast.runtime.banks import BankWeights
from rowcast.runtime.checkpoint.random_source import RandomSource
from rowcast.runtime.comm import SoloComm
from rowcast.runtime.config import spec_from_config
from rowcast.runtime.decoder import Decoder
from rowcast.runtime.kv import PagedKV
from rowcast.runtime.protocols import Tokens
from rowcast.runtime.shard import Shard

pytestmark = pytest.mark.gpu

SHAPES = {
    "llama": {
        "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "vocab_size": 4099,
        "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    },
    "opt": {
        "model_type": "opt", "vocab_size": 4099, "hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072,
        "num_hidden_layers": 2, "num_attention_heads": 12, "max_position_embeddings": 4096, "do_layer_norm_before": True,
        "activation_function": "relu",
    },
    "bloom": {"model_type": "bloom", "vocab_size": 4099, "hidden_size": 1024, "n_layer": 2, "n_head": 16},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_seven_tokens_have_the_bits_of_seven_passes(shape: str, dtype: torch.dtype) -> None:
    from rowcast.runtime.kv.device import BoundStore, Placement

    device, spec = torch.device("cuda"), spec_from_config(SHAPES[shape])
    weights = BankWeights(spec, RandomSource(spec), SoloComm(), dtype=dtype, device=device)
    decoder = Decoder(weights, SoloComm(), device)
    kv = PagedKV(spec, Shard(), num_blocks=128, block_size=16, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(3)
    for store in kv.entries(0) + kv.entries(1):
        store.normal_(generator=generator)
    start, many = 1021, 7  # across a block's and a split's boundary
    table = torch.randperm(128, generator=generator, device=device).int()[None]
    tokens = torch.randint(0, spec.vocab_size, (many,), generator=generator, device=device)

    def logits(first: int, count: int) -> Tensor:
        positions = torch.arange(start + first, start + first + count, device=device)
        slots = table[0, positions // 16].long() * 16 + positions % 16
        starts, counts = (torch.tensor([n], dtype=torch.int32, device=device) for n in (start + first, count))
        bound = BoundStore(kv, Placement(table, starts, counts, slots, 2048))
        hidden = decoder.forward(Tokens(tokens[first : first + count], positions, positions, ()), bound)  # type: ignore[arg-type]
        return decoder.logits(hidden)

    together = logits(0, many)
    one_by_one = torch.cat([logits(i, 1) for i in range(many)])
    assert together.isfinite().all()
    assert torch.equal(together, one_by_one)
    assert torch.equal(torch.cat([logits(0, 3), logits(3, 4)]), together)


GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)


@pytest.mark.parametrize("ladder", ["ngram:gamma=5 / plain", "self:kv=24,chunk=4,sinks=4,recent=8,gamma=3 / plain"])
def test_ladders_in_16_bits_give_plain_decoding_token_for_token(tmp_path: Path, ladder: str) -> None:
    tiny_model("llama-gqa", tmp_path)
    some = prompts(6, shortest=40)
    params = [replace(GREEDY, temperature=0.8 * (i % 2), seed=i) for i in range(6)]
    outputs = [
        [ids(llm.generate(prompt, p)) for prompt, p in zip(some, params, strict=True)]
        for llm in (
            LLM(tmp_path, dtype="bfloat16", device="cuda", ladder=text, block_size=4, eager=eager)
            for text, eager in (("plain", False), ("plain", True), (ladder, False))
        )
    ]
    assert outputs[1] == outputs[0], "captured and eager"
    assert outputs[2] == outputs[0], "with and without drafts"
