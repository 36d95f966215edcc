"""The page's server: whom it answers, what it says, and that it loses no answer."""

import asyncio
import base64
import contextlib
import hashlib
import http.client
import itertools
import json
import re
import socket
import sqlite3
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import httpx
import pytest
from serving import serving
from tiny import save_tiny

from densityrl.annotation import server as server_module
from densityrl.annotation.meshes import NoSurfaceError, Opened
from densityrl.annotation.server import BODY_BYTES, PAGE, create_app, is_loopback, listen
from densityrl.cli import main
from densityrl.config import AnnotationConfig, MeshSettings
from densityrl.errors import DensityRLError, PreferenceError
from densityrl.preference.store import Pair, PreferenceStore, Sample

TOKEN = "a-Token_of-32-characters-or-more"
ORIGIN = "http://127.0.0.1:8000"
PSI = 0.625
FIRST_SEED = 7_654_300  # found in no answer by chance
PAIRS = 6
TINY = ("--resolution", 24, "--slab", "full", "--level", "auto")


class Ready:
    """Has every surface made, or says that there is none."""

    def __init__(self, folder, pairs=PAIRS):
        self.settings = AnnotationConfig(generator="none", pairs=pairs, repeats=0)
        self.failure = None
        self.fault = {}  # by sample: the exception in place of its surface
        self.wanted = {}
        self._folder = folder

    def want(self, annotator, samples):
        self.wanted[annotator] = list(samples)

    def poke(self):
        pass

    async def run(self):
        await asyncio.Event().wait()

    async def mesh(self, sample):
        if sample in self.fault:
            raise self.fault[sample]
        path = self._folder / f"seed{sample.seed:010d}-psi{sample.psi:g}.glb"
        path.write_bytes(bytes([sample.seed - FIRST_SEED]))
        return path


def planned_pairs(count):
    return [
        Pair(*(Sample(FIRST_SEED + 2 * i + k, PSI) for k in (0, 1)), "random") for i in range(count)
    ]


@pytest.fixture
def store(tmp_path):
    with PreferenceStore(tmp_path / "prefs.sqlite", create=True) as store:
        for position, pair in enumerate(planned_pairs(PAIRS)):
            store.plan(position, pair)
        yield store


@pytest.fixture
def preparer(tmp_path):
    return Ready(tmp_path)


OPENED = Opened(
    fingerprint="fingerprint",
    settings=MeshSettings(),
    suggested_level=10.0,
    lo=(-0.5,) * 3,
    hi=(0.5,) * 3,
    process=0,
)


class InProcess(httpx.BaseTransport):
    """To an application without a socket; a fault in it is the answer that a server gives."""

    def __init__(self, app):
        self._transport = httpx.ASGITransport(app, raise_app_exceptions=False)

    def handle_request(self, request):
        async def answer():
            request.stream = httpx.ByteStream(b"".join(request.stream))
            response = await self._transport.handle_async_request(request)
            body = await response.aread()
            return httpx.Response(response.status_code, headers=response.headers, content=body)

        return asyncio.run(answer())


def client_of(store, preparer, **options):
    app = create_app(store, preparer, OPENED, token=TOKEN, **options)
    return httpx.Client(transport=InProcess(app), base_url=f"{ORIGIN}/{TOKEN}/")


@pytest.fixture
def client(store, preparer):
    return client_of(store, preparer)


def begin(client, name="ann"):
    response = client.post("api/session", json={"annotator": name})
    assert response.status_code == 200, response.text
    return response.json()


def identity():
    return uuid.uuid4().hex


def choice(task, answer="left", **values):
    body = {"annotator": "ann", "task": task, "answer": answer, "request": identity()}
    return {**body, "seconds": 1.5, **values}


def choose(client, *values, **named):
    return client.post("api/choice", json=choice(*values, **named))


def assert_sentence(text):
    assert re.fullmatch(r"[^\n]{10,300}", text), text
    assert TOKEN not in text
    assert str(FIRST_SEED)[:5] not in text


def assert_refused(response, *statuses):
    """A status of these and one sentence; returns it."""
    assert response.status_code in statuses, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"error"}
    assert_sentence(body["error"])
    return body["error"]


# --- who may ask ---------------------------------------------------------------------------------

GETS = ("", "page/annotate.js", "api/about", "api/state?annotator=ann", "mesh/1/left")


