"""Speaks the child's side of the protocol without a model; the prompt of a job says how to misbehave.

How it starts is told by FAKE_SPAWN, for instance ``64x64@9f=eof``; ``<behaviour>:once:<file>`` misbehaves only while
the file is absent, and makes it.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

from ltx2_pool.words import protocol
from ltx2_pool.words.protocol import (
    Assign,
    Broken,
    Cancel,
    Compiled,
    Done,
    Failed,
    Generate,
    Lend,
    Lending,
    Memory,
    Phase,
    Ready,
    Step,
)


def main() -> None:
    connection = Connection(int(sys.argv[1]))

    def receive() -> protocol.FromParent:
        return protocol.decode_from_parent(connection.recv_bytes())

    def send(message: protocol.FromChild) -> None:
        connection.send_bytes(protocol.encode(message))

    assign = receive()
    if isinstance(assign, Lend):
        if "weights=hang" in os.environ.get("FAKE_SPAWN", ""):
            time.sleep(600)
        send(Lending(pid=os.getpid(), import_s=0, load_s=0, bytes=1 << 30, device_total=0))
        connection.poll(None)
        return
    assert isinstance(assign, Assign)
    behaviours = dict(item.split("=") for item in os.environ.get("FAKE_SPAWN", "").split(",") if item)
    spawn = behaviours.get(assign.shape.key, "")
    if ":once:" in spawn:
        spawn, marker = spawn.split(":once:")
        if Path(marker).exists():
            spawn = ""
        else:
            Path(marker).touch()
    print(f"fake child of {assign.shape.key} starts", flush=True)
    if spawn == "eof":
        print("about to give up", file=sys.stderr, flush=True)
        sys.exit(7)
    if spawn == "broken":
        send(Broken(error="LoadError: no checkpoint"))
        sys.exit(0)
    if spawn == "hang":
        time.sleep(600)
    if spawn == "garbage":
        connection.send_bytes(b"\x80\x04not json")
        time.sleep(600)
    if spawn == "early":
        send(Step(job_id="nobody", done=0, total=1))
        time.sleep(600)
    if spawn.startswith("gate/"):
        with open(spawn.removeprefix("gate")) as gate:  # noqa: PTH123 - a FIFO
            gate.read()
    memory = Memory(resident=1 << 30, peak=2 << 30)
    send(Ready(pid=os.getpid(), import_s=0, load_s=0, memory=memory))

    while True:
        message = receive()
        if not isinstance(message, Generate):
            return
        job, prompt = message.job, message.job.prompt
        if prompt == "crash":
            print("a last word before the crash", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if prompt == "exit 0":
            sys.exit(0)
        if prompt == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if prompt.startswith("crash once "):
            marker = Path(prompt.removeprefix("crash once "))
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        if prompt == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
        if prompt == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if prompt == "garbage":
            connection.send_bytes(b"{}")
            time.sleep(600)
        if prompt == "truncated":
            os.write(connection.fileno(), struct.pack("!i", 100) + b"only a part")
            sys.exit(0)
        if prompt == "oversized":
            os.write(connection.fileno(), struct.pack("!i", 1 << 30))
            time.sleep(600)
        if prompt == "wrong id":
            send(Done(job_id="another", size=0, sample_rate=0, phases={}, compiled=Compiled(), memory=memory))
            time.sleep(600)
        if prompt in ("soft", "refused", "fatal"):
            send(Failed(job_id=job.id, kind=prompt, error=f"RuntimeError: {prompt} on purpose"))  # type: ignore[arg-type]
            if prompt == "fatal":
                sys.exit(0)
            continue
        if prompt.startswith("chatter "):
            line = "x" * 99 + "\n"
            for _ in range(int(prompt.split()[1]) * 10):
                sys.stdout.write(line)
            sys.stdout.flush()
        if prompt == "flood":  # 1 GB
            chunk = b"y" * (1 << 16) + b"\n"
            for _ in range((1 << 30) // len(chunk)):
                os.write(1, chunk)
        if prompt == "until cancelled":
            send(Step(job_id=job.id, done=0, total=2))
            assert isinstance(receive(), Cancel)
            send(Failed(job_id=job.id, kind="cancelled", error="cancelled"))
            continue
        if prompt == "deaf to cancel":
            send(Step(job_id=job.id, done=0, total=2))
            time.sleep(600)
        if prompt.startswith("gate /"):
            send(Phase(job_id=job.id, phase="denoise"))
            with open(prompt.removeprefix("gate ")) as gate:  # noqa: PTH123 - a FIFO
                gate.read()
        if prompt.startswith("encode gate /"):
            send(Phase(job_id=job.id, phase="encode"))
            with open(prompt.removeprefix("encode gate ")) as gate:  # noqa: PTH123 - a FIFO
                gate.read()
        path = Path(assign.output_dir) / f"{job.id}.mp4"
        path.write_bytes(f"{job.shape.key} by {os.getpid()}".encode())
        send(
            Done(
                job_id=job.id,
                size=path.stat().st_size,
                sample_rate=24000,
                phases={"denoise": 0.0},
                compiled=Compiled(),
                memory=memory,
            )
        )


if __name__ == "__main__":
    main()
