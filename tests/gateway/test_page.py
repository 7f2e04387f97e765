"""The page, in a real Chromium: what a person does, sees, and is told."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from ltx2_pool.tools.stack import TINY_MENU
from tests.gateway.conftest import wait

PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Page]:
    chromium = shutil.which("chromium")
    if chromium is None:
        missing = "Chromium is not installed (Debian: apt-get install chromium)"
        pytest.fail(missing) if os.environ.get("CI") == "true" else pytest.skip(missing)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


def test_a_person_makes_watches_remixes_and_deletes_videos(browser, make_gateway, own_frontend):
    running = make_gateway(own_frontend, shapes=str(TINY_MENU))
    page = browser.new_page(viewport=PHONE)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith((running.url, "blob:", "data:")) else wrong.append(request.url),
    )
    page.goto(running.url)
    expect(page.get_by_role("status").first).to_contain_text("made-up · 0 jobs wait")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]

    page.get_by_label("Prompt").fill("hold a fox")
    page.get_by_label("Shape").select_option("96x64@17f")
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Make the video").click()
    card = page.get_by_role("article").first
    expect(card.get_by_role("progressbar")).to_have_attribute("value", "50")
    expect(card).to_contain_text("50 %")
    (sent,) = own_frontend.requests
    assert (sent["size"], sent["nvext"]) == ("96x64", {"num_frames": 17, "seed": 7})
    own_frontend.release()
    video = card.locator("video")
    expect(video).to_be_visible()
    wait(lambda: video.evaluate("video => video.currentTime") > 0)  # it plays
    poster = video.get_attribute("poster")
    assert poster is not None
    assert poster.endswith("variant=thumbnail")

    card.get_by_role("button", name="Remix").click()
    page.get_by_label("Prompt").fill("refuse a fox")
    page.get_by_role("button", name="Make the video").click()
    failed = page.get_by_role("article").filter(has_text="size is not on the menu")
    expect(failed).to_have_count(1)
    assert own_frontend.requests[-1]["nvext"] == {"num_frames": 17, "seed": 7}

    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "PNG")
    page.get_by_label("Picture that it starts from").set_input_files(
        {"name": "red.png", "mimeType": "image/png", "buffer": picture.getvalue()}
    )
    page.get_by_label("Shape").select_option("96x64@17f")
    page.get_by_label("Prompt").fill("from a picture")
    page.get_by_role("button", name="Make the video").click()
    expect(page.get_by_role("alert")).to_contain_text("input_reference is not offered for 96x64@17f")

    for left in (1, 0):
        page.get_by_role("article").first.get_by_role("button", name="Delete").click()
        expect(page.get_by_role("article")).to_have_count(left)
    page.reload()
    expect(page.get_by_text("None yet.")).to_be_visible()
    assert [text for text in wrong if "400" not in text] == []
    page.close()


def test_many_unfinished_videos_and_older_ones_beyond_a_deleted_one(browser, make_gateway, own_frontend):
    running = make_gateway(own_frontend)
    for number in range(6):
        running.ended(running.create(f"refuse {number}"))
    held = [running.create(f"hold {number}") for number in range(7)]  # browsers allow six connections
    wait(lambda: running.get(held[-1])["progress"] == 50)
    page = browser.new_page()
    page.goto(running.url)
    cards = page.get_by_role("article")
    expect(cards).to_have_count(12)
    expect(page.get_by_text("50 %")).to_have_count(7)
    page.get_by_label("Prompt").fill("hold one more")
    page.get_by_role("button", name="Make the video").click()
    expect(page.get_by_text("50 %")).to_have_count(8)
    cards.last.get_by_role("button", name="Delete").click()
    expect(cards).to_have_count(12)
    wait(lambda: running.count('ltx2_gateway_end_total{end="deleted"}') == 1)
    page.get_by_role("button", name="Show older ones").click()
    expect(cards).to_have_count(13)
    running.client.delete(f"/v1/videos/{held[0]}")
    expect(cards).to_have_count(12)
    own_frontend.release()
    expect(page.locator("video")).to_have_count(7)
    page.close()


def test_a_person_with_a_key(browser, keyed):
    running, a, _ = keyed
    id = a.post("/v1/videos", json={"prompt": "behind a key"}).json()["id"]
    wait(lambda: a.get(f"/v1/videos/{id}").json()["status"] == "completed")
    page = browser.new_page()
    page.goto(running.url)
    page.get_by_label("This gateway asks for a key").fill(a.headers["authorization"].removeprefix("Bearer "))
    page.get_by_role("button", name="Use it").click()
    card = page.get_by_role("article").filter(has_text="behind a key")
    card.get_by_role("button", name="Play").click()
    video = card.locator("video")
    wait(lambda: video.evaluate("video => video.currentTime") > 0)
    page.close()
