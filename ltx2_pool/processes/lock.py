"""The lock on a device: one worker for each, because each counts on all of its memory.

The lock is a name in Linux's abstract socket namespace, made of the device's UUID. There is no file, so no directory
to find, no owner to differ and nothing to clean up: the kernel frees the name with its holder, however that ends, and
tells whoever connects which process holds it.

What it defends: two workers in one network namespace, which is a host, a pod, or a container with the host's network,
whatever their users and their /tmp. What it does not: two containers with a network each that were given the same GPU
(Kubernetes does not do that; ``docker run --gpus all`` twice does). For them `neighbours` looks at who computes on the
device: a warning, because it may also be a desktop, a monitor or a process that is just ending. Nor does it defend
against a local user who takes the name on purpose: an abstract name has no permissions.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable

from ltx2_pool.words.device import Device, DeviceError

_BACKLOG = 4096
"""Nobody accepts the connections of those that ask who holds the name. When as many have asked, the pid is not told."""
_MUCH = 2**30


class DeviceTaken(DeviceError):
    """Another worker has the device. The message says which process, and what to do."""


def hold(device: Device) -> int:
    """Take a device for this worker; returns a descriptor that keeps it while it is open. Raises DeviceTaken, OSError.

    The descriptor is closed in programs that are executed from here. The CPU is shared: nothing is locked for it.
    """
    if not device.is_gpu:
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as name:
        try:
            name.bind(_name(device))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            raise DeviceTaken(
                f"another worker ({_holder(device)}) serves {device.name} ({device.id}): stop it, or give this one "
                "other devices with --devices (LTX2_DEVICES)"
            ) from None
        name.listen(_BACKLOG)
        return name.detach()


def hold_all(devices: Iterable[Device]) -> list[int]:
    """Take several, or none of them. Raises DeviceTaken, OSError."""
    with contextlib.ExitStack() as taken:
        descriptors = []
        for device in devices:
            descriptors.append(hold(device))
            taken.callback(os.close, descriptors[-1])
        taken.pop_all()
        return descriptors


def neighbours(device: Device) -> list[str]:
    """A line for each process that has more than 1 GiB of the device, to be asked before the worker starts its own.

    Raises DeviceError.
    """
    return [
        f"pid {tenant.pid} of the host holds {tenant.bytes / 2**30:.1f} GiB of {device.name} ({device.id}): if that is "
        "a worker in another container, both will run out of memory; set LTX2_DEVICES for one of them"
        for tenant in device.tenants()
        if tenant.bytes > _MUCH
    ]


def _name(device: Device) -> str:
    return f"\0ltx2-pool/device/{device.id}"


def _holder(device: Device) -> str:
    """Who holds the name, as far as the kernel tells."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.setblocking(False)
        try:
            asking.connect(_name(device))
        except OSError:  # it has just ended, or does not listen
            return "pid unknown"
        credentials = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _gid = struct.unpack("3i", credentials)
    return f"pid {pid}, user {uid}" if pid else "in another container with this network"
