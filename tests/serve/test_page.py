"""The page in a browser: what it asks for, what it shows and draws, keyboard, phone, errors."""

import base64
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image

from beit3.data.stores.rle import encode_rle
from beit3.report.palette import build_palette
from beit3.segmentation.records import encode_label_map
from beit3.serve.app import build_app
from beit3.world.language import describe_object
from beit3.world.render import render
from beit3.world.scene import make_scene
from tests.serve.client import make_service
from tests.serve.page_server import (
    MODELS,
    PAGE,
    SIDE,
    Behavior,
    decode_data_uri,
    make_picture,
    serve_page,
)

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"
)
expect = sync_api.expect

NOTES = ("Failed to load resource", "Canvas2D: Multiple readback")
"""What the browser notes of statuses above 399, of servers that are gone, of reading a canvas."""

MIN_CONTRAST, MIN_BORDER_CONTRAST = 4.5, 3.0
"""Of text and of what shows a control, as WCAG 2.2 AA asks for."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def server() -> Iterator[tuple[str, Behavior]]:
    with serve_page() as (address, behavior):
        yield address, behavior


@pytest.fixture
def behavior(server: tuple[str, Behavior]) -> Behavior:
    return server[1]


@pytest.fixture
def page(browser: Any, server: tuple[str, Behavior]) -> Iterator[Any]:
    """A tab of the browser, not yet at the page. Errors in it and requests to elsewhere fail."""
    address = server[0]
    context = browser.new_context(base_url=address)
    page = context.new_page()
    page.set_default_timeout(10_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    page.on("request", lambda request: check_address(request.url, address, faults))
    yield page
    context.close()
    assert [fault for fault in faults if not fault.startswith(NOTES)] == []


def check_address(url: str, address: str, faults: list[str]) -> None:
    if not url.startswith((address, "data:", "blob:")):
        faults.append(f"asked {url}")


def open_page(page: Any, tab: str = "", *, picture: bytes | None = None) -> None:
    """Opens the page, chooses a picture (by default one of 64 x 64 pixels) and a tab."""
    page.goto("/")
    expect(page.get_by_role("tab").first).to_be_visible()
    choose_picture(page, picture or make_picture())
    if tab:
        page.get_by_role("tab", name=tab).click()


def choose_picture(page: Any, content: bytes, name: str = "disk.png") -> None:
    file = {"name": name, "mimeType": "image/png", "buffer": content}
    page.locator("#file").set_input_files(file)
    expect(page.locator("#facts")).to_contain_text(name)


def ask(page: Any, question: str = "what color is it ?") -> None:
    page.get_by_label("Question").fill(question)
    page.keyboard.press("Enter")


def get_panel(page: Any) -> Any:
    return page.locator("[role=tabpanel]:not([hidden])")


# Tools --------------------------------------------------------------------------------------------


@needs_browser
class TestTools:
    def test_tabs_are_the_tasks_of_the_server(self, page: Any) -> None:
        page.goto("/")
        expect(page.get_by_role("tab")).to_have_text(
            "Ask Caption Objects Regions Judge Search Match mine.rating".split()
        )

    def test_tasks_that_the_server_lacks_have_no_tab(self, page: Any, behavior: Behavior) -> None:
        behavior.models, behavior.index = [MODELS[2]], None
        page.goto("/")
        expect(page.get_by_role("tab")).to_have_text(["Caption"])

    def test_a_server_without_weights_says_so(self, page: Any, behavior: Behavior) -> None:
        behavior.models, behavior.index = [], None
        page.goto("/")
        expect(page.get_by_role("alert").filter(has_text="has no weights")).to_be_visible()

    def test_enter_asks_the_question_about_the_picture(self, page: Any, behavior: Behavior) -> None:
        open_page(page)
        ask(page)
        expect(page.locator(".answer")).to_have_text("blue")
        expect(page.locator(".bars li")).to_have_text(["blue81%", "red12%", "green3.4%"])
        expect(page.get_by_text("world-vqa in 0.01 s")).to_be_visible()
        path, fields = behavior.requests[0]
        assert path == "/v1/world-vqa/vqa?attention=true"
        assert fields == {"image": make_picture(), "question": "what color is it ?"}

    def test_the_answer_is_announced(self, page: Any) -> None:
        open_page(page)
        ask(page)
        expect(get_panel(page).get_by_role("status").first).to_have_text("Answer: blue, 81%")

    def test_weights_of_one_task_are_chosen_by_name(self, page: Any, behavior: Behavior) -> None:
        open_page(page)
        page.get_by_label("Weights", exact=True).select_option("other-vqa")
        ask(page)
        expect(page.get_by_text("other-vqa in")).to_be_visible()
        assert behavior.requests[0][0] == "/v1/other-vqa/vqa"  # these have no attention

    def test_a_caption(self, page: Any) -> None:
        open_page(page, "Caption")
        page.get_by_role("button", name="Write a caption").click()
        expect(page.locator(".answer")).to_have_text("a blue circle")

    def test_a_statement_about_two_pictures(self, page: Any, behavior: Behavior) -> None:
        open_page(page, "Judge")
        page.get_by_label("Second picture").set_input_files(
            {"name": "b.png", "mimeType": "image/png", "buffer": make_picture(1)}
        )
        page.get_by_label("Statement").fill("both are blue")
        page.keyboard.press("Enter")
        expect(page.locator(".answer")).to_have_text("true")
        assert behavior.requests[0][1]["image2"] == make_picture(1)

    def test_a_task_that_the_page_does_not_know_shows_its_answer(self, page: Any) -> None:
        open_page(page, "mine.rating")
        page.get_by_role("button", name="Run").click()
        expect(page.locator("pre")).to_contain_text('"rating": 4.5')

    def test_texts_are_ordered_by_how_well_they_match(self, page: Any, behavior: Behavior) -> None:
        open_page(page, "Match")
        page.get_by_label("Texts").fill("a cat\na dog\n\na cat")
        page.get_by_role("button", name="Compare").click()
        expect(page.locator(".bars li")).to_have_text(["a dog0.995", "a cat0.600"])
        image, *texts = behavior.requests[0][1]["input"]
        assert decode_data_uri(image["image"]) == make_picture()
        assert texts == ["a cat", "a dog"]

    def test_another_picture_empties_the_results(self, page: Any) -> None:
        open_page(page)
        ask(page)
        expect(page.locator(".answer")).to_be_visible()
        choose_picture(page, make_picture(1), "other.png")
        expect(page.locator(".answer")).to_have_count(0)


# Pictures -----------------------------------------------------------------------------------------

SEND_FILE = """async ([name, text, kind]) => {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type: "image/png" }));
  const event = kind === "paste"
    ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true })
    : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event);
}"""


@needs_browser
class TestPictures:
    @pytest.mark.parametrize("kind", ["drop", "paste"])
    def test_a_picture_is_dropped_or_pasted(self, page: Any, kind: str) -> None:
        page.goto("/")
        text = base64.b64encode(make_picture()).decode()
        page.evaluate(SEND_FILE, ["a.png", text, kind])
        expect(page.locator("#facts")).to_have_text(f"a.png · {SIDE} × {SIDE} pixels")
        expect(page.get_by_alt_text("The chosen picture, a.png")).to_be_visible()

    def test_a_file_that_is_no_picture_is_refused_in_words(self, page: Any) -> None:
        open_page(page)
        file = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
        page.locator("#file").set_input_files(file)
        expect(page.locator("#picture-error")).to_contain_text("notes.txt is no picture")
        expect(page.locator("#facts")).to_contain_text("disk.png")  # the old one stays

    def test_an_example_offers_questions(self, page: Any, behavior: Behavior) -> None:
        example = json.loads((PAGE / "examples.json").read_text())[0]
        page.goto("/")
        page.get_by_role("button", name=example["alt"]).click()
        page.get_by_role("button", name=example["questions"][1]).click()
        expect(page.locator(".answer")).to_be_visible()
        fields = behavior.requests[0][1]
        assert fields["question"] == example["questions"][1]
        assert fields["image"] == (PAGE / example["file"]).read_bytes()

    def test_a_removed_picture_is_asked_for(self, page: Any, behavior: Behavior) -> None:
        open_page(page)
        page.get_by_role("button", name="Remove").click()
        expect(page.get_by_role("button", name="Choose a picture")).to_be_focused()
        ask(page)
        expect(page.get_by_text("Choose a picture first.")).to_be_visible()
        assert behavior.requests == []

    def test_the_examples_are_drawings_of_the_world(self) -> None:
        for example in json.loads((PAGE / "examples.json").read_text()):
            scene = make_scene(example["seed"])
            drawn = render(scene, 32)
            with (PAGE / example["file"]).open("rb") as file, Image.open(file) as stored:
                assert np.array_equal(np.asarray(drawn), np.asarray(stored))
            names = [f"a {describe_object(item)}" for item in scene.objects]
            assert sorted(re.split(", | and ", example["alt"])) == sorted(names)


# Drawings -----------------------------------------------------------------------------------------


@needs_browser
class TestDrawings:
    def test_boxes_stand_where_the_objects_are(self, page: Any) -> None:
        open_page(page, "Objects")
        page.get_by_role("button", name="Find objects").click()
        boxes = page.locator("rect.box")
        expect(boxes).to_have_count(2)  # the third is below the first threshold
        frame, circle = page.locator("#frame").bounding_box(), boxes.first.bounding_box()
        scale = frame["width"] / SIDE
        assert circle["x"] - frame["x"] == pytest.approx(7 * scale, abs=3)
        assert circle["y"] - frame["y"] == pytest.approx(10 * scale, abs=3)
        assert circle["width"] == pytest.approx(25 * scale, abs=6)
        expect(page.locator(".labels span")).to_have_text(["circle 93%", "ground 58%"])

    def test_the_slider_shows_and_hides_objects(self, page: Any) -> None:
        open_page(page, "Objects")
        page.get_by_role("button", name="Find objects").click()
        slider = page.get_by_label("Show scores from")
        slider.press("End")
        expect(page.locator("rect.box")).to_have_count(0)
        slider.press("Home")
        expect(page.locator(".objects li")).to_have_text(["1circle93%", "2ground58%", "3bird12%"])
        expect(get_panel(page).get_by_role("status")).to_have_text("3 of 3 objects shown.")

    def test_a_focused_object_stands_out(self, page: Any) -> None:
        open_page(page, "Objects")
        page.get_by_role("button", name="Find objects").click()
        page.locator(".objects button").nth(1).focus()
        expect(page.locator(".labels span").first).to_have_class(re.compile("dim"))
        expect(page.locator(".labels span").nth(1)).not_to_have_class(re.compile("dim"))

    def test_masks_cover_the_objects(self, page: Any) -> None:
        open_page(page, "Objects")
        page.get_by_role("button", name="Find objects").click()
        page.locator("rect.box").first.wait_for()
        alphas = read_alphas(page)
        assert alphas[23, 20] > 0 and alphas[3, 3] == 0  # inside the circle, outside of all

    @pytest.mark.parametrize("seed", range(2))
    def test_run_lengths_are_decoded_as_they_were_encoded(self, page: Any, seed: int) -> None:
        rng = np.random.default_rng(seed)
        blocks = rng.random((9, 5)) < 0.5
        mask = np.kron(blocks, np.ones((15 * 4**seed, 7)))[:, :33] > 0  # runs of any length
        page.goto("/")
        decode = """async (rle) => {
          const { decodeRle } = await import("/page/masks.js");
          return Array.from(decodeRle(rle).pixels);
        }"""
        decoded = page.evaluate(decode, encode_rle(torch.from_numpy(mask)))
        assert np.array_equal(np.reshape(decoded, mask.shape), mask)

    def test_label_maps_are_decoded_as_they_were_encoded(self, page: Any) -> None:
        labels = torch.arange(256).reshape(8, 32)
        page.goto("/")
        decode = """async (text) => {
          const { decodeLabelMap } = await import("/page/masks.js");
          return Array.from((await decodeLabelMap(text)).labels);
        }"""
        assert page.evaluate(decode, encode_label_map(labels)) == list(range(256))

    def test_the_legend_names_labels_and_their_area(self, page: Any) -> None:
        open_page(page, "Regions")
        page.get_by_role("button", name="Label the picture").click()
        expect(page.locator(".objects li")).to_have_text(["sky63%", "grass27%", "water11%"])
        assert (read_alphas(page) == 153).all()
        page.get_by_role("button", name="water").focus()
        alphas = read_alphas(page)
        assert alphas[60, 60] == 153 and alphas[5, 5] == 20

    def test_words_show_where_they_look(self, page: Any) -> None:
        open_page(page)
        ask(page)
        words = page.locator(".words button")
        expect(words).to_have_text(["what", "color", "is", "it"])  # "col" and "or" are one
        words.nth(2).focus()  # the fifth token looks at the fifth of 4 x 4 patches
        expect(page.get_by_text("“is” looks mostly in the middle left.")).to_be_visible()
        alphas = read_alphas(page)
        assert alphas.shape == (48, 48)
        assert np.unravel_index(alphas.argmin(), alphas.shape) == (17, 0)
        words.nth(2).press("Enter")
        expect(words.nth(2)).to_have_attribute("aria-pressed", "true")
        page.get_by_label("Question").focus()
        expect(page.locator("canvas.layer")).to_have_count(1)  # it stays
        words.nth(2).press("Enter")
        expect(page.locator("canvas.layer")).to_have_count(0)

    def test_a_drawing_belongs_to_its_tab(self, page: Any) -> None:
        open_page(page, "Objects")
        page.get_by_role("button", name="Find objects").click()
        expect(page.locator("rect.box")).to_have_count(2)
        page.get_by_role("tab", name="Ask").click()
        expect(page.locator("rect.box")).to_have_count(0)
        page.get_by_role("tab", name="Objects").click()
        expect(page.locator("rect.box")).to_have_count(2)


def read_alphas(page: Any) -> np.ndarray:
    """Returns the opacity [H, W], 0 to 255, of the canvas over the picture."""
    width, values = page.locator("#frame canvas").evaluate(
        """(canvas) => {
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return [canvas.width, Array.from(data).filter((_, index) => index % 4 === 3)];
        }"""
    )
    return np.reshape(values, (-1, width))


# Search -------------------------------------------------------------------------------------------


@needs_browser
class TestSearch:
    def search(self, page: Any, text: str = "a blue disk") -> Any:
        """Searches for a text and returns the cards of the results."""
        page.get_by_label("What to look for").fill(text)
        page.keyboard.press("Enter")
        return page.locator(".cards li")

    def test_a_text_with_a_filter(self, page: Any, behavior: Behavior) -> None:
        open_page(page, "Search")
        page.get_by_text("Filter", exact=True).click()
        page.get_by_label("Condition").fill("year >= 2019")
        page.get_by_label("The best of each").select_option("year")
        cards = self.search(page)
        expect(cards).to_have_count(12)
        expect(cards.first).to_contain_text("picture number 0")
        expect(cards.first).to_contain_text("0.900")
        expect(cards.first.get_by_alt_text("picture number 0")).to_be_visible()
        expected = {"text": "a blue disk", "k": 12, "where": "year >= 2019", "group_by": "year"}
        assert behavior.requests == [("/search", expected)]

    def test_more_results_are_appended_and_focused(self, page: Any) -> None:
        open_page(page, "Search")
        cards = self.search(page)
        for count in (24, 30):
            page.get_by_role("button", name="Show more").click()
            expect(cards).to_have_count(count)
        expect(page.get_by_role("button", name="Use picture 25")).to_be_focused()
        expect(page.get_by_role("button", name="Show more")).to_be_hidden()

    def test_pictures_similar_to_the_chosen_one(self, page: Any, behavior: Behavior) -> None:
        open_page(page, "Search")
        page.get_by_role("button", name="Find similar").click()
        expect(page.locator(".cards li")).to_have_count(12)
        assert decode_data_uri(behavior.requests[0][1]["image"]) == make_picture()

    def test_pictures_similar_to_a_result(self, page: Any, behavior: Behavior) -> None:
        open_page(page, "Search")
        expect(self.search(page)).to_have_count(12)
        page.get_by_role("button", name="Find pictures similar to picture 3").click()
        expect(page.get_by_role("heading", name="similar to “picture number 2”")).to_be_focused()
        assert behavior.requests[1][1]["id"] == "row2"

    def test_a_result_becomes_the_picture(self, page: Any, behavior: Behavior) -> None:
        open_page(page, "Search")
        expect(self.search(page)).to_have_count(12)
        page.get_by_role("button", name="Use picture 3", exact=True).click()
        expect(page.locator("#facts")).to_contain_text("picture number 2")
        expect(page.locator(".cards li")).to_have_count(12)
        page.get_by_role("tab", name="Ask").click()
        ask(page)
        expect(page.locator(".answer")).to_be_visible()
        assert behavior.requests[-1][1]["image"] == make_picture(2)

    def test_a_row_without_a_picture(self, page: Any, behavior: Behavior) -> None:
        row = {"rank": 1, "id": "a", "score": 0.5, "metadata": {}, "image_url": None}
        behavior.results = [row]
        open_page(page, "Search")
        card = self.search(page)
        expect(card.get_by_alt_text("no picture")).to_have_count(1)
        expect(card.get_by_role("button")).to_have_text(["Similar"])

    def test_nothing_found(self, page: Any, behavior: Behavior) -> None:
        behavior.results = []
        open_page(page, "Search")
        self.search(page)
        expect(page.get_by_text("Nothing found.")).to_be_visible()
        expect(page.get_by_role("button", name="Show more")).to_be_hidden()


# Errors -------------------------------------------------------------------------------------------


@needs_browser
class TestErrors:
    def test_the_servers_reason_is_shown_and_its_field_focused(
        self, page: Any, behavior: Behavior
    ) -> None:
        behavior.refusals = [(422, "question is longer than 4000 characters", "question")]
        open_page(page)
        ask(page)
        expect(get_panel(page).get_by_role("alert")).to_have_text(
            "question is longer than 4000 characters"
        )
        field = page.get_by_label("Question")
        expect(field).to_be_focused()
        expect(field).to_have_attribute("aria-invalid", "true")
        ask(page, "shorter ?")
        expect(page.locator(".answer")).to_be_visible()
        expect(get_panel(page).get_by_role("alert")).to_have_text("")
        expect(field).not_to_have_attribute("aria-invalid", "true")

    def test_an_empty_question_is_asked_for(self, page: Any, behavior: Behavior) -> None:
        open_page(page)
        ask(page, "  ")
        expect(page.get_by_text("Type the question first.")).to_be_visible()
        assert behavior.requests == []

    def test_an_error_without_a_reason_has_words(self, page: Any, behavior: Behavior) -> None:
        behavior.refusals = [(504, "", None)]
        open_page(page)
        ask(page)
        expect(page.get_by_text("did not finish in time")).to_be_visible()

    def test_a_server_that_is_gone(self, page: Any) -> None:
        open_page(page)
        page.context.set_offline(True)
        ask(page)
        expect(page.get_by_text("The server does not answer")).to_be_visible()

    def test_a_busy_server_is_asked_again_after_the_time_that_it_names(
        self, page: Any, behavior: Behavior
    ) -> None:
        behavior.refusals = [(503, "the queue is full", None)] * 2
        behavior.retry_after = "1"
        open_page(page)
        ask(page)
        expect(page.get_by_text("The server is busy: trying again in 1 s …")).to_be_visible()
        assert len(behavior.requests) == 1
        expect(page.locator(".answer")).to_have_text("blue")
        assert len(behavior.requests) == 3

    def test_a_server_that_stays_busy_is_given_up(self, page: Any, behavior: Behavior) -> None:
        behavior.refusals = [(503, "the queue is full", None)] * 9
        behavior.retry_after = "0.01"
        open_page(page)
        ask(page)
        expect(page.get_by_text("the queue is full")).to_be_visible()
        assert len(behavior.requests) == 6

    def test_a_server_that_is_loading_is_waited_for(self, page: Any, behavior: Behavior) -> None:
        behavior.loading = 9
        page.goto("/")
        expect(page.get_by_text("The server is loading its weights …")).to_be_visible()
        expect(page.get_by_role("tab").first).to_be_visible()
        expect(page.locator("#page-status")).to_have_text("")

    def test_escape_ends_what_is_running(self, page: Any, behavior: Behavior) -> None:
        behavior.hold = threading.Event()
        open_page(page)
        ask(page)
        expect(page.get_by_role("button", name="Cancel")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_text("Canceled.")).to_be_visible()
        behavior.hold.set()

    def test_cancel_ends_what_is_running(self, page: Any, behavior: Behavior) -> None:
        behavior.hold = threading.Event()
        open_page(page)
        ask(page)
        expect(get_panel(page).locator("[aria-busy=true]")).to_be_visible()
        page.keyboard.press("Enter")  # no second request while one is running
        page.get_by_role("button", name="Cancel").click()
        expect(page.get_by_text("Canceled.")).to_be_visible()
        expect(page.get_by_role("button", name="Ask", exact=True)).to_be_focused()
        behavior.hold.set()
        page.wait_for_timeout(100)
        assert len(behavior.requests) == 1
        expect(page.locator(".answer")).to_have_count(0)

    def test_the_token_is_asked_for_and_sent(self, page: Any, behavior: Behavior) -> None:
        behavior.token = "secret"
        page.goto("/")
        field = page.get_by_label("Token")
        expect(field).to_be_focused()
        field.fill("wrong")
        field.press("Enter")
        expect(page.get_by_text("This token is wrong.")).to_be_visible()
        field.fill("secret")
        field.press("Enter")
        page.get_by_role("tab", name="Search").click()
        page.get_by_label("What to look for").fill("a disk")
        page.keyboard.press("Enter")
        image = page.get_by_alt_text("picture number 0")
        expect(image).to_have_attribute("src", re.compile("^blob:"))
        page.reload()
        expect(page.get_by_role("tab").first).to_be_visible()
        page.get_by_role("link", name="API").click()
        expect(page.get_by_role("heading", name="All endpoints")).to_be_visible()


# With the server itself ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_address(root: Path) -> Iterator[str]:
    """Address of a server with small networks that answer at random."""
    service = make_service(root, "vqa", "captioning", "coco", "retrieval")
    config = uvicorn.Config(build_app(service), host="127.0.0.1", port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/"
    server.should_exit = True
    thread.join()
    service.stop()


@needs_browser
def test_the_server_and_the_page_agree(browser: Any, real_address: str) -> None:
    context = browser.new_context(base_url=real_address)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text))
    open_page(page)
    expect(page.get_by_role("tab")).to_have_text(["Ask", "Caption", "Objects", "Match"])
    ask(page, "what color is the circle ?")
    expect(page.locator(".bars li").first).to_be_visible()
    word = page.locator(".words button").filter(has_text="circle").first
    word.focus()
    expect(page.get_by_text("“circle” looks mostly")).to_be_visible()
    assert read_alphas(page).max() > 0
    for tab, button, result in (
        ("Caption", "Write a caption", ".answer"),
        ("Objects", "Find objects", ".objects button"),
    ):
        page.get_by_role("tab", name=tab).click()
        page.get_by_role("button", name=button).click()
        expect(get_panel(page).locator(result).first).to_be_visible()
    expect(page.locator("rect.box").first).to_be_attached()
    page.get_by_role("tab", name="Match").click()
    page.get_by_label("Texts").fill("a circle\na square")
    page.get_by_role("button", name="Compare").click()
    expect(get_panel(page).locator(".bars li")).to_have_count(2)
    page.get_by_role("link", name="API").click()
    expect(page.get_by_text("/v1/vqa").first).to_be_visible()
    context.close()
    assert [fault for fault in faults if not fault.startswith(NOTES)] == []


# Everybody ----------------------------------------------------------------------------------------

FIND_UNNAMED = """() => {
  const shown = (element) => element.checkVisibility();
  const fields = [...document.querySelectorAll("input, select, textarea")].filter(shown);
  const buttons = [...document.querySelectorAll("button")].filter(shown);
  const names = (button) => button.ariaLabel ?? button.textContent.trim()
    ?? button.querySelector("img")?.alt;
  return [
    ...fields.filter((field) => !field.labels?.length),
    ...buttons.filter((button) => !names(button) && !button.querySelector("img[alt]")),
    ...[...document.images].filter((image) => shown(image) && !image.alt),
  ].map((element) => element.outerHTML);
}"""


@needs_browser
class TestEverybody:
    def test_all_is_reached_by_the_keyboard(self, page: Any) -> None:
        page.goto("/")
        expect(page.get_by_role("tab").first).to_be_visible()
        expect(page.locator(".thumb")).to_have_count(5)
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            element = page.evaluate(
                """() => {
                  const { activeElement: element } = document;
                  if (element === document.body) return "";
                  const { outlineStyle, outlineWidth } = getComputedStyle(element);
                  const isShown = outlineStyle !== "none" && parseFloat(outlineWidth) > 0;
                  return (isShown ? "" : "no outline: ") + element.outerHTML.slice(0, 60);
                }"""
            )
            if not element:
                break  # out of the page: no trap
            reached.append(element)
        else:
            pytest.fail(f"Tab never leaves the page: {reached[-3:]}")
        assert not [element for element in reached if element.startswith("no outline")]
        text = " ".join(reached)
        wanted = ["Skip", "docs", "choose", "thumb", 'role="tab"', "question", "select", "primary"]
        positions = [text.find(name) for name in wanted[:6]]
        assert positions == sorted(positions) and positions[0] >= 0, reached
        assert text.count('role="tab"') == 1  # arrows go from tab to tab

    def test_arrow_keys_change_the_tab(self, page: Any) -> None:
        open_page(page)
        page.get_by_role("tab", name="Ask").focus()
        for key, name in (("ArrowRight", "Caption"), ("End", "mine.rating"), ("ArrowRight", "Ask")):
            page.keyboard.press(key)
            tab = page.get_by_role("tab", name=name)
            expect(tab).to_be_focused()
            expect(tab).to_have_attribute("aria-selected", "true")

    def test_controls_and_images_have_names(self, page: Any) -> None:
        open_page(page)
        ask(page)
        expect(page.locator(".answer")).to_be_visible()
        for name in page.get_by_role("tab").all_inner_texts():
            page.get_by_role("tab", name=name).click()
            get_panel(page).locator("summary").evaluate_all("(all) => all.map((e) => e.click())")
            assert page.evaluate(FIND_UNNAMED) == []

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_nothing_is_wider_than_a_phone(self, page: Any, scheme: str) -> None:
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": 390, "height": 844})
        open_page(page)
        ask(page, "what " + "wide" * 40)
        expect(page.locator(".answer")).to_be_visible()
        for name in page.get_by_role("tab").all_inner_texts():
            page.get_by_role("tab", name=name).click()
            get_panel(page).locator("button.primary").click()
            page.wait_for_timeout(50)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name

    def test_an_answer_comes_into_view_on_a_phone(self, page: Any) -> None:
        page.set_viewport_size({"width": 390, "height": 700})
        open_page(page)
        ask(page)
        expect(page.locator(".answer")).to_be_in_viewport()

    def test_a_drawing_stays_in_view_on_a_phone(self, page: Any) -> None:
        page.set_viewport_size({"width": 390, "height": 700})
        open_page(page, "Objects")
        page.get_by_role("button", name="Find objects").click()
        page.locator(".objects button").last.scroll_into_view_if_needed()
        page.mouse.wheel(0, 2000)
        expect(page.locator("#frame")).to_be_in_viewport(ratio=0.95)

    def test_reduced_motion_stops_the_progress_bar(self, page: Any, behavior: Behavior) -> None:
        behavior.hold = threading.Event()
        page.emulate_media(reduced_motion="reduce")
        open_page(page)
        ask(page)
        progress = get_panel(page).locator(".progress")
        expect(progress).to_be_visible()
        assert progress.evaluate("(bar) => getComputedStyle(bar).animationName") == "none"
        behavior.hold.set()


def read_schemes() -> list[dict[str, str]]:
    """Returns the colors of the light and of the dark page: name -> six hexadecimal digits."""
    schemes = []
    for block in re.findall(r":root \{(.*?)\}", (PAGE / "style.css").read_text(), re.DOTALL):
        colors = dict(re.findall(r"--([\w-]+): #(\w+);", block))
        for name, value in colors.items():
            if len(value) == 3:
                colors[name] = "".join(digit * 2 for digit in value)
        if colors:
            schemes.append(colors)
    return schemes


def compute_contrast(first: str, second: str) -> float:
    """Returns the contrast of two colors as WCAG defines it, 1 to 21."""
    luminances = []
    for color in (first, second):
        levels = np.array([int(color[i : i + 2], 16) for i in (0, 2, 4)]) / 255
        linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
        luminances.append(float(linear @ [0.2126, 0.7152, 0.0722]) + 0.05)
    return max(luminances) / min(luminances)


class TestFiles:
    def test_text_has_contrast_on_the_light_and_on_the_dark_page(self) -> None:
        schemes = read_schemes()
        assert len(schemes) == 2
        texts = [(ink, back) for ink in ("ink", "soft", "accent") for back in ("page", "card")]
        texts += [("wrong", "wrong-bg"), ("accent-ink", "accent"), ("ink", "accent-bg")]
        texts += [("soft", "mat"), ("ink", "mat")]
        for colors in schemes:
            for text, background in texts:
                contrast = compute_contrast(colors[text], colors[background])
                assert contrast >= MIN_CONTRAST, (text, background, contrast)
            assert compute_contrast(colors["border"], colors["card"]) >= MIN_BORDER_CONTRAST

    def test_labels_have_the_colors_of_reports(self) -> None:
        stored = re.findall(r'"#(\w{6})"[,\n]', (PAGE / "palette.js").read_text())
        assert stored == ["{:02x}{:02x}{:02x}".format(*color) for color in build_palette()]

    def test_nothing_comes_from_outside(self) -> None:
        for file in PAGE.iterdir():
            if file.name.endswith((".js", ".css", ".html", ".json")):
                text = file.read_text().replace("http://www.w3.org/2000/svg", "")
                assert not re.search(r"https?:|url\(|[\"'`]//", text), file.name
                assert "style=" not in text and "innerHTML" not in text, file.name
