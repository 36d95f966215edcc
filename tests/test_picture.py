"""Pictures: what a surface looks like, and that files are pictures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from densityrl.picture import image_of_tensor, resized, shade_volume, sheet, write_png
from triplane_kernels import Grid

GRID = Grid.cube(48, 2.0)


def ball(centre=(0.0, 0.0, 0.0), radius=0.5):
    return 10 + 20 * (radius - (GRID.points() - torch.tensor(centre)).norm(dim=-1))


def covered(picture):
    return (picture < 255).all(axis=-1)


@pytest.mark.parametrize(("yaw", "pitch"), [(0.0, 0.0), (0.7, 0.0), (-0.4, 0.3)])
def test_a_ball_is_a_disc_from_everywhere(yaw, pitch):
    disc = covered(shade_volume(ball(), GRID, 10.0, yaw, pitch, size=120))
    # the window is the volume and the voxel that closes it on each side
    window = 2 * (1 + 2 / 47)
    expected = np.pi * 0.5**2 / window**2
    assert disc.mean() == pytest.approx(expected, rel=0.03)
    rows, columns = np.nonzero(disc)
    assert rows.mean() == pytest.approx(59.5, abs=0.7)
    assert columns.mean() == pytest.approx(59.5, abs=0.7)


def test_axes():
    """x to the right, y up, and a turn by a quarter brings z to the left."""
    right = np.nonzero(covered(shade_volume(ball((0.4, 0, 0), 0.3), GRID, 10.0, size=60)))
    assert right[1].mean() > 35
    above = np.nonzero(covered(shade_volume(ball((0, 0.4, 0), 0.3), GRID, 10.0, size=60)))
    assert above[0].mean() < 25
    front = ball((0, 0, 0.4), 0.3)
    turned = np.nonzero(covered(shade_volume(front, GRID, 10.0, np.pi / 2, size=60)))
    assert turned[1].mean() < 25


def test_a_cut_surface_is_closed():
    """A ball whose front half lies outside the volume still shows a full disc."""
    disc = covered(shade_volume(ball((0, 0, 1.0), 0.5), GRID, 10.0, size=100))
    window = 2 * (1 + 2 / 47)
    assert disc.mean() == pytest.approx(np.pi * 0.5**2 / window**2, rel=0.05)


def test_an_empty_volume_is_background():
    assert (shade_volume(ball() - 100, GRID, 10.0, size=16) == 255).all()


def test_image_bytes_by_eg3ds_rule():
    values = torch.tensor([-1.5, -1.0, 0.0, 0.5, 0.99609375, 2.0]).expand(3, 1, 6)
    assert image_of_tensor(values)[0, :, 0].tolist() == [0, 0, 128, 191, 255, 255]


def test_sheet_and_file(tmp_path):
    colours = [np.full((20, 20, 3), value, dtype=np.uint8) for value in (10, 90, 200)]
    picture = sheet([colours, colours[::-1]], ["first", "second"], ["a", "b", "c"])
    write_png(tmp_path / "sheet.png", picture)
    pixels = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert pixels.shape == (picture.height, picture.width, 3)
    left = picture.width - 3 * 24
    for row, order in enumerate((colours, colours[::-1])):
        for column, tile in enumerate(order):
            y, x = 24 + 24 * row, left + 24 * column
            np.testing.assert_array_equal(pixels[y : y + 20, x : x + 20], tile)
    assert resized(colours[0], 7).shape == (7, 7, 3)
    assert Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes())).format == "PNG"
