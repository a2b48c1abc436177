"""The DDPM U-Net (Ho et al. 2020), and its weights: reading the checkpoints of train.py.

Whatever does not fit raises ValueError; the scripts turn it into a line for the user.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# ---------- Network


def timestep_embedding(t, dim):
    """Sinusoids of the time step: t (B,) -> (B, dim), dim even, frequencies 1 .. 1/10000."""
    half = dim // 2
    index = torch.arange(half, device=t.device, dtype=torch.float32)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) / (half - 1) * index)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def xavier_init(layer, gain=1.0):
    """Uniform of variance gain^2 / mean(fan in, fan out), bias 0: DDPM's initialisation."""
    nn.init.xavier_uniform_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


# Layers that end a residual branch start near zero, so that every block starts as the identity.
NEAR_ZERO = 1e-5


def conv3x3(c_in, c_out, gain=1.0, stride=1):
    """3x3 convolution; the strided one expects its input padded, see `Downsample`."""
    return xavier_init(nn.Conv2d(c_in, c_out, 3, stride, padding=1 if stride == 1 else 0), gain)


class ResBlock(nn.Module):
    """norm-silu-conv, plus the time embedding, norm-silu-dropout-conv, plus the input."""

    def __init__(self, c_in, c_out, emb, groups, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = conv3x3(c_in, c_out)
        self.emb = xavier_init(nn.Linear(emb, c_out))
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.dropout = dropout
        self.conv2 = conv3x3(c_out, c_out, NEAR_ZERO)
        self.skip = nn.Identity() if c_in == c_out else xavier_init(nn.Conv2d(c_in, c_out, 1))

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb(emb)[:, :, None, None]
        h = F.dropout(F.silu(self.norm2(h)), self.dropout, self.training)
        return self.skip(x) + self.conv2(h)


class Attention(nn.Module):
    """One head of self-attention over all pixels, residual."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        # q, k and v are one layer here; sqrt(2) keeps the variance that three layers would have.
        self.qkv = xavier_init(nn.Conv2d(channels, 3 * channels, 1), math.sqrt(2))
        self.out = xavier_init(nn.Conv2d(channels, channels, 1), NEAR_ZERO)

    def forward(self, x):
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)
        q, k, v = qkv[:, None].chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve the resolution: stride-2 convolution, padded right and bottom only."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv3x3(channels, channels, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the resolution: nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """DDPM's U-Net: (x_t, t) -> predicted eps.

    image_size: pixels a side; len(mult) - 1 halvings must divide it.
    in_channels: 1 (grey) or 3 (RGB).        channels: width of the first level.
    mult: width of each level / channels.    blocks: residual blocks a level (one more going up).
    attention: resolutions, in pixels, that get self-attention (the middle always does).
    dropout: probability, inside the residual blocks, in [0, 1).

    forward: x (B, in_channels, H, W), t int64 (B,) -> float32 of x's shape.
    Raises ValueError on a size, attention or width that does not fit.
    """

    def __init__(self, image_size, in_channels, channels, mult, blocks, attention, dropout=0.0):
        super().__init__()
        if not mult:
            raise ValueError("mult is empty: a network has at least one level")
        sizes = [image_size // 2**i for i in range(len(mult))]
        self.factor = 2 ** (len(mult) - 1)
        if image_size < self.factor or image_size % self.factor:
            raise ValueError(f"image_size {image_size} is not a multiple of {self.factor}: "
                            f"{len(mult)} levels halve it {len(mult) - 1} times")
        if not set(attention) <= set(sizes):
            raise ValueError(f"attention at {','.join(map(str, attention))} pixels: "
                            f"this network's resolutions are {','.join(map(str, sizes))}")
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels {in_channels}: images have 1 (grey) or 3 (RGB)")
        if channels < 4 or channels % 2:
            raise ValueError(f"channels {channels}: the width is an even number, 4 or more")

        # The published networks have 32 groups; a narrow one keeps at least 4 channels in each.
        groups = next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)
        emb = 4 * channels
        self.channels = channels
        self.emb1 = xavier_init(nn.Linear(channels, emb))
        self.emb2 = xavier_init(nn.Linear(emb, emb))

        def block(c_in, c_out, size=None):
            layers = nn.ModuleList([ResBlock(c_in, c_out, emb, groups, dropout)])
            if size in attention:
                layers.append(Attention(c_out, groups))
            return layers

        width = channels
        skips = [width]
        self.conv_in = conv3x3(in_channels, width)
        self.down = nn.ModuleList()
        for level, size in enumerate(sizes):
            for _ in range(blocks):
                self.down.append(block(width, channels * mult[level], size))
                width = channels * mult[level]
                skips.append(width)
            if level < len(mult) - 1:
                self.down.append(nn.ModuleList([Downsample(width)]))
                skips.append(width)

        self.mid1 = block(width, width)
        self.mid1.append(Attention(width, groups))
        self.mid2 = block(width, width)

        self.up = nn.ModuleList()
        for level, size in reversed(list(enumerate(sizes))):
            for _ in range(blocks + 1):
                self.up.append(block(width + skips.pop(), channels * mult[level], size))
                width = channels * mult[level]
            if level > 0:
                self.up[-1].append(Upsample(width))

        self.norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = conv3x3(width, in_channels, NEAR_ZERO)

    def forward(self, x, t):
        if x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"image of {tuple(x.shape[-2:])} pixels: not a multiple of "
                             f"{self.factor}")
        emb = self.emb2(F.silu(self.emb1(timestep_embedding(t, self.channels))))
        emb = F.silu(emb)

        def apply(layers, h):
            for layer in layers:
                h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
            return h

        h = self.conv_in(x)
        skips = [h]
        for layers in self.down:
            h = apply(layers, h)
            skips.append(h)
        h = apply(self.mid2, apply(self.mid1, h))
        for layers in self.up:
            h = apply(layers, torch.cat([h, skips.pop()], dim=1))
        return self.conv_out(F.silu(self.norm_out(h))).float()


# The settings that make a network: the same names in the flags of train.py and in a checkpoint.
UNET_KEYS = ("image_size", "in_channels", "channels", "mult", "blocks", "attention", "dropout")


def build_network(config):
    """A fresh network from its settings (a dict with UNET_KEYS): the one place that builds one.

    Raises ValueError where a setting is missing or does not fit.
    """
    missing = [key for key in UNET_KEYS if key not in config]
    if missing:
        raise ValueError(f"the config lacks {', '.join(missing)}")
    try:
        return UNet(**{key: config[key] for key in UNET_KEYS})
    except TypeError as error:
        raise ValueError(f"the config's values are not those of a network ({error})") from error


# ---------- Checkpoint


def read_checkpoint(path):
    """The checkpoint at `path` (a file, or a run folder that holds ckpt.pt), as train.py wrote it.

    It is loaded to the CPU with weights_only=True: code in a file is refused, not run.
    Returns a dict: model, ema, optimizer, scaler (state dicts), step (int), config (dict).
    Raises ValueError when it is missing, truncated or foreign.
    """
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged file may raise anything.
        raise ValueError(f"{path} is not a checkpoint of train.py: truncated, foreign, or with "
                         "code in it (not run)") from error
    wanted = {"model", "ema", "optimizer", "scaler", "step", "config"}
    if not isinstance(checkpoint, dict) or not wanted <= checkpoint.keys():
        raise ValueError(f"{path} is not a checkpoint of train.py: it lacks {sorted(wanted)}")
    if not isinstance(checkpoint["config"], dict):
        raise ValueError(f"{path} is not a checkpoint of train.py: its config is no dict")
    return checkpoint


def load_weights(net, state, path):
    """Put a state dict into the network; ValueError, naming the file, where they do not fit."""
    try:
        net.load_state_dict(state)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: its weights do not fit its config") from error
