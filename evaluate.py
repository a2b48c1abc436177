"""Measure a set of images or a trained model, and test the claims on it.

    python evaluate.py quality out/cifar10-adv/samples --reference cifar10
    python evaluate.py attack out/cifar10-adv --norm l2 --budget 0.1
    torchrun --nproc_per_node=8 -- evaluate.py quality out/cifar10-adv --num 50000

The commands: quality, memorization, attack, steps, denoise, overfit; each has its own -h. Under
torchrun each process sees every world-th image; the figures are those of one process.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.functional import gaussian_blur, normalize

from losses import Denoiser, Perturbation, mean_square, trajectory_attack
from model import UserError, run_cli
from sample import (ATTACK, EOT, Parser, denoise_step, image_noise, load_run, model_shape, number,
                    sample, save_grid, save_npz, setup, start_group, ticker, to_uint8,
                    visits, write_atomically)
from train import (DATASETS, PRESETS, alarm_times, choose_corruption, find_source, load_images,
                   overfit, settle, some_of, training_images)

# ---------- Sharing the work, and watching it


def first_here(args, load):
    """load() by one process a machine, which fills a cache, and then by the others."""
    first = args.local == 0
    found = load() if first else None
    if args.world > 1:
        dist.barrier()
    return found if first else load()


def gather(part, n, world, device):
    """Rows rank, rank + world, ... of each process -> all n, in order, on every process's CPU."""
    if world == 1:
        return part
    padded = part.new_zeros(-(-n // world), *part.shape[1:]).to(device)
    padded[:len(part)] = part.to(device)
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:n].cpu()


@contextlib.contextmanager
def full_precision():
    """No TF32, which setup() allows for sampling: figures are to equal the reference's."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.backends.cudnn.flags(benchmark=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@full_precision()
def extract(images, look, args, title, chosen=None):
    """What look(uint8 (B, C, H, W), indices) returns, over all: list of CPU tensors (N, ...).

    images: anything with uint8 (B, C, H, W) at an index array.  chosen: only those (N,) indices.
    Under torchrun each process looks at its share, and all of them get the whole. The next batch
    is read during this one.
    """
    chosen = np.arange(len(images)) if chosen is None else chosen
    n, size = len(chosen), args.batch_size
    # a process beyond the last image looks at an earlier one, which gather() leaves out
    mine = chosen[args.rank % n::args.world]
    parts = None

    def fetch(i):
        return torch.from_numpy(images[mine[i:i + size]]).contiguous()

    with ThreadPoolExecutor(1) as loader, ticker(title, n, args.rank == 0) as tick:
        ahead = loader.submit(fetch, 0)
        for i in range(0, len(mine), size):
            batch = ahead.result().to(args.device)
            ahead = loader.submit(fetch, i + size)
            ends = look(batch, mine[i:i + size])
            if parts is None:
                parts = [end.new_empty(len(mine), *end.shape[1:], device="cpu") for end in ends]
            for part, end in zip(parts, ends):
                part[i:i + len(end)] = end
            tick(min(n, (i + len(batch)) * args.world))
    parts = [gather(part, n, args.world, args.device) for part in parts]
    if not all(part.isfinite().all() for part in parts):
        raise UserError(f"{title}: what the network returns is not finite")
    return parts


def check_writable(path):
    """Make a file's folder; UserError, before the work, if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "ab").close()
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error


# ---------- Images: uint8 arrays (N, C, H, W), memory-mapped where they come from files

CACHE = "out/cache"


def form(shape):
    """(C, H, W) -> "28x28 grey"."""
    return f"{shape[2]}x{shape[1]} {'grey' if shape[0] == 1 else 'RGB'}"


def same_kind(name, shape, other, wanted):
    """Raise UserError unless two image shapes (C, H, W) are the same."""
    if tuple(shape) != tuple(wanted):
        raise UserError(f"{name} is {form(shape)}, {other} {form(wanted)}: they must be of one "
                        "size and colour")


def take(images, num, flag, name):
    """The first `num` images, None: all; UserError if that is not there, or is below 10."""
    if len(images) < (num or 10):
        asked = f"--{flag} asks for {num}" if num else "at least 10 are needed"
        raise UserError(f"{name}: {len(images)} images, {asked}")
    return images[:num]


def load_as_is(path, cache_dir):
    """The images of a folder, zip, or npz (arr_0, uint8 NHWC, as sample.py writes it), to measure.

    A uint8 array (N, C, H, W), nothing cropped or resized; decoded ones are memory-mapped from
    cache_dir. Raises UserError, naming the file, for one that is missing, damaged, of floats, not
    square, or not of the first one's size and colour.
    """
    path = name = Path(path)
    kinds = {}
    try:
        if path.suffix == ".npz":
            array = np.load(path)["arr_0"]
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] not in (1, 3):
                raise ValueError(f"arr_0 is {array.dtype} {array.shape}, not uint8 (N, H, W, C)")
            return array.transpose(0, 3, 1, 2)
        files, reader = find_source("folder", path, "train")
        items, read = reader(files)
        for name in items:
            image = read(name)
            if image.mode == "F":
                raise ValueError("its values are floats, not 8 bits")
            kinds[name] = (1 if image.mode[0] in "1LI" else 3, *image.size[::-1])
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{name}: not readable as images ({error})") from error
    if not kinds:
        raise UserError(f"no images in {path}" if path.exists() else f"no such file: {path}")
    channels, height, width = shape = kinds[items[0]]
    if height != width:
        raise UserError(f"{items[0]} is not square")
    for name in items:
        same_kind(name, kinds[name], items[0], shape)
    return load_images("folder", width, channels, path, cache_dir)


