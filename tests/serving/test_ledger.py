"""What processes are known to take of their devices, and what that leaves for others."""

from __future__ import annotations

import pytest

from ltx2_pool.serving.ledger import UNKNOWN, Ledger, Need, Phase, Reservation, Room
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.shapes import Key, Shape

SMALL, LARGE, LARGER = (Key(Shape(32 * n, 32, 9)) for n in (1, 2, 3))
OTHER = Key(Shape(96, 32, 9), "hq")
MEMORY = Memory(resident=2, peak=40)


def ledger_of(*budgets: int | None, **options: int) -> Ledger:
    return Ledger({f"d{number}": budget for number, budget in enumerate(budgets)}, **options)


def process(ledger: Ledger, phase: Phase, key: Key, *devices: str) -> Reservation:
    entry = ledger.reserve(len(ledger.reservations), key, devices or ("d0",))
    ledger.enter(entry, phase)
    return entry


def test_a_phase_takes_what_it_was_seen_to_take():
    ledger = ledger_of(1000)
    ledger.observe(SMALL, Memory(resident=2, peak=40, encoding=7, weights=100))
    needs = {phase: ledger.need(SMALL, phase) for phase in Phase}
    assert needs == {
        Phase.LOADING: Need(140),
        Phase.SPAWNING: Need(140),
        Phase.IDLE: Need(102),
        Phase.GENERATING: Need(140),
        Phase.ENCODING: Need(107),
    }


def test_the_last_word_counts_and_of_peaks_the_highest():
    ledger = ledger_of(1000)
    for memory in (Memory(resident=5, peak=40, encoding=9), Memory(resident=3, peak=30, encoding=6)):
        ledger.observe(SMALL, memory)
    assert [ledger.need(SMALL, phase).least for phase in (Phase.IDLE, Phase.GENERATING, Phase.ENCODING)] == [3, 40, 6]
    ledger.observe(SMALL, Memory(resident=50, peak=30))  # a peak is no lower than what stays
    assert [ledger.need(SMALL, phase).least for phase in (Phase.IDLE, Phase.GENERATING, Phase.ENCODING)] == [50] * 3


@pytest.mark.parametrize(("memory", "made"), [(MEMORY, False), (MEMORY.model_copy(update={"generated": False}), True)])
def test_without_a_video_only_what_it_holds_is_known(memory, made):
    ledger = ledger_of(1000)
    ledger.observe(SMALL, memory, made=made)
    assert ledger.need(SMALL, Phase.IDLE) == Need(2)
    assert ledger.need(SMALL, Phase.GENERATING) == UNKNOWN


def test_a_shape_that_was_never_measured_takes_at_most_what_the_next_larger_one_of_its_variant_takes():
    ledger = ledger_of(1000)
    assert ledger.need(SMALL, Phase.GENERATING) == UNKNOWN
    ledger.observe(LARGER, Memory(resident=1, peak=60))
    ledger.observe(OTHER, Memory(resident=1, peak=10))
    assert ledger.need(SMALL, Phase.GENERATING) == Need(60)
    ledger.observe(LARGE, Memory(resident=1, peak=40))
    assert ledger.need(SMALL, Phase.GENERATING) == Need(40)
    assert ledger.need(LARGER, Phase.GENERATING) == Need(60)
    ledger.observe(SMALL, Memory(resident=1, peak=20))
    assert ledger.need(Key(SMALL.shape, "hq"), Phase.GENERATING) == Need(10)
    assert ledger.need(Key(Shape(128, 32, 9)), Phase.GENERATING) == UNKNOWN
    assert ledger.need(Key(Shape(64, 32, 17)), Phase.SPAWNING) == UNKNOWN
    assert ledger.need(Key(Shape(32, 64, 9)), Phase.SPAWNING) == Need(40)  # as large as a measured one


