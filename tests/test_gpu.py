"""The same numbers on a GPU as on the CPU, and the loop from end to end there."""

from dataclasses import replace

import pytest
import torch
from tiny import NETWORKS, save_pairs, save_tiny, tiny_generator

from densityrl.config import FinetuneConfig, RewardConfig
from densityrl.finetune.train import finetune
from densityrl.generator import latents, load_generator
from densityrl.generator.axes import LatentAxes
from densityrl.reward import InversionNetwork, RewardModel
from densityrl.reward.train import train_reward
from densityrl.volume import SlabSettings, VolumeCache, density_slab, ws_of_seeds
from triplane_kernels import Grid, density, density_grid, radiance

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _exact_float32():
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def assert_near(ours, reference, limit):
    error = (ours.cpu().double() - reference.double()).norm() / reference.double().norm()
    assert error <= limit, f"relative error {error:.1e}"


def test_density_and_its_gradient():
    generator = tiny_generator()
    grid = Grid.cube(12, 1.0)
    torch.manual_seed(0)
    points = torch.rand(2, 50, 3) - 0.5
    planes = generator.planes(generator.mapping(torch.randn(2, 8)))
    results = []
    for device in ("cpu", "cuda"):
        p = planes.to(device).requires_grad_()
        decoder = generator.to(device).decoder
        sigma = density_grid(p, decoder, grid, generator.layout)
        at_points = density(p, decoder, points.to(device), generator.layout)
        colours = radiance(p, decoder, points.to(device), generator.layout)[1]
        (gradient,) = torch.autograd.grad(sigma.sum() + at_points.sum() + colours.sum(), p)
        results.append((sigma.detach(), at_points.detach(), colours.detach(), gradient))
    for ours, reference in zip(results[1], results[0], strict=True):
        assert_near(ours, reference, 1e-5)


def test_images():
    on_cpu, on_gpu = load_generator("heads"), load_generator("heads", "cuda")
    z = latents([3], on_cpu.z_dim)
    with torch.no_grad():
        expected = on_cpu.render(on_cpu.mapping(z), on_cpu.frontal_camera(0.3))
        images = on_gpu.render(on_gpu.mapping(z.cuda()), on_gpu.frontal_camera(0.3))
    for name, image in images.items():
        assert_near(image, expected[name], 1e-3)


def test_bfloat16_planes():
    generator = load_generator("heads", "cuda")
    ws = generator.mapping(latents([3], generator.z_dim).cuda())
    exact = generator.planes(ws)
    rounded = generator.convolutions_to(torch.bfloat16).planes(ws)
    assert rounded.dtype == torch.float32
    assert_near(rounded, exact.cpu(), 0.03)


def test_the_fit_of_an_inversion():
    """The same map on both, from the first numbers of w itself."""
    settings = SlabSettings(resolution=16)
    projections = []
    for device in ("cpu", "cuda"):
        generator = tiny_generator().to(device)
        slabs = density_slab(generator, range(60), settings)
        network = InversionNetwork(slabs.shape[1:], 3).to(device)
        network.fit(slabs.split(16), ws_of_seeds(generator, range(60), settings)[:, 0, :3])
        projections.append(network.projection.cpu())
    assert_near(projections[1], projections[0], 1e-2)


def test_axes():
    """The same on both: each is known by its skewness, and the directions span the same space."""
    on_cpu, on_gpu = (LatentAxes.of(tiny_generator().to(device), 6) for device in ("cpu", "cuda"))
    assert on_gpu.directions.is_cuda
    assert_near(on_gpu.skewness, on_cpu.skewness, 1e-2)
    spanned = [axes.directions.cpu() @ axes.readout.cpu().T for axes in (on_cpu, on_gpu)]
    assert_near(spanned[1], spanned[0], 1e-2)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_loop(tmp_path, network):
    """Volumes, reward, fine-tuning and resuming; the cache holds what a CPU would have made."""
    save_pairs(tmp_path / "pairs.csv")
    generator = save_tiny(tmp_path / "generator")
    config = RewardConfig(
        generator=generator,
        preferences=str(tmp_path / "pairs.csv"),
        resolution=16,
        epochs=1,
        **NETWORKS[network],
    )
    summary = train_reward(config, tmp_path / "reward", device="cuda")
    assert 0 <= summary["accuracy"] <= 1
    assert RewardModel.load(tmp_path / "reward").network.kind == network
    settings = SlabSettings(resolution=16)
    cache = VolumeCache(tmp_path / "reward" / "volumes", tiny_generator(), settings)
    assert_near(
        torch.from_numpy(cache.get(0)), density_slab(tiny_generator(), [0], settings)[0], 1e-4
    )

    tuning = FinetuneConfig(
        generator=generator,
        reward=str(tmp_path / "reward"),
        steps=2,
        held_out_seeds=(0, 1),
        target_seeds=8,
    )
    finetune(tuning, tmp_path / "tuned", device="cuda")
    finetune(replace(tuning, steps=3), tmp_path / "tuned", resume=True, device="cuda")
    tuned = load_generator(tmp_path / "tuned")
    assert tuned.fingerprint() != load_generator(generator).fingerprint()