def open_reference(name, args, shape, config=None, split="train", label="reference"):
    """The images to compare those of shape (C, H, W) with; the provenance gets their name and N.

    name: a data set of train.py, a folder, a zip or an npz. None: the run's own data set, clean.
    split: of a data set; "test" is refused where the source is a bare folder or zip.
    A data set is made as the run's images are, and the provenance says so; without a run, its own
    size and colour have to fit.
    """
    folder, cache = args.data_dir, args.cache_dir
    if config and name in (None, config["dataset"]):
        name = config["dataset"]
        folder, cache = folder or config["data_dir"], cache or config["cache_dir"]
    if name is None:
        raise UserError("--reference is needed: a data set, a folder, a zip or an npz")
    if name in DATASETS:
        size = PRESETS[name].get("image_size", shape[1])
        own = shape if name == "shapes" else (PRESETS[name].get("in_channels", 3), size, size)
        if config is None:
            same_kind(name, own, "the sample", shape)
        root = Path(folder or f"data/{name}")
        if split == "test" and name not in ("shapes", "celeba"):
            files = find_source(name, root, "test")[0]
            if files and files == find_source(name, root, "train")[0]:
                raise UserError(f"{root} has no test split: name a folder, zip or npz of held-out "
                                "images")
        images = first_here(args, lambda: load_images(name, *shape[1::-1], folder, cache, split))
        name = f"{name} {split}" + (f", made {form(shape)} of {form(own)}" if own != shape else "")
    else:
        images = first_here(args, lambda: load_as_is(name, args.cache_dir or CACHE))
    same_kind(name, images.shape[1:], "the sample", shape)
    num = args.reference_num if label == "reference" else None
    images = take(images, num, "reference_num", label)
    args.about.update({label: name, f"{label}_num": len(images), "image": form(shape)})
    return images


def open_run(path, args, *steps):
    """(net, its Diffusion, its settings as `train.settle` completes them); the weights are noted.

    Raises UserError as `load_run`, for a foreign config, or for more sampling steps than T.
    """
    net, diffusion, config, origin = load_run(path, args.device, args.raw)
    try:
        config = settle({}, {"dataset": None} | config)
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: its config is not one of train.py") from error
    if max(steps, default=0) > diffusion.T:
        raise UserError(f"--steps {max(steps)}: the model was trained with T = {diffusion.T}")
    args.about.update(origin)
    return net, diffusion, config


def open_samples(args):
    """SAMPLES: (shape (C, H, W), function that returns the images, the run's settings or None).

    A run is drawn from by that function: after whatever can be wrong has been found.
    """
    path = Path(args.samples)
    if (path / "ckpt.pt").exists() or path.suffix == ".pt":
        run = open_run(path, args, args.steps)
        args.about["num"] = args.num = args.num or 50_000
        return model_shape(run[2]), lambda: draw(run, args, "drawing", args.steps, args.sampler,
                                                 args.spacing), run[2]
    images = first_here(args, lambda: load_as_is(path, args.cache_dir or CACHE))
    images = take(images, args.num, "num", "samples")
    note = dict.fromkeys(DRAW)  # the flags did not draw them; sample.py may have
    beside = path.parent if path.name == "samples.npz" else path
    with contextlib.suppress(OSError, ValueError, TypeError):
        note |= json.loads((beside / "samples.json").read_text())
    args.about.update(note, num=len(images))
    return images.shape[1:], lambda: images, None


