"""The DDPM U-Net (Ho et al. 2020), and its weights: train.py's checkpoints, diffusers' folders.

What does not fit raises ValueError, a setting that is missing KeyError; the scripts turn them into
a line for the user.
"""

import json
import math
import zipfile
from collections import OrderedDict
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


def norm_groups(channels):
    """Groups of the normalisations: up to the published 32, of 4 channels or more each."""
    return next(g for g in range(min(32, channels // 4), 0, -1) if channels % g == 0)


# Layers that end a residual branch start near zero, so that every block starts as the identity.
NEAR_ZERO = 1e-5


def conv3x3(c_in, c_out, gain=1.0):
    """3x3 convolution that keeps the resolution."""
    return xavier_init(nn.Conv2d(c_in, c_out, 3, padding=1), gain)


class ResBlock(nn.Module):
    """norm-silu-conv, plus the time embedding, norm-silu-dropout-conv, plus the input."""

    def __init__(self, c_in, c_out, emb, groups, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = conv3x3(c_in, c_out)
        self.time_emb_proj = xavier_init(nn.Linear(emb, c_out))
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.dropout = dropout
        self.conv2 = conv3x3(c_out, c_out, NEAR_ZERO)
        self.conv_shortcut = (nn.Identity() if c_in == c_out else
                              xavier_init(nn.Conv2d(c_in, c_out, 1)))

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(emb)[:, :, None, None]
        h = F.dropout(F.silu(self.norm2(h)), self.dropout, self.training)
        return self.conv_shortcut(x) + self.conv2(h)


class Attention(nn.Module):
    """One head of self-attention over all pixels, residual."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (
            xavier_init(nn.Linear(channels, channels)) for _ in range(3))
        self.to_out = nn.Sequential(xavier_init(nn.Linear(channels, channels), NEAR_ZERO))

    def forward(self, x):
        h = self.group_norm(x).flatten(2).transpose(1, 2)[:, None]
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))
        return x + self.to_out(h)[:, 0].transpose(1, 2).reshape(x.shape)


def downsample(channels):
    """Halve the resolution: stride-2 convolution, padded right and bottom only."""
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)),
                                     conv=xavier_init(nn.Conv2d(channels, channels, 3, 2))))


def upsample(channels):
    """Double the resolution: nearest neighbour, then a convolution."""
    return nn.Sequential(OrderedDict(grow=nn.Upsample(scale_factor=2.0, mode="nearest"),
                                     conv=conv3x3(channels, channels)))


class UNet(nn.Module):
    """DDPM's U-Net: (x_t, t) -> predicted eps. Its parameters have the names of UNet2DModel's.

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
        sizes = [image_size // 2**i for i in range(len(mult))]
        factor = 2 ** (len(mult) - 1)
        if image_size % factor:
            raise ValueError(f"image_size {image_size} is not a multiple of {factor}: "
                            f"{len(mult)} levels halve it {len(mult) - 1} times")
        if not set(attention) <= set(sizes):
            raise ValueError(f"attention at {','.join(map(str, attention))} pixels: "
                            f"this network's resolutions are {','.join(map(str, sizes))}")
        if in_channels not in (1, 3):
            raise ValueError(f"in_channels {in_channels}: images have 1 (grey) or 3 (RGB)")
        if channels < 4 or channels % 2:
            raise ValueError(f"channels {channels}: the width is an even number, 4 or more")

        groups = norm_groups(channels)
        emb = 4 * channels
        self.channels, self.dropout = channels, dropout

        def level(c_ins, width, attends, **sampler):
            """Residual blocks with these inputs, attention after each that attends; a dict."""
            resnets = [ResBlock(c_in, width, emb, groups, dropout) for c_in in c_ins]
            attentions = [Attention(width, groups) if attend else nn.Identity()
                          for attend in attends]
            return nn.ModuleDict({"resnets": nn.ModuleList(resnets),
                                  "attentions": nn.ModuleList(attentions), **sampler})

        self.time_embedding = nn.Sequential(OrderedDict(
            linear_1=xavier_init(nn.Linear(channels, emb)), act=nn.SiLU(),
            linear_2=xavier_init(nn.Linear(emb, emb))))
        self.conv_in = conv3x3(in_channels, channels)
        levels = [(channels * m, size in attention) for m, size in zip(mult, sizes)]
        width, skips = channels, [channels]

        self.down_blocks = nn.ModuleList()
        for i, (c_out, attends) in enumerate(levels):
            resample = [downsample(c_out)] if i < len(levels) - 1 else []
            self.down_blocks.append(level([width] + [c_out] * (blocks - 1), c_out,
                                          [attends] * blocks,
                                          downsamplers=nn.Sequential(*resample)))
            skips += [c_out] * (blocks + len(resample))
            width = c_out

        self.mid_block = level([width, width], width, [True, False])

        self.up_blocks = nn.ModuleList()
        for i, (c_out, attends) in reversed(list(enumerate(levels))):
            resample = [upsample(c_out)] if i > 0 else []
            c_ins = [c_in + skips.pop() for c_in in [width] + [c_out] * blocks]
            self.up_blocks.append(level(c_ins, c_out, [attends] * (blocks + 1),
                                        upsamplers=nn.Sequential(*resample)))
            width = c_out

        self.conv_norm_out = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_out = conv3x3(width, in_channels, NEAR_ZERO)

    def forward(self, x, t):
        emb = F.silu(self.time_embedding(timestep_embedding(t, self.channels)))

        h = self.conv_in(x)
        skips = [h]
        for level in self.down_blocks:
            for resnet, attention in zip(level["resnets"], level["attentions"]):
                h = attention(resnet(h, emb))
                skips.append(h)
            for layer in level["downsamplers"]:
                h = layer(h)
                skips.append(h)
        for resnet, attention in zip(self.mid_block["resnets"], self.mid_block["attentions"]):
            h = attention(resnet(h, emb))
        for level in self.up_blocks:
            for resnet, attention in zip(level["resnets"], level["attentions"]):
                h = attention(resnet(torch.cat([h, skips.pop()], dim=1), emb))
            h = level["upsamplers"](h)
        return self.conv_out(F.silu(self.conv_norm_out(h))).float()


# The settings that make a network: the same names in the flags of train.py and in a checkpoint.
UNET_KEYS = ("image_size", "in_channels", "channels", "mult", "blocks", "attention", "dropout")


def build_network(config):
    """A fresh network from its settings (a dict with UNET_KEYS): the one place that builds one.

    A network with `dropout == 0` saves a regularised step one of its calls.
    """
    return UNet(**{key: config[key] for key in UNET_KEYS})


# ---------- Checkpoint


def read_checkpoint(path):
    """The weights at `path`, a dict: model, ema (state dicts), step (int), config (dict).

    path: a checkpoint of train.py (a file, or a run folder that holds ckpt.pt; with optimizer and
    scaler) or a folder that diffusers wrote, at step 0, see `read_diffusers`. All is loaded to the
    CPU without running code in a file.  Raises ValueError: missing, truncated or foreign.
    """
    path = Path(path)
    theirs = diffusers_file(path)
    if theirs:
        return read_diffusers(theirs)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        lacks = {"model", "ema", "optimizer", "scaler", "step", "config"} - checkpoint.keys()
        # torch.load does not look at the checksums.
        if lacks or zipfile.ZipFile(path).testzip():
            raise ValueError("incomplete or damaged")
        # Older ones had nothing else.
        checkpoint["config"] = {"predict": "eps", "reg_after": 0.0} | checkpoint["config"]
    except Exception as error:  # A damaged file may raise anything.
        raise ValueError(f"{path} is not a checkpoint of train.py: damaged, foreign, or with "
                         "code in it (not run)") from error
    return checkpoint


# ---------- diffusers: its UNet2DModel is the same network, with the same names

# What a UNet2DModel may be beside its shape, by default; what DDPM's, and ours, is instead.
DEFAULTS = {"act_fn": "silu", "center_input_sample": False, "mid_block_scale_factor": 1,
            "resnet_time_scale_shift": "default", "attn_norm_num_groups": None, "dropout": 0.0,
            "attention_head_dim": 8, "norm_num_groups": 32, "freq_shift": 0,
            "flip_sin_to_cos": True, "downsample_padding": 1, "norm_eps": 1e-5}
DDPM = {"freq_shift": 1, "flip_sin_to_cos": False, "downsample_padding": 0, "norm_eps": 1e-6}
BETAS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction"}


def diffusers_config(config):
    """The settings of the UNet2DModel that is `build_network(config)`, all of them."""
    sizes = [config["image_size"] // 2**i for i in range(len(config["mult"]))]
    attends = ["Attn" if size in config["attention"] else "" for size in sizes]
    return {**DEFAULTS, **DDPM, "sample_size": config["image_size"],
            "in_channels": config["in_channels"], "out_channels": config["in_channels"],
            "block_out_channels": [config["channels"] * m for m in config["mult"]],
            "layers_per_block": config["blocks"], "dropout": config["dropout"],
            "down_block_types": [f"{a}DownBlock2D" for a in attends],
            "up_block_types": [f"{a}UpBlock2D" for a in reversed(attends)],
            "attention_head_dim": None, "norm_num_groups": norm_groups(config["channels"])}


def diffusers_scheduler(config):
    """The settings of the DDPMScheduler that is the run's `losses.Diffusion`."""
    T, schedule = config["T"], config["schedule"]
    betas = {"beta_start": 0.1 / T, "beta_end": 20 / T} if schedule == "linear" else {}
    return {"num_train_timesteps": T, "beta_schedule": BETAS[schedule], **betas,
            "prediction_type": PREDICTIONS[config["predict"]]}


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes of length, a JSON header, the raw data."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, body, tensors = json.loads(data[8:start]), data[start:], {}
    header.pop("__metadata__", None)
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[entry["dtype"]]
        raw = torch.frombuffer(bytearray(body[first:last]), dtype=dtype)
        tensors[name] = raw.reshape(entry["shape"])  # Which fails outside of the file.
    return tensors


def write_safetensors(path, tensors):
    """Write {name: tensor} as float32."""
    raw = {name: x.detach().cpu().float().numpy().tobytes() for name, x in tensors.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, data in raw.items():
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape),
                        "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + b"".join(raw.values()))


def diffusers_file(path):
    """The weights of a UNet2DModel at `path`: the file, or in a folder or its unet; or None."""
    if path.name.startswith("diffusion_pytorch_model") and path.is_file():
        return path
    found = [*path.glob("diffusion_pytorch_model.*"), *path.glob("unet/diffusion_pytorch_model.*")]
    return max(found, default=None)  # .safetensors before .bin


def parse_diffusers(theirs, scheduler):
    """The config of ours for a UNet2DModel's settings and a scheduler's ({} without).

    Raises ValueError, naming it, for a setting that `UNet` cannot express.
    """
    size, widths, kinds = (theirs[key] for key in (
        "sample_size", "block_out_channels", "down_block_types"))
    attends = [kind.startswith("Attn") for kind in kinds]
    config = {"image_size": size, "in_channels": theirs["in_channels"], "channels": widths[0],
              "mult": tuple(width // widths[0] for width in widths),
              "blocks": theirs["layers_per_block"], "dropout": theirs.get("dropout", 0.0),
              "attention": tuple(size // 2**i for i, attend in enumerate(attends) if attend),
              "T": scheduler.get("num_train_timesteps", 1000), "dataset": None,
              "schedule": "cosine" if scheduler.get("beta_schedule") == BETAS["cosine"] else
              "linear",
              "predict": "v" if scheduler.get("prediction_type") == PREDICTIONS["v"] else "eps"}
    for ours, read in ((diffusers_config(config), {**DEFAULTS, **theirs}),
                       (diffusers_scheduler(config), scheduler)):
        for key, value in ours.items():
            if read.get(key, value) != value:
                raise ValueError(f"{key} is {read[key]}, this network has {value}")
    return config


def read_diffusers(file):
    """The weights of diffusers' UNet2DModel in a file, in `read_checkpoint`'s form, at step 0.

    A .safetensors or .bin with config.json beside it; T, the schedule and what it predicts are
    those of a scheduler_config.json that lies there, in scheduler/ or ../scheduler/, else DDPM's.
    Raises ValueError, naming what it is, where this is not the network that `UNet` builds.
    """
    folder = file.parent
    try:
        found = [*folder.parent.glob("scheduler/scheduler_config.json"),
                 *folder.glob("scheduler/scheduler_config.json"),
                 *folder.glob("scheduler_config.json")]
        scheduler = json.loads(found[0].read_text()) if found else {}
        config = parse_diffusers(json.loads((folder / "config.json").read_text()), scheduler)
        net = build_network(config)
        tensors = read_safetensors(file) if file.suffix == ".safetensors" else torch.load(
            file, map_location="cpu", weights_only=True)
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"),
                         ("proj_attn", "to_out.0")):  # The names of 2022.
            tensors = {name.replace(f".{old}.", f".{new}."): x for name, x in tensors.items()}
        net.load_state_dict(tensors)  # The names are the same.
    except Exception as error:  # A damaged or hostile file may raise anything.
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder} is no UNet2DModel that fits: {reason}") from error
    return {"model": net.state_dict(), "ema": net.state_dict(), "step": 0, "config": config}


def write_diffusers(net, config, folder):
    """Write a folder that diffusers' DDPMPipeline and UNet2DModel (in unet/) open.

    Raises ValueError for what they have not: another network or schedule, or a first level that
    is wider than its input.
    """
    if not isinstance(net, UNet) or config["schedule"] not in BETAS or config["mult"][0] != 1:
        raise ValueError("diffusers has no such network, schedule or --mult at first")
    files = {
        "model_index.json": {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"],
                             "scheduler": ["diffusers", "DDPMScheduler"]},
        "unet/config.json": {"_class_name": "UNet2DModel", **diffusers_config(config)},
        "scheduler/scheduler_config.json": {
            "_class_name": "DDPMScheduler", "clip_sample": True, "variance_type": "fixed_small",
            **diffusers_scheduler(config)}}
    for name, settings in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n")
    write_safetensors(folder / "unet/diffusion_pytorch_model.safetensors", net.state_dict())
