"""How many drawn shapes are whole: the share of images that are one crisp disc or box.

    python tests/fit_shapes.py out/shapes-dsm/samples.npz out/shapes-adv/samples.npz

The best-fitting disc and box of each image (centre, radius or half sides, colour) are found by
Nelder-Mead; an image is whole if the better one leaves a root mean square below .05 (white is 1).
"""

import sys
from pathlib import Path

import numpy as np
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sample import Parser, run_cli  # noqa: E402

BACKGROUND = 0.15


def misfit(params, image):
    """Root mean square between an image (C, H, H) in [0, 1] and a shape, its colour fitted.

    params: a disc (x, y, radius) or box (x, y, half width, half height).
    """
    x, y, *sides = params
    pixel = np.arange(image.shape[-1]) + 0.5
    dx, dy = abs(pixel[None] - x), abs(pixel[:, None] - y)
    if len(sides) == 1:
        distance = np.hypot(dx, dy) - sides[0]
    else:
        distance = np.maximum(dx - sides[0], dy - sides[1])
    cover = np.clip(0.5 - distance, 0, 1)  # Of each pixel.
    excess = image - BACKGROUND
    colour = (excess * cover).sum((1, 2)) / max(1e-9, (cover * cover).sum())
    return np.sqrt(((excess - colour[:, None, None] * cover) ** 2).mean())


def best_misfit(image):
    """`misfit` of the best disc or box, begun at the centre and area of what is not background."""
    weight = abs(image - BACKGROUND).max(0)
    weight = weight * (weight > 0.25)
    total = weight.sum() + 1e-9
    pixel = np.arange(len(weight)) + 0.5
    x, y = (weight.sum(0) * pixel).sum() / total, (weight.sum(1) * pixel).sum() / total
    area = (weight > 0).sum() + 1
    width, height = (np.sqrt(3 * (weight.sum(axis) * (pixel - centre) ** 2).sum() / total) + 0.1
                     for axis, centre in ((0, x), (1, y)))
    starts = [(x, y, np.sqrt(area / np.pi)), (x, y, width, height)]
    return min(minimize(misfit, start, image, method="Nelder-Mead",
                        options={"xatol": 0.01, "fatol": 1e-4}).fun for start in starts)


def main():
    """Entry point; see the module's docstring."""
    p = Parser(description=__doc__)
    p.add_argument("samples", type=Path, nargs="+", help="samples.npz of sample.py")
    args = p.parse_args()
    for path in args.samples:
        errors = np.array([best_misfit(image.transpose(2, 0, 1) / 255)
                           for image in np.load(path)["arr_0"]])
        print(f"{path}: {(errors < 0.05).mean():.1%} of {len(errors)} are whole; "
              f"misfit {np.median(errors):.4f} in the median")


if __name__ == "__main__":
    run_cli(main)
