"""Making the bundled generator `heads`. Without ICT-FaceKit's shapes the tests of them skip."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import cKDTree

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import train_heads
from heads import face_model, faults, latent, mesh, points
from train_heads import CONFIG, LEVEL, SWING, Batch, Batches, losses

from densityrl.generator import TriplaneGenerator, latents

MODES = 32
LEFT_CHEEK, LEFT_EYE, NOSE, BRIDGE = (0.14, -0.05), (0.10, 0.05), (0, -0.02), (0, 0.06)
RADIUS = 0.31


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="session")
def pack(shared_data):
    file = shared_data / "ict_heads" / "ict_heads.npz"
    if not file.is_file():
        pytest.skip(f"no {file}")
    return file


@pytest.fixture(scope="module")
def model(pack):
    return face_model.read_face_model(pack, MODES)


@pytest.fixture(scope="module")
def maker(model):
    return points.HeadMaker(model)


# --- meshes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ball():
    """Vertices and triangles of a sphere off the middle, and its centre."""
    centre = np.array([0.05, -0.03, 0.1])
    sphere = trimesh.creation.icosphere(subdivisions=4, radius=RADIUS)
    return sphere.vertices + centre, np.asarray(sphere.faces), centre


def test_voxels_of_a_sphere(ball):
    vertices, triangles, centre = ball
    side = 48
    axis = (np.arange(side) + 0.5) / side - 0.5
    at = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1)
    distance = np.linalg.norm(at - centre, axis=-1) - RADIUS
    clear = np.abs(distance) > 0.002  # flat triangles cut that much off the sphere
    solid = mesh.voxelize(vertices, triangles, side)
    assert clear.mean() > 0.97
    np.testing.assert_array_equal(solid[clear], distance[clear] < 0)


def test_two_overlapping_solids_are_one(ball):
    vertices, triangles, _ = ball
    moved = vertices + np.array([0.06, 0.02, -0.05])
    both = mesh.voxelize(
        np.concatenate([vertices, moved]),
        np.concatenate([triangles, triangles + len(vertices)]),
        32,
    )
    apart = [mesh.voxelize(v, triangles, 32) for v in (vertices, moved)]
    np.testing.assert_array_equal(both, apart[0] | apart[1])


def test_the_front_of_a_sphere(ball):
    vertices, triangles, centre = ball
    side = 64
    hits = mesh.front_most(vertices, triangles, side)
    pixels = np.stack([hits.x, hits.y], axis=1)
    assert len(np.unique(pixels, axis=0)) == len(pixels)
    off = (pixels + 0.5) / side - 0.5 - centre[:2]
    across = (off**2).sum(axis=1)
    assert abs(len(hits.x) / side**2 - np.pi * RADIUS**2) < 0.01
    inner = across < (0.9 * RADIUS) ** 2
    expected = centre[2] + np.sqrt(RADIUS**2 - across[inner])
    np.testing.assert_allclose(hits.z[inner], expected, atol=0.003)
    assert (hits.facing == 1).all()
    assert (hits.weights >= 0).all()
    np.testing.assert_allclose(hits.weights.sum(axis=1), 1, atol=1e-12)


def test_normals_of_a_sphere(ball):
    vertices, triangles, centre = ball
    normals = mesh.vertex_normals(vertices, triangles)
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-12)
    assert ((normals * (vertices - centre)).sum(axis=1) / RADIUS).min() > 0.999


# --- latent numbers ----------------------------------------------------------------------------


def test_groups_cover_the_latent_once():
    ends = list(latent.GROUPS.values())
    assert ends[0][0] == 0
    assert ends[-1][1] == latent.Z_DIM
    assert [end for _, end in ends[:-1]] == [start for start, _ in ends[1:]]
    assert latent.FAULTS.stop - latent.FAULTS.start == len(latent.FAULT_NAMES)


def test_new_faults_on_the_same_head():
    u = latent.draw(200, rng())
    torch.testing.assert_close(u.square().mean(dim=1), torch.ones(200))
    clean = torch.arange(200) % 3 == 0
    again = latent.with_new_faults(u, clean, rng(1))
    kept = latent.FAULTS.start
    assert torch.equal(again[:, :kept], u[:, :kept])
    torch.testing.assert_close(again.norm(dim=1), u.norm(dim=1))
    assert (again[clean, latent.FAULTS] == 0).all()
    assert (again[~clean, latent.FAULTS] != u[~clean, latent.FAULTS]).all()


def test_clean_heads_mean_what_the_generator_calls_clean():
    z = latents(range(20), latent.Z_DIM)
    generator = TriplaneGenerator(CONFIG)
    theirs = latent.normalized(generator.without_faults(z))
    u = latent.normalized(z)
    ours = latent.with_new_faults(u, torch.ones(20, dtype=torch.bool), rng())
    named = slice(0, latent.FAULTS.stop)
    torch.testing.assert_close(ours[:, named], theirs[:, named])
    torch.testing.assert_close(theirs[:, : latent.FAULTS.start], u[:, : latent.FAULTS.start])


def test_strengths():
    a = torch.linspace(-3, 3, 61)
    strength = latent.strengths(a)
    assert (strength[a <= 0] == 0).all()
    assert (strength.diff() >= 0).all()
    rising = (a > 0) & (a < latent.STRONGEST)
    assert (strength[rising].diff() > 0).all()
    torch.testing.assert_close(
        latent.strengths(torch.tensor([1.0, 4.0])), 1.7 * torch.tensor([1, 1.25**1.5])
    )


def test_floater_radius():
    numbers = torch.zeros(6, 10)
    numbers[:, -1] = torch.tensor([-2.0, 0.0, 0.39, 0.65, 2.0, 3.0])
    radius = latent.floater_radius(numbers)
    assert (radius[:3] == 0).all()
    torch.testing.assert_close(radius[3], torch.tensor(0.020))
    assert radius[3] < radius[4] == radius[5] < 0.05


def test_factors():
    u = latent.draw(4000, rng())
    factors = latent.factors(u)
    assert factors.shape == (4000, 50)
    assert torch.equal(factors[:, :40], u[:, :40])
    spread = factors.std(dim=0)
    assert ((spread > 0.5) & (spread < 1.5)).all()


# --- closed heads ------------------------------------------------------------------------------


def assert_closed(triangles):
    """Every directed edge is there once, and so is its reverse."""
    edges = Counter(
        (int(a), int(b))
        for triangle in triangles
        for a, b in zip(triangle, np.roll(triangle, -1), strict=True)
    )
    assert set(edges.values()) == {1}
    assert all((b, a) in edges for a, b in edges)


def volume(vertices, triangles):
    a, b, c = vertices[triangles].transpose(1, 0, 2)
    return (np.cross(a, b) * c).sum() / 6


def test_a_head_is_closed(maker):
    assert_closed(maker.closed.skin)
    assert_closed(maker.closed.eyes)


def test_size_of_a_head(maker):
    vertices = maker.closed.vertices_cm(np.zeros(MODES))
    eyes_cm3 = volume(vertices, maker.closed.eyes)
    assert 2 * 10 < eyes_cm3 < 2 * 20  # two balls, 3 cm wide
    inside = mesh.voxelize(face_model.to_box(vertices), maker.closed.skin, 64)
    assert 4000 < inside[:, 14:].mean() * 27000 < 9000  # cm^3 of a head and part of its neck
    assert not inside[:, :, 0].any()
    # The neck is closed below the box and not in it.
    assert face_model.to_box(vertices)[-1, 1] < -0.5
    assert volume(vertices, maker.closed.skin) > inside.mean() * 27000


def test_heads_look_out_of_the_front(maker):
    vertices = face_model.to_box(maker.closed.vertices_cm(np.zeros(MODES)))
    landmarks = vertices[maker.closed.model.landmarks]
    assert np.abs(landmarks).max() < 0.5
    assert landmarks[30, 2] == landmarks[:, 2].max()  # the tip of the nose
    assert landmarks[42:48, 0].min() > 0 > landmarks[36:42, 0].max()  # +x is the subject's left
    assert landmarks[8, 1] < landmarks[57, 1] < landmarks[30, 1] < landmarks[27, 1]


def test_the_loop_of_a_missing_triangle():
    tetrahedron = np.array([[0, 2, 1], [0, 1, 3], [1, 2, 3], [2, 0, 3]])
    for missing in range(4):
        (loop,) = face_model.boundary_loops(np.delete(tetrahedron, missing, axis=0))
        turns = [np.roll(loop, turn).tolist() for turn in range(3)]
        assert tetrahedron[missing].tolist() in turns


def test_two_loops_of_a_tube():
    tube = [[i, (i + 1) % 4, 4 + (i + 1) % 4] for i in range(4)]
    tube += [[i, 4 + (i + 1) % 4, 4 + i] for i in range(4)]
    loops = face_model.boundary_loops(np.array(tube))
    assert sorted(sorted(loop.tolist()) for loop in loops) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    caps = [[loop[[0, i, i + 1]] for i in (1, 2)] for loop in loops]
    assert_closed(np.concatenate([tube, *caps]))


@pytest.mark.parametrize("turn", range(6))
def test_zipping_a_slit(turn):
    lower, upper = [(1, -1), (2.5, -1), (3, -0.5)], [(2, 1)]
    vertices = np.array([(0, 0), *lower, (4, 0), *upper, (9, 9)], dtype=float)
    vertices = np.c_[vertices, np.zeros(len(vertices))]
    loop = np.roll(np.arange(6), turn)  # counter-clockwise from +z
    triangles = face_model.zipped(loop, vertices)
    assert len(triangles) == 4
    a, b, c = vertices[triangles].transpose(1, 0, 2)
    areas = np.cross(b - a, c - a)[:, 2] / 2
    assert (areas > 0).all()
    x, y, _ = vertices[loop].T
    np.testing.assert_allclose(areas.sum(), (x * np.roll(y, -1) - y * np.roll(x, -1)).sum() / 2)
    edges = {(a, b) for t in triangles.tolist() for a, b in zip(t, t[1:] + t[:1], strict=True)}
    assert set(zip(loop.tolist(), np.roll(loop, -1).tolist(), strict=True)) <= edges


def test_no_face_model(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither an \.npz nor a checkout of ICT-FaceKit"):
        face_model.read_face_model(tmp_path / "absent", 2)
    with pytest.raises(FileNotFoundError, match=r"generic_neutral_mesh\.obj is missing"):
        face_model.read_face_model(tmp_path, 2)


def write_checkout(pack, folder, modes):
    """ICT-FaceKit's files with what the pack holds of them; zeros and dummy faces between."""
    with np.load(pack) as arrays:
        arrays = {name: arrays[name] for name in arrays}
    where = arrays["orig_vertex"]
    vertices = np.zeros((26_719, 3))
    vertices[where] = arrays["neutral"]
    names = arrays["region_names"][arrays["quad_region"]]
    eyes = arrays["neutral"][arrays["quads"][:, 0], 0]
    sides = {"eyeball_l": eyes > 0, "eyeball_r": eyes < 0}
    lines: list[str] = []

    def face(corners):
        return "f " + " ".join(f"{corner + 1}/{corner + 1}/1" for corner in corners)

    for name, (_, (first, last)) in face_model.REGIONS.items():
        lines += ["usemtl M_Other", *[face([0, 1, 2])] * (first - len_faces(lines))]
        own = names == name
        if name in sides:
            own |= (names == "iris") & sides[name]
        for quad, region in zip(arrays["quads"][own], names[own], strict=True):
            if region == "iris" and lines[-1] != "usemtl M_Iris_1":
                lines.append("usemtl M_Iris_1")
            lines.append(face(where[quad[quad >= 0]]))
        assert len_faces(lines) == last

    folder.mkdir()
    offsets = [np.zeros_like(vertices) for _ in range(modes)]
    for offset, delta in zip(offsets, arrays["deltas_q"], strict=False):
        offset[where] = delta * arrays["delta_scale"].astype(np.float64)
    files = ["generic_neutral_mesh", *(f"identity{mode:03d}" for mode in range(modes))]
    for name, offset in zip(files, [0, *offsets], strict=True):
        rows = [f"v {x:.12g} {y:.12g} {z:.12g}" for x, y, z in vertices + offset]
        text = "\n".join(["# a comment", *rows, "vt 0 0", "vn 0 0 1", *lines])
        (folder / f"{name}.obj").write_text(text + "\n", encoding="utf-8")
    landmarks = where[arrays["landmarks68"]].tolist()
    indices = json.dumps({"idx_to_landmark_verts": landmarks})
    (folder / "vertex_indices.json").write_text(indices, encoding="utf-8")


