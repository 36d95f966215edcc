"""Our generator against numbers that EG3D's own code computed from the same checkpoint."""

import json

import numpy as np
import pytest
import torch

from densityrl.generator import latents, load_generator
from densityrl.generator import render as rendering
from densityrl.generator.camera import camera_label, camera_pose, intrinsics, pixel_rays
from triplane_kernels import Grid, density, density_grid, eg3d_lattice, radiance, sample_features

EXACT, RENDERED = 1e-4, 1e-3  # relative, in the norm
PIECES = ("sub", "crop", "corner", "stats")  # of images too large to keep whole


@pytest.fixture(autouse=True)
def without_grad(request):
    with torch.set_grad_enabled("gradients" in request.node.name):
        yield


@pytest.fixture(scope="module")
def pack(shared_data):
    folder = shared_data / "eg3d_parity"
    arrays = dict(np.load(folder / "expected.npz"))
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}
    return tensors, json.loads((folder / "cases.json").read_text())


@pytest.fixture(scope="module")
def expected(pack):
    return pack[0]


@pytest.fixture(scope="module")
def generator(shared_data):
    return load_generator(shared_data / "eg3d_parity" / "eg3d_tiny.pkl")


@pytest.fixture(scope="module")
def planes(generator, expected):
    return torch.cat([generator.planes(ws[None]) for ws in expected["ws_psi07"]])


def assert_near(ours, theirs, limit):
    assert ours.shape == theirs.shape
    theirs = theirs.double()
    error = (ours.double() - theirs).norm() / theirs.norm()
    assert error <= limit, f"relative error {error:.1e}"


def assert_pieces(image, expected, name, limit):
    """Large images are kept as pieces; the rule is in the pack's README."""
    side = image.shape[-1]
    if side <= 128:
        assert_near(image, expected[name], limit)
        return
    step, centre = side // 64, slice(side // 2 - 12, side // 2 + 12)
    assert_near(image[..., 3::step, 5 % step :: step], expected[f"{name}_sub"], limit)
    assert_near(image[..., centre, centre], expected[f"{name}_crop"], limit)
    assert_near(image[..., :12, :12], expected[f"{name}_corner"], limit)
    flat = image.flatten(-2)
    stats = torch.stack([flat.mean(-1), flat.std(-1, correction=0)], dim=-1)
    assert_near(stats, expected[f"{name}_stats"], limit)


def test_latents(generator, expected):
    z = latents(expected["seeds"].tolist(), generator.z_dim)
    assert torch.equal(z, expected["z"])


def test_cameras(generator, expected):
    assert_near(generator.frontal_camera(), expected["c_cond"], 1e-6)
    for row, (yaw, pitch) in enumerate([(0.4, -0.2), (-0.4, -0.2)]):
        pose = camera_pose(yaw, pitch, (0.0, 0.0, 0.2), 2.7)
        assert_near(camera_label(pose, intrinsics(18.837))[0], expected["c"][row], 1e-6)
    third = camera_pose(0.9, 0.35, (0.0, 0.0, 0.2), 2.7)
    assert_near(third.reshape(16), expected["c"][2, :16], 1e-6)


@pytest.mark.parametrize(
    ("name", "psi", "cutoff"),
    [("ws_psi1", 1.0, None), ("ws_psi07", 0.7, 14), ("ws_psi07_cut8", 0.7, 8)],
)
def test_mapping(generator, expected, name, psi, cutoff):
    ws = generator.mapping(expected["z"], expected["c_cond"], psi, cutoff)
    assert_near(ws, expected[name], EXACT)


def test_mapping_follows_the_camera(generator, expected):
    ws = generator.mapping(expected["z"], expected["c"])
    assert_near(ws, expected["ws_psi1_ccam"], EXACT)


def test_the_other_network(shared_data, expected):
    g = load_generator(shared_data / "eg3d_parity" / "eg3d_tiny.pkl", which="G")
    assert_near(g.mapping(expected["z"][:1], expected["c_cond"]), expected["ws_G_not_ema"], EXACT)


