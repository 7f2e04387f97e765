"""Messages survive the Connection, and nothing else is taken for one."""

from __future__ import annotations

import multiprocessing

import pytest
from hypothesis import example, given
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


@pytest.mark.parametrize(
    ("payload", "shown"), [(b"", "b''"), (b"x" * 80, f"b'{'x' * 80}'"), (b"x" * 81, f"b'{'x' * 80}'")]
)
@pytest.mark.parametrize("decode", [protocol.decode_from_child, protocol.decode_from_parent])
def test_the_error_shows_the_beginning_of_what_is_no_message_and_says_why(decode, payload, shown):
    with pytest.raises(ProtocolError, match=rf"^not a message: {shown}: Invalid JSON: "):
        decode(payload)


@pytest.mark.parametrize("length", [1, protocol.MAX_MESSAGE])
def test_the_shortest_and_the_longest_message_may_come(length):
    assert protocol.payload_length(protocol.HEADER.pack(length)) == length


@given(st.integers(-(2**31), 2**31 - 1).filter(lambda n: not 0 < n <= protocol.MAX_MESSAGE))
@example(0)
@example(protocol.MAX_MESSAGE + 1)
def test_an_impossible_length_is_a_protocol_error(length):
    with pytest.raises(ProtocolError, match=f"^a frame of {length} bytes was announced \\(at most 4194304 are allowed"):
        protocol.payload_length(protocol.HEADER.pack(length))


def test_an_unknown_field_is_a_protocol_error():
    with pytest.raises(ProtocolError):
        protocol.decode_from_child(b'{"type": "ping", "more": 1}')


def test_a_jobs_look_ups_are_those_of_the_process_without_the_ones_before():
    before = Compiled(graph_hits=1, graph_misses=2, autograd_hits=3, autograd_misses=4, bypasses=5)
    after = Compiled(graph_hits=11, graph_misses=22, autograd_hits=33, autograd_misses=44, bypasses=55)
    made = after.since(before)
    assert made == Compiled(graph_hits=10, graph_misses=20, autograd_hits=30, autograd_misses=40, bypasses=50)
    assert made.misses == 20 + 40 + 50