@pytest.mark.parametrize("path", GETS)
def test_all_is_answered_to_the_page(client, path):
    begin(client)
    assert client.get(path).status_code == 200
    response = client.get(path, headers={"origin": ORIGIN, "sec-fetch-site": "same-origin"})
    assert response.status_code == 200


@pytest.mark.parametrize("path", GETS)
@pytest.mark.parametrize(
    "token",
    ["", "/", "/x", f"/{TOKEN[:-1]}", f"/{TOKEN}x", f"/{TOKEN.upper()}", "/%C3%A9", f"/x/{TOKEN}"],
)
def test_nothing_without_the_token(client, token, path):
    begin(client)
    response = client.get(f"{ORIGIN}{token}/{path}")
    assert "right token" in assert_refused(response, 403)


def test_the_token_alone_leads_to_the_page(client):
    response = client.get(f"{ORIGIN}/{TOKEN}")
    assert response.status_code == 307
    assert response.headers["location"] == f"/{TOKEN}/"


@pytest.mark.parametrize(
    "host",
    [
        "evil.com",
        "evil.com:8000",
        "127.0.0.1.evil.com",
        "127.0.0.1.evil.com:8000",
        "localhost.evil.com",
        "evil.com:127.0.0.1",
        "127.0.0.2:8000",
        "192.168.1.5:8000",
        "0.0.0.0:8000",
        "",
    ],
)
@pytest.mark.parametrize("path", GETS)
def test_a_rebound_name_is_refused(client, host, path):
    begin(client)
    response = client.get(path, headers={"host": host})
    assert "another name" in assert_refused(response, 403)
    response = client.get(path, headers={"host": host, "origin": f"http://{host}"})
    assert_refused(response, 403)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "LocalHost"])
def test_names_of_this_machine(client, host):
    assert client.get("", headers={"host": host}).status_code == 200


FOREIGN = [
    {"origin": "http://evil.com"},
    {"origin": "null"},
    {"origin": "http://127.0.0.1:8001"},
    {"origin": "https://127.0.0.1:8000"},
    {"origin": "http://localhost:8000"},
    {"origin": f"{ORIGIN}.evil.com"},
    {"origin": ""},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"sec-fetch-site": "cross-site", "sec-fetch-dest": "script"},
    {"sec-fetch-site": "cross-site", "sec-fetch-dest": "iframe", "sec-fetch-mode": "navigate"},
    {"sec-fetch-site": "cross-site", "sec-fetch-dest": "empty", "origin": ORIGIN},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_other_sites_are_refused(client, store, headers):
    (task, *_) = begin(client)["tasks"]
    for path in GETS:
        assert "other sites" in assert_refused(client.get(path, headers=headers), 403)
    posted = client.post("api/choice", json=choice(task), headers=headers)
    assert "other sites" in assert_refused(posted, 403)
    assert store.choices() == []


def test_a_followed_link_opens_the_page(client, store):
    """As from a mail or a web terminal; what changes something is not reached by links."""
    (task, *_) = begin(client)["tasks"]
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-dest": "document"}
    assert client.get("", headers=headers).status_code == 200
    assert_refused(client.post("api/choice", json=choice(task), headers=headers), 403)
    assert_refused(client.get("", headers={**headers, "origin": "http://evil.com"}), 403)
    assert store.choices() == []


@pytest.mark.parametrize(
    "kind",
    [
        "text/plain",
        "text/plain; application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json-patch",
        "",
    ],
)
def test_bodies_that_a_form_could_send_are_refused(client, store, kind):
    (task, *_) = begin(client)["tasks"]
    response = client.post(
        "api/choice", content=json.dumps(choice(task)), headers={"content-type": kind}
    )
    assert "application/json" in assert_refused(response, 415)
    assert store.choices() == []


def test_json_of_a_named_character_set(client):
    response = client.post(
        "api/session",
        content=b'{"annotator": "ann"}',
        headers={"content-type": "application/json; charset=utf-8"},
    )
    assert response.status_code == 200


def test_large_bodies_are_refused(client):
    headers = {"content-type": "application/json"}
    for size, status in ((BODY_BYTES, 422), (BODY_BYTES + 1, 413), (10_000_000, 413)):
        response = client.post("api/session", content=b" " * size, headers=headers)
        assert_refused(response, status)


def test_bodies_of_unknown_length_are_refused(client, store):
    (task, *_) = begin(client)["tasks"]
    response = client.post(
        "api/choice",
        content=iter([json.dumps(choice(task)).encode()]),
        headers={"content-type": "application/json"},
    )
    assert "length" in assert_refused(response, 411)
    assert store.choices() == []