def test_blocks(generator, expected):
    x = image = None
    row = 0
    for side, block in zip((4, 8, 16), generator.backbone.synthesis.blocks, strict=False):
        ws = expected["ws_psi07"][:1, row : row + block.num_conv + 1]
        x, image = block(x, image, ws, "const")
        row += block.num_conv
        assert_near(x, expected[f"dbg_b{side}_x"], EXACT)
        assert_near(image, expected[f"dbg_b{side}_img"], EXACT)


def test_planes(generator, planes, expected):
    assert planes.shape == (3, 3, 32, 256, 256)
    assert_near(planes[..., 7::16, 3::16], expected["planes_sub"], EXACT)
    assert_near(planes[..., :6, :6], expected["planes_corner_tl"], EXACT)
    assert_near(planes[..., -6:, -6:], expected["planes_corner_br"], EXACT)
    flat = planes.flatten(-2)
    stats = [flat.mean(-1), flat.std(-1, correction=0), flat.amin(-1), flat.amax(-1)]
    assert_near(torch.stack(stats, dim=-1), expected["planes_stats"], EXACT)
    silent = generator.planes(expected["ws_psi07"][:1], noise_mode="none")
    assert_near(silent[0, ..., 7::16, 3::16], expected["planes_nonoise_sub"], EXACT)
    mixed = generator.planes(expected["ws_mix"])
    assert_near(mixed[0, ..., 7::16, 3::16], expected["planes_mix_sub"], EXACT)


def test_planes_in_a_batch_equal_planes_one_by_one(generator, planes, expected):
    assert_near(generator.planes(expected["ws_psi07"]), planes, 1e-5)


def test_density_and_colour_at_points(generator, planes, expected):
    points = expected["points"].expand(3, -1, -1)
    sigma, raw = radiance(planes, generator.decoder, points, generator.layout)
    color = rendering.eg3d_color(raw)
    assert_near(sigma, expected["sigma_points"], EXACT)
    assert_near(color[0], expected["rgb_points"], EXACT)
    assert_near(color[..., [0, 1, 2, 10, 31]], expected["rgb_points_ch"], EXACT)


def test_features_of_each_plane(generator, planes, expected):
    points = expected["points"][None, :64]
    for index, axes in enumerate(generator.layout.axes):
        one = type(generator.layout)((axes,), generator.layout.extent)
        features = sample_features(planes[:1, index : index + 1], points, one)
        assert_near(features[0], expected["feat_points64"][index], EXACT)


def test_density_on_grids(generator, planes, expected):
    grid = Grid.cube(24, generator.box_side)
    sigma = density_grid(planes, generator.decoder, grid, generator.layout)
    assert_near(sigma, expected["sigma_grid"], EXACT)
    lattice = eg3d_lattice(24, generator.box_side).reshape(1, -1, 3)
    assert_near(lattice[0], expected["gensamples_coords"], 1e-6)
    sheared = density(planes[:1], generator.decoder, lattice, generator.layout)
    assert_near(sheared.reshape(24, 24, 24), expected["gensamples_sigma"], EXACT)


def test_gradients_at_points(generator, planes, expected):
    texels = planes[:1].clone().requires_grad_(True)
    points = expected["points"][None, :96].clone().requires_grad_(True)
    sigma = density(texels, generator.decoder, points, generator.layout)
    loss = (sigma[0] * expected["grad_r"]).sum()
    loss.backward()
    assert_near(loss, expected["grad_loss"], EXACT)
    assert_near(points.grad[0], expected["grad_points"], EXACT)
    plane, y, x = expected["grad_planes_idx"].long().unbind(-1)
    assert_near(texels.grad[0, plane, :, y, x], expected["grad_planes_val"], EXACT)
    assert_near(texels.grad.abs().sum(), expected["grad_planes_abs_sum"], EXACT)


