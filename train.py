"""Train a diffusion model: plainly (dsm), or with random or adversarial equivariance.

    python train.py                                    embedded shapes, no network, a laptop's CPU
    python train.py --dataset cifar10 --mode adv --noise_p 0.9 --noise_std 0.2
    torchrun --nproc_per_node=8 train.py --dataset celeba --mode adv
    python train.py --dataset cifar10 --mode adv --resume

Writes out/<dataset>-<mode>/: ckpt.pt, log.jsonl, config.json, data.png, samples_<step>.png.
"""

import argparse
import contextlib
import copy
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import signal
import time
import zipfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from losses import MODES, READINGS, Diffusion, Perturbation
from model import UNET_KEYS, UNet, UserError, read_checkpoint, run_cli
from sample import (Parser, duration, image_noise, mix, number, sample, save_grid, setup,
                    start_group, to_uint8, write_atomically)

# ---------------------------------------------------------------------------------------------
# Settings: a default, a preset of the data set, a resumed run's config, a flag; the later wins

share, size = number(float, 0, 1), number(float, 0)
below_one, count, natural = number(float, 0, 1, open_high=True), number(int, 1), number(int, 0)
ON_OFF = argparse.BooleanOptionalAction


def widths(text):
    """An argparse type: "1,2,2" -> (1, 2, 2); "0" -> (), none."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = (-1,)
    if values != (0,) and min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas between")
    return () if values == (0,) else values


# name: (default, type, list of choices or ON_OFF, help)
FLAGS = {
    "what to train": {
        "dataset": ("shapes", None, "data set, and with it the preset"),
        "mode": ("adv", list(MODES), "objective"),
        "data_dir": (None, str, "folder or zip with the data; else ./data, filled by download"),
        "cache_dir": (None, str, "folder of the decoded images; else beside the data"),
    },
    "corruption of the training set, frozen per image": {
        "noise_p": (0.0, share, "share of images with Gaussian noise, 0 to 1"),
        "noise_std": (0.0, size, "its standard deviation on the [-1, 1] scale"),
        "outlier_p": (0.0, share, "share of images replaced by uniform noise, 0 to 1"),
    },
    "regulariser (losses.Perturbation)": {
        "reading": ("sigma", list(READINGS), "how the radius follows the noise schedule"),
        "lam": (0.3, size, "weight lambda"),
        "rho": (2.0, number(float, 1e-3), "exponent of the radius"),
        "beta_min": (8 / 255, number(float, 1e-6), "smallest random beta"),
        "beta_max": (None, number(float, 1e-6), "largest; None: 1 for sigma, 16/255 for epsilon"),
        "ascent_steps": (1, count, "gradient steps of the adversarial perturbation"),
        "ascent_norm": ("linf", ["linf", "l2"], "sign steps in the box, or along the gradient"),
        "ascent_step": (1.25, size, "size of a sign step, in radii"),
        "detach_target": (False, ON_OFF, "no gradient through the unperturbed branch"),
    },
    "network and diffusion": {
        "image_size": (64, count, "pixels a side"),
        "in_channels": (3, [1, 3], "1 grey, 3 RGB"),
        "channels": (128, count, "width of the first level"),
        "mult": ((1, 2, 2, 2, 4), widths, "width of each level / channels, with commas"),
        "blocks": (2, count, "residual blocks a level"),
        "attention": ((16,), widths, "resolutions with attention, in pixels; 0 for none"),
        "dropout": (0.1, below_one, "dropout probability"),
        "T": (1000, count, "diffusion steps"),
        "schedule": ("linear", ["linear", "cosine"], "noise schedule"),
    },
    "training": {
        "batch_size": (128, count, "images a step, over all processes and accumulation"),
        "accum": (1, count, "parts that a process splits its share of the batch into"),
        "steps": (500_000, count, "optimiser steps in all"),
        "lr": (2e-4, size, "Adam's learning rate"),
        "warmup": (5000, natural, "steps of linear warm-up, 0 for none"),
        "ema": (0.9999, below_one, "decay of the weights' moving average"),
        "grad_clip": (1.0, size, "largest gradient norm, 0 for no limit"),
        "flip": (True, ON_OFF, "random horizontal flips"),
        "seed": (0, natural, "seed of everything random, corruption included"),
    },
    "machine": {
        "device": ("auto", str, "cpu, cuda, cuda:1, mps"),
        "amp": ("auto", ["auto", "off", "bf16", "fp16"], "auto: bf16 or fp16 on CUDA, else off"),
        "compile": (None, ON_OFF, "torch.compile; None: on with CUDA"),
    },
    "reports, each in steps, 0 is off": {
        "log_every": (100, natural, "a line on the screen and in log.jsonl"),
        "sample_every": (10_000, natural, "a grid of EMA samples"),
        "save_every": (5000, natural, "a checkpoint (there is always one at the end)"),
        "keep": (1, count, "checkpoints kept: ckpt.pt, and older ones as ckpt_<step>.pt"),
    },
}
PRESETS = {
    "shapes": dict(
        image_size=16, channels=32, mult=(1, 2, 2), blocks=1, attention=(8,), dropout=0.0,
        batch_size=64, steps=1000, lr=1e-3, warmup=100, ema=0.995,
        log_every=20, sample_every=250, save_every=250),
    "fashion_mnist": dict(
        image_size=28, in_channels=1, channels=64, mult=(1, 2, 2), attention=(14,), flip=False,
        steps=50_000, warmup=1000, ema=0.999, sample_every=2500, save_every=1000),
    "cifar10": dict(image_size=32, mult=(1, 2, 2, 2), steps=800_000),
    "celeba": dict(),
    "lsun_bedroom": dict(dropout=0.0),
    "lsun_bedroom-256": dict(
        image_size=256, mult=(1, 1, 2, 2, 4, 4), dropout=0.0, batch_size=64, lr=2e-5),
    "folder": dict(),
}
# What a checkpoint fixes: its weights, or the meaning of t
FIXED = tuple(key for key in UNET_KEYS if key != "dropout") + ("T", "schedule")

# ---------------------------------------------------------------------------------------------
# Data: every set becomes one uint8 array (N, C, H, W)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def shapes(n, size, channels, seed):
    """n anti-aliased coloured discs and boxes on dark grey: uint8 (n, channels, size, size)."""
    rng = np.random.default_rng(seed)

    def uniform(low, high):
        return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)

    pixel = np.arange(size, dtype=np.float32) + 0.5
    dx = abs(pixel[None, None, :] - size * uniform(0.35, 0.65))
    dy = abs(pixel[None, :, None] - size * uniform(0.35, 0.65))
    radius, width, height = (size * uniform(0.15, 0.33) for _ in range(3))
    is_disc = rng.random((n, 1, 1)) < 0.5
    # signed distance to the outline, in pixels
    distance = np.where(is_disc, np.hypot(dx, dy) - radius, np.maximum(dx - width, dy - height))
    cover = np.clip(0.5 - distance, 0, 1)[:, None]
    hue = 6 * uniform(0, 1)[..., None] + np.array([0, 4, 2], np.float32)[None, :, None, None]
    colour = np.clip(abs(hue % 6 - 3) - 1, 0, 1)
    if channels == 1:
        colour = 0.5 + 0.5 * colour[:, :1]
    grey = uniform(0.05, 0.3)[:, None]
    return np.round(255 * (grey + (colour - grey) * cover)).astype(np.uint8)


def image_files(root):
    """Every image below a folder, sorted by path; hidden files and folders are passed over."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__MACOSX"))]
        found += [Path(folder, name) for name in names
                  if Path(name).suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".")]
    return sorted(found)