NUMBERS = ["192.168.1.5:8000", "10.0.0.1", "[fe80::1]:8000", "127.0.0.1:8000", "localhost:8000"]


def test_hosts_where_other_machines_are_let_in(store, preparer):
    client = client_of(store, preparer, names=None)
    for host in [*NUMBERS, socket.gethostname()]:
        own = {"host": host, "origin": f"http://{host}"}
        assert client.get("api/about", headers=own).status_code == 200
        assert_refused(client.get("api/about", headers={**own, "origin": "http://evil.com"}), 403)
    for host in ("evil.com", "192.168.1.5.evil.com", "192.168.1.5x:8000", "evil.com:8000", ""):
        assert_refused(client.get("api/about", headers={"host": host}), 403)
    assert_refused(client.get(f"{ORIGIN}/x/api/about"), 403)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.5", False),
        ("example.org", False),
        ("localhost.example.org", False),
        ("", False),
    ],
)
def test_which_addresses_are_this_machine_alone(host, loopback):
    assert is_loopback(host) is loopback


def test_a_taken_port():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DensityRLError, match=f"port {port} .*; give another --port or --host$"):
            listen("127.0.0.1", port)


def test_a_reply_is_sent_at_once():
    """Else its body waits for the acknowledgement of its head, 40 ms on Linux."""
    with (
        listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
        listening.accept()[0] as connection,
    ):
        # asyncio sets the option itself, but only where a socket names its protocol.
        named = connection.proto == socket.IPPROTO_TCP
        assert named or connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# --- what every answer carries -------------------------------------------------------------------


def guarded(response):
    headers = response.headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert not re.search(r"unsafe|http|\*", headers["content-security-policy"])
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    assert "access-control-allow-origin" not in headers
    return response


def test_every_answer_is_guarded(client, preparer):
    (task, other, *_) = begin(client)["tasks"]
    for path in GETS:
        assert guarded(client.get(path)).status_code == 200
    samples = preparer.wanted["ann"]
    preparer.fault = {
        samples[0]: NoSurfaceError("none"),
        samples[1]: RuntimeError("no memory"),
        samples[2]: KeyError("unforeseen"),
    }
    assert guarded(choose(client, task)).status_code == 200
    for status, response in (
        (404, client.get(f"mesh/{task}/left")),
        (500, client.get(f"mesh/{task}/right")),
        (500, client.get(f"mesh/{other}/left")),
        (404, client.get("absent")),
        (404, client.get("page/absent.js")),
        (405, client.get("api/choice")),
        (409, choose(client, task)),
        (422, choose(client, "x")),
    ):
        assert guarded(response).status_code == status


def test_the_page_runs_its_own_scripts_alone(client):
    response = guarded(client.get(""))
    page = response.text
    inline = re.findall(r"<script(?![^>]*\bsrc=)[^>]*>(.*?)</script>", page, re.DOTALL)
    assert len(inline) == 1
    assert json.loads(inline[0]).keys() == {"imports"}
    digest = base64.b64encode(hashlib.sha256(inline[0].encode()).digest()).decode()
    policy = response.headers["content-security-policy"]
    assert f"script-src 'self' 'sha256-{digest}';" in policy
    assert not re.search(r"<[^>]*\s(on\w+|style)=|<style", page)  # which the policy forbids
    for address in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert address == "data:," or client.get(address).status_code == 200


def test_scripts_that_the_page_imports_are_there(client):
    for folder, script in (("page", "annotate.js"), ("page", "viewer.js")):
        text = client.get(f"{folder}/{script}").text
        for name in re.findall(r"from '\./([^']+)'", text):
            assert client.get(f"{folder}/{name}").status_code == 200
        for name in re.findall(r"from 'three/addons/([^']+)'", text):
            assert client.get(f"page/three/addons/{name}").status_code == 200
    assert "javascript" in client.get("page/three/build/three.module.js").headers["content-type"]


@pytest.mark.parametrize("path", ["docs", "redoc", "openapi.json", "api", "api/", "page", "mesh"])
def test_nothing_else_is_there(client, path):
    response = client.get(path)
    if response.status_code == 307:  # a mount's own slash
        response = client.get(response.headers["location"])
    assert "nothing here" in assert_refused(response, 404)


