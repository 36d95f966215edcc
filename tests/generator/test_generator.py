"""The generator beyond the parity pack: its layers against formulas, and every other option."""

import dataclasses
import hashlib
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import CONFIG, tiny_generator

from densityrl.errors import CheckpointError
from densityrl.generator import (
    GeneratorConfig,
    TriplaneGenerator,
    bundled_generators,
    latents,
    load_generator,
    save_generator,
)
from densityrl.generator.camera import camera_pose, pixel_rays
from densityrl.generator.checkpoint import generator_from_record
from densityrl.generator.layers import ModulatedConv, SynthesisBlock
from densityrl.generator.pickle_reader import ModuleRecord, NetworkRecord
from densityrl.generator.render import (
    MarchingOptions,
    box_limits,
    coarse_depths,
    composite,
    render_rays,
)
from densityrl.generator.superresolution import VARIANTS, SuperResolution
from triplane_kernels import EG3D, radiance

W_DIM = 16


def changed(**options):
    """The tiny generator with other options, and with rendering options under `rendering`."""
    rendering = {**CONFIG.rendering, **options.pop("rendering", {})}
    config = dataclasses.replace(CONFIG, rendering=rendering, **options)
    torch.manual_seed(0)
    generator = TriplaneGenerator(config).eval().requires_grad_(False)
    generator.osg_decoder.net[2].weight.mul_(6)
    return generator


# --- layers --------------------------------------------------------------------------------------


def textbook_convolution(layer, x, w):
    """Modulated convolution, one sample at a time, from its formula (StyleGAN2, eq. 1 to 3).

    Upsampling is written as zeros between the pixels and an ordinary convolution, for which the
    stored kernel is flipped.
    """
    images = []
    for sample, row in zip(x, w, strict=True):
        style = F.linear(row, layer.affine.weight / math.sqrt(len(row)), layer.affine.bias)
        weight = layer.weight * style[None, :, None, None]
        weight = weight / (weight.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if layer.up:
            channels, height, width = sample.shape
            spread = sample.new_zeros(channels, 2 * height, 2 * width)
            spread[:, ::2, ::2] = sample
            y = F.conv2d(F.pad(spread, [2, 1, 2, 1])[None], weight.flip(2, 3))
            taps = torch.tensor([1.0, 3, 3, 1], dtype=sample.dtype)
            taps = (torch.outer(taps, taps) / 16).expand(len(weight), 1, 4, 4)
            y = F.conv2d(F.pad(y, [1, 1, 1, 1]), taps, groups=len(weight))
        else:
            y = F.conv2d(sample[None], weight, padding=1)
        images.append(y)
    y = torch.cat(images)
    y = y + layer.noise_const * layer.noise_strength + layer.bias[:, None, None]
    y = torch.where(y > 0, y, 0.2 * y) * math.sqrt(2)
    return y if layer.clamp is None else y.clamp(-layer.clamp, layer.clamp)


@pytest.mark.parametrize("clamp", [None, 0.8])
@pytest.mark.parametrize("up", [False, True])
def test_modulated_convolution_is_its_formula(up, clamp):
    torch.manual_seed(0)
    side = 12 if up else 6
    layer = ModulatedConv(5, 7, W_DIM, side, up, clamp).double()
    with torch.no_grad():
        layer.bias.normal_()
        layer.noise_strength.fill_(0.3)
    x, w = torch.randn(2, 5, 6, 6).double(), torch.randn(2, W_DIM).double()
    torch.testing.assert_close(layer(x, w, "const"), textbook_convolution(layer, x, w))


def test_noise_modes():
    layer = ModulatedConv(3, 4, W_DIM, 5)
    with torch.no_grad():
        layer.noise_strength.fill_(1.0)
    x, w = torch.randn(1, 3, 5, 5), torch.randn(1, W_DIM)
    assert torch.equal(layer(x, w, "const"), layer(x, w, "const"))
    assert not torch.equal(layer(x, w, "random"), layer(x, w, "random"))
    assert not torch.equal(layer(x, w, "none"), layer(x, w, "const"))
    with pytest.raises(ValueError, match="const, random or none, not 'loud'"):
        layer(x, w, "loud")


def test_the_upsampled_skip_image_keeps_a_constant():
    """The low-pass filter has unit gain: away from the border a flat image stays flat."""
    block = SynthesisBlock(3, 4, 2, W_DIM, 16)
    with torch.no_grad():
        block.torgb.weight.zero_()
        _, image = block(torch.randn(1, 3, 8, 8), torch.ones(1, 2, 8, 8), latent(3), "none")
    assert image.shape == (1, 2, 16, 16)
    torch.testing.assert_close(image[:, :, 2:-2, 2:-2], torch.ones(1, 2, 12, 12))


def latent(rows, batch=1):
    return torch.randn(batch, rows, W_DIM)


# --- super-resolution ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "native", "final", "widths"),
    [
        ("SuperresolutionHybrid2X", 64, 128, (128, 64)),
        ("SuperresolutionHybrid4X", 128, 256, (128, 64)),
        ("SuperresolutionHybrid8X", 128, 512, (128, 64)),
        ("SuperresolutionHybrid8XDC", 128, 512, (256, 128)),
    ],
)
def test_superresolution(variant, native, final, widths):
    """Each module against its blocks chained by hand; a native input is not resized."""
    torch.manual_seed(0)
    module = SuperResolution(variant, W_DIM, 256.0, antialias=True)
    assert (module.block0.conv0.weight.shape[0], module.block1.conv0.weight.shape[0]) == widths
    features, ws = torch.randn(1, 32, native, native), latent(14)
    rows = ws[:, -1:].expand(-1, 3, -1)
    untouched = features.clone()
    with torch.no_grad():
        image = module(features[:, :3], features, ws, "none")
        x, rgb = module.block0(features, features[:, :3], rows, "none")
        assert x.shape[-1] == final // 2
        by_hand = module.block1(x, rgb, rows, "none")[1]
    assert image.shape == (1, 3, final, final)
    assert torch.equal(image, by_hand)
    assert torch.equal(features, untouched)