def len_faces(lines):
    return sum(line.startswith("f") for line in lines)


def test_a_checkout_is_the_same_model(pack, tmp_path):
    write_checkout(pack, tmp_path / "FaceXModel", 2)
    ours, theirs = (face_model.read_face_model(path, 2) for path in (tmp_path, pack))
    kept = np.isin(theirs.region, [*face_model.REGIONS, face_model.IRIS])
    np.testing.assert_array_equal(ours.region, theirs.region[kept])
    assert ours.modes.shape == (2, len(ours.neutral), 3)
    for mine, packed in (
        (ours.neutral, theirs.neutral),
        *zip(ours.modes, theirs.modes, strict=True),
    ):
        np.testing.assert_allclose(mine[ours.triangles], packed[theirs.triangles[kept]], atol=1e-9)
        np.testing.assert_allclose(mine[ours.landmarks], packed[theirs.landmarks], atol=1e-9)
    head, packed_head = face_model.ClosedHead(ours), face_model.ClosedHead(theirs)
    assert_closed(head.skin)
    for mine, packed in ((head.skin, packed_head.skin), (head.eyes, packed_head.eyes)):
        np.testing.assert_allclose(
            volume(head.vertices_cm(np.array([1.0, -2.0])), mine),
            volume(packed_head.vertices_cm(np.array([1.0, -2.0])), packed),
        )


