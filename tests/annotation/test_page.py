"""The real page in headless Chromium, driven by keyboard and read back from the store."""

import io
import itertools
import json
import re
import shutil
import uuid

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import serving
from tiny import save_tiny

from densityrl.preference.store import PreferenceStore

sync_api = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGUMENTS = (
    "--no-sandbox",  # containers have none to offer
    "--use-angle=swiftshader",  # WebGL without a GPU
    "--enable-unsafe-swiftshader",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
PAIRS = 20
OPTIONS = ("--resolution", 64, "--pairs", PAIRS)  # and one in ten repeated
TINY_OPTIONS = ("--resolution", 24, "--slab", "full", "--level", "auto", "--pairs", PAIRS)
KEYS = {"left": "ArrowLeft", "right": "ArrowRight", "tie": "ArrowDown"}

pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium to drive the page with; on Debian: apt install chromium",
)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    return tmp_path_factory.mktemp("page") / "prefs.sqlite"


@pytest.fixture(scope="module")
def server(database):
    """One for all tests, in each of which somebody else begins."""
    with serving("heads", database, *OPTIONS) as running:
        yield running


@pytest.fixture
def new_page(browser):
    """Pages that fail the test when a script fails or anything outside the server is asked for."""
    contexts, faults = [], []

    def open_page(server, **options):
        context = browser.new_context(**{"viewport": {"width": 1000, "height": 700}, **options})
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith((server.origin, "data:", "blob:"))
                or faults.append(f"asked for {request.url}")
            ),
        )
        page.goto(server.address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def begin(page, name):
    page.wait_for_selector("#start[open]")
    page.keyboard.type(name)
    page.keyboard.press("Enter")
    page.wait_for_selector("#start:not([open])", state="attached")
    settled(page)


def settled(page):
    page.wait_for_selector("body[data-state=ready], body[data-state=done]")


def press(page, key):
    """Press a key that answers or undoes, and wait for what comes then."""
    before = page.get_attribute("body", "data-task")
    page.keyboard.press(key)
    page.wait_for_selector(
        f"body[data-state=ready]:not([data-task='{before}']), body[data-state=done]"
    )


def choices(database, annotator, **options):
    with PreferenceStore(database) as store:
        return [c for c in store.choices(**options) if c.annotator == annotator]


def sides(database, annotator):
    return [side(choice) for choice in choices(database, annotator)]


def side(choice):
    """What was pressed, from what is stored."""
    if choice.answer in ("tie", "skip"):
        return choice.answer
    return "left" if (choice.answer == "first") == choice.first_is_left else "right"


def test_twenty_pairs_by_keyboard(server, database, new_page):
    page = new_page(server)
    begin(page, "anna")
    wanted = (["left", "right", "tie", "right", "left"] * 5)[: PAIRS + 2]
    for count, answer in enumerate(wanted, 1):
        press(page, KEYS[answer])
        assert sides(database, "anna") == wanted[:count]  # on disk before the page goes on
    assert page.get_attribute("body", "data-state") == "done"
    assert "22 of 22" in page.inner_text("#count")

    stored = choices(database, "anna")
    assert all(0 < choice.seconds < 60 for choice in stored)
    first = {choice.pair_id: choice for choice in stored if not choice.repeated}
    assert len(first) == PAIRS
    assert 0 < sum(choice.first_is_left for choice in first.values()) < PAIRS
    again = [choice for choice in stored if choice.repeated]
    assert len(again) == 2
    assert all(c.first_is_left != first[c.pair_id].first_is_left for c in again)


def test_undo_and_skip(server, database, new_page):
    page = new_page(server)
    begin(page, "ben")
    press(page, "ArrowLeft")
    press(page, "u")
    press(page, "ArrowRight")
    page.keyboard.press("s")
    page.wait_for_selector("#skip[open]")
    page.keyboard.press("ArrowLeft")  # belongs to the dialog, and answers nothing
    page.keyboard.press("4")
    page.keyboard.type("upside down")
    press(page, "Enter")
    page.keyboard.press("s")
    page.keyboard.press("Escape")
    page.wait_for_selector("#skip:not([open])", state="attached")
    press(page, "ArrowDown")
    assert sides(database, "ben") == ["right", "skip", "tie"]
    assert choices(database, "ben")[1].reason == "upside down"
    undone = [c for c in choices(database, "ben", undone=True) if c.undone]
    assert [side(choice) for choice in undone] == ["left"]


def test_a_reload_goes_on_at_the_same_pair_with_its_time(server, database, new_page):
    page = new_page(server)
    begin(page, "cleo")
    press(page, "ArrowLeft")
    task = page.get_attribute("body", "data-task")
    page.wait_for_timeout(700)
    page.reload()
    settled(page)  # without asking for the name again
    assert page.get_attribute("body", "data-task") == task
    press(page, "ArrowRight")
    assert sides(database, "cleo") == ["left", "right"]
    assert choices(database, "cleo")[1].seconds > 0.7


def test_a_pause_stops_the_time_and_the_answers(server, database, new_page):
    page = new_page(server)
    begin(page, "dana")
    page.keyboard.press(" ")
    assert page.get_attribute("body", "data-state") == "paused"
    page.keyboard.press("ArrowLeft")
    page.wait_for_timeout(1500)
    assert choices(database, "dana") == []
    page.keyboard.press(" ")
    press(page, "ArrowLeft")
    (choice,) = choices(database, "dana")
    assert choice.seconds < 1.5


def test_a_killed_server_loses_nothing(tmp_path, new_page):
    database, generator = tmp_path / "prefs.sqlite", save_tiny(tmp_path / "tiny")
    with serving(generator, database, *TINY_OPTIONS) as server:
        page = new_page(server)
        begin(page, "anna")
        press(page, "ArrowLeft")
        press(page, "ArrowRight")
        task = page.get_attribute("body", "data-task")
        server.kill()
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("#message.bad")
        assert "Not saved. The server does not answer." in page.inner_text("#message")
        assert page.get_attribute("body", "data-task") == task
    assert sides(database, "anna") == ["left", "right"]
    with serving(generator, database, *TINY_OPTIONS) as server:
        page = new_page(server)
        begin(page, "anna")
        assert page.get_attribute("body", "data-task") == task
        assert "2 of 22" in page.inner_text("#count")
        press(page, "ArrowDown")
    assert sides(database, "anna") == ["left", "right", "tie"]


def test_a_lost_reply_is_not_counted_twice(server, database, new_page):
    page = new_page(server)
    begin(page, "emil")

    lost = [0, 2]  # of the answers sent, those whose reply does not arrive
    sent = itertools.count()

    def deliver(route):
        if next(sent) not in lost:
            route.continue_()
            return
        httpx.post(
            route.request.url,
            content=route.request.post_data,
            headers={"content-type": "application/json"},
            timeout=60,
        ).raise_for_status()
        route.abort()

    page.route("**/api/choice", deliver)
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#message.bad")
    task = page.get_attribute("body", "data-task")
    page.evaluate("dispatchEvent(new Event('focus'))")  # no reason to go on to the next pair
    page.wait_for_timeout(300)
    assert page.get_attribute("body", "data-task") == task
    press(page, "ArrowLeft")  # the same answer again, under the same identity
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("#message.bad")
    press(page, "ArrowRight")  # another one: the first stands, and the page says so
    assert "has its answer already" in page.inner_text("#message")
    assert sides(database, "emil") == ["left", "left"]


def test_two_windows_never_count_a_pair_twice(server, database, new_page):
    one, two = new_page(server), new_page(server)
    begin(one, "fay")
    begin(two, "fay")
    assert two.get_attribute("body", "data-task") == one.get_attribute("body", "data-task")
    press(one, "ArrowLeft")
    press(two, "ArrowRight")
    assert "has its answer already" in two.inner_text("#message")
    assert two.get_attribute("body", "data-task") == one.get_attribute("body", "data-task")
    press(two, "ArrowRight")
    assert sides(database, "fay") == ["left", "right"]


def test_a_double_click_and_a_held_key_answer_one_pair(server, database, new_page):
    page = new_page(server)
    begin(page, "gil")
    held_back = []
    page.route("**/api/choice", lambda route: held_back.append(route))
    page.dblclick("[data-answer=left]")
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(200)
    assert len(held_back) == 1
    task = page.get_attribute("body", "data-task")
    held_back[0].continue_()
    page.unroute("**/api/choice")
    page.wait_for_selector(f"body[data-state=ready]:not([data-task='{task}'])")
    for _ in range(6):
        page.keyboard.down("ArrowLeft")  # the first is a press, the others are repeats
        page.wait_for_timeout(100)
    page.keyboard.up("ArrowLeft")
    settled(page)
    assert sides(database, "gil") == ["left", "left"]


def test_everything_by_tab_and_enter(server, database, new_page):
    """Each button can be reached and pressed by keyboard, and keeps the focus after an answer."""
    page = new_page(server)
    begin(page, "hana")
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim().split(' ')[0]"))
    for word in ("Undo", "Pause", "Help", "Left", "Equal", "Skip", "Right", "Front", "Colour"):
        assert word in reached
    page.focus("[data-answer=right]")
    press(page, "Enter")
    assert page.evaluate("document.activeElement.dataset.answer") == "right"
    press(page, " ")
    assert sides(database, "hana") == ["right", "right"]


def pixels(page):
    """The drawing, [H, W, 3]; the divider, which is not drawn, is left out."""
    picture = np.asarray(
        Image.open(io.BytesIO(page.locator("#canvas").screenshot())).convert("RGB")
    )
    middle = picture.shape[1] // 2
    return np.delete(picture, range(middle - 2, middle + 2), axis=1).astype(int)


def colorfulness(picture):
    return (picture.max(axis=2) - picture.min(axis=2)).max()


def test_views(server, new_page):
    page = new_page(server)
    begin(page, "ivo")
    frames = {"start": pixels(page)}
    for key in ("q", "f", "p", "w", "d", "n", "c", "+", "j", "Shift+ArrowRight"):
        page.keyboard.press(key)
        page.wait_for_timeout(250)
        frames[key] = pixels(page)
    assert (frames["f"] == frames["start"]).all()
    for before, after in itertools.pairwise(frames.values()):
        assert (before != after).any(axis=2).mean() > 0.02
    # Without its key there is no colour to be swayed by.
    assert colorfulness(frames["start"]) < 40
    assert colorfulness(frames["n"]) > 100
    assert colorfulness(frames["c"]) > 60


def test_both_sides_are_drawn_alike(server, new_page):
    """One shape on both sides, turned, makes one picture twice."""
    page = new_page(server)
    page.route(
        re.compile(r"/mesh/\d+/right"),
        lambda route: route.continue_(url=route.request.url.replace("/right", "/left")),
    )
    begin(page, "jo")
    page.keyboard.press("q")
    page.wait_for_timeout(250)
    picture = pixels(page)
    half = picture.shape[1] // 2
    left, right = picture[:, :half], picture[:, -half:]
    assert (left != picture[5, 5]).any(axis=2).mean() > 0.2
    differing = [
        (np.abs(left - np.roll(right, shift, axis=1)).max(axis=2) > 24).mean()
        for shift in range(-4, 5)  # the halves need not begin on the same fraction of a pixel
    ]
    assert min(differing) < 0.01


def test_a_sample_without_a_surface_is_said_and_can_be_skipped(tmp_path, new_page):
    database, generator = tmp_path / "prefs.sqlite", save_tiny(tmp_path / "tiny")
    with serving(generator, database, *TINY_OPTIONS, "--level", 1e6) as server:
        page = new_page(server)
        begin(page, "anna")
        assert "no surface at the raw density 1e+06" in page.inner_text("#gone-left")
        page.keyboard.press("s")
        page.keyboard.press("2")
        press(page, "Enter")
    (choice,) = choices(database, "anna")
    assert choice.reason == "a shape is missing or cut off"


def test_a_wrong_name_is_said(server, new_page):
    page = new_page(server)
    page.wait_for_selector("#start[open]")
    page.keyboard.press("Enter")
    assert page.is_visible("#start")  # the browser asks for a name
    page.keyboard.type("   ")
    page.keyboard.press("Enter")
    page.wait_for_selector("#start-error:not(:empty)")
    assert "A name has 1 to 40 printable characters." in page.inner_text("#start-error")


def test_two_hundred_per_cent(server, new_page):
    """A window of 1280 x 800 at 200 % zoom: nothing is cut off at the sides, nothing overlaps."""
    page = new_page(server, viewport={"width": 640, "height": 400}, device_scale_factor=2)
    begin(page, "kai")
    assert page.evaluate("document.documentElement.scrollWidth") <= 640
    boxes = [button.bounding_box() for button in page.query_selector_all("main button, header *")]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= 640 for box in boxes)
    buttons = [button.bounding_box() for button in page.query_selector_all("button:visible")]
    for a, b in itertools.combinations(buttons, 2):
        beside = a["x"] + a["width"] <= b["x"] + 1 or b["x"] + b["width"] <= a["x"] + 1
        below = a["y"] + a["height"] <= b["y"] + 1 or b["y"] + b["height"] <= a["y"] + 1
        assert beside or below
    assert page.query_selector("#canvas").bounding_box()["height"] >= 200