@pytest.mark.parametrize("variant", ["SuperresolutionHybrid2X", "SuperresolutionHybrid4X"])
def test_a_first_block_without_upsampling_is_its_formula(variant):
    """Both convolutions ordinary, the image added as it is."""
    torch.manual_seed(0)
    module = SuperResolution(variant, W_DIM, None, antialias=True).double()
    block = module.block0
    x, image = torch.randn(1, 32, 12, 12).double(), torch.randn(1, 3, 12, 12).double()
    w = latent(1)[:, 0].double()
    for conv in (block.conv0, block.conv1):
        conv.noise_const = torch.zeros(12, 12).double()
    with torch.no_grad():
        y, rgb = block(x, image, w[:, None].expand(-1, 3, -1), "none")
        by_hand = textbook_convolution(block.conv1, textbook_convolution(block.conv0, x, w), w)
        style = F.linear(w, block.torgb.affine.weight / math.sqrt(W_DIM), block.torgb.affine.bias)
        weight = block.torgb.weight[:, :, 0, 0] * style / math.sqrt(len(style[0]))
        added = torch.einsum("oi,bihw->bohw", weight, by_hand)
    torch.testing.assert_close(y, by_hand)
    by_hand = image + added + block.torgb.bias[:, None, None]
    torch.testing.assert_close(rgb, by_hand, rtol=1e-4, atol=1e-5)  # images are float32


def test_image_raw_is_what_was_rendered():
    """Also where no resizing takes place, where EG3D overwrites it."""
    generator = changed(
        superresolution="SuperresolutionHybrid2X", decoder_features=32, plane_channels=32
    )
    ws = generator.mapping(torch.randn(1, 8))
    camera = generator.frontal_camera()
    out = generator.render(ws, camera, resolution=64)
    assert out["image"].shape == (1, 3, 128, 128)
    assert torch.equal(out["image_raw"], generator.render_raw(generator.planes(ws), camera, 64))


# --- a checkpoint of any size --------------------------------------------------------------------


