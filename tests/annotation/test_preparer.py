"""What is made ready behind the page: pairs in a reproducible order, each surface once."""

import asyncio
import contextlib
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import save_tiny, tiny_generator, tiny_reward

from densityrl.annotation import preparer as preparer_module
from densityrl.annotation.meshes import MeshMaker, NoSurfaceError, make_mesh
from densityrl.annotation.preparer import CANDIDATES, PLANNED_AHEAD, Preparer
from densityrl.config import AnnotationConfig, MeshSettings
from densityrl.errors import CheckpointError, DensityRLError
from densityrl.generator import save_generator
from densityrl.preference.store import Pair, PreferenceStore, Sample
from densityrl.preference.table import PreferenceTable
from densityrl.reward import ConvNetwork

MESH = MeshSettings(resolution=24, slab="full", level=7.0)


class Here(ThreadPoolExecutor):
    """In place of the process that makes surfaces, of which a start takes seconds."""

    def __init__(self):
        super().__init__(1)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("preparer") / "generator")


@pytest.fixture
def preparing(generator, tmp_path):
    """Makes opened preparers, each in this process unless told otherwise."""
    with contextlib.ExitStack() as stack:

        def make(name="prefs", process=False, **values):
            settings = AnnotationConfig(**{"generator": generator, "mesh": MESH, **values})
            store = stack.enter_context(PreferenceStore(tmp_path / f"{name}.sqlite", create=True))
            preparer = stack.enter_context(Preparer(store, settings, tmp_path / "meshes"))
            if not process:
                preparer._pool = Here()
                stack.callback(preparer._pool.shutdown)
            preparer.open()
            return preparer

        yield make


def save_reward(directory, **values):
    directory.mkdir(exist_ok=True)
    tiny_reward(**values).save(directory)
    return str(directory)


@pytest.fixture
def reward(tmp_path):
    return save_reward(tmp_path / "reward")


def other_reward():
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = ConvNetwork((8, 8)).eval().requires_grad_(False)
    return replace(tiny_reward(), network=network)


def replace_reward(directory, model):
    """With a later time stamp, however coarse the clock of the file system is."""
    weights = Path(directory) / "reward.safetensors"
    later = weights.stat().st_mtime_ns + 10**9
    model.save(directory)
    os.utime(weights, ns=(later, later))


def planned(preparer, count):
    """The first pairs of the plan, put into the store."""

    async def plan():
        for position in range(preparer.store.planned(), count):
            assert preparer.store.plan(position, await preparer.choose_pair(position))

    asyncio.run(plan())
    return preparer.store.pairs()


def while_running(preparer, work):
    """What `work` returns, beside the preparer's own tasks; once for each preparer."""

    async def both():
        background = asyncio.create_task(preparer.run())
        try:
            return await work()
        finally:
            background.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await background

    return asyncio.run(both())


async def until(condition):
    """Ends with the test's own time limit at the latest."""
    while not condition():
        await asyncio.sleep(0.005)


# --- which pairs ---------------------------------------------------------------------------------


def seeds(pair):
    return pair.first.seed, pair.second.seed


def test_random_pairs_take_seeds_in_order(preparing):
    pairs = planned(preparing(first_seed=70, truncation_psi=0.8), 4)
    assert [seeds(pair) for pair in pairs] == [(70, 71), (72, 73), (74, 75), (76, 77)]
    assert {sample.psi for pair in pairs for sample in (pair.first, pair.second)} == {0.8}
    assert {(pair.source, pair.probability) for pair in pairs} == {("random", None)}


def test_seeds_of_any_pair_are_used(preparing):
    preparer = preparing(first_seed=70)
    preparer.store.plan(0, Pair(Sample(71, 1.0), Sample(5, 1.0), "random"))
    preparer.store.add_table(PreferenceTable(np.array([72]), np.array([74])), "ann", 1.0)
    assert [seeds(pair) for pair in planned(preparer, 3)[2:]] == [(70, 73), (75, 76)]