# ---------- Feature networks: FID's Inception, DINOv2, or any other


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=None):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        if padding is None:
            padding = [k // 2 if stride == 1 else 0 for k in kernel]
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


POOLS = {
    "mean": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "halve": lambda x: F.max_pool2d(x, 3, 2),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
}
ACROSS, ALONG, FORK = (1, 7), (7, 1), "1x3 and 3x1, side by side"


class Mixed(nn.Module):
    """Chains of convolutions (width, kernel[, stride]), concatenated; `branch_pool` pools first."""

    def __init__(self, c_in, pool, **chains):
        super().__init__()
        self.pool, self.chains, self.width = POOLS[pool], [], 0
        for name, convs in chains.items():
            width, layers = c_in, []
            for i, (c_out, kernel, *stride) in enumerate(convs, 1):
                key = f"{name}_{i}" if len(convs) > 1 else name
                fork = {f"{key}a": (1, 3), f"{key}b": (3, 1)}
                layers.append(fork if kernel == FORK else {key: kernel})
                for key, kernel in layers[-1].items():
                    self.add_module(key, Conv(width, c_out, kernel, *stride))
                width = c_out * len(layers[-1])
            self.chains.append((name, layers))
            self.width += width

    def forward(self, x):
        ends = []
        for name, layers in self.chains:
            h = self.pool(x) if name == "branch_pool" else x
            for keys in layers:
                h = torch.cat([getattr(self, key)(h) for key in keys], dim=1)
            ends.append(h)
        return torch.cat(ends, dim=1)


class Inception(nn.Module):
    """The Inception of 2015 that FID is defined by, its layers named as in the published file.

    uint8 (B, 3, H, W), resized to 299 -> pool3 features (B, 2048), logits without bias (B, 1008).
    Two quirks are its own: means that do not count the padding, and the maximum in the last block.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=0)
        self.width = 192
        for name, c in (("5b", 32), ("5c", 64), ("5d", 64)):
            self.add(name, "mean", branch1x1=[(64, 1)], branch5x5=[(48, 1), (64, 5)],
                     branch3x3dbl=[(64, 1), (96, 3), (96, 3)], branch_pool=[(c, 1)])
        self.add("6a", "halve", branch3x3=[(384, 3, 2)],
                 branch3x3dbl=[(64, 1), (96, 3), (96, 3, 2)], branch_pool=[])
        for name, c in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            self.add(name, "mean", branch1x1=[(192, 1)],
                     branch7x7=[(c, 1), (c, ACROSS), (192, ALONG)],
                     branch7x7dbl=[(c, 1), (c, ALONG), (c, ACROSS), (c, ALONG), (192, ACROSS)],
                     branch_pool=[(192, 1)])
        self.add("7a", "halve", branch3x3=[(192, 1), (320, 3, 2)],
                 branch7x7x3=[(192, 1), (192, ACROSS), (192, ALONG), (192, 3, 2)], branch_pool=[])
        for name, pool in (("7b", "mean"), ("7c", "max")):
            self.add(name, pool, branch1x1=[(320, 1)], branch3x3=[(384, 1), (384, FORK)],
                     branch3x3dbl=[(448, 1), (384, 3), (384, FORK)], branch_pool=[(192, 1)])
        self.fc = nn.Linear(self.width, 1008)

    def add(self, name, pool, **chains):
        block = Mixed(self.width, pool, **chains)
        self.add_module(f"Mixed_{name}", block)
        self.width = block.width

    def forward(self, x):
        x = F.interpolate(x.float() / 255, (299, 299), mode="bilinear", align_corners=False)
        x = (2 * x - 1).contiguous(memory_format=torch.channels_last)
        for name, layer in self.named_children():
            if name in ("Conv2d_3b_1x1", "Mixed_5b"):
                x = POOLS["halve"](x)
            x = layer(x) if name != "fc" else x.mean((2, 3))
        return x, x @ self.fc.weight.T


INCEPTION = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
             "pt_inception-2015-12-05-6726825d.pth")
HASH = "6726825d"


def load_inception(path=None):
    """The published network, or another one's weights under its names: (net, what it is).

    Without `path` torch.hub fetches the file, checked by its hash. A file that bears the published
    hash in its name must have it; another only has to fit, and is reported by its own.
    Raises UserError for no file and no network, a wrong hash, weights that do not fit.
    """
    cached = Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION).name)
    if path is None and not cached.exists():
        try:
            torch.hub.load_state_dict_from_url(INCEPTION, map_location="cpu", check_hash=True)
        except Exception as error:  # network, disk, hash: all end alike
            raise UserError(f"no Inception weights ({error}): fetch {INCEPTION} and name it with "
                            f"--inception, or put it at {cached}; --features random needs none"
                            ) from error
    path, net = Path(path or cached), Inception()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # missing, damaged or foreign: all end alike
        raise UserError(f"--inception {path}: not the weights of the FID Inception "
                        f"({str(error).splitlines()[0]})") from error
    known = digest.startswith(HASH)
    if HASH in path.name and not known:
        raise UserError(f"{path}: wrong hash {digest[:8]}, the published file has {HASH}")
    return net, f"Inception {digest[:8]}" + ("" if known else ", NOT the published network")


def random_inception():
    """The untrained network, seeded: He et al.'s initial weights, so that no layer fades."""
    net, g = Inception(), torch.Generator().manual_seed(0)
    for p in net.parameters():
        if p.dim() > 1:
            p.data.normal_(0, math.sqrt(2 / p[0].numel()), generator=g)
    return net, "random Inception (seed 0), NOT comparable with published figures"


class DINOv2(nn.Module):
    """ViT-L/14 by torch.hub: uint8 (B, 3, H, W), resized to 224 -> class token (B, 1024)."""

    def __init__(self):
        super().__init__()
        try:
            self.vit = torch.hub.load("facebookresearch/dinov2", "dinov2_vitl14", trust_repo=True)
        except Exception as error:  # no network, or what the hub's code raises
            raise UserError(f"--features dinov2: torch.hub could not load it ({error})") from error

    def forward(self, x):
        x = F.interpolate(x.float() / 255, (224, 224), mode="bicubic", antialias=True)
        return self.vit(normalize(x.clamp(0, 1), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


@torch.no_grad()
def load_torchscript(path, device, shape):
    """Any TorchScript module, uint8 (B, 3, H, W) -> features (B, d): (net, what it is).

    Tried on one black image of (C, H, W); UserError where it does not bear that.
    """
    try:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        net = torch.jit.load(path, map_location=device).eval()
        ends = net(torch.zeros(1, 3, *shape[1:], dtype=torch.uint8, device=device))
        ends = ends[0] if isinstance(ends, tuple) else ends
        if ends.dim() != 2:
            raise ValueError(f"the output is {tuple(ends.shape)}, not (B, d)")
    except Exception as error:  # missing, no TorchScript, or anything that it raises
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[-1]
        raise UserError(f"--features {path}: neither inception, random, dinov2, pixels nor "
                        f"TorchScript for {form(shape)} ({reason})") from error
    return net, f"{Path(path).name} ({digest[:8]}), NOT comparable with published figures"


def load_features(args, shape):
    """What --features names, as a function for `extract`: features (B, d), and logits if it can.

    shape: (C, H, W) of the images. Grey images are repeated to three channels, but for "pixels".
    """
    nets = {"inception": lambda: first_here(args, lambda: load_inception(args.inception)),
            "random": random_inception, "pixels": lambda: (nn.Flatten(), "pixels, NOT comparable"),
            "dinov2": lambda: (first_here(args, DINOv2), "DINOv2 ViT-L/14")}
    name = args.features
    net, args.about["features"] = nets.get(name, lambda: load_torchscript(name, args.device,
                                                                          shape))()
    net = net.to(args.device, memory_format=torch.channels_last).eval()

    def look(x, index):
        ends = net(x if name == "pixels" else x.expand(-1, 3, -1, -1))
        return ends if isinstance(ends, tuple) else (ends,)

    return look


# ---------- Features (N, d) in blocks of rows

ROWS, COLUMNS = 4096, 8192


def mean_of(rows):
    """Mean (d,) in float64."""
    return sum(block.double().sum(0) for block in rows.split(ROWS)) / len(rows)


@full_precision()
def neighbours(x, y, k, prepare, args, title, same=False, radii=None):
    """The k rows of y with the least |x - y|^2 - radius(y)^2, for each row of x (N, d).

    Returns (these values, float64 (N, k), ascending; indices of the rows). radii None: zero.
    prepare: applied to float rows; centring them keeps the rounding of |y|^2 - 2 x.y small. That
        only chooses candidates, a few more than k: values are of differences, in float64.
    same: x is y, and a row is no neighbour of itself; a duplicate of it is one, at distance 0.
    """
    device = args.exact
    wide = max(1, x.shape[1] // 2048)
    few, many = max(1, ROWS // wide), max(1, COLUMNS // wide)
    minus = torch.zeros(len(y)) if radii is None else radii.square()
    found = []
    with ticker(title, len(x)) as tick:
        for i in range(0, len(x), few):
            a = prepare(x[i:i + few].to(device).float())
            value = torch.empty(len(a), 0, device=device)
            index = value.long()
            for j in range(0, len(y), many):
                b = prepare(y[j:j + many].to(device).float())
                row = b.square().sum(1) - minus[j:j + many].to(b)
                new = torch.addmm(row[None], a, b.T, alpha=-2)
                if same:
                    low, high = max(i, j), min(i + len(a), j + len(b))
                    new[range(low - i, high - i), range(low - j, high - j)] = math.inf
                new, at = new.topk(min(k + 4, len(b)), largest=False)
                value, index = torch.cat([value, new], 1), torch.cat([index, at + j], 1)
            value, at = value.topk(min(k + 4, value.shape[1]), largest=False)
            index = index.gather(1, at).cpu()
            part = max(1, 256 // wide)
            for rows, near, far in zip(*(s.split(part) for s in (a, index, value.isinf()))):
                b = prepare(y[near.flatten()].to(device).float()).view(*near.shape, -1)
                exact = (rows[:, None].double() - b.double()).square().sum(-1).cpu() - minus[near]
                exact, order = exact.masked_fill(far.cpu(), math.inf).sort(dim=1)
                found.append((exact[:, :k], near.gather(1, order)[:, :k]))
            tick(i + len(a))
    values, indices = zip(*found)
    return torch.cat(values), torch.cat(indices)


# ---------- Sampling, attacked or not


def draw(run, args, title, steps, sampler, spacing, hook=None):
    """args.num images of a run, as sample.py draws them: uint8 (N, C, H, W) on every process.

    hook: function(image indices) -> the `perturb` of `sample`.  args: rank, world, device, seed,
    num, batch_size.
    """
    net, diffusion, config = run
    shape = model_shape(config)
    mine = range(args.rank, args.num, args.world)
    parts = [torch.empty(0, *shape).byte()]
    with ticker(title, args.num, args.rank == 0) as tick:
        for first in range(0, len(mine), args.batch_size):
            batch = mine[first:first + args.batch_size]

            def progress(i, steps):
                tick((first + len(batch) * i / steps) * args.num / len(mine))

            noise = image_noise(args.seed, batch, shape, args.device)
            perturb = hook and hook(batch)
            x = sample(net, diffusion, noise, sampler, steps, spacing, perturb=perturb,
                       progress=progress)
            parts.append(to_uint8(x).cpu())
    return gather(torch.cat(parts), args.num, args.world, args.device).numpy()


class NextLook(nn.Module):
    """What the denoiser will see after the coming step: the mean over `noises` of D(x_prev).

    (x (B, ...), t (B,) of one value) -> (B, ...). after: dict t -> prev, the times that the
    sampler visits; noises: a draw of the sampler's noise each, kept while an attack ascends.
    For a step without noise, one look; else len(noises) of them, and a call of the network before.
    """

    def __init__(self, net, diffusion, after, sampler, noises):
        super().__init__()
        self.denoiser = Denoiser(net, diffusion)
        self.after, self.sampler, self.noises = after, sampler, noises

    def forward(self, x, t):
        now = t[0].item()
        prev = self.after[now]
        eps = self.denoiser.net(x, t)
        looks = []
        for noise in self.noises if self.sampler == "ddpm" and prev >= 0 else self.noises[:1]:
            y = denoise_step(lambda x, t: eps, self.denoiser.diffusion, x, now, prev, self.sampler,
                             lambda: noise)
            looks.append(y if prev < 0 else self.denoiser(y, torch.full_like(t, prev)))
        return sum(looks) / len(looks)


def attacker(net, ascent_steps, diffusion, shape, args, norms):
    """For `draw`: function(image indices) -> the hook that pushes their states while sampling.

    net: whose denoiser to attack.  ascent_steps: 0 for a random push of the same norm.
    args: seed, steps, spacing, sampler; share of the steps that is attacked, evenly spread; norm
        and budget as `trajectory_attack`; eot, how many of the sampler's noises to average over.
    norms: (num,), filled with each image's largest push, in the ball's own norm and units.
    """
    path = visits(diffusion.T, args.steps, args.spacing)
    pushes = max(1, round(args.share * len(path)))
    pushed = {path[int((i + 0.5) * len(path) / pushes)][0] for i in range(pushes)}

    def hook(batch):
        # streams of their own, so that the sampler's noise is that of the images left alone
        noise, view = image_noise(args.seed, batch, shape, args.device, ATTACK), None
        if args.eot and ascent_steps:
            coming = image_noise(args.seed, batch, shape, args.device, EOT)
            fixed = [coming() for _ in range(args.eot)]
            view = NextLook(net, diffusion, dict(path), args.sampler, fixed)
        push = trajectory_attack(view or Denoiser(net, diffusion), diffusion, pushed, noise,
                                 args.norm, args.budget, ascent_steps)

        def watched(x, t):
            y = push(x, t)
            omega = ((y - x) / diffusion.s[t]).flatten(1)
            size = omega.abs().amax(1) if args.norm == "linf" else mean_square(omega).sqrt()
            norms[batch] = torch.maximum(norms[batch], size.cpu())
            return y

        return watched

    return hook


# ---------- Metrics


def moments(rows):
    """Mean (d,) and covariance (d, d), N - 1 in its denominator, of (N, d), in float64."""
    mean = mean_of(rows)
    cov = sum((block.double() - mean).T @ (block.double() - mean) for block in rows.split(ROWS))
    return mean, cov / (len(rows) - 1)


def frechet(mean1, cov1, mean2, cov2):
    """|mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)): Heusel et al. 2017.

    The root's trace is the sum of the roots of the eigenvalues of cov1^(1/2) cov2 cov1^(1/2).
    """
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item()


def inception_score(logits, splits=10):
    """exp(mean KL(p(y|x) || p(y))) of each split, in file order: (mean, std over the splits)."""
    scores = []
    for i in range(splits):
        log_p = logits[i * len(logits) // splits:(i + 1) * len(logits) // splits].double()
        log_p = log_p.log_softmax(1)
        marginal = log_p.logsumexp(0) - math.log(len(log_p))
        scores.append((log_p.exp() * (log_p - marginal)).sum(1).mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def kid(fake, real, subsets=100, size=1000, seed=2020):
    """Unbiased MMD^2, kernel (x.y / d + 1)^3, over random subsets: (mean, std over subsets).

    Seed and order of drawing are torch-fidelity's. A size above a set's is cut to it.
    """
    size, values = min(size, len(fake), len(real)), []
    rng = np.random.RandomState(seed)

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    for _ in range(subsets):
        x, y = (rows[rng.choice(len(rows), size, replace=False)].double() for rows in (fake, real))
        within = sum(k.sum() - k.trace() for k in (kernel(x, x), kernel(y, y)))
        values.append((within / (size * (size - 1)) - 2 * kernel(x, y).mean()).item())
    return float(np.mean(values)), float(np.std(values))


# Wavelet coefficients are counted in bins of 1/4080: those of uint8 images fall on every 16th
BINS = 4080


def haar(x):
    """|Finest diagonal Haar coefficients| of images (B, C, H, W), a tensor or an array.

    They are (a - b - c + d) / 2 of 2x2 pixels, the edge of an odd size left out.
    """
    a, b, c, d = (x[..., i:x.shape[-2] // 2 * 2:2, j:x.shape[-1] // 2 * 2:2]
                  for i in (0, 1) for j in (0, 1))
    return abs(a - b - c + d) / 2


def haar_counts(x):
    """Histogram, long (8 BINS,), of `haar` of images (B, C, H, W) in [-1, 1], channels alike."""
    index = (haar(x) * BINS).round().long().clamp(max=8 * BINS - 1)
    return torch.bincount(index.flatten().cpu(), minlength=8 * BINS)


def noise_std(counts):
    """Donoho's estimate of the noise's std on the [-1, 1] scale: median |coefficient| / 0.6745.

    counts: of `haar_counts`, summed over images: one median over all of them.
    """
    below, n = counts.cumsum(0), counts.sum().item()
    middle = torch.searchsorted(below, torch.tensor([(n + 1) // 2, n // 2 + 1]))
    return middle.double().mean().item() / BINS / 0.6745


def residual_noise(images):
    """`noise_std` of uint8 images (N, C, H, W)."""
    size = max(1, 2**24 // math.prod(images.shape[1:]))
    return noise_std(sum(haar_counts(torch.from_numpy(images[i:i + size] / np.float32(127.5) - 1))
                         for i in range(0, len(images), size)))


def pixel_std(images):
    """Standard deviation over all values of uint8 images (N, C, H, W), on the [-1, 1] scale."""
    counts = sum(np.bincount(images[i:i + 1000].ravel(), minlength=256)
                 for i in range(0, len(images), 1000))
    levels = np.arange(256) / 127.5
    mean = np.average(levels, weights=counts)
    return math.sqrt(np.average((levels - mean) ** 2, weights=counts))


def brightness_std(images):
    """Standard deviation, over uint8 images (N, C, H, W), of their means, on the [-1, 1] scale."""
    means = [images[i:i + 1000].mean((1, 2, 3)) for i in range(0, len(images), 1000)]
    return float(np.concatenate(means).std()) / 127.5


def noise_images(images, level=0.3):
    """Share of uint8 images (N, C, H, W) that are mostly noise: their own `noise_std` > level.

    `residual_noise`, a median over all images, does not see a few of them.
    """
    medians = [np.median(haar(images[i:i + 1000] / 127.5), axis=(1, 2, 3))
               for i in range(0, len(images), 1000)]
    return float((np.concatenate(medians) > 0.6745 * level).mean())


# What is said of each set without a network: by JSON key
PLAIN = {"residual_noise": residual_noise, "pixel_std": pixel_std,
         "brightness_std": brightness_std, "noise_images": noise_images}


def describe(images, look, args, title, keep=False):
    """What the figures need of a set (N, C, H, W): a dict of tensors, on the first process alone.

    look: of `load_features`.  keep: cache it, keyed by the images' content and the network.
    """
    digest = hashlib.sha256(repr(images.shape).encode())
    for i in range(0, len(images), 1000):
        digest.update(np.ascontiguousarray(images[i:i + 1000]))
    args.about.setdefault("sha256", {})[title] = digest.hexdigest()[:16]
    digest.update(f"{args.about['features']}, {', '.join(PLAIN)}".encode())
    path = Path(args.cache_dir or CACHE, f"statistics-{digest.hexdigest()[:16]}.npz")
    # the first process decides for all
    found = torch.tensor([keep and path.exists()])
    found = gather(found, args.world, args.world, args.device)[0]
    if keep and not found and args.rank == 0:
        check_writable(path)
    rows, *logits = (None,) if found else extract(images, look, args, title)
    if args.rank:
        return {}
    if found:
        try:
            with np.load(path) as file:
                return {name: torch.from_numpy(file[name]) for name in file}
        except Exception as error:  # a damaged file may raise anything
            raise UserError(f"{path} is damaged: delete it, and it is made anew") from error
    mean, cov = moments(rows)
    centred = functools.partial(torch.sub, other=mean.float().to(args.exact))
    nearest = neighbours(rows, rows, 3, centred, args, f"{title}: radii", same=True)[0]
    stats = {"features": rows, "mean": mean, "cov": cov, "radii": nearest[:, -1].sqrt(),
             **{name: torch.tensor(of(images), dtype=torch.float64) for name, of in PLAIN.items()}}
    if keep:
        write_atomically(path, lambda temporary: save_npz(temporary, **stats))
    return {**stats, "logits": logits[0] if logits else None}


def inside(some, others, args, title):
    """Share of `some` rows inside a ball of `others`, edge included (Kynkaanniemi et al. 2019).

    A ball reaches to the 3rd nearest of its own set. Precision: of generated rows in the balls of
    real ones. Recall: the other way round.
    """
    centred = functools.partial(torch.sub, other=others["mean"].float().to(args.exact))
    margin, at = neighbours(some["features"], others["features"], 1, centred, args, title,
                            radii=others["radii"])
    return (margin <= 1e-6 * others["radii"][at].square()).double().mean().item()


def figures(fake, real, args):
    """Quality of a described set against another: a dict by JSON key, {} but on the first process.

    fid, is_mean, is_std (None without logits), kid_mean, kid_std, precision, recall, and PLAIN's
    of both sets.
    """
    if args.rank:
        return {}
    few, d = min(len(fake["features"]), len(real["features"])), fake["features"].shape[1]
    args.about["kid_subset"] = min(few, 1000)
    if few <= d and "warning" not in args.about:
        args.about["warning"] = f"N = {few} for {d} features: rank-deficient, FID biased upwards"
        print(f"warning: {args.about['warning']}", file=sys.stderr)
    kid_mean, kid_std = kid(fake["features"], real["features"])
    is_mean, is_std = (None, None) if fake["logits"] is None else inception_score(fake["logits"])
    return {
        "fid": frechet(fake["mean"], fake["cov"], real["mean"], real["cov"]),
        "is_mean": is_mean, "is_std": is_std, "kid_mean": kid_mean, "kid_std": kid_std,
        "precision": inside(fake, real, args, "precision"),
        "recall": inside(real, fake, args, "recall"),
        **{f"{name}{end}": of[name].item()
           for name in PLAIN for end, of in (("", fake), ("_reference", real))},
    }


def scorer(args, shape, config=None):
    """--reference described once: function (images, title) -> their `figures` against it.

    It keeps the first images of each set for --png.
    """
    images = open_reference(args.reference, args, shape, config)
    if args.features == "pixels" and math.prod(shape) > 8192:
        raise UserError(f"--features pixels: {math.prod(shape)} values an image, at most 8192 have "
                        "a covariance to compute with")
    look = load_features(args, shape)
    real = describe(images, look, args, "reference", keep=True)

    def score(images, title):
        args.strips.append(np.array(images[:16]))  # a copy: a view would keep them all
        return figures(describe(images, look, args, title), real, args)

    return score


# ---------- Commands: (args) -> rows of the table


def quality(args):
    """FID, IS, KID, precision, recall of images, or of a run; residual noise, pixel std, the std of
    the images' brightness, the share of images that are noise, of both sets."""
    shape, load, config = open_samples(args)
    score = scorer(args, shape, config)
    return [score(load(), "samples")]


def few_steps(args):
    """The quality figures for each number of sampling steps, sampler and spacing."""
    run = open_run(args.run, args, *args.steps)
    score, rows = scorer(args, model_shape(run[2]), run[2]), []
    for sampler, spacing, steps in itertools.product(args.sampler, args.spacing, args.steps):
        title = f"{sampler} {spacing} {steps}"
        row = score(draw(run, args, title, steps, sampler, spacing), title)
        rows.append({"sampler": sampler, "spacing": spacing, "steps": steps, **row})
    return rows


def attack(args):
    """The quality figures of images whose sampling is attacked, the state x moved to x + s_t omega.

    Beside them the same seeds left alone, and pushed at random by the same norm. mse: to the images
    left alone, on the [-1, 1] scale. norm_min, norm_max: of the images' largest omegas.
    """
    run = open_run(args.run, args, args.steps)
    shape, rows = model_shape(run[2]), []
    attacks = {"none": None, "random": (run[0], 0), "white box": (run[0], args.attack_steps)}
    if args.surrogate:
        net, _, config, args.about["surrogate"] = load_run(args.surrogate, args.device, args.raw)
        same_kind(args.surrogate, model_shape(config), args.run, shape)
        attacks["transfer"] = (net, args.attack_steps)
    score = scorer(args, shape, run[2])
    for name, how in attacks.items():
        norms = torch.zeros(args.num)
        hook = how and attacker(*how, run[1], shape, args, norms)
        images = draw(run, args, name, args.steps, args.sampler, args.spacing, hook)
        norms = gather(norms[args.rank::args.world], args.num, args.world, args.device)
        clean = images if how is None else clean
        mse = np.mean([np.mean((a / 127.5 - b / 127.5) ** 2) for a, b in zip(images, clean)])
        rows.append({"attack": name, **score(images, name), "mse": mse.item(),
                     "norm_min": norms.min().item(), "norm_max": norms.max().item()})
    return rows


def memorization(args):
    """Whether samples are copies: the nearest and second nearest training image, d1 and d2 away.

    copied: the share with d1 < d2 / 3. similar: median, 95 % and 99 % quantile of the cosine
    similarity to the most similar training image (pixels: less the mean image), and the shares
    above .9, .95, .99. Beside it held-out images, the curve of an honest model, and the samples
    blurred, since smoothness alone changes similarity. Exact duplicates in training count once.
    """
    shape, load, config = open_samples(args)
    reach = math.ceil(3 * args.blur)
    if reach >= shape[-1]:
        raise UserError(f"--blur {args.blur}: too wide for images of {shape[-1]} pixels a side")
    train = open_reference(args.reference, args, shape, config)
    if config and args.reference in (None, config["dataset"]):
        train = some_of(train, config["limit"], config["seed"])
        args.about["reference_num"] = len(train)
    held = args.holdout and open_reference(args.holdout, args, shape, config, "test", "holdout")
    look = load_features(args, shape)
    images = load()

    def blurred(x, index):
        return look(gaussian_blur(x, 2 * reach + 1, args.blur), index)

    _, once = np.unique([hashlib.sha256(x.tobytes()).digest() for x in train], return_index=True)
    once.sort()
    args.about["duplicates_left_out"] = len(train) - len(once)
    base = extract(train, look, args, "training set", once)[0]
    sets = {"samples": (images, look), "blurred": (images, blurred)}
    sets |= {"held out": (held, look)} if args.holdout else {}
    sets = {name: extract(*some, args, name)[0] for name, some in sets.items()}
    if args.rank:
        return []
    pixels, rows = args.features == "pixels", []
    mean = mean_of(base).float().to(args.exact)

    def centred(x):
        return (x - mean) / (127.5 if pixels else 1)

    for name, some in sets.items():
        squares, near = neighbours(some, base, 2, centred, args, name)
        d1, d2 = squares.sqrt().T
        turn = neighbours(some, base, 1, lambda x: F.normalize(centred(x) if pixels else x), args,
                          f"{name}: cosine")[0]
        cosine = 1 - turn[:, 0] / 2
        rows.append({
            "set": name, "n": len(some), "copied": (d1 < d2 / 3).double().mean().item(),
            "d1": d1.median().item(), "d1/d2": (d1 / d2).nanmedian().item(),
            **{f"similar {q:.0%}": cosine.quantile(q).item() for q in (0.5, 0.95, 0.99)},
            **{f"> {p}": (cosine > p).double().mean().item() for p in (0.9, 0.95, 0.99)}})
        if name == "samples":
            closest = (d1 / d2).nan_to_num(1).argsort()[:32].numpy()
            pairs = np.stack([images[closest], train[once[near[closest, 0].numpy()]]], axis=1)
    save_grid(pairs.reshape(-1, *shape), args.png)
    print(f"{args.png}: pairs of a sample and its nearest training image, least d1 / d2 first")
    return rows


def denoise(args):
    """Held-out images plus Gaussian noise, denoised from the time step of nearest s / sqrt(a).

    One-shot: D(x_t). Ancestral: DDPM steps from t down. psnr: dB, peak 2, the mean over images;
    residual: `residual_noise`, std on the [-1, 1] scale.
    """
    net, diffusion, config = open_run(args.run, args)
    shape, rows = model_shape(config), []
    images = open_reference(args.reference, args, shape, config, split="test")
    images = take(images, args.num or min(1000, len(images)), "num", "held-out images")
    args.about["num"] = len(images)
    levels = ((1 - diffusion.alpha_bar) / diffusion.alpha_bar).sqrt()
    for std in args.noise_std:
        t = (levels - std).abs().argmin().item()
        counts = torch.zeros(3, 8 * BINS, dtype=torch.long)

        def look(batch, index):
            clean = batch.float() / 127.5 - 1
            noisy = clean + std * image_noise(args.seed, index, shape, args.device, ATTACK)()
            x = diffusion.sqrt_a[t] * noisy
            batch_t = torch.full((len(x),), t, device=x.device)
            once = diffusion.x0_from_eps(x, batch_t, net(x, batch_t))
            noise = image_noise(args.seed, index, shape, args.device)
            for now in range(t, -1, -1):
                x = denoise_step(net, diffusion, x, now, now - 1, "ddpm", noise)
            ends = [noisy, once.clamp(-1, 1), x.clamp(-1, 1)]
            counts.add_(torch.stack([haar_counts(end) for end in ends]))
            # an exact image, such as a black one, counts as 100 dB
            return [-10 * (mean_square(end - clean) / 4).clamp(min=1e-10).log10() for end in ends]

        psnrs = extract(images, look, args, f"noise {std}")
        # a process beyond the last image has looked at one that is not its own
        parts = gather(counts[None], args.world, args.world, args.device)[:len(images)]
        row = {"noise_std": std, "t": t, "clean residual": residual_noise(images)}
        for name, psnr, part in zip(("input", "one-shot", "ancestral"), psnrs, parts.sum(0)):
            row |= {f"{name} psnr": psnr.mean().item(), f"{name} residual": noise_std(part)}
        rows.append(row)
    return rows


def alarm(args):
    """J under 10 ascent steps over J under the training step, at five time steps, raw weights.

    On the first --num training images as training saw them, see `train.overfit`.
    """
    net, diffusion, config = open_run(args.run, args)
    images = open_reference(None, args, model_shape(config), config)
    images = some_of(images, config["limit"], config["seed"])
    index = np.arange(min(args.num, len(images)))
    args.about["num"] = len(index)
    kinds = choose_corruption(len(images), config["noise_p"], config["outlier_p"], config["seed"])
    x0 = training_images(images, index, kinds, config["noise_std"], config["seed"])
    # what a run older than a field did is the field's default
    fields = [key for key in Perturbation.__dataclass_fields__ if key in config]
    cfg = Perturbation(**{key: config[key] for key in fields})
    times = alarm_times(diffusion.T)
    found = overfit(net, diffusion, x0.to(args.device), times, cfg)
    return [{"t": t, "J_pgd10": pgd, "J_train": own, "ratio": pgd / own if own else None}
            for t, (pgd, own) in zip(times, found)]


# ---------- Command line

positive, whole, ten = number(float, 1e-9), number(int, 1), number(int, 10)


def png(text):
    """An argparse type: the path of a PNG."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return Path(text)


def listed(kind, *choices):
    """An argparse type: values with commas between, each parsed by `kind`, or one of `choices`."""

    def parse(text):
        values = [kind(part) for part in text.split(",")]
        if choices and not set(values) <= set(choices):
            raise argparse.ArgumentTypeError(f"{text!r} is not of {', '.join(choices)}")
        return values

    return parse


# name: (default, type, list of choices or None for a switch, help)
FLAGS = {
    "reference": (None, str, "a data set of train.py, a folder, zip, or npz; None: the run's own"),
    "holdout": (None, str, "held-out images, likewise; of a data set the test split"),
    "data_dir": (None, str, "folder or zip of the data set; None: the run's, or data/NAME"),
    "cache_dir": (None, str, f"for statistics and decoded images; None: {CACHE}; for a data set "
                             "the run's, or beside it"),
    "reference_num": (None, ten, "only the first so many images of it; None: all"),
    "features": ("inception", str, "inception; random: untrained, offline, not comparable; dinov2; "
                                   "pixels; or FILE.pt, TorchScript uint8 NCHW -> (B, d)"),
    "inception": (None, str, "file of the Inception's weights; None: fetched by torch.hub"),
    "num": (None, ten, "images to draw, or take; None: 50000 to draw, all to take"),
    "sampler": ("ddim", ["ddim", "ddpm"], "ddim: deterministic; ddpm: ancestral"),
    "steps": (100, whole, "network calls per image"),
    "spacing": ("respaced", ["respaced", "naive"], "naive: one-step updates at "
                 "strided time steps; leaves noise"),
    "seed": (0, number(int, 0), "seed of image 0, 1, ..."),
    "raw": (False, None, "raw weights instead of the EMA"),
    "norm": ("l2", ["l2", "linf"], "l2 or linf, the attack's ball"),
    "budget": (0.1, positive, "its radius in units of s_t, a root mean square or largest element"),
    "attack_steps": (5, whole, "ascent steps"),
    "share": (0.5, number(float, 1e-9, 1), "of the sampling steps that is attacked, evenly spread"),
    "eot": (1, number(int, 0), "attack D after the next step, clipping included, in the mean over "
                               "so many noises of ddpm; 0: D now, which overlooks the clipping"),
    "surrogate": (None, str, "second run, to attack through as well (transfer)"),
    "blur": (1.0, positive, "std of the blurred control, in pixels"),
    "png": (None, png, "PNG with a row of the first 16 images for each row of the table"),
    "noise_std": ([0.1, 0.2], listed(positive), "std of the noise on the [-1, 1] scale"),
    "batch_size": (50, whole, "images at a time, per process; does not change the figures"),
    "device": ("auto", str, "cpu, cuda, cuda:1, mps"),
    "json": (None, Path, "file for the figures and their provenance"),
}
DRAW = ["num", "sampler", "steps", "spacing", "seed", "raw"]
QUALITY = ["reference", "data_dir", "cache_dir", "reference_num", "features", "inception", *DRAW,
           "batch_size", "png"]
MACHINE = ["device", "json"]
# name: (function, its subject, flags, flags that are otherwise here)
COMMANDS = {
    "quality": (quality, "samples", QUALITY, {}),
    "memorization": (memorization, "samples", [*QUALITY, "holdout", "blur"], {
        "features": ("pixels", *FLAGS["features"][1:]),
        "png": (Path("out/memorization.png"), png, "PNG of the closest pairs")}),
    "attack": (attack, "run", [*QUALITY, "norm", "budget", "attack_steps", "share", "eot",
                               "surrogate"], {"num": (5000, ten, "images to draw")}),
    "steps": (few_steps, "run", QUALITY, {
        "num": (5000, ten, "images to draw"),
        "steps": ([1000, 500, 300, 100, 50, 20, 10], listed(whole), "network calls per image"),
        "sampler": (["ddpm", "ddim"], listed(str, "ddpm", "ddim"), "of ddpm, ddim"),
        "spacing": (["respaced"], listed(str, "respaced", "naive"),
                    "of respaced, naive; naive leaves noise")}),
    "denoise": (denoise, "run", ["reference", "data_dir", "cache_dir", "num", "seed", "raw",
                                 "noise_std", "batch_size"],
                {"num": (None, ten, "held-out images; None: 1000, or all")}),
    "overfit": (alarm, "run", ["data_dir", "cache_dir", "num"],
                {"num": (16, whole, "training images")}),
}


def parse_args(argv=None):
    """The command line; UserError where it is wrong."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(dest="command", required=True, metavar="command")
    for name, (function, subject, flags, special) in COMMANDS.items():
        text = " ".join(function.__doc__.split())
        q = commands.add_parser(name, help=text.split(". ")[0], description=text)
        # for a command without these flags; those that it has set their own
        q.set_defaults(about=["command", subject, *flags], reference_num=None, png=None,
                       raw=name == "overfit")
        q.add_argument(subject, help="run folder of train.py, or a checkpoint file" + (
            "; or images: folder, zip or npz" if subject == "samples" else ""))
        for flag in [*flags, *MACHINE]:
            default, kind, text = special.get(flag, FLAGS[flag])
            shown = ",".join(map(str, default)) if isinstance(default, list) else default
            options = {"choices": kind} if isinstance(kind, list) else {"type": kind}
            options = options | {"metavar": ""} if kind else {"action": "store_true"}
            text += f" ({shown})" if kind and default is not None else ""
            q.add_argument(f"--{flag}", default=default, help=text, **options)
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        if value == "":
            raise UserError(f"{name} is empty")
    return args


def main(argv=None):
    """Entry point; see the module's docstring."""
    # a TorchScript file is what the user asks for, deprecated or not
    warnings.filterwarnings("ignore", ".*torch.jit.load")
    args = parse_args(argv)
    args.rank, args.local, args.world, args.device = setup(args.device)
    args.exact = torch.device("cpu") if args.device.type == "mps" else args.device  # has float64
    args.about = {name: getattr(args, name) for name in args.about}
    if args.rank == 0:
        print(f"output {args.json or 'on the screen alone; --json FILE keeps it'}", flush=True)
        for path in filter(None, (args.json, args.png)):
            check_writable(path)
    if args.world > 1:
        start_group(args.device)
    args.strips = []
    rows = COMMANDS[args.command][0](args)
    if args.world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if args.rank:
        return
    cells = [[f"{v:.5g}" if isinstance(v, float) else str(v) for v in row]
             for row in (rows[0], *(row.values() for row in rows))]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    print("; ".join(f"{key} {value}" for key, value in args.about.items() if value is not None))
    if args.png and args.strips:
        save_grid(np.concatenate(args.strips), args.png, len(args.strips[0]))
    if args.json:
        data = {**(rows[0] if args.command == "quality" else {"rows": rows}),
                "provenance": args.about}
        text = json.dumps(data, indent=2, default=str) + "\n"
        write_atomically(args.json, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    run_cli(main)
