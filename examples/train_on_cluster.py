"""Train on a Ray cluster whose nodes do not have this package. Takes a minute more than the run.

    python examples/train_on_cluster.py job/train.yaml --address auto                    # on a machine of the cluster
    python examples/train_on_cluster.py job/train.yaml --submit http://127.0.0.1:8265    # from your machine, as a job

The package travels with the run. Nodes of Ray's own image lack torch and the rest, too: with --install Ray installs
them, which takes minutes on each node. Data, base model and output folder are absolute paths that mean the same on all.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.job_submission import JobStatus, JobSubmissionClient

import raycontrolnet
from raycontrolnet import TrainConfig, fit


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on a Ray cluster whose nodes do not have this package.")
    parser.add_argument("settings", type=Path, help="YAML file; a job gets its folder")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--address", help="on a machine of the cluster: auto, or HOST:PORT of the head")
    where.add_argument("--submit", metavar="DASHBOARD", help="from elsewhere: URL of the dashboard")
    parser.add_argument("--install", action="store_true", help="install what the package needs on the nodes")
    arguments = parser.parse_args()
    environment = runtime_env(install=arguments.install)
    if arguments.submit:
        sys.exit(submit(arguments.submit, arguments.settings, environment))
    ray.init(address=arguments.address, runtime_env=environment, log_to_driver=False)
    result = fit(TrainConfig(**yaml.safe_load(arguments.settings.read_text(encoding="utf-8"))))
    print(f"{result.step} updates in {result.seconds:.0f} s, loss {result.loss}: {result.output_dir}")


def runtime_env(*, install: bool) -> dict[str, Any]:
    """Return what Ray gives every process of the run: this package, from where Python finds it here."""
    environment: dict[str, Any] = {"py_modules": [str(Path(raycontrolnet.__path__[0]))]}
    if install:
        needed = metadata.requires("raycontrolnet") or []
        # The nodes have Ray, of which there can be but one version in a cluster.
        environment["pip"] = [each for each in needed if "extra ==" not in each and not each.startswith("ray[")]
        environment["config"] = {"setup_timeout_seconds": 1800}
    return environment


def submit(dashboard: str, settings: Path, environment: dict[str, Any]) -> int:
    """Run `raycontrolnet train` as a job, print what it prints, and return 0 if it succeeds.

    Ctrl-C ends the printing, not the job.
    """
    client = JobSubmissionClient(dashboard)
    job = client.submit_job(
        entrypoint=f"python -m raycontrolnet train --config {settings.name}",
        runtime_env=environment | {"working_dir": str(settings.resolve().parent)},
    )
    print(f"{job}; end it with `ray job stop --address {dashboard} {job}`", flush=True)

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    asyncio.run(follow())
    status = client.get_job_status(job)
    print(f"{job}: {status.value.lower()}")
    return 0 if status == JobStatus.SUCCEEDED else 1


if __name__ == "__main__":
    main()
