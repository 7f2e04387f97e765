"""How long a gang waits while its devices are never left without work, and what devices that fault are told from."""

from __future__ import annotations

import random
import sys
import types
from pathlib import Path

import pytest

from ltx2_pool.serving import schedule
from ltx2_pool.serving.actions import Pause, Start, Wake
from ltx2_pool.serving.book import Begin, Book
from ltx2_pool.serving.breaker import THRESHOLD, Pauses
from ltx2_pool.serving.devices import Devices
from ltx2_pool.serving.ledger import Ledger, Phase, Reservation
from ltx2_pool.serving.tickets import Limits, Ticket
from ltx2_pool.words.outcomes import ProcessLost, Video
from ltx2_pool.words.protocol import Memory
from ltx2_pool.words.requests import Job
from ltx2_pool.words.shapes import Key, Shape

ROUNDS = 3
"""That a gang whose turn it is waits at most; in a round, everything that works at its beginning is done."""
MEMORY = Memory(resident=1, peak=5, generated=True)
VIDEO = Video(None, 0, {})  # type: ignore[arg-type]
SINGLES = [Key(Shape(32 * n, 32, 9)) for n in range(1, 5)]
GANG = Key(Shape(640, 320, 9))


class Saturated:
    """A book whose devices always have more to do: every key of one device has jobs that wait."""

    def __init__(self, number: int) -> None:
        self.random = random.Random(number)
        count = self.random.randrange(1, 9)
        self.size = self.random.randrange(1, min(count, 4) + 1)
        names = [f"d{n}" for n in range(count)]
        budget, places = self.random.choice([(8, None), (30, None), (1000, None), (1000, 1), (1000, 2)])
        ledger = Ledger(dict.fromkeys(names, budget), concurrency=self.random.choice([1, 1, 2]), max_processes=places)
        self.keys = SINGLES[: self.random.randrange(1, 5)]
        for key in (*self.keys, GANG):
            if self.random.random() < 0.8:
                ledger.observe(key, MEMORY)
        limits = Limits(1000, 1000, 1000, patience=0)
        self.book = Book(ledger, limits, (*self.keys, GANG), gpus={GANG: self.size})
        self.starts: list[Ticket] = []
        self.numbers = iter(range(10**6))

    def admit(self, key: Key, user: str) -> Ticket:
        job = Job(str(next(self.numbers)), key.shape, "p", 1, 2, 1.0, 24)
        return self.book.admit(job, key, user, lambda _: None, 0.0)

    def decide(self) -> None:
        for key in self.keys:
            while sum(ticket.key == key for ticket in self.book.waiting) < 3:
                self.admit(key, str(key))
        for action in self.book.next_actions(1.0):
            if isinstance(action, Start):
                self.starts.append(action.job)  # type: ignore[arg-type]
            assert not isinstance(action, Begin) or len(action.process.devices) in (1, self.size)

    def advance(self, process: Reservation) -> None:
        """What it does now is done."""
        if process.ending and process.id not in self.book.running:
            self.book.gone(process)
        elif process.starting:
            self.book.ready(process, MEMORY.model_copy(update={"generated": False}), 1.0)
        elif process.id in self.book.running:
            self.book.encoding(process)
            if self.random.random() < 0.5:
                self.decide()
            self.book.done(process, MEMORY, VIDEO, 1.0)
        self.decide()

    def round(self) -> None:
        works = [
            (r, r.phase, r.used)
            for r in self.book.ledger.reservations.values()
            if r.phase is not Phase.IDLE or r.ending
        ]
        self.random.shuffle(works)
        for process, phase, used in works:
            if process.id in self.book.ledger.reservations and (process.phase, process.used) == (phase, used):
                self.advance(process)

    def waits(self) -> int:
        """Rounds from the gang's turn to its start."""
        for _ in range(self.random.randrange(8)):
            self.decide()
            self.round()
        gang = self.admit(GANG, "somebody else")
        self.decide()
        rounds = -1  # until it is the first
        for _ in range(100):
            if gang in self.starts:
                return max(0, rounds)
            rounds += rounds >= 0 or gang is self.book.waiting[0]
            self.round()
        raise AssertionError("it waits for ever")


def test_a_gang_waits_for_what_works_and_for_its_own_start_and_no_longer():
    """Its own start and its first job take two of the rounds."""
    waits = [Saturated(number).waits() for number in range(1_000)]
    assert max(waits) <= ROUNDS, waits.index(max(waits))


def test_a_gang_that_claims_nothing_waits_for_ever(monkeypatch):
    """The devices that it needs are then never free together."""
    source = Path(schedule.__file__).read_text()
    claim = "self._rooms[device].claim(need, lease=False, alone=job.alone)"
    assert claim in source
    module = types.ModuleType("mutant")
    monkeypatch.setitem(sys.modules, "mutant", module)
    exec(compile(source.replace(claim, "pass"), "mutant", "exec"), vars(module))

    def all_start() -> None:
        for number in range(1_000):
            world = Saturated(number)
            world.book.decide = module.decide
            world.waits()

    with pytest.raises(AssertionError, match="for ever"):
        all_start()


A, B, C, D = SINGLES