@pytest.mark.parametrize(
    ("budgets", "beside", "raised"),
    [
        ([1000], 0, 50),  # a quarter more than its peak
        ([1000], 1, 961),  # one byte more than the other one left
        ([45], 0, 45),  # no more than all there is
        ([45], 1, 45),
        ([None], 0, 50),
        ([None], 1, 50),
        ([1000, 900], 0, 50),
        ([1000, 900], 2, 900),
        ([48, 45], 0, 45),
        ([48, None], 0, 50),
        ([100, None], 2, 61),
    ],
)
def test_memory_that_ran_out_says_that_the_phase_takes_more_than_there_was(budgets, beside, raised):
    """`beside`: on how many of its devices another process is, that holds 40."""
    ledger = ledger_of(*budgets)
    ledger.observe(SMALL, MEMORY)
    entry = process(ledger, Phase.GENERATING, SMALL, *ledger.devices)
    for device in ledger.devices[:beside]:
        process(ledger, Phase.GENERATING, SMALL, device)
    ledger.ran_out(entry)
    assert ledger.need(SMALL, Phase.GENERATING) == Need(raised)
    assert ledger.need(SMALL, Phase.IDLE) == Need(2)


def test_what_running_out_said_grows_with_each_time_and_sinks_by_half_with_each_video():
    ledger = ledger_of(1000)
    ledger.observe(SMALL, MEMORY)
    entry = process(ledger, Phase.GENERATING, SMALL)
    takes = []
    for _ in range(3):
        ledger.ran_out(entry)
        takes.append(ledger.need(SMALL, Phase.GENERATING).least)
    for _ in range(7):
        ledger.observe(SMALL, MEMORY)
        takes.append(ledger.need(SMALL, Phase.GENERATING).least)
    assert takes == [50, 62, 77, 58, 49, 44, 42, 41, 40, 40]
    assert ledger.describe()["known"] == {"32x32@9f": {"idle": 2, "peak": 40, "raised": None}}


def test_a_shape_that_was_never_measured_and_ran_out_is_unknown_above_what_larger_ones_take():
    ledger = ledger_of(1000)
    ledger.observe(LARGE, MEMORY)
    ledger.ran_out(process(ledger, Phase.GENERATING, SMALL))
    assert ledger.need(SMALL, Phase.GENERATING) == Need(50, True)
    assert ledger.need(SMALL, Phase.IDLE) == Need(0)
    ledger.observe(LARGE, Memory(resident=2, peak=50))
    assert ledger.need(SMALL, Phase.GENERATING) == Need(50)


@pytest.mark.parametrize(
    ("seen", "need"), [([], UNKNOWN), ([LARGE], Need(40)), ([SMALL], Need(50)), ([SMALL, LARGE], Need(50))]
)
def test_a_start_that_runs_out_while_the_weights_load_says_only_that_it_takes_more_than_was_seen(seen, need):
    ledger = ledger_of(None)
    for key in seen:
        ledger.observe(key, MEMORY)
    ledger.ran_out(ledger.reserve(1, SMALL, ("d0",)))
    assert ledger.need(SMALL, Phase.SPAWNING) == need


def test_what_loads_beside_it_is_not_known_to_have_taken_anything():
    ledger = ledger_of(None)
    ledger.observe(SMALL, MEMORY)
    ledger.reserve(1, SMALL, ("d0",))
    ledger.set_budget("d0", 100)
    assert ledger.budget("d0") == 100
    entry = ledger.reserve(2, SMALL, ("d0",))
    ledger.ran_out(entry)
    assert ledger.need(SMALL, Phase.SPAWNING) == Need(100)


def test_running_out_says_more_of_the_smaller_shapes_too():
    ledger = ledger_of(1000)
    ledger.observe(LARGE, MEMORY)
    assert ledger.need(SMALL, Phase.GENERATING) == Need(40)
    ledger.ran_out(process(ledger, Phase.GENERATING, LARGE))
    assert ledger.need(SMALL, Phase.GENERATING) == Need(50)