def test_rays(generator, pack):
    expected, cases = pack
    origins, directions = pixel_rays(expected["c"], 16)
    assert_near(origins[:, 0], expected["rays16_o"], 1e-6)
    assert_near(directions, expected["rays16_d"], 1e-6)
    chosen = cases["debug_ray_indices_of_16x16_grid"]
    assert_near(origins[0, chosen], expected["dbg_rays_o"], 1e-6)
    assert_near(directions[0, chosen], expected["dbg_rays_d"], 1e-6)


def test_every_step_of_eight_rays(generator, planes, expected):
    origins, directions = expected["dbg_rays_o"][None], expected["dbg_rays_d"][None]
    options = rendering.MarchingOptions.from_rendering(generator.rendering)
    start = torch.full(origins.shape[:2], options.ray_start)
    end = torch.full(origins.shape[:2], options.ray_end)
    depths = rendering.coarse_depths(start, end, options, jitter=False)
    assert_near(depths[0], expected["dbg_depths_coarse"], EXACT)

    def sigma_at(depths):
        points = (origins[..., None, :] + depths[..., None] * directions[..., None, :]).flatten(
            1, 2
        )
        sigma = density(planes[:1], generator.decoder, points, generator.layout)
        return sigma.reshape(depths.shape)

    sigma = sigma_at(depths)
    assert_near(sigma[0], expected["dbg_sigma_coarse"], EXACT)
    weights = rendering.interval_weights(depths, sigma)
    assert_near(weights[0], expected["dbg_weights_coarse"], EXACT)
    fine = rendering.importance_depths(depths, weights, 48, jitter=False)
    assert_near(fine[0], expected["dbg_depths_fine"], EXACT)
    together, _ = torch.cat([depths, fine], dim=-1).sort(dim=-1)
    assert_near(together[0], expected["dbg_depths_all"], EXACT)
    all_sigma = sigma_at(together)
    assert_near(all_sigma[0], expected["dbg_sigma_all"], RENDERED)
    all_weights = rendering.interval_weights(together, all_sigma)
    assert_near(all_weights[0], expected["dbg_weights_all"], RENDERED)
    whole = rendering.render_rays(
        planes[:1], generator.decoder, generator.layout, origins, directions, options
    )
    assert_near(whole.features[0], expected["dbg_feat"], RENDERED)
    assert_near(whole.depth[0], expected["dbg_depth"], RENDERED)
    assert_near(whole.weight_sum[0], expected["dbg_wsum"], RENDERED)


@pytest.mark.parametrize("white_back", [False, True])
def test_compositing_alone(expected, white_back):
    depths, sigma = expected["march_depths"][None], expected["march_sigma"][None]
    whole = rendering.composite(depths, sigma, expected["march_color"][None], white_back)
    name = "march_white_feat" if white_back else "march_black_feat"
    assert_near(whole.features[0], expected[name], 1e-5)
    assert_near(whole.weights[0], expected["march_weights"], 1e-5)
    depth = rendering.clamp_depth(whole.depth, depths.amin(), depths.amax())
    assert_near(depth[0], expected["march_depth"], 1e-5)
    assert depth[0, 2] == depths.amax()  # the ray without weight


@pytest.mark.parametrize(
    "variant", ["auto", "numeric", "disparity", "white", "black", "noimp", "few"]
)
def test_rendering_options(generator, planes, pack, variant):
    expected, cases = pack
    case = cases["render_variants"][variant]
    options = rendering.MarchingOptions.from_rendering({**generator.rendering, **case["overrides"]})
    seed, view = case["seed_index"], case["camera_index"]
    rays = pixel_rays(expected["c"][view : view + 1], case["ray_grid"])
    whole = rendering.render_rays(
        planes[seed : seed + 1], generator.decoder, generator.layout, *rays, options
    )
    kept = whole.features[0][:, cases["feature_channels_kept"]]
    assert_near(kept, expected[f"var_{variant}_feat"], RENDERED)
    assert_near(whole.depth[0], expected[f"var_{variant}_depth"], RENDERED)
    assert_near(whole.weight_sum[0], expected[f"var_{variant}_wsum"], RENDERED)