def locate(dataset, root, train):
    """What `root` (folder or zip) holds of a data set: (kind, files), files empty if nothing."""
    if root.is_file():
        return "zip", [root]
    if dataset == "cifar10":
        names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
        for folder in (root, root / "cifar-10-batches-py"):
            if (folder / names[0]).is_file():
                return "cifar", [folder / name for name in names if (folder / name).is_file()]
    if dataset == "fashion_mnist":
        name = f"{'train' if train else 't10k'}-images-idx3-ubyte.gz"
        for folder in (root, root / "FashionMNIST" / "raw"):
            if (folder / name).is_file():
                return "idx", [folder / name]
    if dataset == "lsun_bedroom":
        name = f"bedroom_{'train' if train else 'val'}_lmdb"
        for folder in (root, root / name):
            if folder.name == name and (folder / "data.mdb").is_file():
                return "lmdb", [folder / "data.mdb"]
    return "images", image_files(root)


def download(dataset, root):
    """Fetch a data set with torchvision into `root`; UserError where that cannot be."""
    import torchvision.datasets as sets
    makers = {"cifar10": sets.CIFAR10, "fashion_mnist": sets.FashionMNIST, "celeba": sets.CelebA}
    if dataset not in makers:
        raise UserError(f"--dataset {dataset} is not downloaded: say where it is with --data_dir")
    print(f"downloading {dataset} to {root}", flush=True)
    try:
        makers[dataset](root, download=True)
    except (OSError, RuntimeError, ImportError) as error:
        raise UserError(f"{dataset} could not be downloaded ({str(error).splitlines()[0][:100]}): "
                        "fetch it by hand and pass --data_dir") from error