def test_other_methods_are_refused(client):
    for method in ("PUT", "DELETE", "PATCH"):
        response = client.request(method, "api/state?annotator=ann", json={})
        assert response.status_code == 405
        assert response.json().keys() == {"error"}


# --- a session -----------------------------------------------------------------------------------


def test_a_session(client, store):
    about = client.get("api/about").json()
    assert about["lo"] == [-0.5] * 3
    assert about["annotators"] == []
    first = begin(client, " ann ")
    assert first["annotator"] == "ann"
    assert (first["done"], first["total"], first["undo"]) == (0, PAIRS, None)
    assert first["waiting"] is False
    assert len(set(first["tasks"])) == 4
    assert client.get("api/about").json()["annotators"] == ["ann"]

    second = choose(client, first["tasks"][0], seconds=2.5).json()
    assert (second["done"], second["seconds"]) == (1, 2.5)
    assert second["tasks"][:3] == first["tasks"][1:]
    assert client.get("api/state?annotator=ann").json() == second

    undo = client.post("api/undo", json={"annotator": "ann", "choice": second["undo"]})
    assert undo.json()["tasks"] == first["tasks"]
    assert (undo.json()["done"], undo.json()["undo"]) == (0, None)
    again = client.post("api/undo", json={"annotator": "ann", "choice": second["undo"]})
    assert "already" in assert_refused(again, 409)

    state = undo.json()
    while state["tasks"]:
        state = choose(client, state["tasks"][0], "tie").json()
    assert (state["done"], state["waiting"]) == (PAIRS, False)
    assert [c.answer for c in store.choices()] == ["tie"] * PAIRS
    assert [c.undone is None for c in store.choices(undone=True)] == [False] + [True] * PAIRS


def test_sides_become_samples(client, store):
    state, winners = begin(client), []
    for side in itertools.islice(itertools.cycle(("left", "right")), PAIRS):
        task = state["tasks"][0]
        winners.append(client.get(f"mesh/{task}/{side}").content[0])
        state = choose(client, task, side).json()
    chosen = [
        (c.pair.first if c.answer == "first" else c.pair.second).seed for c in store.choices()
    ]
    assert [seed - FIRST_SEED for seed in chosen] == winners
    assert {c.first_is_left for c in store.choices()} == {True, False}


def test_what_comes_next_is_wanted(client, store, preparer):
    tasks = begin(client)["tasks"]
    shown = [store.task(task) for task in tasks]
    assert preparer.wanted["ann"] == [s for task in shown for s in (task.left, task.right)]
    tasks = choose(client, tasks[0]).json()["tasks"]
    assert preparer.wanted["ann"][0] == store.task(tasks[0]).left


def test_annotators_have_tasks_of_their_own(client, store):
    ann, bob = begin(client), begin(client, "bob")
    assert not set(ann["tasks"]) & set(bob["tasks"])
    assert_refused(choose(client, bob["tasks"][0]), 404)
    done = choose(client, ann["tasks"][0]).json()
    undo = client.post("api/undo", json={"annotator": "bob", "choice": done["undo"]})
    assert_refused(undo, 404)
    assert len(store.choices()) == 1


def test_a_second_window(client, store):
    (task, *_) = begin(client)["tasks"]
    assert choose(client, task, "left").status_code == 200
    assert "another window" in assert_refused(choose(client, task, "right"), 409)
    assert len(store.choices()) == 1


def test_a_click_that_is_sent_twice_counts_once(client, store):
    (task, *_) = begin(client)["tasks"]
    click = choice(task)
    first, second = (client.post("api/choice", json=click) for _ in range(2))
    assert first.json() == second.json()
    assert first.json()["done"] == 1
    assert_refused(client.post("api/choice", json={**click, "answer": "right"}), 409)
    assert len(store.choices(undone=True)) == 1