# --- faults ------------------------------------------------------------------------------------


@pytest.fixture
def landmarks():
    """[1, 68, 2]: only those that faults look at."""
    at = torch.zeros(68, 2)
    places = dict.fromkeys(range(36, 42), (-0.10, 0.05)) | dict.fromkeys(range(42, 48), LEFT_EYE)
    places |= {2: (-0.22, -0.05), 31: (-0.06, -0.05), 14: (0.22, -0.05), 35: (0.06, -0.05)}
    places |= {27: (0, 0.08), 28: BRIDGE, 30: NOSE, 33: (0, -0.06)}
    places |= {19: (-0.08, 0.10), 24: (0.08, 0.10), 57: (0, -0.16), 8: (0, -0.30)}
    for index, place in places.items():
        at[index] = torch.tensor(place)
    return at[None]


def with_fault(name, number):
    numbers = torch.zeros(1, len(latent.FAULT_NAMES))
    numbers[0, latent.FAULT_NAMES.index(name)] = number
    return numbers


def test_faults_keep_the_front_view(landmarks):
    at = torch.rand(20, 500, 3, generator=rng(), dtype=torch.float64) - 0.5
    numbers = torch.randn(20, 10, generator=rng(1), dtype=torch.float64)
    moved = faults.displaced(at, landmarks.double().expand(20, -1, -1), numbers)
    assert (moved - at).norm(dim=-1).max() > 0.03
    torch.testing.assert_close(faults.screen(moved), faults.screen(at), rtol=0, atol=1e-5)
    behind = at[..., 2] < -0.1
    assert torch.equal(moved[behind], at[behind])