class Scored(Preparer):
    """Scores are those of a table, of any size in no time."""

    async def _in_pool(self, function, *arguments):
        (sample,) = arguments[1]
        return 0, [math.sin(sample.seed)]


def sources(tmp_path, name, count):
    settings = AnnotationConfig(
        generator="none", anchors=0.2, uncertain=0.25, reward=str(tmp_path / "none")
    )
    with PreferenceStore(tmp_path / name, create=True) as store:
        preparer = Scored(store, settings, tmp_path)
        return planned(preparer, count)


def test_shares_of_pairs(tmp_path):
    count = 400
    pairs = sources(tmp_path, "one", count)
    assert pairs == sources(tmp_path, "two", count)
    for source, share in (("anchor", 0.2), ("uncertain", 0.8 * 0.25), ("random", 0.8 * 0.75)):
        found = sum(pair.source == source for pair in pairs)
        assert abs(found - share * count) < 3 * math.sqrt(share * (1 - share) * count)

    anchors = [pair for pair in pairs if pair.source == "anchor"]
    assert [pair.first.seed for pair in anchors] == [100_000 + i for i in range(len(anchors))]
    assert {(pair.first.psi, pair.second.psi) for pair in anchors} == {(0.25, 1.0)}
    others = [s for pair in pairs for s in (pair.first, pair.second) if s.psi == 1.0]
    assert len({sample.seed for sample in others}) == len(others)
    assert min(sample.seed for sample in others) == 10_000


@pytest.mark.parametrize(("share", "source"), [(0.0, "random"), (1.0, "anchor")])
def test_no_pair_or_every_pair_has_an_anchor(preparing, share, source):
    pairs = planned(preparing(anchors=share, uncertain=1.0), 30)
    assert {pair.source for pair in pairs} == {source}


def test_without_a_reward_no_pair_is_uncertain(preparing):
    assert {pair.source for pair in planned(preparing(uncertain=1.0), 10)} == {"random"}


# --- pairs that a reward chooses -----------------------------------------------------------------


def scores_by(model, seeds):
    samples = [Sample(seed, 1.0) for seed in seeds]
    return dict(zip(seeds, MeshMaker(tiny_generator(), MESH).scores(model, samples), strict=True))


def closest(scores):
    """The two seeds of all whose scores differ least."""
    return min(itertools.combinations(scores, 2), key=lambda p: abs(scores[p[0]] - scores[p[1]]))


def test_the_least_certain_pair_of_the_candidates(preparing, reward):
    preparer = preparing(reward=reward, uncertain=1.0, first_seed=0)
    scores = scores_by(tiny_reward(), range(CANDIDATES + 6))
    left = list(scores)
    for pair in planned(preparer, 4):
        one, other = closest({seed: scores[seed] for seed in left[:CANDIDATES]})
        assert set(seeds(pair)) == {one, other}
        margin = scores[pair.first.seed] - scores[pair.second.seed]
        assert pair.probability == pytest.approx(1 / (1 + math.exp(-margin)), rel=1e-9)
        assert pair.probability != 0.5
        assert pair.source == "uncertain"
        left = [seed for seed in left if seed not in (one, other)]


def test_another_reward_scores_anew(preparing, reward):
    preparer = preparing(reward=reward, uncertain=1.0, first_seed=0)
    before = asyncio.run(preparer.choose_pair(0))
    replace_reward(reward, other_reward())
    after = asyncio.run(preparer.choose_pair(0))
    assert set(seeds(before)) == set(closest(scores_by(tiny_reward(), range(CANDIDATES))))
    assert set(seeds(after)) == set(closest(scores_by(other_reward(), range(CANDIDATES))))
    assert set(seeds(before)) != set(seeds(after))