def test_a_skip_has_a_reason_and_nothing_else_has(client, store):
    (task, *_) = begin(client)["tasks"]
    for answer, reason in (("skip", None), ("skip", "  "), ("left", "ugly"), ("tie", "same")):
        error = assert_refused(choose(client, task, answer, reason=reason), 422)
        assert "reason" in error
    assert store.choices() == []
    assert choose(client, task, "skip", reason=" cut off ").json()["done"] == 1
    (skipped,) = store.choices()
    assert (skipped.answer, skipped.reason) == ("skip", "cut off")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seconds", -0.1),
        ("seconds", float("nan")),
        ("seconds", float("inf")),
        ("seconds", 1e9),
        ("seconds", "1.5"),
        ("seconds", None),
        ("answer", "first"),
        ("answer", "LEFT"),
        ("answer", ["left"]),
        ("task", "1"),
        ("task", 1.5),
        ("task", True),
        ("task", None),
        ("request", "short"),
        ("request", "x" * 65),
        ("request", 1),
        ("reason", "x" * 201),
        ("annotator", ""),
        ("annotator", "x" * 41),
        ("annotator", 1),
        ("extra", 1),
    ],
)
def test_wrong_values(client, store, field, value):
    (task, *_) = begin(client)["tasks"]
    content = json.dumps({**choice(task), field: value})
    response = client.post(
        "api/choice", content=content, headers={"content-type": "application/json"}
    )
    assert assert_refused(response, 422).startswith(f"'{field}': ")
    assert store.choices() == []


@pytest.mark.parametrize("field", ["annotator", "task", "answer", "request", "seconds"])
def test_missing_values(client, field):
    body = {k: v for k, v in choice(*begin(client)["tasks"][:1]).items() if k != field}
    error = assert_refused(client.post("api/choice", json=body), 422)
    assert error.startswith(f"'{field}': ")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b'"ann"', b"\xff", b"[" * 8000, b"9" * 5000]
)
def test_bodies_that_are_no_object(client, content):
    response = client.post(
        "api/session", content=content, headers={"content-type": "application/json"}
    )
    assert_refused(response, 400, 422)


@pytest.mark.parametrize("name", [" ", "a\nb", "a\0", "\u202eann", "x" * 41])
def test_names_that_are_none(client, store, name):
    assert_refused(client.post("api/session", json={"annotator": name}), 422)
    assert store.annotators() == []


def test_half_a_character_is_no_name(client, store):
    response = client.post(
        "api/session",
        content=rb'{"annotator": "\ud800"}',
        headers={"content-type": "application/json"},
    )
    assert_refused(response, 422)
    assert store.annotators() == []


@pytest.mark.parametrize("name", ["Zoë", "名前", 'o\'brien "x" %41 <b>&', "a/b?c#d"])
def test_names_of_any_language(client, store, name):
    assert begin(client, name)["annotator"] == name
    state = client.get("api/state", params={"annotator": name})
    assert state.json()["annotator"] == name
    assert store.annotators() == [name]


def test_unknown_annotators_and_tasks(client):
    assert_refused(client.get("api/state?annotator=nobody"), 404)
    assert_refused(choose(client, 1, annotator="nobody"), 404)
    begin(client)
    for task in (0, 99):
        assert_refused(choose(client, task), 404)
        assert_refused(client.get(f"mesh/{task}/left"), 404)
        undo = client.post("api/undo", json={"annotator": "ann", "choice": task})
        assert_refused(undo, 404)
    for path in ("api/state", "mesh/x/left", "mesh/1/both"):
        assert_refused(client.get(path), 422)


@pytest.mark.parametrize("number", [-1, 2**63, -(2**63) - 1, 10**30])
def test_numbers_beyond_the_database(client, number):
    begin(client)
    assert_refused(choose(client, number), 404, 422)
    assert_refused(client.get(f"mesh/{number}/left"), 404, 422)
    undo = client.post("api/undo", json={"annotator": "ann", "choice": number})
    assert_refused(undo, 404, 422)


# --- pairs that are not chosen yet ---------------------------------------------------------------


def test_waits_for_pairs_that_are_not_planned(store, tmp_path):
    preparer = Ready(tmp_path, pairs=PAIRS + 1)
    client = client_of(store, preparer)
    state = begin(client)
    preparer.failure = PreferenceError("the reward is gone")
    for _ in range(PAIRS - 1):
        state = choose(client, state["tasks"][0]).json()  # no matter, while there are pairs
    error = assert_refused(choose(client, state["tasks"][0]), 500)
    assert error.rstrip(".") == "No next pair could be chosen: the reward is gone"
    preparer.failure = None
    waiting = client.get("api/state?annotator=ann").json()
    assert (waiting["done"], waiting["tasks"], waiting["waiting"]) == (PAIRS, [], True)
    store.plan(PAIRS, planned_pairs(PAIRS + 1)[-1])
    assert len(client.get("api/state?annotator=ann").json()["tasks"]) == 1