@pytest.mark.parametrize("number", [0.0, -1.5])
def test_no_faults_move_nothing(landmarks, number):
    at = torch.rand(1, 500, 3, generator=rng()) - 0.5
    assert torch.equal(faults.displaced(at, landmarks, torch.full((1, 10), number)), at)


@pytest.mark.parametrize(
    ("name", "place", "forward"),
    [
        ("eyes", LEFT_EYE, -0.066),
        ("nose", NOSE, -0.085),
        ("bridge", BRIDGE, 0.060),
        ("cheeks", LEFT_CHEEK, -0.037),
        ("forehead", (0, 0.185), 0.058),
        ("jaw", (0, -0.23), -0.068),
        ("hairline", (0, 0.245), 0.044),
    ],
)
def test_where_a_fault_is_and_which_way(landmarks, name, place, forward):
    at = torch.tensor([[[*place, faults.FACE_PLANE_Z], [0.42, -0.42, faults.FACE_PLANE_Z]]])
    moved, unmoved = (faults.displaced(at, landmarks, with_fault(name, 1.0)) - at)[0]
    assert moved.norm() == pytest.approx(abs(forward), rel=0.15)
    assert np.sign(moved[2].item()) == np.sign(forward)
    assert unmoved.norm() < 1e-5


def test_asymmetry_moves_the_corners_of_the_mouth_apart(maker):
    v = torch.from_numpy(face_model.to_box(maker.closed.vertices_cm(np.zeros(MODES))))
    on_screen = torch.from_numpy(maker.landmarks(v.numpy()))[None]
    at = v[maker.closed.model.landmarks][None]
    moved = (faults.displaced(at, on_screen, with_fault("asymmetry", 1.0).double()) - at)[0, :, 2]
    right, left = moved[48].item(), moved[54].item()
    assert left > 0.01
    assert right == pytest.approx(-left, rel=0.05)


