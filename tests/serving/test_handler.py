"""One request to one answer: the statuses, the streaming, and the one owner of each job."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os

import pytest
from dynamo.llm.exceptions import HttpError, InvalidArgument

from ltx2_pool.serving.delivery import Deliverer, MediaStore
from ltx2_pool.serving.handler import VideoHandler
from ltx2_pool.serving.traffic import Traffic
from ltx2_pool.tools.stack import TINY_MENU
from ltx2_pool.words import requests
from ltx2_pool.words.menu import Menu
from ltx2_pool.words.outcomes import NoRoom, QueueFull
from ltx2_pool.words.pictures import Picture, PictureError
from tests.serving.made_up import CONTENT, FAILURES, Context, Counts, HangingFileSystem, MadeUpPool, collect, until

MENU = Menu.load(TINY_MENU)


class MadeUpIntake:
    """Pictures whose references say what they hold, or what is wrong with them."""

    def __init__(self):
        self.held = 0
        self.sizes = None
        self.hang = asyncio.Event()

    @contextlib.asynccontextmanager
    async def taken(self, references, sizes, _user):
        self.sizes = sizes
        with contextlib.ExitStack() as closing:
            pictures, pixels = [], []
            for reference in references:
                match reference.text:
                    case "hang":
                        await self.hang.wait()
                    case "bad":
                        raise PictureError("the picture is no picture")
                    case "busy":
                        raise QueueFull("picture_queue_full", 9, 5.0)
                    case "no room":
                        raise NoRoom("no memory")
                pixels.append(os.memfd_create("pixels"))
                closing.callback(os.close, pixels[-1])
                os.write(pixels[-1], reference.text.encode())
                digest = hashlib.sha256(reference.text.encode()).hexdigest()
                pictures.append(Picture(digest, reference.frame, reference.strength))
            self.held += 1
            closing.callback(self._let_go)
            yield tuple(pictures), tuple(pixels)

    def _let_go(self):
        self.held -= 1


class Stage:
    """A handler over a made-up pool, and the check that a request leaves nothing behind."""

    def __init__(self, directory, store=None, timeout=10.0):
        self.directory = directory
        self.pool = MadeUpPool(directory)
        self.counts = Counts()
        self.traffic = Traffic(None)
        self.intake = MadeUpIntake()
        self.handler = VideoHandler(
            self.pool,
            MENU,
            "tiny",
            requests.Limits(urls=store is not None),
            Deliverer(store, timeout),
            self.counts,
            self.traffic,
            intake=self.intake,
            recipes={MENU.keys[0]: "5eed"},
        )
        self._before = asyncio.all_tasks()

    def ask(self, prompt="fine", context=None, **fields):
        return self.handler.generate({"model": "tiny", "prompt": prompt, **fields}, context or Context())

    def assert_clean(self):
        assert self.intake.held == 0
        assert asyncio.all_tasks() - self._before <= {asyncio.current_task()}
        assert self.handler.working == 0
        assert list(self.directory.iterdir()) == []


@pytest.fixture
async def stage(tmp_path):
    stage = Stage(tmp_path)
    yield stage
    stage.assert_clean()


@pytest.fixture
def hanging():
    HangingFileSystem.start_again()
    yield HangingFileSystem
    HangingFileSystem.let_go.set()


async def test_a_video(stage):
    (answer,) = await collect(stage.ask(user="  somebody  "))
    assert (answer["status"], answer["progress"], answer["model"]) == ("completed", 100, "tiny")
    assert answer["id"].endswith("_64x64@9f_seed42_steps2")
    (data,) = answer["data"]
    assert base64.b64decode(data["b64_json"]) == CONTENT
    assert (data["fps"], data["audio_sample_rate"]) == (24, 24000)
    assert stage.counts.counted == {("64x64@9f", "respond"): 1}
    assert stage.traffic.scores() == {"64x64@9f": pytest.approx(1)}
    assert stage.pool.users == ["somebody"]


async def test_the_user_is_nobody_or_somebody_short(stage):
    for user in (None, "", "   ", "u" * 1000):
        await collect(stage.ask(user=user))
    assert stage.pool.users == ["", "", "", "u" * 256]


async def test_a_stream_reports_each_step(stage):
    *events, last = await collect(stage.ask(stream=True, nvext={"num_inference_steps": 4}))
    assert [(e["status"], e["progress"]) for e in events] == [("in_progress", p) for p in (0, 25, 50, 75)]
    assert last["status"] == "completed"


@pytest.mark.parametrize(
    ("prompt", "status", "words"),
    [
        ("no room", 503, "try again"),
        ("queue full", 429, "try again in 13 s"),
        ("unavailable", 503, "try again in 30 s"),
        ("lost", 503, "try again"),
        ("soft", 500, "could not be made"),
        ("a bug", 500, "could not be made"),
        ("timeout", TimeoutError, "deadline"),
        ("gen timeout", TimeoutError, "too long"),
        ("poisonous", InvalidArgument, "ended two processes"),
        ("refused", InvalidArgument, "no such token$"),
        ("", InvalidArgument, "prompt is empty"),
    ],
)
async def test_each_failure_has_its_status(stage, caplog, prompt, status, words):
    expected = HttpError if isinstance(status, int) else status
    with pytest.raises(expected, match=words) as caught:
        await collect(stage.ask(prompt))
    if isinstance(status, int):
        assert caught.value.code == status
    assert stage.traffic.scores() == {}
    if prompt in FAILURES:
        assert words.removesuffix("$") in caplog.text or status == 500
    else:
        assert stage.counts.counted == {("invalid",): 1}


async def test_what_a_child_left_is_a_500_with_its_cause_in_the_log(stage, caplog):
    stage.pool.leave = lambda path: path.symlink_to("/etc/passwd")
    with pytest.raises(HttpError) as caught:
        await collect(stage.ask())
    assert caught.value.code == 500
    assert "symbolic links" in caplog.text
    assert stage.counts.counted == {("delivery",): 1}


async def test_a_client_that_leaves_cancels_its_job(stage):
    context = Context()
    asking = asyncio.create_task(collect(stage.ask("hold", context)))
    await until(lambda: stage.pool.held)
    context.gone.set()
    assert await asking == []
    assert len(stage.pool.cancelled) == 1
    assert stage.counts.counted == {}


async def test_a_client_that_left_while_it_waited_in_dynamo_starts_nothing(stage):
    context = Context()
    context.gone.set()
    assert await collect(stage.ask(context=context)) == []
    assert stage.pool.users == []


async def test_a_generator_that_is_closed_between_two_steps_cancels_its_job(stage):
    items = stage.ask("hold", stream=True)
    await anext(items)
    await items.aclose()
    assert len(stage.pool.cancelled) == 1


async def test_a_generator_that_is_thrown_away_cancels_its_job(stage):
    items = stage.ask("hold", stream=True)
    await anext(items)
    del items
    await until(lambda: stage.pool.cancelled and not stage.handler.working)


async def test_a_hard_cancel_cancels_the_job(stage):
    asking = asyncio.create_task(collect(stage.ask("hold")))
    await until(lambda: stage.pool.held)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert len(stage.pool.cancelled) == 1


async def test_a_hard_cancel_twice_still_waits_for_the_job(stage):
    gate = asyncio.Event()

    async def slow_to_die(job, on_event, user="", pixels=()):
        try:
            await asyncio.Event().wait()
        finally:
            stage.pool.cancelled.append(job.id)
            await gate.wait()

    stage.pool.generate = slow_to_die
    asking = asyncio.create_task(collect(stage.ask()))
    await until(lambda: stage.handler.working)
    await asyncio.sleep(0)
    asking.cancel()
    await until(lambda: stage.pool.cancelled)
    asking.cancel()
    await asyncio.sleep(0)
    assert not asking.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await asking


@pytest.mark.parametrize("turns", range(8))
async def test_a_client_that_leaves_as_its_video_comes_leaves_no_file(stage, turns):
    context = Context()
    asking = asyncio.create_task(collect(stage.ask("hold", context)))
    await until(lambda: stage.pool.held)
    stage.pool.release()
    for _ in range(turns):
        await asyncio.sleep(0)
    context.gone.set()
    await asking


@pytest.mark.parametrize("turns", range(8))
async def test_a_hard_cancel_as_the_video_comes_leaves_no_file(stage, turns):
    asking = asyncio.create_task(collect(stage.ask("hold")))
    await until(lambda: stage.pool.held)
    stage.pool.release()
    for _ in range(turns):
        await asyncio.sleep(0)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking


async def test_giving_up_answers_503_to_those_who_wait_and_those_who_come(stage):
    asking = asyncio.create_task(collect(stage.ask("hold")))
    await until(lambda: stage.pool.held)
    stage.handler.give_up()
    for answer in (asking, collect(stage.ask())):
        with pytest.raises(HttpError) as caught:
            await answer
        assert caught.value.code == 503


async def test_an_upload_that_hangs_is_a_503_and_counted(tmp_path, hanging, caplog):
    stage = Stage(tmp_path, MediaStore("hanging://media", None), timeout=0.1)
    with pytest.raises(HttpError) as caught:
        await collect(stage.ask(response_format="url"))
    assert caught.value.code == 503
    assert "could not be handed over in 0.1 s" in caplog.text
    assert stage.counts.counted == {("delivery",): 1}
    stage.assert_clean()


async def test_giving_up_does_not_wait_for_an_upload(tmp_path, hanging):
    stage = Stage(tmp_path, MediaStore("hanging://media", None), timeout=1000)
    asking = asyncio.create_task(collect(stage.ask(response_format="url")))
    await until(lambda: hanging.waiting)
    stage.handler.give_up()
    with pytest.raises(HttpError) as caught:
        await asking
    assert caught.value.code == 503
    assert stage.counts.counted == {("delivery",): 1}
    stage.assert_clean()


async def test_a_video_from_pictures_says_which_in_its_id_and_its_job(stage):
    more = {"last_frame_reference": "two", "last_frame_strength": 0.5}
    asked = {"input_reference": "one", "extra_args": {"media_passthrough": more}}
    (answer,) = await collect(stage.ask(**asked))
    ((one, first), (two, last)) = stage.pool.pictures[0]
    assert (first, one.frame, one.strength) == (b"one", "first", 1.0)
    assert (last, two.frame, two.strength) == (b"two", "last", 0.5)
    assert answer["id"].endswith(f"_64x64@9f_seed42_steps2_first-{one.digest[:16]}_last-{two.digest[:16]}")
    assert stage.intake.sizes == ((64, 64),)
    assert stage.pool.asked[0].recipe == "5eed"
    assert f"picture=first:sha256:{one.digest}:1 picture=last:sha256:{two.digest}:0.5" in stage.pool.asked[0].comment
    assert stage.counts.counted == {("64x64@9f", "respond"): 1, ("64x64@9f", "pictures"): 1}


@pytest.mark.parametrize(
    ("reference", "status", "words", "reason"),
    [
        ("bad", InvalidArgument, "the picture is no picture", "invalid"),
        ("busy", 429, "try again in 5 s", "picture_queue_full"),
        ("no room", 503, "try again", "no_room"),
    ],
)
async def test_what_is_wrong_with_a_picture_is_told_and_reaches_no_process(stage, reference, status, words, reason):
    with pytest.raises(HttpError if isinstance(status, int) else status, match=words) as caught:
        await collect(stage.ask(input_reference=reference))
    if isinstance(status, int):
        assert caught.value.code == status
    assert stage.pool.pictures == []
    assert stage.counts.counted == {(reason,): 1}


async def test_a_client_that_leaves_while_its_picture_is_taken_leaves_nothing(stage):
    context = Context()
    asking = asyncio.create_task(collect(stage.ask(context=context, input_reference="hang")))
    await until(lambda: stage.intake.sizes is not None)
    context.gone.set()
    assert await asking == []
    assert stage.pool.pictures == []


async def test_a_picture_for_a_shape_that_is_made_from_text_only_is_refused(stage):
    with pytest.raises(InvalidArgument, match=r"input_reference is not offered for 96x64@17f: choose 64x64@9f"):
        await collect(stage.ask(size="96x64", input_reference="one"))


async def test_a_worker_without_an_intake_says_so(tmp_path):
    stage = Stage(tmp_path)
    stage.handler._intake = None
    with pytest.raises(InvalidArgument, match="takes no pictures"):
        await collect(stage.ask(input_reference="one"))
