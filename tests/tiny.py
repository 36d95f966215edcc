"""A generator and a reward with random weights, small enough to train in seconds, and pairs."""

import numpy as np
import torch

from densityrl.generator import GeneratorConfig, TriplaneGenerator, save_generator
from densityrl.preference import PreferenceTable, write_preferences
from densityrl.reward import ConvNetwork, RewardModel
from densityrl.volume import SlabSettings

CONFIG = GeneratorConfig(
    z_dim=8,
    w_dim=16,
    c_dim=0,
    synthesis_channels=(8, 8, 8),
    plane_channels=6,
    plane_axes=((0, 1), (1, 2), (2, 0)),
    decoder_hidden=16,
    decoder_features=3,
    rendering={
        "box_warp": 1.0,
        "ray_start": 2.2,
        "ray_end": 3.2,
        "depth_resolution": 8,
        "depth_resolution_importance": 8,
        "avg_camera_radius": 2.7,
        "avg_camera_pivot": [0.0, 0.0, 0.0],
    },
    neural_rendering_resolution=12,
)


def tiny_generator(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = TriplaneGenerator(CONFIG)
        with torch.no_grad():  # planes of a size that moves the density
            generator.osg_decoder.net[2].weight.mul_(6)
            for block in generator.backbone.synthesis.blocks:
                block.torgb.weight.mul_(2)
    return generator.eval().requires_grad_(False)


def save_tiny(path, seed=0):
    save_generator(tiny_generator(seed), path)
    return str(path)


def tiny_reward(settings=None, **values):
    """An untrained reward for tiny_generator's box."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = ConvNetwork((8, 8)).eval().requires_grad_(False)
    settings = settings or SlabSettings(resolution=16)
    return RewardModel(network, settings, **{"box_side": 1.0, **values})


# Of either network, so small that a training with tiny_generator takes a second.
NETWORKS = {
    "inversion": {
        "network": "inversion",
        "components": 6,
        "inversion_slabs": 30,
        "anchors": 6,
    },
    "conv": {
        "network": "conv",
        "widths": (8, 8),
        "learning_rate": 1e-3,
        "anchors": 6,
        "mirror": True,
    },
}


def save_pairs(path):
    """20 pairs of 40 seeds, of which the smaller is always preferred: nothing to be learned."""
    seeds = np.arange(40).reshape(2, 20)
    write_preferences(path, PreferenceTable(seeds[0], seeds[1]))
    return str(path)