class ArrayUnpickler(pickle.Unpickler):
    """Reads CIFAR-10's batches: numpy arrays and plain values, nothing that could run."""

    def find_class(self, module, name):
        if module.startswith("numpy") and name in ("_reconstruct", "ndarray", "dtype"):
            return super().find_class(module, name)
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, not run")


def open_items(kind, files, train):
    """The source as (items, read): read(item) is a PIL image. Raises UserError naming the file."""
    try:
        if kind == "zip":
            archive = zipfile.ZipFile(files[0])
            names = sorted(name for name in archive.namelist()
                           if Path(name).suffix.lower() in IMAGE_SUFFIXES
                           and not name.startswith("__MACOSX"))
            return names, lambda name: Image.open(io.BytesIO(archive.read(name)))
        if kind == "cifar":
            batches = [ArrayUnpickler(open(f, "rb"), encoding="bytes").load() for f in files]
            array = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
            return array.transpose(0, 2, 3, 1), Image.fromarray
        if kind == "idx":
            with gzip.open(files[0]) as file:
                header = np.frombuffer(file.read(16), ">i4")
                return np.frombuffer(file.read(), np.uint8).reshape(header[1:]), Image.fromarray
        if kind == "lmdb":
            import torchvision.datasets
            folder = files[0].parent
            lsun = torchvision.datasets.LSUN(str(folder.parent),
                                             [f"bedroom_{'train' if train else 'val'}"])
            return range(len(lsun)), lambda i: lsun[i][0]
    except ImportError as error:
        raise UserError(f"{files[0]}: reading LSUN needs the package lmdb "
                        "(pip install lmdb)") from error
    except (OSError, EOFError, ValueError, KeyError, TypeError, pickle.UnpicklingError,
            zipfile.BadZipFile) as error:
        raise UserError(f"{files[0]}: not readable as {kind} ({error})") from error
    return files, Image.open


def fit(image, size, channels, aligned_celeba):
    """PIL image -> uint8 (channels, size, size): upright, centre square, resized.

    Shrinking averages over the area that a pixel covers (no aliasing); enlarging is bicubic.
    CelebA's aligned 178x218 images are cropped to the usual 128x128 around (89, 121).
    """
    image = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
    width, height = image.size
    if aligned_celeba and image.size == (178, 218):
        box = (25, 57, 153, 185)
    else:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    if box[2] - box[0] != size:
        shrink = box[2] - box[0] > size
        image = image.resize((size, size), Image.BOX if shrink else Image.BICUBIC, box=box)
    else:
        image = image.crop(box)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def load_images(dataset, image_size, in_channels, data_dir=None, cache_dir=None, train=True,
                build=True):
    """A data set as a uint8 array (N, in_channels, image_size, image_size), memory-mapped.

    data_dir: folder or zip; None looks in ./data and downloads there what torchvision can.
    cache_dir: where the decoded .npy goes (default: beside the source). Its name holds a hash of
        the source's files and the settings, so other settings never meet it.
    build: False waits for another process of this machine to build the cache.
    Raises UserError for a missing, empty or unreadable source, naming the file.
    """
    if dataset == "shapes":
        return shapes(10_000 if train else 2_000, image_size, in_channels, seed=0 if train else 1)
    root = Path(data_dir or "data")
    if data_dir and not root.exists():
        raise UserError(f"--data_dir {root}: no such file or folder")
    split = "train" if train else "test"
    if not data_dir:
        root = root / dataset
        if build and not locate(dataset, root, train)[1]:
            download(dataset, root)
        while not build and not locate(dataset, root, train)[1]:
            time.sleep(1)
    kind, files = locate(dataset, root, train)
    if dataset == "celeba" and kind == "images":
        # the official split is by file number; a smaller folder is all training images
        files = files[:162_770] if train else files[182_637:]
    if not files:
        raise UserError(f"no {split} images of {dataset} in {root}")

    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    stamp = json.dumps([str(root.resolve()), kind, stats, dataset, image_size, in_channels, split])
    stamp = hashlib.sha256(stamp.encode()).hexdigest()[:12]
    folder = Path(cache_dir or (root if root.is_dir() else root.parent))
    cache = folder / f"{dataset}-{split}-{image_size}x{in_channels}-{stamp}.npy"
    while not build and not cache.exists():
        time.sleep(1)
    if not cache.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(cache, lambda path: build_cache(path, kind, files, dataset, image_size,
                                                             in_channels, train))
        except PermissionError as error:
            raise UserError(f"cannot write {cache}: choose another --cache_dir") from error
    return np.load(cache, mmap_mode="r")