def record_of(generator, lr_mul=0.01, **attributes):
    """The network record that a pickle of this generator would hold."""
    tensors = {
        name.replace("osg_decoder.", "decoder."): tensor.clone()
        for name, tensor in generator.state_dict().items()
    }

    def module(name="Module", **values):
        return ModuleRecord(name, values)

    config = generator.config
    last = f"backbone.synthesis.b{4 << (len(config.synthesis_channels) - 1)}.conv1"
    modules = {
        "backbone.mapping.fc0": module(bias_gain=lr_mul),
        "decoder.net.0": module(bias_gain=config.decoder_lr_mul),
        last: module(conv_clamp=config.synthesis_clamp),
        "renderer": module("ImportanceRenderer", plane_axes=axis_matrices(config.plane_axes)),
    }
    if config.superresolution is not None:
        modules["superresolution"] = module(config.superresolution)
        modules["superresolution.block0.conv1"] = module(conv_clamp=config.superresolution_clamp)
    values = {
        "z_dim": config.z_dim,
        "rendering_kwargs": config.rendering,
        "neural_rendering_resolution": config.neural_rendering_resolution,
        **attributes,
    }
    return NetworkRecord("TriPlaneGenerator", values, tensors, frozenset(tensors), modules)


def axis_matrices(axes):
    """[3, 3, 3] such that a point times the inverse has its plane coordinates first."""
    columns = torch.zeros(3, 3, 3)
    for plane, (a, b) in enumerate(axes):
        for place, axis in enumerate((a, b, 3 - a - b)):
            columns[plane, axis, place] = 1
    return torch.linalg.inv(columns)


@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_every_superresolution_is_read(variant):
    original = changed(
        superresolution=variant, decoder_features=32, plane_channels=32, synthesis_clamp=256.0
    )
    copy = generator_from_record(record_of(original), "test")
    said = {"mapping_features": original.w_dim}  # what the record says where ours may be silent
    if variant is None:
        said["superresolution_clamp"] = None
    assert copy.config == dataclasses.replace(original.config, **said)
    for name, tensor in original.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor)


@pytest.mark.parametrize(
    "options",
    [
        {"c_dim": 25, "rendering": {"c_scale": 1.0, "c_gen_conditioning_zero": False}},
        {"mapping_layers": 8},
        {"mapping_layers": 4, "mapping_features": 24},
        {"c_dim": 25, "embed_features": 12, "w_dim": 20},
        {"mapping_lr_mul": 0.1, "decoder_lr_mul": 0.5, "decoder_hidden": 24},
        {"synthesis_channels": (12, 8, 6, 4), "plane_channels": 4},
        {"plane_axes": ((0, 1), (0, 2), (2, 0))},
        {"rendering": {"ray_start": "auto", "ray_end": "auto", "box_warp": 1.4}},
    ],
    ids=lambda options: "-".join(options),
)
def test_other_widths_depths_and_options_are_read(options):
    original = changed(**options)
    record = record_of(original, original.config.mapping_lr_mul)
    copy = generator_from_record(record, "test").eval()
    z = torch.randn(2, original.z_dim)
    camera = original.frontal_camera(0.2, 0.1)
    with torch.no_grad():
        ours, theirs = (
            g.render(g.mapping(z, camera, truncation_psi=0.7), camera) for g in (copy, original)
        )
    for name in ours:
        assert torch.equal(ours[name], theirs[name])


def test_what_an_unsupported_record_says():
    original = changed()
    record = record_of(original)
    other = dataclasses.replace(record, class_name="Generator")
    with pytest.raises(CheckpointError, match="holds a Generator, not EG3D's TriPlaneGenerator"):
        generator_from_record(other, "f.pkl")
    unknown = {**record.modules, "superresolution": ModuleRecord("Superres9", {})}
    with pytest.raises(CheckpointError, match="super-resolution class Superres9"):
        generator_from_record(dataclasses.replace(record, modules=unknown), "f.pkl")
    tensors = dict(record.tensors)
    name = "backbone.synthesis.b8.conv0.bias"
    del tensors[name]
    with pytest.raises(CheckpointError, match=f"f.pkl lacks 1 tensor, among them {name}"):
        generator_from_record(dataclasses.replace(record, tensors=tensors), "f.pkl")
    tensors[name] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[3\], expected \[8\]"):
        generator_from_record(dataclasses.replace(record, tensors=tensors), "f.pkl")


