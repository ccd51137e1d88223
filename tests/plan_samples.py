"""A plan with a forecast, made by hand: what files, tables and pictures are tested with."""

from __future__ import annotations

from dataclasses import replace

from test_kv import SPEC

from rowcast.placement.forecast import Alternative, DeviceMemory, Forecast, RungTime, Share, Stage, WhatIf
from rowcast.placement.plan import Plan
from rowcast.placement.resident import resident_plan
from rowcast.placement.workload import Input

GIB = 1 << 30


def memory(device: str, card: str, budget_gib: float, **classes: float) -> DeviceMemory:
    """Classes in GiB, without the margin; `rung_KV` is the class "rung KV"."""
    budget = int(budget_gib * GIB)
    taken = {name.replace("_", " "): int(amount * GIB) for name, amount in classes.items()}
    return DeviceMemory(device, card, budget, taken | {"margin": budget - sum(taken.values())})


FORECAST = Forecast(
    model="Yarn-Llama-2-13b-128k",
    machine="2 x RTX4090 (24.0 GiB, PCIe 4 x16), peers over host memory, host 128.0 GiB",
    gpus=["RTX4090", "RTX4090"],
    layout="tensor parallel over 2 GPUs",
    tensor_parallel=2,
    pipeline_stages=1,
    context=130_048,
    prompt=128_000,
    batch=1,
    ladder="draft:model=Llama-68M,gamma=2 / self:kv=4096,gamma=6 / plain",
    seconds_per_token=0.226,
    tokens_per_s=4.42,
    tokens_per_s_range=[3.6, 5.1],
    first_token_s=64.0,
    tokens_per_round=5.8,
    bottleneck="bus",
    bottleneck_share=0.81,
    gap=0.004,
    solver_s=0.31,
    greedy_seconds_per_token=0.244,
    groups=9_600,
    memory=[
        memory("GPU 0", "RTX4090", 22, weights=12.4, draft=0.13, KV=2.5, rung_KV=1.6, buffers=2.4, work=1.1, graphs=0.3),
        memory("GPU 1", "RTX4090", 22, weights=12.4, draft=0.13, KV=2.5, rung_KV=1.6, buffers=2.4, work=1.1, graphs=0.3),
        memory("host of node 0", "host", 115.2, KV=94.2),
    ],
    rungs=[
        RungTime("draft:model=Llama-68M,gamma=2", 1.4, 0.002, "launches", "nothing"),
        RungTime("self:kv=4096,gamma=6", 1.0, 0.016, "GPU memory", "nothing"),
        RungTime("plain", 0.17, 1.1, "bus", "weights and attention under the copies of KV"),
    ],
    stages=[
        Stage("draft:model=Llama-68M,gamma=2", "draft", {"GPU memory": 2e8}, {"GPU memory": 2e-4, "launches": 2.6e-3}),
        Stage("self:kv=4096,gamma=6", "neurons", {"GPU memory": 1.7e10}, {"GPU memory": 1.0e-2}),
        Stage("self:kv=4096,gamma=6", "attention", {"GPU memory": 8e9}, {"GPU memory": 6e-3, "peers": 1.2e-3}),
        Stage("plain", "KV", {"bus": 1.7e10, "GPU memory": 4e8}, {"bus": 0.183, "GPU memory": 3e-4}),
        Stage("plain", "neurons", {"GPU memory": 4.4e9}, {"GPU memory": 3e-3}),
        Stage("plain", "collectives", {"peers": 2e7}, {"peers": 2e-3}),
    ],
    shares=[
        Share([0, 1], "neurons", 0, "resident", 0, 120, 120, GIB),
        Share([0, 1], "KV", -1, "resident", 0, 3, 80, 2 * GIB),
        Share([0, 1], "KV", -1, "streamed", 3, 77, 80, 47 * GIB),
    ],
    alternatives=[
        Alternative("plain", 1.1, "no rung drafts, so every token waits for the KV"),
        Alternative("pipeline over 2 GPUs", None, "62.1 GiB of KV on GPU 0 do not fit"),
    ],
    what_if=[WhatIf("1 GiB more on each GPU", 0.219), WhatIf("PCIe 5 x16", 0.13)],
    inputs=[
        Input("GPU memory rate", 1.008e12, "datasheet", "NVIDIA Ada GPU Architecture whitepaper, appendix A"),
        Input("acceptance of self:kv=4096", 0.93, "assumed", "TriForce, arXiv 2404.11912, table 1"),
        Input("host memory rate", 1.536e11, "assumed", ""),
    ],
    notes=["context 130048: the model's own"],
)


def resident(**changes: object) -> Plan:
    """A plan of the tiny model that the engine could have made."""
    given = {"fingerprint": "f", "dtype": "bfloat16", "device": "cuda:0", "budget_bytes": GIB} | changes
    return resident_plan(SPEC, **given)  # type: ignore[arg-type]


def forecast_plan(**changes: object) -> Plan:
    """The tiny model's plan with the forecast of a large one: as a file holds them."""
    return replace(resident(fingerprint=""), spec="s" * 16, machine=FORECAST.machine, forecast=replace(FORECAST, **changes))  # type: ignore[arg-type]
