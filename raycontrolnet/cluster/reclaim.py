"""EC2's notice that this spot instance will be reclaimed, passed on to Ray, which does not look for it.

    ray start --address=$RAY_HEAD_IP:6379
    nohup python -m raycontrolnet.cluster.reclaim $RAY_HEAD_IP:6379 &

Ray then starts nothing new on this node, and a run writes a checkpoint in the two minutes that are left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from datetime import datetime, timezone
from pathlib import Path

from raycontrolnet.cluster.tokens import FILE, MODE, VARIABLES, place_of_token

METADATA = "http://169.254.169.254"
"""EC2's instance metadata service. AWS_EC2_METADATA_SERVICE_ENDPOINT, as in AWS's own tools, names another."""
POLL_S = 5.0
"""As AWS recommends."""
TOKEN_TTL_S = 300
TIMEOUT_S = 2.0


def main() -> None:
    """Wait for the notice, tell Ray, and end."""
    parser = argparse.ArgumentParser(description="Tell Ray when EC2 is about to reclaim this spot instance.")
    parser.add_argument("address", help="HOST:PORT of the cluster's head")
    address = parser.parse_args().address
    service = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", METADATA).rstrip("/")
    while (left := seconds_left(service)) is None:
        time.sleep(POLL_S)
    print(f"EC2 reclaims this instance in {left} s: telling Ray", flush=True)
    # A cluster that knows no tokens ignores one. Without the address, the command may drain a Ray of its own.
    environment = _token_shown() | os.environ | {"RAY_ADDRESS": address}
    sys.exit(subprocess.run(drain_command(address, left), env=environment).returncode)


def _token_shown() -> dict[str, str]:
    """Return what lets Ray's command show a token, if there is one here, as `ray start` did."""
    is_there = place_of_token() in VARIABLES or Path(FILE).expanduser().is_file()
    return {MODE: "token"} if is_there else {}


def seconds_left(service: str) -> int | None:
    """Return the seconds until this instance is reclaimed; None if that is not planned, or cannot be known now."""
    try:
        token = _ask(service, "/latest/api/token", "PUT", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)})
        notice = _ask(service, "/latest/meta-data/spot/instance-action", "GET", {"X-aws-ec2-metadata-token": token})
        at = datetime.strptime(json.loads(notice)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=timezone.utc)
    except (OSError, ValueError, TypeError, KeyError):  # 404 while nothing is planned
        return None
    return max(0, int((at - datetime.now(timezone.utc)).total_seconds()))


def _ask(service: str, path: str, method: str, headers: dict[str, str]) -> str:
    request = urllib.request.Request(service + path, method=method, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        return str(answer.read().decode())


def drain_command(address: str, left: int) -> list[str]:
    """Return the command that tells Ray; it is hidden in `ray --help`, and the only one there is."""
    return [
        "ray", "drain-node", "--address", address, "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", "EC2 reclaims this spot instance", "--deadline-remaining-seconds", str(left),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