def test_sizes_that_a_record_only_claims_take_no_memory():
    """A latent of 2**40 numbers, in a file that holds none of them."""
    record = record_of(changed())
    attributes = {**record.attributes, "z_dim": 2**40}
    with pytest.raises(CheckpointError, match=r"fc0\.weight has shape \[16, 8\], expected"):
        generator_from_record(dataclasses.replace(record, attributes=attributes), "f.pkl")
    tensors = {
        **record.tensors,
        "backbone.synthesis.b16.conv1.weight": torch.empty(2**50, 0, 3, 3),
    }
    with pytest.raises(CheckpointError, match=r"f\.pkl(:| is not the EG3D generator it claims)"):
        generator_from_record(dataclasses.replace(record, tensors=tensors), "f.pkl")


# --- our own directory ---------------------------------------------------------------------------


def test_a_directory_is_the_same_generator(tmp_path):
    original = changed(c_dim=25, rendering={"c_scale": 1.0, "c_gen_conditioning_zero": False})
    save_generator(original, tmp_path / "copy", {"from": "a test"})
    copy = load_generator(tmp_path / "copy")
    assert copy.config == original.config
    assert copy.fingerprint() == original.fingerprint()
    assert not copy.training
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    described = json.loads((tmp_path / "copy" / "generator.json").read_text())
    assert described["provenance"] == {"from": "a test"}
    assert GeneratorConfig.from_json(described["config"]) == original.config


def test_the_fingerprint_sees_every_weight_and_option():
    prints = {
        tiny_generator().fingerprint(),
        tiny_generator(1).fingerprint(),
        changed(rendering={"box_warp": 1.5}).fingerprint(),
    }
    nudged = tiny_generator()
    nudged.backbone.mapping.w_avg[3] += 1e-6
    assert len(prints | {nudged.fingerprint()}) == 4
    assert tiny_generator().fingerprint() in prints


def break_json(folder):
    (folder / "generator.json").write_text("{")


def break_version(folder):
    edit(folder, version=99)


def break_format(folder):
    edit(folder, format="something-else")


def break_weights(folder):
    data = (folder / "generator.safetensors").read_bytes()
    (folder / "generator.safetensors").write_bytes(data[:-1])


def remove_weights(folder):
    (folder / "generator.safetensors").unlink()


def break_config(folder):
    edit(folder, config={"z_dim": 3})


def inflate_config(folder):
    config = json.loads((folder / "generator.json").read_text())["config"]
    edit(folder, config={**config, "w_dim": 2**20})


def replace_weights(folder):
    (folder / "generator.safetensors").write_bytes(b"nothing")
    digest = hashlib.sha256(b"nothing").hexdigest()
    edit(folder, weights={"file": "generator.safetensors", "sha256": digest})


def edit(folder, **values):
    path = folder / "generator.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_json, "is not JSON"),
        (break_format, "does not describe a densityrl-generator"),
        (break_version, "has format version 99; this release reads version 1"),
        (break_weights, "do not belong together"),
        (remove_weights, r"generator\.safetensors is missing"),
        (break_config, "has an unusable config"),
        (inflate_config, "has shape"),
        (replace_weights, "is not a safetensors file"),
    ],
)
def test_a_damaged_directory_is_refused(tmp_path, harm, message):
    save_generator(tiny_generator(), tmp_path)
    harm(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_generator(tmp_path)


def test_a_generator_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"no generator at .*bundled one \(heads\)"):
        load_generator(tmp_path / "nothing")
    (tmp_path / "file.pkl").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="'D' is no generator: give G_ema or G"):
        load_generator(tmp_path / "file.pkl", which="D")


def test_bundled_generators_load():
    assert bundled_generators() == ["heads"]
    generator = load_generator("heads")
    assert generator.planes(generator.mapping(latents([0], generator.z_dim))).isfinite().all()


# --- latent to w ---------------------------------------------------------------------------------