def test_the_budget_is_what_is_free_and_what_our_processes_hold_without_the_reserve():
    ledger = ledger_of(None, None)
    ledger.observe(SMALL, MEMORY)
    process(ledger, Phase.GENERATING, SMALL, "d0", "d1")
    process(ledger, Phase.IDLE, SMALL, "d1")
    process(ledger, Phase.GENERATING, SMALL, "d1").ending = True
    ledger.set_budget("d1", 100, reserve=10)
    assert [ledger.budget(device) for device in ledger.devices] == [None, 100 + 40 + 2 - 10]
    ledger.set_budget("d1", 1)
    assert ledger.budget("d1") == 43
    ledger.set_budget("d1", 1, reserve=44)
    assert ledger.budget("d1") == 0
    ledger.set_budget("d1", None)
    assert ledger.budget("d1") is None


def test_a_process_that_starts_is_unknown_where_nobody_knows_what_the_weights_leave():
    ledger = ledger_of(100, None)
    ledger.observe(SMALL, MEMORY)
    here, there = ledger.reserve(1, SMALL, ("d0",)), ledger.reserve(2, SMALL, ("d0", "d1"))
    assert (here.phase, there.phase) == (Phase.SPAWNING, Phase.LOADING)
    assert [here.held_on("d0"), there.held_on("d0"), there.held_on("d1")] == [Need(40), Need(40), UNKNOWN]
    ledger.enter(there, Phase.IDLE)
    assert there.held_on("d1") == Need(2)
    assert not there.used
    ledger.enter(there, Phase.GENERATING)
    ledger.enter(here, Phase.SPAWNING)
    assert 0 < there.used < here.used


def test_what_is_on_a_device_moves_or_is_alone_there():
    ledger = ledger_of(100, 100, 100)
    first, gang = process(ledger, Phase.IDLE, SMALL, "d0"), process(ledger, Phase.IDLE, SMALL, "d1", "d2")
    assert all(map(ledger.still, ledger.devices))
    assert ledger.alone(first)
    assert ledger.alone(gang)
    last = process(ledger, Phase.ENCODING, SMALL, "d2")
    assert [ledger.still(device) for device in ledger.devices] == [True, True, False]
    assert [ledger.alone(entry) for entry in (first, gang, last)] == [True, False, False]
    ledger.release(last)
    ledger.release(last)
    assert ledger.alone(gang)
    assert ledger.still("d2")


def test_side_by_side_the_most_demanding_one_generates():
    ledger = ledger_of(100)
    ledger.observe(SMALL, Memory(resident=10, peak=40))
    ledger.observe(LARGE, Memory(resident=30, peak=50))
    assert ledger.steady([]) == 0
    assert ledger.steady([SMALL]) == 40
    assert ledger.steady([SMALL, LARGE]) == ledger.steady([LARGE, SMALL]) == 70
    assert ledger.steady([SMALL, LARGE, LARGER]) == 70


def test_people_see_what_each_device_holds_and_what_each_key_takes():
    ledger = ledger_of(100, None, concurrency=2)
    ledger.observe(SMALL, MEMORY)
    process(ledger, Phase.GENERATING, SMALL)
    process(ledger, Phase.IDLE, SMALL)
    ledger.reserve(7, OTHER, ("d1",))
    ledger.observe(LARGE, MEMORY, made=False)
    ledger.ran_out(process(ledger, Phase.GENERATING, SMALL, "d0"))
    assert ledger.describe() == {
        "max_size": "auto",
        "devices": {
            "d0": {"budget": 100, "held": 82, "exclusive": 0, "leases": 2, "processes": 3},
            "d1": {"budget": None, "held": 0, "exclusive": 1, "leases": 0, "processes": 1},
        },
        "known": {
            "32x32@9f": {"idle": 2, "peak": 40, "raised": 59},
            "64x32@9f": {"idle": 2, "peak": None, "raised": None},
        },
    }
    assert ledger_of(100, max_processes=3).describe()["max_size"] == 3