def build_cache(path, kind, files, dataset, size, channels, train):
    """Decode every image of a source into the .npy `path`, with a line of progress."""
    items, read = open_items(kind, files, train)
    if dataset == "celeba" and kind == "zip":
        items = items[:162_770] if train else items[182_637:]
    if not len(items):
        raise UserError(f"no images in {files[0]}")

    def decode(item):
        try:
            return fit(read(item), size, channels, dataset == "celeba")
        except (OSError, ValueError, SyntaxError, zipfile.BadZipFile, zipfile.zlib.error,
                Image.DecompressionBombError) as error:
            name = item if isinstance(item, (str, Path)) else f"image of {files[0]}"
            raise UserError(f"{name}: not a readable image ({error})") from error

    cache = np.lib.format.open_memmap(path, "w+", np.uint8, (len(items), channels, size, size))
    start = time.time()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(items), 1000):
            for i, image in enumerate(pool.map(decode, items[first:first + 1000]), first):
                cache[i] = image
            rate = (i + 1) / (time.time() - start)
            print(f"\rdecoding {files[0].parent}: {i + 1:,}/{len(items):,} images, {rate:,.0f}/s,"
                  f" ETA {duration((len(items) - i - 1) / rate)}  ", end="", flush=True)
    print(flush=True)
    cache.flush()


CLEAN, NOISY, OUTLIER = 0, 1, 2
# The first word of every seed, so that no two uses of randomness ever share a stream
ORDER, CHOICE, CORRUPT, STEP = 1, 2, 3, 4


def choose_corruption(n, noise_p, outlier_p, seed):
    """Which images are spoiled: uint8 (n,) of CLEAN, NOISY, OUTLIER. Exact shares, in a seed.

    A larger share contains the smaller one's images. Outliers replace whatever was there.
    """
    kinds = np.full(n, CLEAN, np.uint8)
    for kind, share in ((NOISY, noise_p), (OUTLIER, outlier_p)):
        order = np.random.default_rng([CHOICE, seed, kind]).permutation(n)
        kinds[order[:round(share * n)]] = kind
    return kinds


def training_images(images, index, kinds, noise_std, seed):
    """The training set's images at `index`, as the model sees them: float32 (B, C, H, W).

    On the [-1, 1] scale. NOISY: plus Gaussian noise of std noise_std, not clipped. OUTLIER:
    uniform noise instead. Frozen: a function of (seed, index), never stored, never re-drawn.
    """
    x = torch.from_numpy(images[index]).float() / 127.5 - 1
    for row in np.flatnonzero(kinds[index]):
        rng = np.random.default_rng([CORRUPT, seed, int(index[row])])
        if kinds[index[row]] == NOISY:
            x[row] += noise_std * torch.from_numpy(rng.standard_normal(x[row].shape, np.float32))
        else:
            x[row] = 2 * torch.from_numpy(rng.random(x[row].shape, np.float32)) - 1
    return x


@lru_cache(maxsize=4)
def permutation(seed, epoch, n):
    """The order of one pass over n images."""
    return np.random.default_rng([ORDER, seed, epoch]).permutation(n)


def batch_index(step, batch_size, n, seed):
    """Indices of the global batch of a step: an endless row of shuffled passes, cut to size."""
    position = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = position // n
    return np.concatenate([permutation(seed, int(e), n)[position[epochs == e] % n]
                           for e in np.unique(epochs)])


