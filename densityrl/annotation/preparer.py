"""What happens while a person looks: the next pairs are chosen, their surfaces made."""

from __future__ import annotations

import asyncio
import itertools
import math
import multiprocessing
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from densityrl.annotation.meshes import (
    LEVEL_SAMPLES,
    MeshSettings,
    NoSurfaceError,
    Opened,
    cache_key,
    make_mesh,
    open_generator,
    reward_scores,
    reward_stamp,
)
from densityrl.errors import DensityRLError
from densityrl.preference.store import Pair, PreferenceStore, Sample

T = TypeVar("T")

PLANNED_AHEAD = 6  # pairs; more would be chosen by an older reward
CANDIDATES = 16  # samples among which the reward's least sure pair is looked for


@dataclass(frozen=True, kw_only=True)
class AnnotationSettings:
    """Which pairs an annotator is given, and of what."""

    generator: str
    pairs: int = 200  # an annotator
    repeats: float = 0.1  # of these shown again, sides swapped
    anchors: float = 0.0  # share of the pairs that compare with a known-good sample
    reward: str | None = None  # directory of a reward that chooses pairs
    uncertain: float = 0.5  # share of the other pairs that it chooses
    first_seed: int = 10_000
    truncation_psi: float = 1.0
    anchor_first_seed: int = 100_000  # as reward training has them
    anchor_psi: float = 0.25
    mesh: MeshSettings = field(default_factory=MeshSettings)
    level: float | None = 10.0  # None: the suggested one, in place of mesh.level
    cache_bytes: int = 2 * 2**30
    device: str = "cpu"


class Preparer:
    """Plans pairs into the store and makes surfaces into a folder, both ahead of need.

    A context manager; `open` comes first, then `run` beside the server.
    """

    def __init__(self, store: PreferenceStore, settings: AnnotationSettings, folder: Path) -> None:
        self.store = store
        self.settings = settings
        self.failure: Exception | None = None
        self._root = folder
        self._wanted = asyncio.Event()
        self._making: dict[Path, asyncio.Task[Path]] = {}
        self._scores: dict[int, float] = {}  # of seeds, by the reward of this time stamp:
        self._stamp = 0
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))

    def open(self) -> Opened:
        """Load the generator; raises what is wrong with it, or with the reward."""
        settings = self.settings
        seeds = range(settings.first_seed, settings.first_seed + LEVEL_SAMPLES)
        try:
            opened = self._pool.submit(
                open_generator,
                settings.generator,
                settings.device,
                settings.mesh,
                settings.level,
                seeds,
                settings.truncation_psi,
            ).result()
            if settings.reward is not None:
                self._pool.submit(reward_scores, settings.reward, []).result()
        except BrokenProcessPool as error:
            raise DensityRLError(
                "the process that makes surfaces ended; is there memory enough for the generator?"
            ) from error
        self.folder = self._root / cache_key(opened.fingerprint, opened.settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        return opened

    def close(self) -> None:
        for process in list((self._pool._processes or {}).values()):
            process.terminate()  # what it makes is whole in the folder, or not there
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Preparer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- surfaces --------------------------------------------------------------------------------

    def want(self, samples: Iterable[Sample]) -> None:
        """Begin to make what is missing, in this order."""
        for sample in samples:
            self._begin(sample)

    async def mesh(self, sample: Sample) -> Path:
        """The file of a sample's surface, once it is made; NoSurfaceError if it has none."""
        return await asyncio.shield(self._begin(sample))

    def _begin(self, sample: Sample) -> asyncio.Task[Path]:
        path = self.folder / f"seed{sample.seed:010d}-psi{sample.psi:g}.glb"
        task = self._making.get(path)
        if task is None or (task.done() and not isinstance(task.exception(), NoSurfaceError)):
            task = asyncio.create_task(self._make(sample, path))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._making[path] = task
        return task

    async def _make(self, sample: Sample, path: Path) -> Path:
        if path.exists():
            path.touch()  # used last, so evicted last
        else:
            await self._in_pool(make_mesh, sample, str(path))
            await asyncio.to_thread(self._evict)
        return path

    def _evict(self) -> None:
        """Keep the folder's size: the surfaces used longest ago go."""
        files = sorted(self.folder.glob("*.glb"), key=lambda path: -path.stat().st_mtime_ns)
        total = 0
        for path in files:
            total += path.stat().st_size
            if total > self.settings.cache_bytes:
                path.unlink(missing_ok=True)

    async def _in_pool(self, function: Callable[..., T], *arguments: object) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, function, *arguments)

    # --- pairs -----------------------------------------------------------------------------------

    def poke(self) -> None:
        """Somebody went on: look whether more pairs are to be planned."""
        self._wanted.set()

    async def run(self) -> None:
        """Plan ahead of the furthest annotator until cancelled; a failure is kept for the page."""
        while True:
            try:
                await self._plan_ahead()
            except (DensityRLError, BrokenProcessPool, OSError) as error:
                self.failure = error
            await self._wanted.wait()
            self._wanted.clear()

    async def _plan_ahead(self) -> None:
        while True:
            planned = await asyncio.to_thread(self.store.planned)
            furthest = await asyncio.to_thread(self.store.furthest)
            if planned >= min(self.settings.pairs, furthest + PLANNED_AHEAD):
                self.failure = None
                return
            pair = await self.choose_pair(planned)
            await asyncio.to_thread(self.store.plan, planned, pair)

    async def choose_pair(self, position: int) -> Pair:
        """The pair for this position of the plan."""
        settings = self.settings
        known = await asyncio.to_thread(self.store.pairs)
        draw = random.Random(f"densityrl pair {position}")
        kind, share = draw.random(), draw.random()
        if kind < settings.anchors:
            seed = settings.anchor_first_seed + sum(pair.source == "anchor" for pair in known)
            ranked = Sample(self._unused(known, 1)[0], settings.truncation_psi)
            return Pair(Sample(seed, settings.anchor_psi), ranked, "anchor")
        if settings.reward is not None and share < settings.uncertain:
            return await self._uncertain(self._unused(known, CANDIDATES))
        first, second = self._unused(known, 2)
        return self._pair(first, second)

    def _pair(self, first: int, second: int) -> Pair:
        psi = self.settings.truncation_psi
        return Pair(Sample(first, psi), Sample(second, psi), "random")

    def _unused(self, known: list[Pair], count: int) -> list[int]:
        """The next seeds that are in no pair."""
        used = {sample.seed for pair in known for sample in (pair.first, pair.second)}
        seeds: list[int] = []
        seed = self.settings.first_seed
        while len(seeds) < count:
            if seed not in used:
                seeds.append(seed)
            seed += 1
        return seeds

    async def _uncertain(self, seeds: list[int]) -> Pair:
        """The two of these seeds that the reward can tell apart least."""
        settings = self.settings
        assert settings.reward is not None
        if self._stamp != reward_stamp(settings.reward):
            self._scores.clear()
        for seed in seeds:
            if seed not in self._scores:  # one by one, so that surfaces need not wait for all
                sample = Sample(seed, settings.truncation_psi)
                self._stamp, (score,) = await self._in_pool(
                    reward_scores, settings.reward, [sample]
                )
                self._scores[seed] = score
        ranked = sorted(seeds, key=lambda seed: self._scores[seed])
        low, high = min(
            itertools.pairwise(ranked),
            key=lambda pair: self._scores[pair[1]] - self._scores[pair[0]],
        )
        margin = self._scores[low] - self._scores[high]
        probability = 1 / (1 + math.exp(-margin))
        return replace(self._pair(low, high), source="uncertain", probability=probability)