def test_the_last_pair_is_not_overlooked(store, preparer, monkeypatch):
    """Planned in the very moment in which there was none."""
    preparer.settings = AnnotationConfig(generator="none", pairs=PAIRS + 1, repeats=0)
    client = client_of(store, preparer)
    state = begin(client)
    for _ in range(PAIRS - 1):
        state = choose(client, state["tasks"][0]).json()
    upcoming = store.upcoming

    def then_plan(*arguments, **options):
        tasks = upcoming(*arguments, **options)
        store.plan(PAIRS, planned_pairs(PAIRS + 1)[-1])
        return tasks

    monkeypatch.setattr(store, "upcoming", then_plan)
    state = choose(client, state["tasks"][0]).json()
    assert state["done"] == PAIRS
    assert state["tasks"] or state["waiting"]


# --- surfaces ------------------------------------------------------------------------------------


def test_nothing_tells_which_sample_is_shown(client, store, preparer):
    state = begin(client)
    task = state["tasks"][0]
    mesh = client.get(f"mesh/{task}/left")
    assert mesh.headers["content-type"] == "model/gltf-binary"
    answers = [mesh, choose(client, task), client.get("api/about")]
    told = str(state) + "".join(f"{answer.headers}" for answer in answers)
    told += "".join(answer.text for answer in answers[1:])
    for sample in (store.task(task).left, store.task(task).right):
        assert str(sample.seed) not in told
        assert str(sample.psi) not in told
    assert "random" not in told


def test_a_sample_without_a_surface(client, preparer):
    (task, *_) = begin(client)["tasks"]
    sentence = "this sample has no surface at the raw density 10"
    preparer.fault[preparer.wanted["ann"][1]] = NoSurfaceError(sentence)
    assert client.get(f"mesh/{task}/left").status_code == 200
    error = assert_refused(client.get(f"mesh/{task}/right"), 404)
    assert error == "This sample has no surface at the raw density 10."


def test_a_surface_that_is_gone_reveals_nothing(client, preparer, tmp_path, monkeypatch):
    (task, *_) = begin(client)["tasks"]

    async def gone(sample):
        return tmp_path / f"seed{sample.seed:010d}-psi{sample.psi:g}.glb"

    monkeypatch.setattr(preparer, "mesh", gone)
    assert_refused(client.get(f"mesh/{task}/left"), 404, 500, 503)


# --- the page works offline ----------------------------------------------------------------------

THREE = PAGE / "three"


def listed():
    rows = re.findall(r"^([0-9a-f]{64})  (\S+)$", (THREE / "README.md").read_text(), re.MULTILINE)
    return {name: digest for digest, name in rows}


def test_three_is_the_one_that_was_taken():
    there = {
        path.relative_to(THREE).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in THREE.rglob("*")
        if path.is_file() and path.name != "README.md"
    }
    assert there == listed()
    assert len(there) > 5


def test_three_is_whole():
    """Every module that one of these modules imports is among them."""
    for path in THREE.rglob("*.js"):
        for name in re.findall(r"(?:from|import)\s*['\"](\.[^'\"]+)['\"]", path.read_text()):
            assert (path.parent / name).resolve().relative_to(THREE).as_posix() in listed()


def test_the_page_asks_for_nothing_outside():
    own = [path for path in PAGE.rglob("*") if path.is_file() and THREE not in path.parents]
    assert len(own) >= 4
    for path in own:
        assert not re.search(r"https?://|['\"(]//", path.read_text(encoding="utf-8")), path