@pytest.fixture
def devices() -> Devices:
    return Devices(["d0", "d1", "d2"], Pauses(first=10, longest=35))


def test_a_device_on_which_one_key_after_the_other_faults_is_taken_out(devices):
    for key in (A, B):
        devices.faulted(key, ("d0",), 0.0, "no CUDA")
        assert not devices.out(0.0)
        assert devices.avoided[key] == {"d0"}
    devices.faulted(C, ("d0",), 0.0, "no CUDA\nand more")
    assert devices.out(0.0).keys() == {"d0"}
    assert devices.taken_out() == [("d0", "unavailable: d0 is out of service: no CUDA")]
    assert devices.taken_out() == []
    assert not devices.out(10.0)


def test_pauses_of_a_device_grow_until_a_video_is_made_there(devices):
    now, pauses = 0.0, []
    for _ in range(THRESHOLD):
        devices.faulted(A, ("d0",), now, "")
    for _ in range(4):
        pauses.append(devices.out(now)["d0"].until - now)
        now += pauses[-1]
        devices.faulted(A, ("d0",), now, "")  # one is enough now
    assert pauses == [10, 20, 35, 35]
    devices.well(B, ("d0",))
    devices.faulted(B, ("d0",), now + 35, "")
    assert not devices.out(now + 35)


def test_a_key_that_faults_everywhere_takes_no_device_out(devices):
    for _ in range(10):
        for name in ("d0", "d1", "d2"):
            devices.faulted(A, (name,), 0.0, "")
    assert not devices.out(0.0)


def test_the_last_device_in_service_stays(devices):
    for name, keys in (("d0", (A, B, C)), ("d1", (B, C, D)), ("d2", (D, A, B))):
        devices.take_out(name, 0.0, "") if name != "d2" else [devices.faulted(key, (name,), 0.0, "") for key in keys]
    assert devices.out(0.0).keys() == {"d0", "d1"}
    alone = Devices(["d0"], Pauses())
    for key in (A, B, C, D):
        alone.faulted(key, ("d0",), 0.0, "")
    assert not alone.out(0.0)


def test_a_device_that_is_out_is_thought_of_again_when_its_pause_is_over():
    book = Book(Ledger({"d0": 100, "d1": 100}), Limits(), [A])
    book.devices.take_out("d0", 5.0, "lost")
    (wake,) = book.next_actions(6.0)
    assert isinstance(wake, Wake)
    assert wake.at == book.devices.out(6.0)["d0"].until


def lost_in(book: Book, device: str, now: float) -> str | None:
    process = book.ledger.reserve(1000 + int(now), A, (device,))
    book.ready(process, MEMORY, 1.0)
    (start,) = [action for action in book.next_actions(now) if isinstance(action, Start)]
    assert start.process is process
    charge = book.lost(process, ProcessLost("p", "cuda_fault", "it faulted", began=True), now)
    book.gone(process)
    return charge


@pytest.mark.parametrize(("places", "charges"), [("00", ["retry", "retry"]), ("01", ["retry", "poisoned"])])
def test_a_job_is_not_charged_twice_for_one_device(places, charges):
    book = Book(Ledger({"d0": 100, "d1": 100}), Limits(), [A])
    book.admit(Job("j", A.shape, "p", 1, 2, 1.0, 24), A, "", lambda _: None, 0.0)
    assert [lost_in(book, f"d{place}", 20.0 * n) for n, place in enumerate(places)] == charges


def test_with_one_device_the_second_fault_is_the_jobs():
    book = Book(Ledger({"d0": 100}), Limits(), [A])
    book.admit(Job("j", A.shape, "p", 1, 2, 1.0, 24), A, "", lambda _: None, 0.0)
    assert [lost_in(book, "d0", 20.0 * n) for n in range(2)] == ["retry", "poisoned"]


def test_of_a_gang_only_the_device_that_faulted_is_blamed():
    book = Book(Ledger({"d0": 100, "d1": 100}), Limits(), [GANG], gpus={GANG: 2})
    for number in range(THRESHOLD):
        process = book.ledger.reserve(number, GANG, ("d0", "d1"))
        book.ready(process, Memory(resident=1, peak=5, generated=False), 1.0)
        book.lost(process, ProcessLost("p", "cuda_fault", "it faulted", devices=("d1",)), 0.0)
        book.gone(process)
    assert book.devices.out(0.0).keys() == {"d1"}


A = SINGLES[0]


def book(*devices: str, budget: int | None = 100, **options: object) -> Book:
    return Book(Ledger(dict.fromkeys(devices, budget)), Limits(), [A, GANG], gpus={GANG: 2}, **options)


def admit(asked: Book, key: Key) -> list[object]:
    answers: list[object] = []
    asked.admit(Job("j", key.shape, "p", 1, 2, 1.0, 24), key, "", answers.append, 0.0)
    return answers


def test_a_device_without_weights_makes_the_other_one_the_last():
    asked = book("d0", "d1")
    asked.next_actions(0.0, {"d0": Pause(300.0, "no weights")})
    asked.devices.take_out("d1", 0.0, "three faults")
    assert not asked.devices.out(0.0)
    assert asked.able()
    asked.next_actions(0.0, {"d0": Pause(300.0, "no weights"), "d1": Pause(300.0, "no weights")})
    assert not asked.able()


