"""A command as a job of a Ray cluster, from Python. Run in a checkout: python examples/job.py [ADDRESS]

ADDRESS is that of a dashboard, as in http://127.0.0.1:8265; otherwise RAY_ADDRESS, a cluster that runs here, or one that is started.
"""

from __future__ import annotations

import sys

from rowcast.cluster import jobs
from rowcast.errors import UserError


def main() -> None:
    try:
        cluster = jobs.find(sys.argv[1] if len(sys.argv) > 1 else None, cpus=3)
        print(f"cluster: {cluster.address}" + (", started here" if cluster.started else ""))
        job = jobs.submit(
            ["generate", "The capital of France is", "--tp", "3", "--max-tokens", "8", "--json"],
            address=cluster,
            working_dir=".",
            env={"ROWCAST_LOG": "info"},
        )
        print(f"job: {job.id}")
        code = job.follow(lambda text: print(text, end="", flush=True))
    except UserError as error:
        sys.exit(str(error))
    print(f"{job.status()}, exit code {code}")
    sys.exit(code)


if __name__ == "__main__":
    main()
