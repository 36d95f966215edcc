"""What happens while a person looks: the next pairs are chosen, their surfaces made."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from densityrl.annotation.meshes import (
    LEVEL_SAMPLES,
    NoSurfaceError,
    Opened,
    begin_process,
    cache_key,
    make_mesh,
    open_generator,
    reward_scores,
    reward_stamp,
)
from densityrl.config import AnnotationConfig
from densityrl.errors import DensityRLError
from densityrl.preference.store import Pair, PreferenceStore, Sample

T = TypeVar("T")

PLANNED_AHEAD = 6  # pairs; more would be chosen by an older reward
CANDIDATES = 16  # samples among which the reward's least sure pair is looked for


class Preparer:
    """Plans pairs into the store and makes surfaces into a folder, both ahead of need.

    A context manager; `open` comes first, then `run` beside the server.
    """

    def __init__(self, store: PreferenceStore, settings: AnnotationConfig, folder: Path) -> None:
        self.store = store
        self.settings = settings
        self.failure: Exception | None = None
        self._root = folder
        self._wanted = asyncio.Event()
        self._work = asyncio.Event()
        self._wishes: dict[str, list[Sample]] = {}  # of each annotator
        self._awaited: dict[Sample, asyncio.Future[None]] = {}
        self._without: dict[Sample, str] = {}  # that have no surface, and what to say of it
        self._scores: dict[int, tuple[int, float]] = {}  # of seeds: the reward's time stamp, score
        self._process: int | None = None
        self._pool = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=begin_process
        )

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
                seeds,
                settings.truncation_psi,
            ).result()
            if settings.reward is not None:
                self._pool.submit(reward_scores, settings.reward, []).result()
        except BrokenProcessPool as error:
            raise DensityRLError(
                "the process that makes surfaces ended; is there memory enough for the generator?"
            ) from error
        self._process = opened.process
        self.folder = self._root / cache_key(opened.fingerprint, opened.settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        return opened

    def close(self) -> None:
        for child in multiprocessing.active_children():
            if child.pid == self._process:
                child.terminate()  # what it makes is whole in the folder, or not there
        self._pool.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> Preparer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- surfaces --------------------------------------------------------------------------------

    def want(self, annotator: str, samples: Iterable[Sample]) -> None:
        """What this annotator will see next, in this order; what was wanted before is forgotten."""
        self._wishes[annotator] = list(samples)
        self._work.set()

    async def mesh(self, sample: Sample) -> Path:
        """The file of a sample's surface, once it is made; NoSurfaceError if it has none."""
        path = self._path(sample)
        if sample in self._without:
            raise NoSurfaceError(self._without[sample])
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)  # used last, so evicted last
            return path
        future = self._awaited.setdefault(sample, asyncio.get_running_loop().create_future())
        self._work.set()
        await asyncio.shield(future)
        return path

    def _path(self, sample: Sample) -> Path:
        return self.folder / f"seed{sample.seed:010d}-psi{sample.psi!r}.glb"

    def _next(self) -> Sample | None:
        """What somebody waits for goes before what somebody will see."""
        for sample in self._awaited:
            return sample
        for wishes in self._wishes.values():
            while wishes:
                sample = wishes.pop(0)
                if sample not in self._without and not self._path(sample).exists():
                    return sample
        return None

    async def _make_surfaces(self) -> None:
        while True:
            sample = self._next()
            if sample is None:
                await self._work.wait()
                self._work.clear()
                continue
            error: Exception | None = None
            try:
                await self._in_pool(make_mesh, sample, str(self._path(sample)))
                await asyncio.to_thread(self._evict)
            except NoSurfaceError as missing:
                self._without[sample] = str(missing)
                error = missing
            except Exception as failed:  # told to whoever asks for it, which tries again
                error = failed
            future = self._awaited.pop(sample, None)
            if future is not None and not future.done():
                if error is None:
                    future.set_result(None)
                else:
                    future.set_exception(error)
                    future.exception()  # nobody may wait any more

    def _evict(self) -> None:
        """Keep the folder's size: the surfaces used longest ago go, the last one stays."""
        files = sorted(self.folder.glob("*.glb"), key=lambda path: -path.stat().st_mtime_ns)
        sizes = itertools.accumulate(path.stat().st_size for path in files)
        for path, size in list(zip(files, sizes, strict=True))[1:]:
            if size > self.settings.cache_bytes:
                path.unlink(missing_ok=True)

    async def _in_pool(self, function: Callable[..., T], *arguments: object) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, function, *arguments)
        except BrokenProcessPool as error:
            raise DensityRLError(
                "the process that makes surfaces ended; start `densityrl annotate` again"
            ) from error

    # --- pairs -----------------------------------------------------------------------------------

    def poke(self) -> None:
        """Somebody went on: look whether more pairs are to be planned."""
        self._wanted.set()

    async def run(self) -> None:
        """Make surfaces, and plan pairs ahead of the furthest annotator, until cancelled.

        A failure to plan is kept in `failure` for the page.
        """
        await asyncio.gather(self._make_surfaces(), self._plan())

    async def _plan(self) -> None:
        while True:
            try:
                await self._plan_ahead()
            except Exception as error:
                self.failure = error
            await self._wanted.wait()
            self._wanted.clear()

    async def _plan_ahead(self) -> None:
        while True:
            planned = await asyncio.to_thread(self.store.planned)
            if planned >= self.settings.pairs or planned >= PLANNED_AHEAD + await asyncio.to_thread(
                self.store.furthest
            ):
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
        while old := self._outdated(seeds):  # one by one, so that surfaces need not wait for all
            stamp, (score,) = await self._in_pool(
                reward_scores, settings.reward, [Sample(old[0], settings.truncation_psi)]
            )
            self._scores[old[0]] = stamp, score
        scores = {seed: self._scores[seed][1] for seed in seeds}
        low, high = min(
            itertools.pairwise(sorted(seeds, key=lambda seed: scores[seed])),
            key=lambda pair: scores[pair[1]] - scores[pair[0]],
        )
        margin = scores[low] - scores[high]
        probability = 1 / (1 + math.exp(-margin))
        return replace(self._pair(low, high), source="uncertain", probability=probability)

    def _outdated(self, seeds: list[int]) -> list[int]:
        """Those without a score by the reward that is there now."""
        assert self.settings.reward is not None
        stamp = reward_stamp(self.settings.reward)
        return [seed for seed in seeds if self._scores.get(seed, (None, 0.0))[0] != stamp]
