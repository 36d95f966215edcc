"""Measures of surfaces, on volumes whose answers are known in closed form."""

import numpy as np
import pytest
import torch

from densityrl.geometry import FINE, LIMIT, asymmetry, nose_length, roughness, surface_distance
from triplane_kernels import Grid

GRID = Grid.cube(64, 1.0)
NOTHING = np.full(GRID.shape, -90.0, dtype=np.float32)


def field(distance):
    """Raw density as a bundled generator has it, of signed distances that are negative inside."""
    return np.clip(10 - 5000 * distance, -90, 110).astype(np.float32)


def ball_distance(radius, centre=(0.0, 0.0, 0.0), grid=GRID):
    points = grid.points(dtype=torch.float64).numpy()
    return np.linalg.norm(points - np.array(centre), axis=-1) - radius


def ball(radius, centre=(0.0, 0.0, 0.0), grid=GRID):
    return field(ball_distance(radius, centre, grid))


# --- surface_distance ----------------------------------------------------------------------------


@pytest.mark.parametrize("difference", [0.0005, 0.002, 0.01])
@pytest.mark.parametrize("radius", [0.1, 0.25])
def test_concentric_spheres(radius, difference):
    centre = (0.003, 0.005, -0.002)
    a, b = ball(radius, centre), ball(radius + difference, centre)
    assert surface_distance(a, b, GRID) == pytest.approx(difference, rel=0.03)
    assert surface_distance(b, a, GRID) == surface_distance(a, b, GRID)


def test_a_shifted_sphere():
    """A small shift d moves the surface by d |cos| along its normal; the mean of |cos| is 1/2."""
    measured = surface_distance(ball(0.25), ball(0.25, (0.001, 0.002, 0.002)), GRID)
    assert measured == pytest.approx(0.003 / 2, rel=0.03)


def test_voxels_of_other_proportions():
    grid = Grid((-0.4, -0.5, -0.3), (0.4, 0.5, 0.3), (70, 50, 60))
    measured = surface_distance(ball(0.2, grid=grid), ball(0.204, grid=grid), grid)
    assert measured == pytest.approx(0.004, rel=0.03)


def test_what_does_not_move_the_surface_is_no_distance():
    sigma = ball(0.25)
    assert surface_distance(sigma, sigma, GRID) == 0
    assert surface_distance(sigma, 1.1 * (sigma - 10) + 10, GRID) < 1e-6
    assert surface_distance(sigma, sigma - 3, GRID, level=8.5) == pytest.approx(0.0006, rel=0.05)


def test_distances_end_at_the_limit():
    assert surface_distance(ball(0.1), ball(0.4), GRID) == pytest.approx(LIMIT)
    assert surface_distance(ball(0.1), ball(0.4), GRID, limit=0.02) == pytest.approx(0.02)


def test_a_floater_counts_its_size_and_not_its_distance():
    head = ball(0.2, (-0.1, 0, 0))
    near, far = (np.maximum(head, ball(0.05, (x, 0, 0))) for x in (0.25, 0.35))
    area = 0.05**2 / (0.2**2 + 0.05**2)  # of the floater, of both surfaces
    for sigma in (near, far):
        # One way only: nothing of the head is far from the other surface.
        assert surface_distance(sigma, head, GRID) == pytest.approx(LIMIT * area / 2, rel=0.1)


def test_a_floater_just_off_the_surface_is_seen_all_around():
    """Its vertices face every way, and those that turn their back on the head count as well."""
    head = ball(0.2)
    sigma = np.maximum(head, ball(0.02, (0, 0, 0.24)))
    area = 0.02**2 / (0.2**2 + 0.02**2)
    assert surface_distance(sigma, head, GRID) == pytest.approx(0.04 * area / 2, rel=0.25)


def test_the_cut_is_no_surface():
    """A cylinder that grazes a face of the volume, and leaves it for a part of its length."""
    grid = Grid((-0.25, -0.25, -0.1), (0.25, 0.25, 0.4), (33, 33, 33))
    points = grid.points(dtype=torch.float64).numpy()
    distance = np.linalg.norm(points[..., [0, 2]], axis=-1) - 0.2485
    for difference in (0.001, 0.003):
        measured = surface_distance(field(distance), field(distance - difference), grid)
        assert measured == pytest.approx(difference, rel=0.1)


def test_no_surface():
    assert surface_distance(ball(0.2), NOTHING, GRID) == LIMIT
    assert surface_distance(NOTHING, NOTHING, GRID, limit=0.01) == 0.01
    assert roughness(NOTHING, GRID) == FINE
    assert asymmetry(NOTHING, GRID) == LIMIT
    assert nose_length(NOTHING, GRID) == 0


def test_a_volume_of_another_grid():
    sigma = np.zeros((4, 4, 4), dtype=np.float32)
    for measure in (roughness, asymmetry, nose_length):
        with pytest.raises(ValueError, match=r"\(4, 4, 4\) does not belong on a grid"):
            measure(sigma, GRID)