def prefetch(fetch, first, last, depth=3):
    """Yield (step, fetch(step)) for first <= step < last, fetched ahead by two threads."""
    with ThreadPoolExecutor(2) as pool:
        pending = deque(pool.submit(fetch, step) for step in range(first, min(first + depth, last)))
        for step in range(first, last):
            batch = pending.popleft().result()
            if step + depth < last:
                pending.append(pool.submit(fetch, step + depth))
            yield step, batch


# ---------------------------------------------------------------------------------------------
# Command line and run folder


def parse_args(argv=None):
    """The flags that were given, by name, and no others: `settle` fills in the rest."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               argument_default=argparse.SUPPRESS,
               epilog="In brackets the default; a data set's preset (PRESETS) may set another.")
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for name, (default, kind, text) in flags.items():
            if name == "dataset":
                kind = [preset for preset in PRESETS if "-" not in preset]
            key = "action" if kind is ON_OFF else "choices" if isinstance(kind, list) else "type"
            more = {"type": int} if name == "in_channels" else {}
            group.add_argument(f"--{name}", help=f"{text} ({default})", **{key: kind}, **more)
    group = p.add_argument_group("run folder")
    group.add_argument("--out", help="where it is (out/<dataset>-<mode>)")
    group.add_argument("--resume", action="store_true",
                       help="go on from its checkpoint, with the settings stored there")
    group.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    return vars(p.parse_args(argv))


def settle(given, stored):
    """The run's settings: defaults < preset < a resumed run's own < flags. UserError if foolish."""
    defaults = {name: flag[0] for flags in FLAGS.values() for name, flag in flags.items()}
    chosen = {**defaults, **stored, **given}
    name = f"{chosen['dataset']}-{given.get('image_size')}"
    preset = PRESETS[name if name in PRESETS else chosen["dataset"]]
    cfg = {**defaults, **preset, **stored, **given}
    cfg = {key: value for key, value in cfg.items() if key in defaults}

    for key in FIXED:
        if stored and cfg[key] != stored[key]:
            raise UserError(f"--{key} {cfg[key]}: the checkpoint's network has {stored[key]}")
    if (cfg["noise_p"] > 0) != (cfg["noise_std"] > 0):
        raise UserError("--noise_p and --noise_std go together: one of them is 0")
    beta_max = cfg["beta_max"] or READINGS[cfg["reading"]][1]
    if beta_max < cfg["beta_min"]:
        raise UserError(f"beta_max {beta_max} is below beta_min {cfg['beta_min']}")
    return cfg


def run_files(out):
    """The files of an earlier run in a folder."""
    return [path for pattern in ("ckpt*.pt", "config.json", "log.jsonl", "data.png",
                                 "samples_*.png") for path in out.glob(pattern)]


def save_checkpoint(out, state, keep):
    """Write ckpt.pt, whole at every moment; the one before it becomes ckpt_<step>.pt if kept."""

    def save(temporary):
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    if keep > 1:
        write_atomically(out / f"ckpt_{state['step']:07d}.pt", save)
    write_atomically(out / "ckpt.pt", save)
    # ckpt.pt is the newest numbered one too, hence keep - 1 before it
    for old in sorted(out.glob("ckpt_*.pt"))[:-keep if keep > 1 else None]:
        old.unlink()


# ---------------------------------------------------------------------------------------------
# Training


class Objective(nn.Module):
    """The whole loss as one forward call, which is what DistributedDataParallel supports.

    x0 (B, C, H, W) -> (loss, dict of detached figures), t and eps drawn here.
    """

    def __init__(self, net, diffusion, mode, perturbation):
        super().__init__()
        self.net, self.diffusion, self.perturbation = net, diffusion, perturbation
        self.loss = MODES[mode]

    def forward(self, x0):
        t = torch.randint(self.diffusion.T, (len(x0),), device=x0.device)
        eps = torch.randn_like(x0)
        return self.loss(self.net, self.diffusion, x0, t, eps, self.perturbation)


def main(argv=None):
    """Entry point; see the module's docstring."""
    given = parse_args(argv)
    rank, local, world, device = setup(given.get("device", "auto"))
    say = print if rank == 0 else lambda *_, **__: None
    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    out = Path(given.pop("out", f"out/{given.get('dataset', 'shapes')}-{given.get('mode', 'adv')}"))
    say(f"output {out}", flush=True)

    # Everything that can be wrong comes before anything is written
    saved = read_checkpoint(out) if resume else None
    stored = saved["config"] if resume else {}
    cfg = SimpleNamespace(**settle(given, stored))
    if run_files(out) and not resume and not overwrite and rank == 0:
        raise UserError(f"{out} holds a run: --resume continues it, --overwrite replaces it")
    if cfg.batch_size % (world * cfg.accum):
        raise UserError(f"--batch_size {cfg.batch_size} does not divide into {world} processes "
                        f"x {cfg.accum} parts")
    share = cfg.batch_size // world

    images = load_images(cfg.dataset, cfg.image_size, cfg.in_channels, cfg.data_dir, cfg.cache_dir,
                         build=local == 0)
    kinds = choose_corruption(len(images), cfg.noise_p, cfg.outlier_p, cfg.seed)

    # The same initial weights on every rank
    torch.manual_seed(cfg.seed)
    net = UNet(**{key: getattr(cfg, key) for key in UNET_KEYS}).to(device)
    net = net.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    diffusion = Diffusion(cfg.T, cfg.schedule, device)
    optimizer = torch.optim.Adam(net.parameters(), cfg.lr, fused=True)
    amp = cfg.amp
    if amp == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if bf16 else "fp16" if device.type == "cuda" else "off"
    autocast = torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16,
                              enabled=amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    start = 0
    if resume:
        net.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"] and scaler.is_enabled():
            scaler.load_state_dict(saved["scaler"])
        start = saved["step"]

    if rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}") from error
        if resume:
            trim_log(out / "log.jsonl", start)
        else:
            for path in run_files(out):
                path.unlink()
        (out / "config.json").write_text(json.dumps(vars(cfg), indent=2) + "\n")
        first = np.arange(min(64, len(images)))
        save_grid(to_uint8(training_images(images, first, kinds, cfg.noise_std, cfg.seed)),
                  out / "data.png")
    if resume:
        changed = [f"{key} {stored[key]} -> {value}" for key, value in vars(cfg).items()
                   if key in stored and stored[key] != value]
        say(f"resuming at step {start:,}" + "".join(f"; {change}" for change in changed))
    spoiled = [f"{np.sum(kinds == NOISY):,} with noise of std {cfg.noise_std}" * bool(cfg.noise_p),
               f"{np.sum(kinds == OUTLIER):,} replaced by noise" * bool(cfg.outlier_p)]
    say(f"data {cfg.dataset}: {len(images):,} images {tuple(images.shape[1:])}, "
        + (" and ".join(filter(None, spoiled)) or "none corrupted")
        + f" (frozen, seed {cfg.seed}; see data.png)")
    compiled = device.type == "cuda" if cfg.compile is None else cfg.compile
    say(f"net {sum(p.numel() for p in net.parameters()):,} parameters, mode {cfg.mode}, "
        f"{world} x {device.type}, {torch.get_num_threads()} threads, amp {amp}, "
        f"compile {'on' if compiled else 'off'}", flush=True)

    if compiled:
        net.compile()
    perturbation = Perturbation(**{name: getattr(cfg, name)
                                   for name in Perturbation.__dataclass_fields__})
    objective = Objective(net, diffusion, cfg.mode, perturbation).train()
    if world > 1:
        start_group(device)
        objective = DistributedDataParallel(
            objective, device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True)
    parameters, averages = list(net.parameters()), list(ema.parameters())

    def fetch(step):
        index = batch_index(step, cfg.batch_size, len(images), cfg.seed)
        index = index[rank * share:(rank + 1) * share]
        batch = training_images(images, index, kinds, cfg.noise_std, cfg.seed)
        return batch.pin_memory() if device.type == "cuda" else batch

    recent, names = [], []

    def average():
        """Means since the last call, over steps and processes; a non-finite loss ends the run."""
        table = torch.stack(recent)
        if world > 1:
            dist.all_reduce(table)
        table = (table / world).cpu()
        for i, bad in enumerate(~table[:, 0].isfinite()):
            if bad:
                good = f"{out}/ckpt.pt is of step {kept}" if kept else "no checkpoint was saved"
                raise UserError(f"the loss of step {step - len(recent) + 1 + i} is not finite; "
                                f"last good checkpoint: {good}")
        recent.clear()
        return dict(zip(names, table.mean(0).tolist()))

    def report(figures):
        nonlocal mark, waited, counted
        spent = (time.perf_counter() - mark) / counted
        rates = {"img_s": cfg.batch_size / spent, "s_step": spent,
                 "data_wait": waited / counted / spent}
        say(f"step {step:,}/{cfg.steps:,}  "
            + "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
            + f"  {rates['img_s']:.1f} img/s  {spent:.3f} s/step  data {rates['data_wait']:.1%}"
            f"  ETA {duration((cfg.steps - step) * spent)}", flush=True)
        if rank == 0:
            row = {"step": step, "lr": lr, **figures, **rates}
            row = {key: value if math.isfinite(value) else None for key, value in row.items()}
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
        mark, waited, counted = time.perf_counter(), 0.0, 0

    def save():
        nonlocal kept
        if rank == 0 and kept != step:
            save_checkpoint(out, {
                "model": net.state_dict(), "ema": ema.state_dict(), "step": step,
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "config": vars(cfg)}, cfg.keep)
        kept = step

    def draw():
        if rank == 0:
            shape = (cfg.in_channels, cfg.image_size, cfg.image_size)
            noise = image_noise(cfg.seed, range(64), shape, device)
            x = sample(ema, diffusion, noise, steps=min(50, cfg.T))
            save_grid(to_uint8(x).cpu(), out / f"samples_{step:06d}.png")

    signals = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: signals.append(number))

    step, kept, began = start, start, time.perf_counter()
    mark, waited, counted = began, 0.0, 0
    for step, batch in prefetch(fetch, start, cfg.steps):
        waited += time.perf_counter() - mark_wait if counted else 0.0
        # Stateless: what is random in a step depends on (seed, rank, step), so resume is exact
        torch.manual_seed(mix(STEP, cfg.seed, rank, step))
        lr = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup))
        for group in optimizer.param_groups:
            group["lr"] = lr

        x0 = batch.to(device, non_blocking=True)
        if cfg.flip:
            flipped = torch.rand(len(x0), 1, 1, 1, device=device) < 0.5
            x0 = torch.where(flipped, x0.flip(-1), x0)
        x0 = x0.contiguous(memory_format=torch.channels_last)
        total = 0
        for i, part in enumerate(x0.chunk(cfg.accum)):
            last = i == cfg.accum - 1
            with contextlib.nullcontext() if last or world == 1 else objective.no_sync():
                with autocast:
                    loss, figures = objective(part)
                scaler.scale(loss / cfg.accum).backward()
            total = total + torch.stack([loss.detach(), *figures.values()]) / cfg.accum
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, cfg.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        # The decay ramps up, so that a short run's average is not of its first weights
        decay = min(cfg.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(averages, parameters, 1 - decay)

        names = ["loss", *figures, "grad_norm"]
        recent.append(torch.cat([total, norm.detach()[None]]))
        step, counted = step + 1, counted + 1
        stop = bool(signals)
        if world > 1:
            # all ranks stop at the same step; asking costs a wait, so not at every step
            asked = torch.tensor(float(stop), device=device)
            stop = step % 10 == 0 and (dist.all_reduce(asked), asked.item() > 0)[1]
        logs, saves, draws = (every and step % every == 0 for every in
                              (cfg.log_every, cfg.save_every, cfg.sample_every))
        ends = stop or step == cfg.steps
        if logs or saves or ends or len(recent) >= 1000:
            figures = average()
        if logs:
            report(figures)
        if saves or ends:
            save()
        if draws or step == cfg.steps:
            draw()
        if stop:
            break
        mark_wait = time.perf_counter()

    if world > 1:
        dist.destroy_process_group()
    spent = duration(time.perf_counter() - began)
    if signals:
        say(f"stopped by {signal.Signals(signals[0]).name} at step {step:,}, saved in {out}/ckpt.pt; "
            "--resume continues")
        return 128 + signals[0]
    say(f"done: step {step:,} after {spent}; {out}/samples_{step:06d}.png shows EMA samples, "
        f"python sample.py {out} draws more")


def trim_log(path, step):
    """Drop log lines after `step`: a run killed past its checkpoint takes those steps again."""
    if path.exists():
        rows = [row for row in path.read_text().splitlines() if json.loads(row)["step"] <= step]
        path.write_text("".join(row + "\n" for row in rows))


if __name__ == "__main__":
    run_cli(main)
