"""Messages survive the Connection, and nothing else is taken for one."""

from __future__ import annotations

import multiprocessing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltx2_pool.words import protocol
from ltx2_pool.words.protocol import (
    Assign,
    Cancel,
    Checked,
    Checksum,
    Compiled,
    Done,
    Failed,
    Generate,
    Lend,
    Lending,
    Memory,
    Ping,
    ProtocolError,
    Ready,
)
from ltx2_pool.words.recipe import Recipe
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key, Shape

SHAPE = Shape(768, 512, 121)
MEMORY = Memory(resident=1, peak=2)
JOB = Job("id", SHAPE, 'ein Fuchs 🦊 " \\ \n', 42, 5, 1.0, 24)


@pytest.mark.parametrize(
    "message",
    [
        Assign(key=Key(SHAPE), recipe=Recipe(model_path="/m")),
        Generate(job=JOB, output="/o/id.1.mp4"),
        Cancel(job_id="id"),
        Lend(recipes=(Recipe(model_path="/m"),)),
        Checksum(),
    ],
)
def test_the_parents_messages_read_back_in_the_child(message):
    assert protocol.decode_from_parent(protocol.encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Ping(),
        Ready(import_s=1.5, load_s=0.5, memory=MEMORY),
        Checked(digest="00"),
        Lending(import_s=1, load_s=2, bytes=3),
        Done(job_id="id", sample_rate=24000, phases={"text": 0.1}, compiled=Compiled(), memory=MEMORY),
        Failed(job_id="id", kind="soft", error="x", memory=MEMORY),
    ],
)
def test_frames_are_what_a_connection_sends(message):
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        payload = protocol.encode(message)
        theirs.send_bytes(payload)
        raw = b""
        import os

        while len(raw) < protocol.HEADER.size + len(payload):
            raw += os.read(ours.fileno(), 4096)
        assert raw == protocol.frame(payload)
        assert protocol.payload_length(raw[: protocol.HEADER.size]) == len(payload)
        assert protocol.decode_from_child(payload) == message


@given(st.binary(max_size=200))
def test_garbage_is_a_protocol_error(payload):
    with pytest.raises(ProtocolError):
        protocol.decode_from_child(payload)


@given(st.integers(-(2**31), 2**31 - 1).filter(lambda n: not 0 < n <= protocol.MAX_MESSAGE))
def test_an_impossible_length_is_a_protocol_error(length):
    with pytest.raises(ProtocolError):
        protocol.payload_length(protocol.HEADER.pack(length))


def test_an_unknown_field_is_a_protocol_error():
    with pytest.raises(ProtocolError):
        protocol.decode_from_child(b'{"type": "ping", "more": 1}')