def test_latents_are_those_of_numpy():
    z = latents([3, 2**32 - 1], 5)
    assert z.dtype == torch.float32
    assert torch.equal(z[0], torch.tensor(np.random.RandomState(3).randn(1, 5)[0]).float())
    assert latents([], 5).shape == (0, 5)


def test_truncation():
    generator = changed()
    generator.backbone.mapping.w_avg.normal_()
    mean = generator.backbone.mapping.w_avg
    z = torch.randn(2, 8)
    full = generator.mapping(z)
    assert full.shape == (2, generator.num_ws, W_DIM)
    torch.testing.assert_close(generator.mapping(z, truncation_psi=0), mean.expand_as(full))
    half = generator.mapping(z, truncation_psi=0.5, truncation_cutoff=2)
    torch.testing.assert_close(half[:, :2], (full[:, :2] + mean) / 2)
    assert torch.equal(half[:, 2:], full[:, 2:])


def test_the_conditioning_camera():
    z = torch.randn(2, 8)
    following = changed(c_dim=25, rendering={"c_scale": 1.0, "c_gen_conditioning_zero": False})
    turned = following.frontal_camera(0.5)
    assert not torch.equal(following.mapping(z), following.mapping(z, turned))
    assert torch.equal(following.mapping(z), following.mapping(z, following.frontal_camera()))
    for option in ({"c_gen_conditioning_zero": True, "c_scale": 1.0}, {"c_scale": 0.0}, {}):
        blind = changed(c_dim=25, rendering=option)
        assert torch.equal(blind.mapping(z), blind.mapping(z, turned))
    without = changed(c_dim=0)
    assert torch.equal(without.mapping(z), without.mapping(z, turned))


def test_wrong_shapes_are_named():
    generator = changed(c_dim=25)
    with pytest.raises(ValueError, match=r"z must be \[B, 8\], not \[1, 9\]"):
        generator.mapping(torch.randn(1, 9))
    with pytest.raises(ValueError, match=r"c must be \[B, 25\]"):
        generator.mapping(torch.randn(1, 8), torch.randn(1, 16))
    with pytest.raises(ValueError, match=r"c must be \[B, 25\]"):
        generator.render(generator.mapping(torch.randn(1, 8)), torch.randn(25))


# --- rendering -----------------------------------------------------------------------------------


def test_chunks_change_no_number(monkeypatch):
    generator = tiny_generator()
    ws, camera = generator.mapping(torch.randn(2, 8)), generator.frontal_camera(0.3)
    whole = generator.render(ws, camera)
    monkeypatch.setattr("densityrl.generator.render.RAYS_PER_CHUNK", 17)
    chunked = generator.render(ws, camera)
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name], rtol=1e-5, atol=1e-5)


def test_jitter_draws_and_repeats():
    generator = tiny_generator()
    ws, camera = generator.mapping(torch.randn(1, 8)), generator.frontal_camera()
    images = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        images.append(generator.render(ws, camera, jitter=True)["image"])
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])
    still = generator.render(ws, camera)["image"]
    assert torch.equal(still, generator.render(ws, camera)["image"])
    assert (images[0] - still).abs().mean() < 0.1


def options(**values):
    return MarchingOptions.from_rendering({**CONFIG.rendering, **values})


def test_white_background_lifts_empty_space():
    depths = torch.linspace(1, 2, 5).expand(1, 1, 5)
    sigma, colour = torch.full((1, 1, 5), -100.0), torch.rand(1, 1, 5, 3)
    assert torch.equal(
        composite(depths, sigma, colour, False).features, torch.full((1, 1, 3), -1.0)
    )
    assert torch.equal(composite(depths, sigma, colour, True).features, torch.full((1, 1, 3), 1.0))


def test_compositing_of_a_uniform_fog():
    """Constant density d over length L lets exp(-d L) through, however it is sampled."""
    depths = torch.linspace(1, 3, 9, dtype=torch.float64).expand(1, 1, 9)
    sigma, colour = torch.full_like(depths, 1.5), torch.full((1, 1, 9, 1), 0.25).double()
    fog = composite(depths, sigma, colour, False)
    opacity = 1 - math.exp(-2 * math.log1p(math.exp(0.5)))
    assert fog.weight_sum.item() == pytest.approx(opacity, abs=1e-8)
    assert fog.features.item() == pytest.approx(0.5 * opacity - 1, abs=1e-8)