# --- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("server") / "generator")


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """What the command says instead of starting, on one line however wide."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*options, code):
        argv = ["densityrl", "annotate", "--no-browser", "--db", str(tmp_path / "prefs.sqlite")]
        monkeypatch.setattr(sys, "argv", [*argv, *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            main()
        said = capsys.readouterr()
        assert stop.value.code == code
        assert said.out == ""
        return said.err

    return run


@pytest.fixture
def no_start(monkeypatch):
    def started(*_, **__):
        pytest.fail("it started")

    monkeypatch.setattr(server_module, "serve", started)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_other_machines_are_let_in_on_purpose_only(refused, no_start, tmp_path, host):
    said = refused("--generator", "heads", "--host", host, code=2)
    assert f"--host {host} lets other machines reach the page, unencrypted; add --i-know" in said
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_other_machines_are_let_in_by_i_know(monkeypatch, capsys, tmp_path):
    started = []
    monkeypatch.setattr(server_module, "serve", lambda *_, **options: started.append(options))
    argv = ["densityrl", "annotate", "--generator", "heads", "--host", "0.0.0.0", "--i-know"]
    monkeypatch.setattr(sys, "argv", [*argv, "--db", str(tmp_path / "prefs.sqlite")])
    with contextlib.suppress(SystemExit):
        main()
    assert [options["host"] for options in started] == ["0.0.0.0"]


def test_a_level_is_a_number_or_auto(refused, no_start):
    said = refused("--generator", "heads", "--level", "abc", code=2)
    assert "give a raw density or auto, not 'abc'" in said


@pytest.mark.parametrize(
    ("key", "value"), [("level", 12.5), ("generator", "another"), ("resolution", 32)]
)
def test_a_database_of_something_else(refused, generator, tmp_path, key, value):
    with PreferenceStore(tmp_path / "prefs.sqlite", create=True) as store:
        store.describe({key: value})
    said = refused("--generator", generator, "--resolution", 24, "--slab", "full", code=1)
    assert f"was made with {key} = {value}" in said
    assert said.count("\n") == 1
    with PreferenceStore(tmp_path / "prefs.sqlite") as store:
        assert store.about() == {key: value}


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_the_extra_is_named(refused, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "densityrl.annotation.server")
    said = refused("--generator", "heads", code=1)
    assert f"needs {missing}: pip install 'densityrl[annotate]'" in said
    assert said.count("\n") == 1


# --- the real server -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(generator, tmp_path_factory):
    database = tmp_path_factory.mktemp("real") / "prefs.sqlite"
    with serving(generator, database, *TINY) as running:
        yield running


def raw(server, target):
    """Status, headers and body of a GET whose target no client has put in order."""
    host, _, port = server.origin.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            f"GET {target} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.lower(), body


CLIMBS = [
    "/T/../x",
    "/T/../T/api/about",
    "/x/../T/api/about",
    "//T/",
    "//T/api/about",
    "/./T/api/about",
    "/%2e/T/",
    "/t/T/",
    "/T/page/../server.py",
    "/T/page/..%2fserver.py",
    "/T/page/..%2f..%2fcli.py",
    "/T/page/%2e%2e/server.py",
    "/T/page/..%5cserver.py",
    "/T/page/three/../../meshes.py",
    "/T/page//etc/passwd",
    "/T/page/%2fetc%2fpasswd",
    "/T/page/annotate.js%00",
    "/T/mesh/../../etc/passwd",
    "/T/mesh/1/..%2f..%2fprefs.sqlite",
    "/",
    "/favicon.ico",
]


@pytest.mark.parametrize("target", CLIMBS)
def test_paths_lead_nowhere_else(server, target):
    token = server.address.split("/")[3]
    status, head, body = raw(server, target.replace("T", token))
    assert status in (400, 403, 404, 422), body
    assert b"content-type: application/json" in head
    assert json.loads(body).keys() == {"error"}


def test_the_real_page_and_surface(server):
    with httpx.Client(base_url=server.address) as client:
        assert guarded(client.get("")).status_code == 200
        state = begin(client, "looks")
        while not state["tasks"]:
            state = client.get("api/state?annotator=looks").json()
        mesh = guarded(client.get(f"mesh/{state['tasks'][0]}/left"))
        assert mesh.content[:4] == b"glTF"
        assert b"10000" not in mesh.content[:2000]  # the first seed
    assert len(server.address.split("/")[3]) >= 32
    assert raw(server, "/" + server.address.split("/")[3] + "/")[0] == 200


def stored(database):
    """Of each choice: its request, task, answer, annotator and the position among theirs."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return connection.execute(
            "SELECT request, task.id, answer, name, position, pair FROM choice "
            "JOIN task ON task.id = task JOIN annotator ON annotator.id = annotator "
            "WHERE undone IS NULL ORDER BY choice.id"
        ).fetchall()


def go_on(client, name, acknowledge, until_sent=lambda body: None):
    """Answer whatever comes, until all is done or the server is gone."""
    state = begin(client, name)
    while state["done"] < state["total"]:
        if state["tasks"]:
            body = choice(state["tasks"][0], "tie", annotator=name)
            until_sent(body)
            response = client.post("api/choice", json=body)
            assert response.status_code == 200, response.text
            acknowledge(body)
            state = response.json()
        else:
            state = client.get("api/state", params={"annotator": name}).json()
    return state