def test_scores_of_two_rewards_are_not_mixed(preparing, reward, monkeypatch):
    preparer = preparing(reward=reward, uncertain=1.0, first_seed=0)
    calls = []
    ask = preparer._in_pool

    async def replaced_midway(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            replace_reward(reward, other_reward())
        return await ask(*arguments)

    monkeypatch.setattr(preparer, "_in_pool", replaced_midway)
    during = asyncio.run(preparer.choose_pair(0))
    expected = set(closest(scores_by(other_reward(), range(CANDIDATES))))
    assert set(seeds(during)) == expected
    assert set(seeds(asyncio.run(preparer.choose_pair(0)))) == expected


# --- planning ahead ------------------------------------------------------------------------------


def test_plans_ahead_of_the_furthest(preparing):
    preparer = preparing(pairs=12)
    store = preparer.store

    def go_on(name, count):
        """Give `count` tasks in all to somebody, then plan."""
        store.add_annotator(name)
        assert len(store.upcoming(name, count, pairs=12, repeats=0)) == count
        asyncio.run(preparer._plan_ahead())
        return store.planned()

    asyncio.run(preparer._plan_ahead())
    assert store.planned() == PLANNED_AHEAD == 6
    assert go_on("ann", 1) == 7
    assert go_on("bob", 1) == 7
    assert go_on("bob", 4) == 10
    assert go_on("ann", 3) == 10
    assert go_on("bob", 8) == 12
    assert go_on("bob", 12) == 12


def test_goes_on_when_poked(preparing):
    preparer = preparing(pairs=8)
    store = preparer.store
    store.add_annotator("ann")

    async def work():
        await until(lambda: store.planned() == 6)
        store.upcoming("ann", 4, pairs=8, repeats=0)
        preparer.poke()
        await until(lambda: store.planned() == 8)

    while_running(preparer, work)
    assert [seeds(pair) for pair in store.pairs()] == [
        (seed, seed + 1) for seed in range(10_000, 10_016, 2)
    ]


def test_a_failure_is_kept_until_planning_succeeds(preparing, reward):
    preparer = preparing(reward=reward, uncertain=1.0, pairs=1)
    shutil.rmtree(reward)

    async def work():
        await until(lambda: preparer.failure is not None)
        assert isinstance(preparer.failure, CheckpointError)
        assert "no reward in" in str(preparer.failure)
        assert preparer.store.planned() == 0
        save_reward(Path(reward))
        preparer.poke()
        await until(lambda: preparer.failure is None)

    while_running(preparer, work)
    assert [pair.source for pair in preparer.store.pairs()] == ["uncertain"]


# --- surfaces ------------------------------------------------------------------------------------

SAMPLES = [Sample(seed, 1.0) for seed in range(6)]


@pytest.fixture
def made(monkeypatch):
    """Samples whose surfaces were begun, in order; `before` is called with each."""

    class Made(list):
        before = staticmethod(lambda sample: None)

        def make(self, sample, path):
            self.append(sample)
            self.before(sample)
            make_mesh(sample, path)

    record = Made()
    monkeypatch.setattr(preparer_module, "make_mesh", record.make)
    return record


def test_one_surface_for_many_requests(preparing, made):
    preparer = preparing()

    async def work():
        return await asyncio.gather(*(preparer.mesh(SAMPLES[i % 2]) for i in range(20)))

    paths = while_running(preparer, work)
    assert sorted(made, key=SAMPLES.index) == SAMPLES[:2]
    assert len(set(paths)) == 2
    maker = MeshMaker(tiny_generator(), MESH)
    assert [path.read_bytes() for path in paths[:2]] == [maker.glb(s) for s in SAMPLES[:2]]


def test_surfaces_outlive_a_restart(preparing, made):
    def once(**values):
        preparer = preparing(**values)
        path = while_running(preparer, lambda: preparer.mesh(SAMPLES[0]))
        return path, path.stat().st_ino, path.read_bytes()

    assert once() == once(name="again")
    assert made == SAMPLES[:1]
    assert once(mesh=replace(MESH, triangles=500))[2] != once()[2]


def test_samples_of_any_truncation_have_their_own_file(preparing):
    preparer = preparing()
    samples = [Sample(3, 0.7), Sample(3, 0.25), Sample(3, 0.70000001), Sample(30, 0.7)]

    async def work():
        return [(await preparer.mesh(sample)).name for sample in samples]

    assert len(set(while_running(preparer, work))) == len(samples)


def test_a_failure_is_tried_again(preparing, made):
    preparer = preparing()

    def fail(_):
        if len(made) == 1:
            raise OSError("no space left on device")

    made.before = fail

    async def work():
        with pytest.raises(OSError, match="no space left"):
            await preparer.mesh(SAMPLES[0])
        return await preparer.mesh(SAMPLES[0])

    assert while_running(preparer, work).stat().st_size > 1000
    assert len(made) == 2


def test_no_surface_is_final(preparing, made):
    preparer = preparing(mesh=replace(MESH, level=1e5))

    async def work():
        for _ in range(3):
            with pytest.raises(NoSurfaceError, match="no surface at the raw density 100000"):
                await preparer.mesh(SAMPLES[0])
        preparer.want("ann", SAMPLES[:2])
        await until(lambda: len(made) == 2)

    while_running(preparer, work)
    assert made == SAMPLES[:2]


def test_whoever_waits_comes_first(preparing, made):
    """Wishes in order; those of before are forgotten, and what is there is not made again."""
    preparer = preparing()
    started, go_on = threading.Event(), threading.Event()

    def hold(_):
        started.set()
        go_on.wait()

    made.before = hold

    async def work():
        preparer.want("ann", SAMPLES[:3])
        await until(started.is_set)  # the first is being made
        preparer.want("ann", SAMPLES[:1] + SAMPLES[3:5])
        waiting = asyncio.create_task(preparer.mesh(SAMPLES[5]))
        await asyncio.sleep(0)
        go_on.set()
        await waiting
        await until(lambda: len(list(preparer.folder.glob("*.glb"))) == 4)

    while_running(preparer, work)
    assert made == [SAMPLES[i] for i in (0, 5, 3, 4)]


def test_who_gives_up_takes_nothing_from_others(preparing, made):
    preparer = preparing()
    started, go_on = threading.Event(), threading.Event()
    made.before = lambda _: (started.set(), go_on.wait())

    async def work():
        impatient, patient = (asyncio.create_task(preparer.mesh(SAMPLES[0])) for _ in range(2))
        await until(started.is_set)
        impatient.cancel()
        await asyncio.sleep(0)
        go_on.set()
        return await patient

    assert while_running(preparer, work).exists()
    assert made == SAMPLES[:1]


# --- the folder's size ---------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Surfaces of 1000 bytes."""
    monkeypatch.setattr(
        preparer_module, "make_mesh", lambda sample, path: Path(path).write_bytes(bytes(1000))
    )


def age(preparer, sample, seconds):
    """As if it had been used that long before now."""
    path = preparer._path(sample)
    then = path.stat().st_mtime_ns - seconds * 10**9
    os.utime(path, ns=(then, then))


def kept(preparer):
    return [sample for sample in SAMPLES if preparer._path(sample).exists()]


def test_the_newest_surfaces_are_kept(preparing, small):
    preparer = preparing(cache_bytes=2000)

    async def work():
        for number, sample in enumerate(SAMPLES[:4]):
            await preparer.mesh(sample)
            age(preparer, sample, 100 - number)
            assert kept(preparer) == SAMPLES[max(0, number - 1) : number + 1]

    while_running(preparer, work)


def test_a_surface_in_use_is_kept(preparing, small):
    preparer = preparing(cache_bytes=2000)

    async def work():
        for sample, seconds in zip(SAMPLES[:2], (100, 50), strict=True):
            await preparer.mesh(sample)
            age(preparer, sample, seconds)
        await preparer.mesh(SAMPLES[0])  # used, so younger than the second
        await preparer.mesh(SAMPLES[2])

    while_running(preparer, work)
    assert kept(preparer) == [SAMPLES[0], SAMPLES[2]]


def test_a_surface_larger_than_the_folder_is_served(preparing, small):
    preparer = preparing(cache_bytes=10)
    assert while_running(preparer, lambda: preparer.mesh(SAMPLES[0])).stat().st_size == 1000


def test_a_surface_that_is_evicted_while_asked_for(preparing, monkeypatch):
    preparer = preparing()
    exists, vanishing = Path.exists, []

    def evicted_then(path, **options):
        there = exists(path, **options)
        if there and path in vanishing:
            vanishing.remove(path)
            path.unlink()
        return there

    monkeypatch.setattr(Path, "exists", evicted_then)

    async def work():
        path = await preparer.mesh(SAMPLES[0])
        vanishing.append(path)
        return (await preparer.mesh(SAMPLES[0])).stat().st_size

    assert while_running(preparer, work) > 1000


# --- the process of its own ----------------------------------------------------------------------


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text
    assert 10 < len(text) < 300
    return text


def test_a_bad_generator(preparing, tmp_path):
    with pytest.raises(DensityRLError) as error:
        preparing(process=True, generator=str(tmp_path / "absent"))
    assert "no generator at" in one_sentence(error)


def test_a_bad_reward(preparing, tmp_path):
    with pytest.raises(DensityRLError) as error:
        preparing(process=True, reward=str(tmp_path))
    assert "no reward in" in one_sentence(error)


def test_a_reward_of_another_box(preparing, tmp_path):
    reward = save_reward(tmp_path / "reward", box_side=2.0)
    with pytest.raises(DensityRLError) as error:
        preparing(reward=reward)
    assert "box of side 2.0" in one_sentence(error)


@pytest.mark.parametrize("level", [None, 10.0], ids=["auto", "given"])
def test_a_generator_of_one_density(preparing, tmp_path, level):
    generator = tiny_generator()
    for parameter in generator.osg_decoder.parameters():
        parameter.zero_()  # which is then the density everywhere
    save_generator(generator, tmp_path / "constant")
    with pytest.raises(DensityRLError) as error:
        preparing(generator=str(tmp_path / "constant"), mesh=replace(MESH, level=level))
    assert "the density is the same everywhere" in one_sentence(error)


def test_the_process_ends_with_the_preparer(generator, tmp_path):
    before = set(multiprocessing.active_children())
    with PreferenceStore(tmp_path / "prefs.sqlite", create=True) as store:
        settings = AnnotationConfig(generator=generator, mesh=MESH)
        with Preparer(store, settings, tmp_path / "meshes") as preparer:
            opened = preparer.open()
            (process,) = set(multiprocessing.active_children()) - before
            assert process.is_alive()
            path = while_running(preparer, lambda: preparer.mesh(SAMPLES[0]))
        process.join()
    assert not process.is_alive()
    assert path.read_bytes() == MeshMaker(tiny_generator(), MESH).glb(SAMPLES[0])
    assert opened.fingerprint == tiny_generator().fingerprint()
    assert opened.settings == MESH
    assert opened.lo == (-0.5, -0.5, -0.5)
    assert opened.hi == (0.5, 0.5, 0.5)


KILLED = """
import sys, time
from densityrl.annotation.preparer import Preparer
from densityrl.config import AnnotationConfig
from densityrl.preference.store import PreferenceStore
if __name__ == "__main__":
    with PreferenceStore(sys.argv[2], create=True) as store:
        Preparer(store, AnnotationConfig(generator=sys.argv[1]), __import__("pathlib").Path(
            sys.argv[2] + ".meshes")).open()
        print("open", flush=True)
        time.sleep(1000)
"""


def test_the_process_ends_with_a_killed_server(generator, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), generator, str(tmp_path / "prefs.sqlite")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "open\n"
        process.send_signal(signal.SIGKILL)
        # Its child has the same end of this pipe, which ends when the last of them has closed it.
        assert process.stdout.read() == ""