@pytest.mark.parametrize("seed", range(3))
def test_rendered_colour_and_depth(generator, planes, expected, seed):
    for view in range(3):
        features, depth = generator._render_features(
            planes[seed : seed + 1], expected["c"][view : view + 1], 64, jitter=False
        )
        assert_near(features[0, :3], expected["image_raw"][seed, view], RENDERED)
        assert_near(depth[0], expected["image_depth"][seed, view], RENDERED)


@pytest.mark.parametrize(("seed", "view"), [(0, 0), (1, 1), (2, 2)])
def test_images(generator, planes, expected, seed, view):
    out = generator.render(
        expected["ws_psi07"][seed : seed + 1],
        expected["c"][view : view + 1],
        planes=planes[seed : seed + 1],
    )
    assert out["image_raw"].shape == (1, 3, 64, 64)
    assert_near(out["image_depth"][0], expected["image_depth"][seed, view], RENDERED)
    pieces = {f"image_{kind}": expected[f"image_{kind}"][seed, view] for kind in PIECES}
    assert_pieces(out["image"][0], pieces, "image", RENDERED)


def test_feature_image(generator, planes, expected):
    features, _ = generator._render_features(planes[:1], expected["c"][:1], 64, jitter=False)
    assert_near(features[0][:, ::2, 1::2], expected["feature_image_sub"], RENDERED)


def test_image_at_another_rendering_resolution(generator, planes, expected):
    ws, c = expected["ws_psi07"][:1], expected["c"][1:2]
    out = generator.render(ws, c, resolution=128, planes=planes[:1])
    assert_near(out["image_raw"][0, :, ::2, ::2], expected["nrr128_image_raw"], RENDERED)
    assert_near(out["image_depth"][0, :, ::2, ::2], expected["nrr128_image_depth"], RENDERED)
    assert_pieces(out["image"][0], expected, "nrr128_image", RENDERED)
    again = generator.render(ws, c, planes=planes[:1])
    assert again["image_raw"].shape[-1] == 64  # a call leaves no trace in the generator


def test_superresolution_alone(generator, expected):
    module, ws = generator.superresolution, expected["ws_psi07"][:1]
    features = expected["sr_in32"]
    cases = {
        "sr32_none": (ws, "none"),
        "sr32_const": (ws, "const"),
        "sr32_mix": (expected["ws_mix"], "none"),
    }
    for name, (rows, noise) in cases.items():
        image = module(features[:, :3], features, rows, noise)
        assert_pieces(image[0], expected, name, EXACT)


@pytest.mark.parametrize(("name", "side"), [("sr_native", 128), ("sr_larger", 192)])
def test_superresolution_resizes(generator, expected, name, side):
    channel, y, x = torch.meshgrid(
        *(torch.arange(n, dtype=torch.float64) for n in (32, side, side)), indexing="ij"
    )
    features = (0.6 * torch.cos(0.9 * channel + 0.23 * x - 0.11 * y)).float()[None]
    ws = expected["ws_psi07"][:1]
    image = generator.superresolution(features[:, :3], features, ws, "none")
    assert_pieces(image[0], expected, name, EXACT)


def test_bfloat16_stays_close(shared_data, planes, expected):
    half = load_generator(shared_data / "eg3d_parity" / "eg3d_tiny.pkl")
    half.convolutions_to(torch.bfloat16)
    ours = half.planes(expected["ws_psi07"][:1])
    assert ours.dtype == torch.float32
    error = (ours - planes[:1]).norm() / planes[:1].norm()
    assert 1e-5 < error < 2e-2  # bfloat16 was used, and its rounding is all that differs
