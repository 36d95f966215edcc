"""The page's server: who may ask, what is answered, and how it is started.

Everything lies below a random token in the path: http://127.0.0.1:PORT/TOKEN/. A request that
lacks it, names another host (a rebound name) or comes from another site is refused.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import ipaddress
import re
import secrets
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from densityrl.annotation.meshes import NoSurfaceError, Opened
from densityrl.annotation.preparer import Preparer
from densityrl.config import AnnotationConfig
from densityrl.errors import DensityRLError, PreferenceError
from densityrl.preference.store import (
    NAME_LENGTH,
    REASON_LENGTH,
    AlreadyAnsweredError,
    Answer,
    NoSuchTaskError,
    PreferenceStore,
    Task,
)

PAGE = Path(__file__).parent / "page"
AHEAD = 4  # tasks that the page is told of, the present one among them
BODY_BYTES = 16 * 1024
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}

IMPORT_MAP = re.compile(r'<script type="importmap">(.*?)</script>', re.DOTALL)


Number = Annotated[int, Field(ge=0, lt=2**63)]  # what SQLite counts with


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    annotator: Annotated[str, Field(min_length=1, max_length=NAME_LENGTH)]


class ChoiceBody(Body):
    task: Number
    answer: Literal["left", "right", "tie", "skip"]
    request: Annotated[str, Field(min_length=16, max_length=64)]
    seconds: Annotated[float, Field(ge=0, le=86_400, allow_inf_nan=False)]
    reason: Annotated[str, Field(max_length=REASON_LENGTH)] | None = None


class UndoBody(Body):
    choice: Number


class Guard:
    """Lets through what asks for this host, from this page, with the token.

    names: the hosts that a request may name; None: any address that is a number, which no foreign
    name can be rebound to, and this machine's own name.
    """

    def __init__(self, app: ASGIApp, token: str, names: set[str] | None) -> None:
        self.app = app
        self.token = token
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        refusal = self._refusal(Request(scope))
        if refusal is not None:
            await _sentence(*refusal)(scope, receive, send)
            return
        prefix = f"/{self.token}"
        if scope["path"] == prefix:
            await RedirectResponse(f"{prefix}/")(scope, receive, send)
            return
        inner = {**scope, "root_path": prefix}  # routes are looked up below it

        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *GUARDING_HEADERS]
            await send(message)

        await self.app(inner, receive, send_guarded)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        host = request.headers.get("host", "")
        if not self._is_ours(host):
            return 403, "This server is asked for under another name; open the address it printed."
        origin = request.headers.get("origin")
        site = request.headers.get("sec-fetch-site", "same-origin")
        # A link that is followed, as in a mail or a web terminal, is another site's and harmless.
        followed = request.method == "GET" and request.headers.get("sec-fetch-dest") == "document"
        foreign = site not in ("same-origin", "none") and not followed
        if foreign or (origin is not None and origin != f"http://{host}"):
            return 403, "Requests from other sites are refused."
        token = request.url.path.lstrip("/").partition("/")[0]
        if not secrets.compare_digest(token.encode(), self.token.encode()):
            return 403, "The address lacks the right token; open the one the server printed."
        if request.method in ("POST", "PUT", "PATCH", "DELETE"):
            length = request.headers.get("content-length", "")
            if not length.isdigit():
                return 411, "A request with a body must say its length."
            if int(length) > BODY_BYTES:
                return 413, f"A request has at most {BODY_BYTES} bytes."
            kind = request.headers.get("content-type", "").partition(";")[0].strip()
            if kind != "application/json":
                return 415, "A request's body must be application/json."
        return None

    def _is_ours(self, host: str) -> bool:
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        name = name.strip("[]").lower()
        if self.names is not None:
            return name in self.names
        with contextlib.suppress(ValueError):
            ipaddress.ip_address(name)
            return True
        return name in {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}


def _guarding_headers() -> list[tuple[bytes, bytes]]:
    """Nothing from outside the server is loaded, run or framed; nothing leaks to other sites."""
    match = IMPORT_MAP.search((PAGE / "index.html").read_text(encoding="utf-8"))
    assert match is not None, "the page has an import map"
    digest = base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'self' 'sha256-{digest}'; style-src 'self'; "
        "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return [
        (b"content-security-policy", policy.encode()),
        (b"cross-origin-resource-policy", b"same-origin"),
        (b"referrer-policy", b"no-referrer"),
        (b"x-content-type-options", b"nosniff"),
    ]


GUARDING_HEADERS = _guarding_headers()


def _sentence(status: int, text: str) -> JSONResponse:
    text = f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '?', '!')) else '.'}"
    return JSONResponse({"error": text}, status, headers={"cache-control": "no-store"})


def create_app(
    store: PreferenceStore,
    preparer: Preparer,
    opened: Opened,
    *,
    token: str,
    names: set[str] | None = LOOPBACK_NAMES,
    suggested_name: str = "",
) -> ASGIApp:
    """The page and what it asks for, behind its guard; see `Guard` for `names`.

    preparer: opened already; suggested_name: the annotator whom the page proposes.
    """
    settings = preparer.settings

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        planning = asyncio.create_task(preparer.run())
        yield
        planning.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await planning

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    def state_of(annotator: str) -> tuple[dict[str, Any], list[Task]]:
        pairs, repeats = settings.pairs, settings.repeats
        planned = store.planned()  # before, so that a pair planned meanwhile is not overlooked
        tasks = store.upcoming(annotator, AHEAD, pairs=pairs, repeats=repeats)
        progress = store.progress(annotator, pairs=pairs, repeats=repeats)
        # More will come: the pairs are chosen only shortly before they are shown.
        waiting = not tasks and planned < pairs
        state = {
            "annotator": annotator,
            "tasks": [task.id for task in tasks],
            "done": progress.done,
            # Pairs that were skipped are not repeated, so there may be fewer than were to be.
            "total": progress.total if tasks or waiting else progress.done,
            "seconds": progress.seconds,
            "undo": progress.last_choice,
            "waiting": waiting,
        }
        return state, tasks

    async def state(annotator: str) -> dict[str, Any]:
        """Where an annotator is; the surfaces that come next are begun."""
        current, tasks = await asyncio.to_thread(state_of, annotator)
        preparer.want(annotator, (sample for task in tasks for sample in (task.left, task.right)))
        preparer.poke()
        if current["waiting"] and preparer.failure is not None:
            raise HTTPException(500, f"No next pair could be chosen: {preparer.failure}")
        return current

    @app.get("/")
    def page() -> HTMLResponse:
        return HTMLResponse(
            (PAGE / "index.html").read_text(encoding="utf-8"),
            headers={"cache-control": "no-store"},
        )

    @app.get("/api/about")
    def about() -> dict[str, Any]:
        return {
            "lo": opened.lo,
            "hi": opened.hi,
            "pairs": settings.pairs,
            "name": suggested_name,
            "annotators": store.annotators(),
        }

    @app.post("/api/session")
    async def session(body: Body) -> dict[str, Any]:
        return await state(await asyncio.to_thread(store.add_annotator, body.annotator))

    @app.get("/api/state")
    async def get_state(annotator: str) -> dict[str, Any]:
        return await state(annotator)

    @app.post("/api/choice")
    async def choose(body: ChoiceBody) -> dict[str, Any]:
        reason = (body.reason or "").strip() or None
        if (body.answer == "skip") != (reason is not None):
            raise HTTPException(422, "A reason belongs to a skipped pair, and to no other.")

        def save() -> None:
            task = store.task(body.task)
            store.choose(
                body.annotator,
                body.task,
                _unsided(body.answer, task),
                request=body.request,
                seconds=body.seconds,
                reason=reason,
            )

        await asyncio.to_thread(save)
        return await state(body.annotator)

    @app.post("/api/undo")
    async def undo(body: UndoBody) -> dict[str, Any]:
        await asyncio.to_thread(store.undo, body.annotator, body.choice)
        return await state(body.annotator)

    @app.get("/mesh/{task}/{side}")
    async def mesh(task: Number, side: Literal["left", "right"]) -> Response:
        found = await asyncio.to_thread(store.task, task)
        path = await preparer.mesh(found.left if side == "left" else found.right)
        try:
            data = await asyncio.to_thread(path.read_bytes)
        except FileNotFoundError:
            raise HTTPException(503, "This shape had to make room for others; try again.") from None
        # No header tells which sample it is. A task's surface never changes.
        return Response(
            data,
            media_type="model/gltf-binary",
            headers={"cache-control": "private, max-age=86400, immutable"},
        )

    app.mount("/page", StaticFiles(directory=PAGE))

    def on(error: type[Exception], status: int) -> None:
        @app.exception_handler(error)
        async def answer(_: Request, found: Exception) -> JSONResponse:
            return _sentence(status, str(found))

    on(NoSurfaceError, 404)
    on(NoSuchTaskError, 404)
    on(AlreadyAnsweredError, 409)
    on(PreferenceError, 422)
    on(DensityRLError, 500)
    on(RuntimeError, 500)  # torch's, out of memory among them

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        text = "There is nothing here." if error.status_code == 404 else str(error.detail)
        return _sentence(error.status_code, text)

    @app.exception_handler(Exception)
    async def broken(_: Request, error: Exception) -> JSONResponse:
        return _sentence(500, "something broke, which the server's own output tells more about")

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _sentence(422, "The body is not JSON.")
        where = " ".join(str(part) for part in first["loc"][1:]) or "body"
        return _sentence(422, f"'{where}': {first['msg']}")

    return Guard(app, token, names)


def _unsided(answer: str, task: Task) -> Answer:
    if answer == "tie":
        return "tie"
    if answer == "skip":
        return "skip"
    return "first" if (answer == "left") == task.first_is_left else "second"


def listen(host: str, port: int) -> socket.socket:
    """A socket on this address, port 0 for any free one; DensityRLError if it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        server = socket.create_server((host, port), family=family, backlog=128)
        # Connections inherit it. asyncio sets it for sockets that say they are TCP's, which those
        # of create_server do not; a reply's second packet then waits 40 ms for an acknowledgement.
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return server
    except (OSError, UnicodeError) as error:
        raise DensityRLError(
            f"cannot listen on {host}, port {port} ({error}); give another --port or --host"
        ) from error


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def serve(
    settings: AnnotationConfig,
    database: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    cache: str | Path | None = None,
    suggested_name: str = "",
    on_ready: Callable[[str, float, float, int], None] = lambda *_: None,
) -> None:
    """Serve the page until interrupted.

    database: the store, made if need be; cache: folder of surfaces, by default beside it.
    `on_ready` is told, once the page answers, its address, the level of the surfaces, the level
    that their histogram suggests, and how many choices the store holds. Raises DensityRLError for
    a store of something else, a bad generator or reward, a taken port.
    """
    database = Path(database)
    folder = Path(cache) if cache is not None else database.with_name(f"{database.name}.meshes")
    sock = listen(host, port)
    with (
        sock,
        PreferenceStore(database, create=True) as store,
        Preparer(store, settings, folder) as preparer,
    ):
        about = {
            "truncation_psi": settings.truncation_psi,
            "slab": settings.mesh.slab,
            "resolution": settings.mesh.resolution,
        }
        if settings.mesh.level is not None:
            about["level"] = settings.mesh.level
        store.check(about)  # before the generator is loaded, which takes its time
        opened = preparer.open()
        store.describe({**about, "generator": opened.fingerprint, "level": opened.level})
        token = secrets.token_urlsafe(24)
        app = create_app(
            store,
            preparer,
            opened,
            token=token,
            names=LOOPBACK_NAMES | {host} if is_loopback(host) else None,
            suggested_name=suggested_name,
        )
        name = socket.gethostname() if host in ("0.0.0.0", "::") else host
        where = f"[{name}]" if ":" in name else name
        server = _Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,  # it would show the token
                server_header=False,
                timeout_graceful_shutdown=2,
            ),
            lambda: on_ready(
                f"http://{where}:{sock.getsockname()[1]}/{token}/",
                opened.level,
                opened.suggested_level,
                len(store.choices()),
            ),
        )
        if threading.current_thread() is threading.main_thread():
            # uvicorn finishes and raises the signal again; a terminated server cleans up as well.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # which is how this ends
            server.run(sockets=[sock])


class _Server(uvicorn.Server):
    """Tells when it answers."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self._on_ready()