def test_disparity_sampling_is_even_in_one_over_depth():
    start, end = torch.tensor([[1.0]]), torch.tensor([[4.0]])
    depths = coarse_depths(start, end, options(disparity_space_sampling=True), False)
    torch.testing.assert_close(1 / depths[0, 0], torch.linspace(1, 0.25, 8))
    even = coarse_depths(start, end, options(), False)
    torch.testing.assert_close(even[0, 0], torch.linspace(1, 4, 8))


def test_auto_limits_are_the_box():
    """A ray along z through a cube of side 1 is sampled from its front face to its rear."""
    generator = changed(rendering={"ray_start": "auto", "ray_end": "auto"})
    origin = torch.tensor([[[0.0, 0.0, 2.7], [3.0, 0.0, 2.7]]])
    direction = torch.tensor([[[0.0, 0.0, -1.0], [0.0, 0.0, -1.0]]])
    start, end = box_limits(origin, direction, 1.0)
    torch.testing.assert_close(start, torch.tensor([[2.2, 2.2]]))
    torch.testing.assert_close(end[0, 0], torch.tensor(3.2))
    out = generator.render(generator.mapping(torch.randn(1, 8)), generator.frontal_camera())
    assert all(image.isfinite().all() for image in out.values())


def test_rendering_options_that_make_no_sense():
    with pytest.raises(ValueError, match="clamp_mode='relu' is unknown"):
        options(clamp_mode="relu")
    with pytest.raises(ValueError, match="both must be numbers, or both 'auto'"):
        options(ray_start="auto")


def test_rendering_differentiates():
    """Against finite differences, in planes and decoder; sample depths are constants."""
    generator = changed(rendering={"depth_resolution_importance": 0}).double()
    camera = generator.frontal_camera(0.2).double()
    rays = pixel_rays(camera, 3)
    marching = MarchingOptions.from_rendering(generator.rendering)
    planes = torch.randn(1, 3, 6, 5, 5).double().requires_grad_()
    weight = generator.osg_decoder.net[0].weight.requires_grad_()

    def features(planes, weight):
        return render_rays(planes, generator.decoder, generator.layout, *rays, marching).features

    assert torch.autograd.gradcheck(features, (planes, weight), eps=1e-6, atol=1e-5)


def test_the_centre_of_the_frontal_view_looks_at_the_pivot():
    pose = camera_pose(0.3, 0.2, pivot=(0, 0.1, 0.2), radius=2.7)
    forward, origin = pose[:3, 2], pose[:3, 3]
    assert origin.norm().item() == pytest.approx(2.7, rel=1e-5)
    toward = F.normalize(torch.tensor([0, 0.1, 0.2]) - origin, dim=0)
    torch.testing.assert_close(forward, toward)
    torch.testing.assert_close(pose[:3, :3].T @ pose[:3, :3], torch.eye(3), atol=1e-6, rtol=0)


def test_what_is_handed_to_the_kernels():
    generator = changed(plane_axes=EG3D.axes, decoder_lr_mul=0.5, rendering={"box_warp": 1.4})
    assert generator.layout.axes == EG3D.axes
    assert generator.box_side == 1.4
    features = torch.randn(4, 6)
    sigma, _ = radiance(
        torch.zeros(1, 3, 6, 4, 4), generator.decoder, torch.zeros(1, 1, 3), generator.layout
    )
    torch.testing.assert_close(
        sigma[0, 0], generator.osg_decoder.net(torch.zeros(6))[0], rtol=1e-5, atol=1e-6
    )
    hidden = F.softplus(
        F.linear(features, generator.decoder.weights[0], generator.decoder.biases[0])
    )
    torch.testing.assert_close(generator.osg_decoder.net[:2](features), hidden)


def test_bfloat16_planes_stay_close():
    generator = tiny_generator()
    ws = generator.mapping(torch.randn(1, 8))
    exact = generator.planes(ws)
    rounded = generator.convolutions_to(torch.bfloat16).planes(ws)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.03