def test_a_room_is_what_the_processes_on_the_device_leave():
    ledger = ledger_of(100, 90, concurrency=2, max_processes=4)
    ledger.observe(SMALL, MEMORY)
    process(ledger, Phase.GENERATING, SMALL, "d0", "d1")
    ledger.enter(process(ledger, Phase.IDLE, SMALL), Phase.ENCODING, alone=True)
    for phase in (Phase.IDLE, Phase.GENERATING):
        process(ledger, phase, SMALL).ending = True
    assert ledger.leases == 4
    assert ledger.rooms() == {
        "d0": Room(100, 0, 0, held=122, rows=4, active=3, exclusive=1, ending=42, ending_rows=2),
        "d1": Room(90, 1, 3, held=40, rows=1, active=1),
    }
    assert ledger_of(None).rooms() == {"d0": Room(None, 1, None)}


FREE = {"budget": 100, "leases": 1, "places": 1, "held": 60, "rows": 2, "active": 1}


@pytest.mark.parametrize(
    ("room", "need", "asks", "admitted"),
    [
        ({}, Need(40), {"row": True}, True),
        ({}, Need(41), {"row": True}, False),
        ({}, Need(50), {"own": 10, "lease": True}, True),
        ({}, Need(51), {"own": 10, "lease": True}, False),
        ({"leases": 0}, Need(1), {"lease": True}, False),
        ({"leases": 0}, Need(1), {"row": True}, True),
        ({"places": 0}, Need(1), {"row": True}, False),
        ({"places": 0}, Need(1), {"lease": True}, True),
        ({"places": None}, Need(1), {"row": True}, True),
        ({"exclusive": 1}, Need(1), {}, False),
        ({"claimed_alone": 1}, Need(1), {}, False),
        ({}, Need(1), {"alone": True}, False),
        ({}, Need(1, True), {}, False),
        ({"active": 0}, Need(1), {"alone": True}, True),
        ({"active": 0}, Need(1, True), {}, True),
        ({"active": 0, "claimed_active": 1}, Need(1), {"alone": True}, False),
        ({"active": 0, "claimed_active": 1}, Need(1, True), {}, False),
        # The only process there is may try.
        ({"rows": 0, "active": 0, "held": 0}, Need(999), {"row": True}, True),
        ({"rows": 1, "active": 0}, Need(999), {"lease": True}, True),
        ({"rows": 1, "active": 0}, Need(999), {"row": True}, False),
        ({"rows": 0, "active": 0, "held": 0, "claimed_active": 1}, Need(999), {"row": True}, False),
        ({"budget": None, "rows": 0, "active": 0}, UNKNOWN, {"row": True}, True),
        ({"budget": None}, Need(1), {}, False),
        # What is claimed may be met by what ends, and what begins may not.
        ({"claimed": 30}, Need(10), {}, True),
        ({"claimed": 31}, Need(10), {}, False),
        ({"claimed": 50, "ending": 20}, Need(10), {}, True),
        ({"claimed": 51, "ending": 20}, Need(10), {}, False),
        ({"ending": 60}, Need(41), {}, False),
    ],
)
def test_what_may_begin_in_a_room(room, need, asks, admitted):
    assert Room(**{**FREE, **room}).admits(need, **{"lease": False, **asks}) is admitted


def test_what_begins_takes_and_what_waits_claims():
    room = Room(100, 2, 3)
    room.take(Need(40), lease=False, row=True)
    assert room == Room(100, 2, 2, held=40, rows=1, active=1)
    room.take(Need(50), 10, lease=True, alone=True)
    assert room == Room(100, 1, 2, held=80, rows=1, active=2, exclusive=1)
    room.take(Need(80), 80, lease=False)
    assert room == Room(100, 1, 2, held=80, rows=1, active=3, exclusive=1)
    room.claim(Need(30), 10, lease=True)
    room.claim(Need(5), 10, lease=False, alone=True)
    room.claim(Need(7, True), lease=False)
    assert (room.claimed, room.claimed_active, room.claimed_alone) == (27, 3, 2)
    assert (room.held, room.active, room.leases) == (80, 3, 0)
    for held in (3, 4):
        room.release(held)
    assert (room.ending, room.ending_rows) == (7, 2)
    unlimited = Room(None, 1, None)
    unlimited.take(UNKNOWN, lease=False, row=True)
    assert unlimited == Room(None, 1, None, rows=1, active=1, exclusive=1)