def test_another_site_can_do_nothing(server, database, browser):
    """A page elsewhere that knows even the token is refused."""
    with httpx.Client(base_url=server.address) as client:
        task = client.post("api/session", json={"annotator": "lea"}).json()["tasks"][0]
    body = {
        "annotator": "lea",
        "task": task,
        "answer": "left",
        "request": uuid.uuid4().hex,
        "seconds": 1.0,
    }
    context = browser.new_context()
    page = context.new_page()
    page.route("http://elsewhere.test/", lambda route: route.fulfill(body="<p>elsewhere"))
    page.goto("http://elsewhere.test/")
    outcome = page.evaluate(
        """async ([address, body]) => {
            const [method, headers] = ['POST', { 'Content-Type': 'application/json' }];
            const tries = {
                plain: () => fetch(`${address}api/choice`, { method, mode: 'no-cors', body }),
                json: () => fetch(`${address}api/choice`, { method, headers, body }),
                read: () => fetch(`${address}api/about`).then((reply) => reply.json()),
            };
            const outcome = {};
            for (const [name, attempt] of Object.entries(tries)) {
                outcome[name] = await attempt().then(({ type }) => type ?? 'read', () => 'refused');
            }
            return outcome;
        }""",
        [server.address, json.dumps(body)],
    )
    context.close()
    assert outcome["json"] == outcome["read"] == "refused"
    assert outcome["plain"] in ("opaque", "refused")  # opaque: sent, and refused by the server
    assert choices(database, "lea") == []
