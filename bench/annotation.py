"""How long an annotator waits, measured on the real page in headless Chromium.

    python bench/annotation.py            # prints a table
    python bench/annotation.py --save     # and keeps it in bench/results/annotation.jsonl

For two sizes of surfaces: the first pair after starting, the time from a key to the next pair on
the screen once it was made ahead, the server's share of it (the answer on disk and the reply), and
the script's time of a frame while both shapes turn. Drawing itself is the GPU's; without one
Chromium draws in software, and the rate of frames is that software's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from harness import RESULTS, Provenance
from playwright.sync_api import CDPSession, Page, sync_playwright

from densityrl.annotation.server import serve
from densityrl.config import AnnotationConfig, MeshSettings

SIZES = {
    "face, 128 points": MeshSettings(),
    "whole head, 256 points": MeshSettings(slab="full", resolution=256),
}
ANSWERS = 15
TURN_SECONDS = 5
ARGUMENTS = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader")

# From a key to the frame that shows the next pair; the cover was up, or it was not.
ANSWER = """() => new Promise((resolve) => {
    const began = performance.now();
    const { body } = document;
    const before = body.dataset.task;
    let waited = false;
    const observer = new MutationObserver(() => {
        waited ||= body.dataset.state === 'waiting';
        if (body.dataset.state !== 'ready' || body.dataset.task === before) return;
        observer.disconnect();
        requestAnimationFrame(() => setTimeout(() => resolve([performance.now() - began, waited])));
    });
    observer.observe(body, { attributes: true });
    body.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowLeft', bubbles: true }));
})"""
SAVED = """() => performance.getEntriesByType('resource')
    .filter(({ name }) => name.endsWith('api/choice')).map(({ duration }) => duration)"""
FRAMES = """(seconds) => new Promise((resolve) => {
    let frames = 0;
    const began = performance.now();
    const count = (now) => {
        frames += 1;
        if (now - began < 1000 * seconds) requestAnimationFrame(count);
        else resolve(frames);
    };
    requestAnimationFrame(count);
})"""


@dataclass(frozen=True, kw_only=True)
class Row:
    size: str
    triangles: int  # of both shapes, on average
    first_pair_s: float  # from the name to the first pair
    made_ahead: int  # of the answers, that needed no spinner
    next_pair_ms: float  # median of these
    next_pair_worst_ms: float
    saved_ms: float  # median, the part that the server takes
    script_ms: float  # of a frame
    software_frames_per_s: float
    memory_mib: float  # of the script's heap


def metrics(session: CDPSession) -> dict[str, float]:
    answer = session.send("Performance.getMetrics")
    return {entry["name"]: entry["value"] for entry in answer["metrics"]}


def triangles(folder: Path) -> int:
    import trimesh

    counts = [len(trimesh.load_mesh(path).faces) for path in sorted(folder.rglob("*.glb"))]
    return round(2 * statistics.mean(counts))


def measure(page: Page, address: str, size: str, cache: Path, pause: float) -> Row:
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    page.goto(address)
    page.wait_for_selector("#start[open]")
    page.keyboard.type("bench")
    began = time.perf_counter()
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-state=ready]")
    first_pair = time.perf_counter() - began

    waits = []
    for _ in range(ANSWERS):
        page.wait_for_timeout(1000 * pause)  # somebody looks
        waits.append(page.evaluate(ANSWER))
    ahead = [milliseconds for milliseconds, waited in waits if not waited]
    if not ahead:
        raise SystemExit(f"{size}: no pair was made ahead within {pause} s; give a longer --pause")

    page.keyboard.press("a")
    page.wait_for_timeout(500)
    before = metrics(session)
    frames = page.evaluate(FRAMES, TURN_SECONDS)
    after = metrics(session)
    return Row(
        size=size,
        triangles=triangles(cache),
        first_pair_s=first_pair,
        made_ahead=len(ahead),
        next_pair_ms=statistics.median(ahead),
        next_pair_worst_ms=max(ahead),
        saved_ms=statistics.median(page.evaluate(SAVED)),
        script_ms=1000 * (after["ScriptDuration"] - before["ScriptDuration"]) / frames,
        software_frames_per_s=frames / TURN_SECONDS,
        memory_mib=after["JSHeapUsedSize"] / 2**20,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before each answer")
    arguments = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("no Chromium to drive the page with; on Debian: apt install chromium")

    rows = []
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as work, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        for number, (size, mesh) in enumerate(SIZES.items()):
            ready = context.Queue()
            cache = Path(work) / f"meshes{number}"
            server = context.Process(
                target=serve,
                args=(
                    AnnotationConfig(generator="heads", pairs=2 * ANSWERS, mesh=mesh),
                    Path(work) / f"{number}.sqlite",
                ),
                kwargs={"cache": cache, "on_ready": Ready(ready)},
            )
            server.start()
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            rows.append(measure(page, ready.get(timeout=120), size, cache, arguments.pause))
            page.close()
            server.terminate()
            server.join()
        browser.close()

    provenance = Provenance.of("cpu")
    print(provenance.sentence())
    for row in rows:
        print(json.dumps(asdict(row)))
    if arguments.save:
        with (RESULTS / "annotation.jsonl").open("a", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps({**asdict(row), **asdict(provenance)}) + "\n")


@dataclass
class Ready:
    """Hands the page's address to the process that measures."""

    queue: multiprocessing.Queue

    def __call__(self, address: str, *_: object) -> None:
        self.queue.put(address)


if __name__ == "__main__":
    main()