def test_a_kill_loses_nothing(generator, tmp_path):
    database = tmp_path / "prefs.sqlite"
    sent, saved, enough = [], [], threading.Event()

    def acknowledge(body):
        saved.append(body)
        if len(saved) == 25:
            enough.set()

    def stream(address):
        with httpx.Client(base_url=address) as client, contextlib.suppress(httpx.TransportError):
            go_on(client, "ann", acknowledge, sent.append)
        enough.set()

    with serving(generator, database, *TINY, "--pairs", 5000, "--repeats", 0) as running:
        thread = threading.Thread(target=stream, args=(running.address,))
        thread.start()
        enough.wait()
        running.kill()
        thread.join()

    assert len(saved) >= 25
    rows = stored(database)
    assert len(sent) - len(saved) in (0, 1)  # that the kill met
    assert [row[0] for row in rows][: len(saved)] == [body["request"] for body in saved]
    assert len(rows) <= len(sent)

    with (
        serving(generator, database, *TINY, "--pairs", 5000, "--repeats", 0) as running,
        httpx.Client(base_url=running.address) as client,
    ):
        state = begin(client)
        assert state["done"] == len(rows)
        with PreferenceStore(database) as store:
            positions = [c.position for c in store.choices()]
        assert positions == list(range(1, len(rows) + 1))
        # The page sends again what got no reply: it counts, and counts once.
        again = client.post("api/choice", json=sent[-1])
        assert again.json()["done"] == len(sent)
        assert choose(client, again.json()["tasks"][0]).json()["done"] == len(sent) + 1
    rows = stored(database)
    assert [row[0] for row in rows][:-1] == [body["request"] for body in sent]
    assert [row[4] for row in rows] == list(range(1, len(rows) + 1))


CLIENTS, SESSIONS, EACH = 4, 10, 250


encoded = json.dumps


class Bare:
    """As much of an HTTP client as `go_on` needs, and quicker than a whole one."""

    def __init__(self, address):
        url = httpx.URL(address)
        self.path = url.path
        self.connection = http.client.HTTPConnection(url.host, url.port, timeout=60)
        self.close = self.connection.close

    def _ask(self, method, path, body=None):
        headers = {"content-type": "application/json"} if body else {}
        self.connection.request(method, self.path + path, body, headers)
        response = self.connection.getresponse()
        return httpx.Response(response.status, content=response.read())

    def post(self, path, json):
        return self._ask("POST", path, encoded(json))

    def get(self, path, params):
        return self._ask("GET", f"{path}?{urlencode(params)}")


def post_once(address, body):
    with contextlib.closing(Bare(address)) as client:
        return client.post("api/choice", body)


def test_ten_thousand_choices_of_four_at_once(generator, tmp_path):
    """Four clients, of ten annotators each: nothing is lost or doubled, though some click twice."""
    database = tmp_path / "prefs.sqlite"
    names = [f"{client} {session}" for client in range(CLIENTS) for session in range(SESSIONS)]

    def answers(address, own, pool):
        saved, twins = [], []
        with contextlib.closing(Bare(address)) as client:

            def twice(body):
                if len(saved) % EACH == 100:
                    twins.append(pool.submit(post_once, address, body))

            for name in own:
                state = go_on(client, name, saved.append, twice)
                assert state["done"] == state["total"] == EACH
            assert {twin.result().status_code for twin in twins} == {200}
        assert len(twins) == SESSIONS
        return saved

    with (
        serving(generator, database, *TINY, "--pairs", EACH, "--repeats", 0) as running,
        ThreadPoolExecutor(CLIENTS) as others,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        work = [
            pool.submit(answers, running.address, names[client::CLIENTS], others)
            for client in range(CLIENTS)
        ]
        saved = [body for each in work for body in each.result()]

    rows = stored(database)
    assert len(saved) == len(rows) == len(names) * EACH
    told = {(b["request"], b["task"], b["answer"], b["annotator"]) for b in saved}
    assert {row[:4] for row in rows} == told
    assert len({row[1] for row in rows}) == len(rows)
    for name in names:
        theirs = [row for row in rows if row[3] == name]
        assert sorted(row[4] for row in theirs) == list(range(1, EACH + 1))
        assert len({row[5] for row in theirs}) == EACH
    with PreferenceStore(database) as store:
        assert len(store.pairs()) == store.planned() == EACH
        assert len(store.choices(undone=True)) == len(rows)
