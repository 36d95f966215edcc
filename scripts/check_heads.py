"""Measure a generator of `heads` on latents it was not trained on, against their own targets.

python scripts/check_heads.py --ict ICT-FaceKit --generator heads
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from heads.check import check
from heads.face_model import read_face_model
from heads.latent import GROUPS
from heads.points import HeadMaker

from densityrl.generator import load_generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ict", type=Path, required=True, help="ICT-FaceKit: checkout or .npz")
    parser.add_argument("--generator", default="heads", help="a directory, or a bundled one's word")
    parser.add_argument("--count", type=int, default=24, help="latents")
    parser.add_argument("--seed", type=int, default=99)
    args = parser.parse_args()
    maker = HeadMaker(read_face_model(args.ict, GROUPS["identity"][1]))
    report = check(load_generator(args.generator), maker, args.count, args.seed)
    for name, value in asdict(report).items():
        print(f"{name} {value:.4g}")


if __name__ == "__main__":
    main()