def test_a_job_that_faults_other_devices_each_time_is_charged_in_gangs_that_overlap():
    asked = book("d0", "d1", "d2")
    answers = admit(asked, GANG)
    for number, (place, bad) in enumerate(((("d0", "d1"), "d1"), (("d0", "d2"), "d2"))):
        process = asked.ledger.reserve(100 + number, GANG, place)
        asked.ready(process, MEMORY, 1.0)
        assert any(isinstance(action, Start) for action in asked.next_actions(1.0))
        charge = asked.lost(process, ProcessLost("p", "cuda_fault", "w", began=True, devices=(bad,)), 1.0)
        asked.gone(process)
    assert charge == "poisoned"
    assert len(answers) == 1


@pytest.mark.parametrize(("key", "place", "blamed"), [(GANG, ("d0", "d1"), False), (A, ("d0",), True)])
@pytest.mark.parametrize("reason", ["spawn_timeout", "compile"])
def test_the_rank_that_is_noticed_first_tells_nothing_of_its_device(reason, key, place, blamed):
    asked = book("d0", "d1", "d2")
    for number in range(THRESHOLD):
        process = asked.ledger.reserve(number, key, place)
        asked.start_failed(process, ProcessLost("p", reason, "w", devices=("d0",)), 0.0)
        asked.gone(process)
    assert ("d0" in asked.devices.out(0.0)) is blamed


@pytest.mark.parametrize("back", [10.0, 40.0])
def test_a_job_waits_for_weights_that_are_tried_again_whatever_else_is_out(back):
    asked = book("d0", "d1")
    answers = admit(asked, A)
    asked.next_actions(0.0, {"d0": Pause(15.0, ""), "d1": Pause(back, "unavailable: d1 is out of service")})
    assert answers == []


def test_younger_keys_leave_a_gang_its_devices_when_they_are_started_ahead():
    keys = [SINGLES[0], GANG, *SINGLES[1:]]
    ledger = Ledger({"d0": 1000, "d1": 1000}, max_processes=2)
    for key in keys:
        ledger.observe(key, MEMORY)
    asked = Book(ledger, Limits(), keys, ahead=keys, gpus={GANG: 2})
    begun: list[Key] = []
    starting: list[Reservation] = []
    while True:
        new = [action.process for action in asked.next_actions(0.0) if isinstance(action, Begin)]
        begun += [process.key for process in new]
        starting += new
        if not starting:
            break
        asked.ready(starting.pop(0), MEMORY, 1.0)  # one after the other, as they become so
    assert begun[:2] == [SINGLES[0], GANG]


def test_a_budget_is_found_out_where_nothing_moves():
    ledger = Ledger({"d0": None, "d1": None})
    starting = ledger.reserve(1, A, ("d0",))
    assert (ledger.still("d0"), ledger.still("d1")) == (False, True)
    ledger.enter(starting, Phase.IDLE)
    assert ledger.still("d0")
    starting.ending = True
    assert not ledger.still("d0")


def test_copies_that_may_not_write_to_the_directory_that_was_made_again_are_one_riddle():
    """They are all confined to the one that was there before; a process that is started now is not."""
    devices = [f"d{number}" for number in range(8)]
    asked = book(*devices)
    admit(asked, A)
    for number, device in enumerate(devices[:6]):
        asked.ready(asked.ledger.reserve(number, A, (device,)), MEMORY, 1.0)
    charges = []
    for number in range(8):
        if number >= 6:
            asked.ready(asked.ledger.reserve(number, A, (devices[number],)), MEMORY, 1.0)
        (start,) = [action for action in asked.next_actions(1.0) if isinstance(action, Start)]
        if number == 7:  # what was there is gone before the job is told, and nothing else is left
            asked.gone(start.process)
        charges.append(asked.lost(start.process, ProcessLost("p", "system", "may not write"), 1.0))
        asked.gone(start.process)
    assert charges == ["retry"] * 7 + ["failed"]


def test_a_hot_shape_flows_on_while_another_device_of_a_gang_loads_its_weights():
    """The gang's start had both devices to itself, for as long as the one of them loaded."""
    ledger = Ledger({"d0": 100, "d1": None})
    for key in (A, GANG):
        ledger.observe(key, MEMORY)
    asked = Book(ledger, Limits(), [A, GANG], gpus={GANG: 2})
    hot = ledger.reserve(100, A, ("d0",))
    asked.ready(hot, MEMORY, 1.0)
    admit(asked, GANG)
    (begin,) = [action for action in asked.next_actions(1.0) if isinstance(action, Begin)]
    assert begin.process.devices == ("d0", "d1")
    admit(asked, A)
    (start,) = [action for action in asked.next_actions(1.0) if isinstance(action, Start)]
    assert start.process is hot
    rows = ledger.describe()["devices"]
    assert (rows["d0"]["exclusive"], rows["d1"]["exclusive"]) == (0, 1)
    assert rows["d0"]["held"] == 2 * MEMORY.peak