# --- roughness -----------------------------------------------------------------------------------


def wavy(amplitude, length, shift=0.0):
    """A sphere with waves of its radius along x."""
    x = GRID.points(dtype=torch.float64).numpy()[..., 0] - shift
    waves = amplitude * np.cos(2 * np.pi * x / length)
    return field(ball_distance(0.3, (shift, shift, shift)) - waves)


@pytest.mark.parametrize("length", [0.04, 0.06, 0.08])
def test_roughness_grows_with_the_waves(length):
    measured = [roughness(wavy(amplitude, length), GRID) for amplitude in (0, 0.002, 0.004, 0.008)]
    assert measured[1] > 1.5 * measured[0]
    assert measured[2] > 1.5 * measured[1]
    assert measured[3] > 1.5 * measured[2]


def test_roughness_of_a_wavy_plane():
    """The docstring's formula; the mean of |cos| is 2 / pi."""
    points = GRID.points(dtype=torch.float64).numpy()
    k, amplitude = 2 * np.pi / 0.08, 0.004
    sigma = field(points[..., 2] - 0.003 - amplitude * np.cos(k * points[..., 0]))
    response = (1 - np.exp(-((0.02 * k) ** 2) / 2)) / 0.02**2
    response -= (1 - np.exp(-((0.05 * k) ** 2) / 2)) / 0.05**2
    expected = 0.02**2 * response * amplitude * 2 / np.pi
    assert response * 0.02**2 > 0.5
    assert roughness(sigma, GRID) == pytest.approx(expected, rel=0.1)


def test_a_smooth_head_is_not_rough_whatever_its_size():
    waves = roughness(wavy(0.004, 0.06), GRID)
    for radius in (0.15, 0.2, 0.25, 0.3):
        assert roughness(ball(radius), GRID) < 0.12 * waves


def test_roughness_is_steady_under_shifts_of_less_than_a_voxel():
    measured = [roughness(wavy(0.004, 0.06, shift), GRID) for shift in (0, 0.003, 0.006, 0.01)]
    assert np.ptp(measured) < 0.1 * np.mean(measured)


# --- asymmetry -----------------------------------------------------------------------------------


def test_what_is_symmetric_has_no_asymmetry():
    assert asymmetry(ball(0.3, (0, 0.05, 0.1)), GRID) < 1e-7


def test_asymmetry_is_the_distance_to_the_mirror_image():
    sigma = np.maximum(ball(0.25, (0.002, 0, 0)), ball(0.1, (0.2, 0.1, 0.1)))
    mirrored = surface_distance(sigma, sigma[::-1], GRID)
    assert asymmetry(sigma, GRID) == pytest.approx(mirrored, rel=0.01)
    # Off the middle by d, a sphere is 2 d from its mirror image, and its surface half of that.
    assert asymmetry(ball(0.25, (0.002, 0, 0)), GRID) == pytest.approx(0.002, rel=0.03)


def test_asymmetry_needs_a_middle():
    with pytest.raises(ValueError, match="centred at x = 0"):
        asymmetry(np.zeros((4, 4, 4)), Grid((0, 0, 0), (1, 1, 1), (4, 4, 4)))


# --- nose_length ---------------------------------------------------------------------------------


def face(length, tip_y=0.0):
    """A flat face at z = 0.1 with a nose: a ball whose foremost point is `length` before it."""
    points = GRID.points(dtype=torch.float64).numpy()
    flat = np.abs(points - np.array([0, 0, -0.1])).max(axis=-1) - 0.2
    nose = ball_distance(0.04, (0.5 / 63, tip_y, 0.1 + length - 0.04))
    return field(np.minimum(flat, nose))


@pytest.mark.parametrize("length", [0.02, 0.05, 0.063])
def test_a_nose_by_hand(length):
    assert nose_length(face(length, 1.5 / 63), GRID) == pytest.approx(length, abs=2e-4)


def test_a_nose_is_found_where_it_is():
    low, high = face(0.05, tip_y=-4.5 / 63), face(0.05, tip_y=4.5 / 63)
    assert nose_length(low, GRID) == pytest.approx(nose_length(high, GRID), abs=1e-6)


def test_floaters_before_the_face_are_no_nose():
    floater = ball(0.03, (0, 0, 0.4))
    assert nose_length(np.maximum(face(0.05), floater), GRID) == nose_length(face(0.05), GRID)


def test_a_solid_on_the_front_face_is_seen_there():
    points = GRID.points(dtype=torch.float64).numpy()
    post = np.linalg.norm(points[..., :2], axis=-1) - 0.03
    sigma = np.maximum(face(0.05), field(post))
    assert nose_length(sigma, GRID) == pytest.approx(0.4, abs=2e-4)


def test_a_nose_without_cheeks():
    assert nose_length(ball(0.045), GRID) == 0
