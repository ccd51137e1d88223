"""The benchmarks of docs/benchmarks.md, but for serving, side by side on the GPUs of a machine, and the page made of what they print.

    python benchmarks/suite.py --list
    python benchmarks/suite.py -o RUN --held-out a.txt --text b.txt --text c.txt             # all; RUN gets outputs, logs and copies
    python benchmarks/suite.py -o RUN --only kernels* offload-* --gpus 2 --seconds 540       # what begins and ends in nine minutes
    python benchmarks/suite.py -o RUN --keep --where "one of four of a host"                 # docs/results and the page, from RUN

Each job has its GPUs for itself, and as large a share of the processor's cores; bus, memory and what else the host has are shared, so
that times which the host bounds are better taken alone (`--only NAME --gpus N`). A job begins, in the list's order or that of --only,
where GPUs with enough memory are free and, by what it took on an H100, the time is enough. Started again, the suite runs what is not
done yet; jobs that train go on where they were. After --seconds what runs is interrupted, and killed 15 s later; whatever a job leaves
behind is killed when it ends. `--keep` takes what jobs said that ended with a line of JSON, those of which a part failed included. Exit
code 1 where a job failed.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from suite_jobs import JOBS, MODEL, Job

from rowcast.placement import nvml

ROOT = Path(__file__).parents[1]
GRACE_S = 15.0
"""Between an interrupt and the end of a job that does not heed it."""
LAST_S = 45.0
"""That a job which trains in parts takes to save and to end, beyond its minutes."""
SETTINGS = "suite.json"
ENVIRONMENT = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "RAY_ADDRESS": "local"}
"""Of jobs: numbers of GPUs are the driver's, a cluster is a job's own."""


def _heeds() -> None:
    """A job is ended by SIGINT, which what a shell runs in the background ignores, as do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(slots=True)
class Running:
    job: Job
    gpus: tuple[int, ...]
    process: subprocess.Popen[bytes]
    began_s: float


