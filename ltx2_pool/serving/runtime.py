"""This process's part in Dynamo: which discovery, event and request plane it takes."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from dynamo.runtime import DistributedRuntime


def connect(discovery: str) -> Any:
    """Dynamo's runtime on the running loop; `discovery` is a backend's name."""
    os.environ["DYN_DISCOVERY_BACKEND"] = discovery
    if discovery in ("file", "mem"):
        # Neither NATS nor etcd: what a single host needs.
        os.environ.setdefault("DYN_EVENT_PLANE", "zmq")
    return DistributedRuntime(asyncio.get_running_loop(), discovery, os.environ.get("DYN_REQUEST_PLANE", "tcp"))