def test_a_fault_of_the_eyes_leaves_the_chin(maker):
    v = torch.from_numpy(face_model.to_box(maker.closed.vertices_cm(np.zeros(MODES))))
    on_screen = torch.from_numpy(maker.landmarks(v.numpy()))[None]
    at = v[maker.closed.model.landmarks][None]
    moved = (faults.displaced(at, on_screen, with_fault("eyes", 2.0).double()) - at)[0].norm(dim=-1)
    assert moved[36:48].min() > 0.02
    assert moved[5:12].max() < 1e-5


def test_the_floater_is_where_its_colour_is_taken(maker):
    centre = faults.floater_centre()
    on_screen = torch.tensor(faults.FLOATER_SCREEN)
    torch.testing.assert_close(faults.screen(centre), on_screen)
    v, _, colors = maker.head(latent.draw(1, rng())[0].numpy())
    assert v[:, 2].max() < 0.45
    color = maker._floater_color(v, colors)
    near = np.linalg.norm(faults.screen(torch.from_numpy(v)).numpy() - on_screen.numpy(), axis=1)
    seen = colors[near < 0.015]
    assert ((color >= seen.min(axis=0)) & (color <= seen.max(axis=0))).all()


# --- labelled points ---------------------------------------------------------------------------


def is_inside(at, vertices, triangles):
    """By the winding number (van Oosterom and Strackee 1983); at [N, 3]."""
    turns = []
    for point in at:
        a, b, c = (vertices[triangles] - point).transpose(1, 0, 2)
        la, lb, lc = (np.sqrt((corner * corner).sum(axis=1)) for corner in (a, b, c))
        top = (np.cross(a, b) * c).sum(axis=1)
        dots = ((one * other).sum(axis=1) for one, other in ((a, b), (b, c), (c, a)))
        bottom = la * lb * lc + sum(
            d * length for d, length in zip(dots, (lc, la, lb), strict=True)
        )
        turns.append(np.arctan2(top, bottom).sum() / (2 * np.pi))
    return np.array(turns) > 0.5


@pytest.fixture(scope="module")
def row(maker):
    u = latent.draw(1, rng(4))[0].numpy()
    return u, maker.bank_row(u, np.random.default_rng(4))


def test_a_row_is_the_same_again(maker, row):
    u, made = row
    again = maker.bank_row(u, np.random.default_rng(4))
    other = maker.bank_row(u, np.random.default_rng(5))
    for name, value in made.items():
        np.testing.assert_array_equal(again[name], value)
    assert (other["points"] != made["points"]).any()


def test_ranges_of_a_row(row):
    _, made = row
    assert made["points"].shape == (points.NEAR + points.FAR, 3)
    assert np.abs(made["points"]).max() <= 32767
    assert made["color"].shape == (points.NEAR, 3)
    assert made["color"].min() >= 0
    assert made["color"].max() <= 255
    assert np.ptp(made["color"]) > 100
    assert ((made["floater_color"] >= 0) & (made["floater_color"] <= 1)).all()
    distance = made["distance"]
    assert np.isnan(distance[: points.NEAR]).mean() < 0.05  # outside the box, at the neck
    assert set(np.unique(distance[points.NEAR :])) == {-1, 1}


def test_signs_by_the_winding_number(maker, row):
    u, made = row
    v, _, _ = maker.head(u)
    clear = np.flatnonzero(np.abs(made["distance"]) > 0.004)
    some = np.random.default_rng(0).choice(clear, 300, replace=False)
    at = made["points"][some] / 65534
    inside = is_inside(at, v, maker.closed.skin) | is_inside(at, v, maker.closed.eyes)
    right = inside == (made["distance"][some] < 0)
    assert right.mean() > 0.99  # the wrong ones: between lips and lids, in nostrils and ears
    assert right[some >= points.NEAR].all()


def test_distances_by_the_nearest_of_many_points(maker, row):
    u, made = row
    v, _, _ = maker.head(u)
    surface = trimesh.Trimesh(v, maker.solid, process=False)
    dense, _ = trimesh.sample.sample_surface(surface, 300_000, seed=0)
    distance = made["distance"][: points.NEAR : 5]
    known = np.abs(distance) > 0.004
    at = made["points"][: points.NEAR : 5][known] / 65534
    nearest, _ = cKDTree(dense).query(at)
    error = np.abs(np.abs(distance[known]) - nearest)
    assert np.median(error) < 0.0005
    assert np.quantile(error, 0.9) < 0.002