@dataclass(slots=True)
class Suite:
    """`gpus`: memory of each in GiB. `limit_s`: after which nothing runs any more."""

    folder: Path
    jobs: Sequence[Job]
    gpus: Sequence[float]
    names: Sequence[str]
    """The driver's, of each."""
    places: Mapping[str, str]
    limit_s: float
    running: list[Running] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    _began_s: float = field(default_factory=time.monotonic)

    @property
    def left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self._began_s)

    def run(self) -> None:
        """All that fits."""
        waiting = [job for job in self.jobs if not done(self.folder, job)]
        try:
            while waiting or self.running:
                for job in list(waiting):
                    if self._can_begin(job):
                        waiting.remove(job)
                        self._begin(job)
                if not self.running:
                    break
                time.sleep(0.2)
                for job in self._look():
                    if job.in_parts and not done(self.folder, job) and job.name not in self.failed:
                        waiting.insert(0, job)
                if self.left_s <= 0:
                    self._interrupt()
        finally:
            self._interrupt()
        for job in waiting:
            self._say(f"{job.name}: not begun")

    def _free(self) -> list[int]:
        taken = {gpu for each in self.running for gpu in each.gpus}
        return [gpu for gpu in range(len(self.gpus)) if gpu not in taken]

    def _can_begin(self, job: Job) -> bool:
        needs_s = 2 * LAST_S if job.in_parts else job.seconds
        names = {each.name: each for each in self.jobs}
        if any(name in names and not done(self.folder, names[name]) for name in job.after):
            return False
        return self.left_s >= needs_s and sum(self.gpus[gpu] >= job.memory for gpu in self._free()) >= job.gpus

    def _begin(self, job: Job) -> None:
        gpus = tuple(gpu for gpu in self._free() if self.gpus[gpu] >= job.memory)[: job.gpus]
        minutes = max(0.1, (min(self.left_s, job.seconds) - LAST_S) / 60)
        line = job.line({**self.places, "minutes": f"{minutes:.2f}"})
        env = {**os.environ, **ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ",".join(self.names[gpu] for gpu in gpus)}
        (self.folder / f"{job.name}.end").unlink(missing_ok=True)
        cores = sorted(os.sched_getaffinity(0))
        share = max(1, len(cores) // max(1, len(self.gpus)))
        mine = {core for gpu in gpus for core in cores[gpu * share : (gpu + 1) * share]} or set(cores)
        with (self.folder / f"{job.name}.out").open("wb") as out, (self.folder / f"{job.name}.err").open("ab") as err:
            process = subprocess.Popen(
                ["bash", "-c", line], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                preexec_fn=_heeds,
            )  # fmt: skip
        self.running.append(Running(job, gpus, process, time.monotonic()))
        with suppress(ProcessLookupError):  # it has ended already
            os.sched_setaffinity(process.pid, mine)
        self._say(f"{job.name}: GPU {', '.join(map(str, gpus))}")

    def _look(self) -> list[Job]:
        """Which ones have ended since."""
        ended = [each for each in self.running if each.process.poll() is not None]
        for each in ended:
            _signal(each, signal.SIGKILL)  # what it left behind
            self.running.remove(each)
            seconds, code = time.monotonic() - each.began_s, each.process.returncode
            told = {"code": code, "seconds": round(seconds, 1), "date": date.today().isoformat()}
            (self.folder / f"{each.job.name}.end").write_text(json.dumps(told) + "\n")
            self._say(f"{each.job.name}: exit code {code} after {seconds:.0f} s")
            if code:
                self.failed.append(each.job.name)
        return [each.job for each in ended]

    def _interrupt(self) -> None:
        """End what runs."""
        try:
            for each in self.running:
                _signal(each, signal.SIGINT)
            end = time.monotonic() + GRACE_S
            while self.running and time.monotonic() < end:
                time.sleep(0.05)
                self._look()
        finally:
            for each in self.running:
                _signal(each, signal.SIGKILL)
            for each in self.running:
                each.process.wait()
            self._look()

    def _say(self, text: str) -> None:
        line = f"[{time.monotonic() - self._began_s:5.0f} s] {text}"
        self.told.append(line)
        print(line, file=sys.stderr, flush=True)


def _signal(running: Running, signum: int) -> None:
    """To all processes of its group, which is its own, its leader ended or not."""
    with suppress(ProcessLookupError):
        os.killpg(running.process.pid, signum)


def done(folder: Path, job: Job) -> bool:
    """Whether it has ended with all that it was to give."""
    if job.makes:
        return (folder / job.makes).exists()
    try:
        ended = json.loads((folder / f"{job.name}.end").read_text())
    except FileNotFoundError:
        return False
    return bool(ended["code"] == 0)


def report_line(folder: Path, job: Job) -> str | None:
    """The last line of its output that is a JSON object; what runs a job for others adds lines of its own."""
    try:
        lines = (folder / f"{job.name}.out").read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    for line in reversed(lines):
        with suppress(ValueError):
            if isinstance(json.loads(line), dict):
                return line
    return None


def keep(folder: Path, jobs: Sequence[Job], where: str | None) -> int:
    """Put what was printed into docs/results and write the page. Returns how many results those were."""
    kept = 0
    for job in jobs:
        line = report_line(folder, job)
        if not job.title or line is None or not (folder / f"{job.name}.end").exists():
            continue
        ended = json.loads((folder / f"{job.name}.end").read_text())
        (folder / f"{job.name}.json").write_text(line + "\n")
        words = ["--keep", str((folder / f"{job.name}.json").resolve()), "--as", job.name, "--title", job.title]
        words += ["--command", job.shown, "--date", ended["date"], *(["--where", where] if where else [])]
        subprocess.run([sys.executable, "benchmarks/report.py", *words], cwd=ROOT, check=True)
        kept += 1
    return kept


def gpus_here() -> dict[str, float]:
    """GiB of each GPU that this process may use, by the driver's number."""
    facts = nvml.read()
    found = {} if facts is None else {str(gpu.index): (gpu.memory_bytes or 0) / 2**30 for gpu in facts.gpus}
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return found if names is None else {name: found[name] for name in names.split(",") if name in found}


def begin(folder: Path, settings: Mapping[str, object]) -> None:
    """Make the run's folder, or go on in it. Exits where it was begun with other settings."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    if path.exists() and (before := json.loads(path.read_text())) != settings:
        changed = ", ".join(f"--{name.replace('_', '-')}" for name, value in settings.items() if before.get(name) != value)
        sys.exit(f"{folder} was begun with another {changed}: give the same, or another folder with -o")
    path.write_text(json.dumps(settings) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "-o", "--output", type=Path, help="a folder for outputs, logs and trained copies; what is done there stays"
    )
    parser.add_argument("--list", action="store_true", help="the jobs, and what each needs")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="jobs by name or pattern, in this order")
    parser.add_argument("--but", nargs="+", default=[], metavar="NAME", help="without these")
    parser.add_argument("--gpus", type=int, help="to use, the first so many; all")
    parser.add_argument("--seconds", type=float, default=1e6, help="after which nothing runs")
    parser.add_argument("--model", default=MODEL, help="SmolLM2-135M-Instruct, or where it lies")
    parser.add_argument("--text", action="append", default=[], help="to calibrate and train on; repeatable")
    parser.add_argument("--held-out", help="a text to judge by, which is none of those")
    parser.add_argument("--keep", action="store_true", help="take the results of -o into docs, and run nothing")
    parser.add_argument("--where", help="with --keep: on what, beyond the GPU's name")
    args = parser.parse_args()
    chosen = [job for pattern in args.only for job in JOBS if fnmatch.fnmatch(job.name, pattern)]
    jobs = [job for job in dict.fromkeys(chosen) if not any(fnmatch.fnmatch(job.name, name) for name in args.but)]
    if not jobs:
        parser.error(f"no job is named {' or '.join(args.only)}; --list shows all")
    if args.list:
        print("\n".join(f"{job.name:22} {job.gpus} x {job.memory:3.0f} GiB {job.seconds:5.0f} s  {job.shown}" for job in jobs))
        return 0
    if args.output is None:
        parser.error("-o is missing: a folder for outputs and logs")
    if args.keep:
        print(f"{keep(args.output, jobs, args.where)} results kept", file=sys.stderr)
        return 0
    if not (args.text and args.held_out):
        left_out = [job.name for job in jobs if job.needs_text]
        jobs = [job for job in jobs if not job.needs_text]
        if left_out:
            print(f"without --text and --held-out: not run are {', '.join(left_out)}", file=sys.stderr)
    gpus = dict(list(gpus_here().items())[: args.gpus])
    if not gpus:
        parser.error("there is no GPU here; the benchmarks' own pages say how to rehearse them without")
    folder = args.output.resolve()
    model, held_out, *texts = (
        str(Path(given).resolve()) if given and Path(given).exists() else given
        for given in (args.model, args.held_out, *args.text)
    )
    begin(folder, {"model": model, "held_out": held_out, "text": texts})
    places = {
        "python": shlex.quote(sys.executable),
        "work": shlex.quote(str(folder)),
        "model": shlex.quote(model),
        "texts": " ".join(f"--text {shlex.quote(text)}" for text in texts),
        "held_out": shlex.quote(held_out or ""),
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    suite = Suite(folder, jobs, list(gpus.values()), list(gpus), places, args.seconds)
    suite.run()
    return int(bool(suite.failed))


if __name__ == "__main__":
    sys.exit(main())
