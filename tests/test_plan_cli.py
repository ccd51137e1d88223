"""`rowcast plan` as a user meets it, and what becomes of its plans: executed as they say, or refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plan_samples import FORECAST
from tiny import tiny_model

import rowcast.cli
from rowcast import LLM, Plan, SamplingParams, UserError
from rowcast.placement import here, nvml
from rowcast.placement.forecast import Forecast, Share
from rowcast.placement.nvml import DriverFacts, DriverGpu, DriverPair, PcieLink
from rowcast.runtime.plan_for import MachineWish, plan_for

Run = Callable[..., tuple[int, str, str]]
NAMED = ("plan", "facebook/opt-6.7b", "--gpus", "1xRTX4090", "--host-memory", "64GiB", "--ladder", "plain", "--groups", "500")


@pytest.fixture(autouse=True)
def nothing_is_known_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No probe, no GPU, whatever machine this runs on."""
    monkeypatch.setenv("ROWCAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nvml, "read", lambda: None)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """One command line in this process -> exit code, standard output, standard error."""

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = rowcast.cli.main([str(arg) for arg in args])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama-gqa", path)
    return path


def forecast_of(plan: Plan) -> Forecast:
    assert plan.forecast is not None
    return plan.forecast


# What is printed


def test_a_table_with_everything(run: Run) -> None:
    code, out, err = run(*NAMED)
    assert (code, err) == (0, "")
    for told in (
        "GPU 0",
        "RTX4090",
        "weights",
        "margin",
        "neurons",
        "LM head",
        "tokens/s (",
        "bottleneck: GPU memory",
        "of the best",
    ):
        assert told in out
    for title in ("memory, GiB", "time of a committed token", "passes", "what if", "inputs, by origin", "what lies where"):
        assert title in out
    assert "datasheet" in out and "given" in out and "assumed" in out


def test_json_is_the_plan(run: Run, tmp_path: Path) -> None:
    file, drawn = tmp_path / "a.plan", tmp_path / "a.svg"
    code, out, err = run(*NAMED, "--json", "-o", file, "--picture", drawn)
    assert (code, err) == (0, "")
    saved = Plan.load(file)
    assert json.loads(out) == json.loads(saved.to_json()) and out.count("\n") == 1
    assert saved.fingerprint == "" and saved.spec and saved.machine == forecast_of(saved).machine
    assert "GPU 0" in drawn.read_text()


def test_what_is_assumed_is_said(run: Run) -> None:
    _, out, _ = run(*NAMED)
    assert "GiB of host memory are assumed" not in out
    code, out, _ = run("plan", "facebook/opt-125m", "--gpus", "RTX4090", "--ladder", "plain", "--groups", "100")
    assert code == 0 and "64 GiB of host memory are assumed, give --host-memory" in out and "none was given" in out


@pytest.mark.parametrize("at", [(), ("--tp", "2")])
def test_a_draft_that_no_rung_asks(run: Run, at: tuple[str, ...]) -> None:
    code, out, err = run(
        "plan", "facebook/opt-6.7b", "--gpus", "2xRTX4090", "--draft", "facebook/opt-125m", "--groups", "100", *at
    )
    assert (code, err) == (0, "") and "acceptance of draft:model=" in out


def test_this_machine_without_a_gpu(run: Run) -> None:
    code, out, err = run("plan", "SmolLM2-135M-Instruct", "--ladder", "plain", "--context", "256", "--groups", "100")
    assert (code, err) == (0, "")
    assert "machine: the CPU, as no GPU is visible; its rates are assumed, measure them with rowcast probe" in " ".join(
        out.split()
    )
    assert "float32" in out


def driver(*names: str, peers: bool | None = None) -> DriverFacts:
    gpus = [
        DriverGpu(
            index=i, name=name, uuid=f"GPU-{i}", memory_bytes=23 << 30, link=None, link_limit=PcieLink(4, 8), nvlinks=0, numa_node=0,
            mig=False,
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    pairs = [DriverPair(a, b, None, peers) for a in range(len(names)) for b in range(a + 1, len(names))]
    return DriverFacts("595", tuple(gpus), tuple(pairs))


def test_this_machine_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvml, "read", lambda: driver("NVIDIA GeForce RTX 4090", "NVIDIA L4", peers=True))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = here.this_machine(gpu_memory_bytes=20 << 30)
    assert [card.name for card in found.machine.cards] == ["RTX4090", "L4"]
    assert [card.memory_bytes >> 30 for card in found.machine.cards] == [20, 20]
    assert found.machine.cards[0].bus_rate.value == 16e9 and found.machine.nodes[0].link == "pcie"
    assert "rowcast probe" in found.told
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,7,0")
    assert [card.name for card in here.this_machine().machine.cards] == ["L4"]
    assert here.is_here(["L4"]) and here.is_here([]) and not here.is_here(["RTX4090"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert here.this_machine().machine.cards == ()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(nvml, "read", lambda: driver("NVIDIA GeForce GTX 680"))
    with pytest.raises(UserError, match=r"GTX 680.*not in the table: run rowcast probe"):
        here.this_machine()


@pytest.mark.parametrize("machine", [(), ("--gpus", "2xRTX4090")], ids=["here", "named"])
def test_without_torch(machine: tuple[str, ...], tmp_path: Path) -> None:
    block = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import rowcast.cli
sys.exit(rowcast.cli.main(sys.argv[1:]))
"""
    args = ["plan", "facebook/opt-125m", *machine, "--groups", "200", "-o", str(tmp_path / "a.plan")]
    found = subprocess.run([sys.executable, "-c", block, *args], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stderr) == (0, "")
    assert Plan.load(tmp_path / "a.plan").forecast is not None


# What is refused


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (("no/such-model",), "no/such-model"),
        (("facebook/opt-125m", "--gpus", "2xRTX9999"), "RTX9999"),
        (("facebook/opt-175b", "--gpus", "1xT4", "--host-memory", "32GiB", "--ladder", "plain"), "more host memory"),
        (("facebook/opt-125m", "--acceptance", "2"), "--acceptance '2'"),
        (("facebook/opt-125m", "--hit-rate", "1.5"), "--hit-rate 1.5"),
        (("facebook/opt-125m", "--context", "99999"), "--context 99999"),
        (("facebook/opt-125m", "--batch", "0"), "--batch 0"),
        (("facebook/opt-125m", "--groups", "0"), "--groups 0"),
        (("facebook/opt-125m", "--link", "nvlink"), "--link nvlink"),
        (("facebook/opt-125m", "--gpus", "2xRTX4090", "--link", "nvlink"), "no NVLink"),
        (("facebook/opt-125m", "--gpus", "2x4xL4"), "no rate between them"),
        (("facebook/opt-125m", "--gpus", "L4", "--tp", "2"), "--tp 2"),
        (("facebook/opt-125m", "--gpu-memory", "24GiB"), "no GPU"),
        (("facebook/opt-125m", "--gpus", "L4", "--gpu-memory", "1TiB"), "--gpu-memory"),
        (("facebook/opt-125m", "--ladder", "nonsense"), "nonsense"),
        (("facebook/opt-125m", "--mode", "approximate", "--ladder", "plain"), "--mode approximate"),
        (("facebook/opt-125m", "--calibration", "no-such-folder"), "no-such-folder"),
        (("facebook/opt-125m", "--picture", "a.pdf"), "--picture a.pdf"),
        (("facebook/opt-125m", "--gpus", "L4", "--ladder", "plain", "-o", "no/such/folder/a.plan"), "cannot write"),
        ((), "model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_one_sentence(run: Run, args: tuple[str, ...], told: str) -> None:
    code, out, err = run("plan", *args)
    assert (code, out) == (2, "")
    assert told in err and err.startswith("rowcast: ") and err.count("\n") == 1


def test_damaged_and_foreign_files(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.plan"
    assert run(*NAMED, "-o", file)[0] == 0
    data = file.read_bytes()
    for changed, told in ((data[:-40], "damaged"), (b"PK" + data, "is not a plan file")):
        file.write_bytes(changed)
        code, out, err = run("generate", "hi", "--plan", file)
        assert (code, out) == (2, "") and told in err


# What is executed


@pytest.mark.parametrize(
    "ladder",
    ["self:kv=97,gamma=3 / plain", "ngram / plain", "self:mlp=0.5,by=q4 / plain", "self:bits=8 / plain", "draft / plain", "auto"],
)
def test_an_executed_plan_takes_what_it_says(directory: Path, tmp_path: Path, ladder: str) -> None:
    """On one device the plan from a config is the one that the engine would have made with the weights at hand."""
    draft = str(directory) if "draft" in ladder else None
    plan = plan_for(str(directory), ladder=ladder, draft=draft, context=120, batch=3)
    plan.save(tmp_path / "a.plan")
    ours = LLM(directory, plan=tmp_path / "a.plan")
    made = LLM(
        directory,
        ladder=plan.ladder_text,
        max_model_len=120,
        max_num_seqs=3,
        device="cpu",
        host_memory=plan.budget_bytes // 2,
    ).plan
    told = ("fingerprint", "draft_fingerprints", "budget_bytes", "machine", "notes", "forecast")
    own: dict[str, Any] = {name: getattr(plan, name) for name in told}
    assert asdict(ours.plan) == asdict(plan) == asdict(replace(made, **own))
    device = forecast_of(plan).memory[0]
    assert device.classes["weights"] == plan.weight_bytes and device.classes["KV"] == plan.kv_bytes
    assert device.classes["draft"] + device.classes["rung weights"] == plan.rung_weight_bytes
    assert device.classes["rung KV"] == plan.rung_kv_bytes and device.classes["work"] == plan.work_bytes
    out = ours.generate([1, 2, 3], SamplingParams(max_tokens=5, temperature=0, detokenize=False))[0]
    assert len(out.outputs[0].token_ids) == 5


def test_a_plan_for_another_shape_is_refused(directory: Path) -> None:
    plan = plan_for("facebook/opt-125m", ladder="plain", groups=50)
    with pytest.raises(UserError, match=r"a model of another shape \(facebook/opt-125m\)"):
        LLM(directory, plan=plan)


def share(part: str, tier: str) -> Share:
    return Share([0], part, 0, tier, 0, 1, 1, 5)


def test_what_cannot_be_done_yet_is_named(directory: Path) -> None:
    plan = plan_for(str(directory), ladder="plain", groups=50)
    forecast = forecast_of(plan)
    for changes, told in (
        ({"tensor_parallel": 4}, ["tensor parallelism over 4 GPUs"]),
        ({"pipeline_stages": 2}, ["a pipeline of 2 stages"]),
        ({"shares": [share("attention", "peer")]}, ["attention held by another GPU"]),
        ({"shares": [share("attention", "rows"), share("KV", "cpu")]}, ["attention fetched by rows", "KV computed on the CPU"]),
        ({"tensor_parallel": 2, "shares": FORECAST.shares}, ["over 2 GPUs"]),
    ):
        with pytest.raises(UserError, match="cannot do yet") as caught:
            LLM(directory, plan=replace(plan, forecast=replace(forecast, **changes)))
        for each in told:
            assert each in str(caught.value)
        assert "resident" not in str(caught.value)


def test_a_pipeline_says_at_once_what_to_plan_for(run: Run, directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.plan"
    asked = ("plan", directory, "--gpus", "2xRTX4090", "--ladder", "plain", "--groups", "50", "-o", file)
    code, out, _ = run(*asked, "--tp", "1")
    told = "no engine executes this plan yet: a pipeline of 2 stages; plan for these GPUs with --tp 2"
    assert code == 0 and out.splitlines()[2] == told and out.count("no engine") == 1
    for ranks in ("1", "2"):
        code, out, err = run("generate", "hi", "--model", directory, "--plan", file, "--tp", ranks)
        assert (code, out) == (2, "") and "a pipeline of 2 stages" in err and "plan for these GPUs with --tp 2, or" in err
    assert run(*asked, "--tp", "2")[0] == 0
    code, out, err = run("generate", "hi", "--model", directory, "--plan", file)
    assert (code, out) == (2, "") and "the plan is for 2 ranks and --tp 1 is not: run it with --tp 2, or" in err


def test_where_ranks_cannot_be_as_many_as_gpus() -> None:
    """Twelve heads have no five equal parts: four GPUs could share them."""
    plan = plan_for("facebook/opt-125m", MachineWish(gpus="5xRTX4090"), ladder="plain", groups=50)
    assert plan.notes[-1] == "no engine executes this plan yet: a pipeline of 5 stages; plan for 4 GPUs with --tp 4"


def test_a_plan_for_a_gpu_that_is_not_here(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_for(str(directory), MachineWish(gpus="RTX4090"), ladder="plain", groups=50)
    assert plan.device == "cuda"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"the plan is for a GPU \(cuda\), which is not there: make a plan for this machine"):
            LLM(directory, plan=plan)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8 << 30, 12 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=12 << 30))
    with pytest.raises(UserError, match=r"takes .* of a budget of 22.8 GiB, but cuda:0 has 12.0 GiB"):
        LLM(directory, plan=plan)


def test_predicted_and_measured_side_by_side(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "a.plan"
    args = (
        "plan",
        "SmolLM2-135M-Instruct",
        "--ladder",
        "plain",
        "--context",
        "64",
        "--prompt",
        "5",
        "--groups",
        "100",
        "-o",
        file,
    )
    assert run(*args)[0] == 0
    code, out, err = run("generate", "The capital of France is", "--plan", file, "--max-tokens", "4")
    assert code == 0 and "Paris" in out and "predicted" not in out
    assert err.count("predicted") == 1 and "seconds per token" in err and "%" in err
    code, out, err = run("generate", "The capital of France is", "--plan", file, "--max-tokens", "4", "--json")
    told = json.loads(out)["stats"]["plan"]
    assert told["seconds per token"]["predicted"] > 0 and told["seconds per token"]["measured"] > 0
    assert told["seconds to the first token"]["error"] is not None and "predicted" not in err