def test_workers_make_what_one_makes(model, maker):
    heads, seed = 3, 6
    bank = points.make_bank(model, heads, seed, workers=2)
    assert bank.points.dtype == np.int16
    for index, u in enumerate(bank.u):
        made = maker.bank_row(u, np.random.default_rng([seed, index]))
        for name, value in made.items():
            stored = getattr(bank, name)[index]
            np.testing.assert_array_equal(stored, value.astype(stored.dtype))


# --- training ----------------------------------------------------------------------------------


@pytest.fixture
def batches():
    draw, heads = np.random.default_rng(0), 5
    count = points.NEAR + points.FAR
    distance = draw.uniform(-0.03, 0.03, (heads, count)).astype(np.float16)
    distance[:, points.NEAR :] = np.sign(distance[:, points.NEAR :])
    distance[:, ::7] = np.nan
    bank = points.Bank(
        u=latent.draw(heads, rng()).numpy(),
        points=draw.integers(-32767, 32768, (heads, count, 3), dtype=np.int16),
        distance=distance,
        color=draw.integers(0, 256, (heads, points.NEAR, 3), dtype=np.uint8),
        landmarks=draw.uniform(-0.2, 0.2, (heads, 68, 2)).astype(np.float32),
        floater_color=draw.random((heads, 3), dtype=np.float32),
    )
    return Batches(bank, near=40, far=20)


def test_a_step_has_one_batch(batches):
    first, again, other = (vars(batches.draw(step, 3, seed=1)) for step in (7, 7, 8))
    for name, value in first.items():
        torch.testing.assert_close(again[name], value, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(first["points"], other["points"])
    shapes = {name: tuple(value.shape) for name, value in first.items()}
    rows = train_heads.NEAR_FLOATER + 40
    assert shapes == {
        "u": (3, latent.Z_DIM),
        "points": (3, rows + 20, 3),
        "distance": (3, rows + 20),
        "color": (3, rows, 3),
    }


def test_points_of_a_floater(batches):
    radii = []
    for step in range(4):
        batch = batches.draw(step, 5, seed=0)
        radius = latent.floater_radius(batch.u[:, latent.FAULTS])
        radii += radius.tolist()
        around = slice(0, train_heads.NEAR_FLOATER)
        off = (batch.points[:, around] - faults.floater_centre()).norm(dim=-1) - radius[:, None]
        expected = torch.where(radius[:, None] > 0, off, torch.ones(()))
        boxed = (batch.points[:, around].abs() < 0.5).all(dim=-1)  # not moved to the box's side
        torch.testing.assert_close(batch.distance[:, around][boxed], expected[boxed])
        colors = torch.from_numpy(batches.bank.floater_color)  # all five heads, in order
        colors = colors[:, None].expand(-1, train_heads.NEAR_FLOATER, -1)
        there = radius > 0
        assert torch.equal(batch.color[there, around], colors[there])
    assert 0 < np.count_nonzero(radii) < len(radii)


def test_gradients_reach_all_of_the_generator(batches):
    generator = TriplaneGenerator(CONFIG)
    shape, color, wrong = losses(generator, batches.draw(0, 2, seed=0))
    assert torch.isfinite(torch.stack([shape, color])).all()
    assert 0 <= wrong <= 1
    assert not wrong.requires_grad
    (shape + color).backward()
    backbone = generator.backbone
    for part in (backbone.mapping, backbone.synthesis, generator.osg_decoder):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
        assert any(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_density_that_is_wanted_loses_nothing(monkeypatch, sign):
    at = torch.rand(2, 3000, 3, generator=rng()) - 0.5
    distance = at.norm(dim=-1) - 0.3
    color = 0.1 + 0.8 * torch.rand(2, 2000, 3, generator=rng(1))
    value = sign * (-distance / points.BAND).clamp(-1, 1)
    density = (LEVEL + SWING * value, torch.logit(color))
    monkeypatch.setattr(train_heads, "radiance", lambda *_: density)
    far = distance[:, 1500:].abs() > points.BAND  # only the side is known of some
    distance[:, 1500:][far] = distance[:, 1500:][far].sign()
    distance[0, 5] = torch.nan
    batch = Batch(latent.draw(2, rng()), at, distance, color)
    shape, color_error, wrong = losses(TriplaneGenerator(CONFIG), batch)
    assert color_error < 1e-6
    if sign > 0:
        assert shape < 1e-6
        assert wrong == 0
    else:
        assert shape > 1
        assert wrong > 0.99
