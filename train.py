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
import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from losses import (MODES, READINGS, Diffusion, Perturbation, ascend, mean_square,
                    radius_and_weight, random_omega)
from model import UNET_KEYS, UNet, UserError, read_checkpoint, run_cli
from sample import (CHOICE, CORRUPT, FIXED_BATCH, INIT, LIMIT, ORDER, SHAPES, STEP, Parser,
                    duration, image_noise, mix, number, sample, save_grid, setup, start_group,
                    to_uint8, write_atomically)

# ---------- Settings: default < preset of the data set < a resumed run's config < flag

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


PRESETS = {
    "shapes": dict(  # minutes on two CPU cores, and the paper's point: noisy data, clean samples
        noise_p=0.9, noise_std=0.2,
        image_size=16, channels=16, mult=(1, 2, 2), blocks=1, attention=(8,), dropout=0.0,
        batch_size=32, steps=3000, lr=2e-3, warmup=100, ema=0.998,
        log_every=50, sample_every=500, save_every=500),
    "fashion_mnist": dict(
        image_size=28, in_channels=1, channels=64, mult=(1, 2, 2), attention=(14,), flip=False,
        steps=50_000, warmup=1000, ema=0.999, sample_every=2500, save_every=1000),
    "cifar10": dict(image_size=32, mult=(1, 2, 2, 2), steps=800_000),
    "celeba": dict(),  # the defaults are CelebA's
    "lsun_bedroom": dict(dropout=0.0),
    "lsun_bedroom-256": dict(
        image_size=256, mult=(1, 1, 2, 2, 4, 4), dropout=0.0, batch_size=64, lr=2e-5),
    "folder": dict(),
}
DATASETS = [name for name in PRESETS if "-" not in name]
# name: (default, type, list of choices or ON_OFF, help)
FLAGS = {
    "what to train": {
        "dataset": ("shapes", DATASETS, "data set, and with it the preset"),
        "mode": ("adv", list(MODES), "objective"),
        "data_dir": (None, str, "folder or zip with the data; else ./data, filled by download"),
        "cache_dir": (None, str, "folder of the decoded images; else beside the data"),
        "limit": (0, natural, "train on so many of its images alone, chosen by the seed; 0: all"),
    },
    "corruption of the training set, frozen per image": {
        "noise_p": (0.0, share, "share of images with Gaussian noise, 0 to 1"),
        "noise_std": (0.0, size, "its standard deviation on the [-1, 1] scale"),
        "outlier_p": (0.0, share, "share of images replaced by uniform noise, 0 to 1"),
    },
    "regulariser (losses.Perturbation)": {
        "reading": (Perturbation.reading, list(READINGS), "closed form of the radius"),
        "lam": (Perturbation.lam, size, "weight lambda"),
        "rho": (Perturbation.rho, number(float, 1e-3), "exponent of the radius"),
        "beta_min": (Perturbation.beta_min, number(float, 1e-6), "lower end of beta"),
        "beta_max": (Perturbation.beta_max, number(float, 1e-6),
                     "its upper end; None: 1 for sigma, 16/255 for epsilon"),
        "ascent_steps": (Perturbation.ascent_steps, count, "gradient steps of omega"),
        "ascent_norm": (Perturbation.ascent_norm, ["linf", "l2"],
                        "sign steps in the box, or along the gradient"),
        "ascent_step": (Perturbation.ascent_step, size, "size of a sign step, in radii"),
        "reg_share": (Perturbation.reg_share, number(float, 1e-3, 1),
                      "share of the batch regularised; at .3 adv costs 4.5 units, not 8"),
        "reg_low": (Perturbation.reg_low, ON_OFF,
                    "take that share from the smallest t, not rescaled; needs --reg_share < 1"),
        "detach_target": (Perturbation.detach_target, ON_OFF,
                          "no gradient through the unperturbed branch"),
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
        "monitor_every": (0, natural, "J under 10 ascent steps over J under the training step"),
        "save_every": (5000, natural, "a checkpoint (there is always one at the end)"),
        "keep": (1, count, "1: ckpt.pt alone; more: also the newest so many as ckpt_<step>.pt"),
    },
}
# What a checkpoint fixes: its weights, or the meaning of t
FIXED = tuple(key for key in UNET_KEYS if key != "dropout") + ("T", "schedule")

# ---------- Data: every set becomes one uint8 array (N, C, H, W)

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def shapes(n, size, channels, seed):
    """n anti-aliased coloured discs and boxes on dark grey: uint8 (n, channels, size, size)."""
    rng = np.random.default_rng([SHAPES, seed])

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
    return np.round(255 * (0.15 + (colour - 0.15) * cover)).astype(np.uint8)


def is_image(name):
    """By its suffix; hidden files and the Macintosh's shadow files are not."""
    path = Path(name)
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden and not str(name).endswith("/")


# Readers: open_x(files) -> (items, read), read(item) a PIL image


def open_images(files):
    """Image files, the files themselves."""
    return files, Image.open


def open_zip(files):
    """A zip of images at any depth."""
    archive = zipfile.ZipFile(files[0])
    names = sorted(name for name in archive.namelist() if is_image(name))
    return names, lambda name: Image.open(io.BytesIO(archive.read(name)))


class ArrayUnpickler(pickle.Unpickler):
    """Reads CIFAR-10's batches: numpy arrays and plain values, nothing that could run."""

    def find_class(self, module, name):
        known = module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype")
        if known or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which was not run")


def open_cifar(files):
    """CIFAR-10's python batches."""
    batches = [ArrayUnpickler(open(file, "rb"), encoding="bytes").load() for file in files]
    images = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return images.transpose(0, 2, 3, 1), Image.fromarray


def open_idx(files):
    """(Fashion-)MNIST's gzipped idx file."""
    with gzip.open(files[0]) as file:
        shape = np.frombuffer(file.read(16), ">i4")[1:]
        return np.frombuffer(file.read(), np.uint8).reshape(shape), Image.fromarray


def open_lsun(files):
    """LSUN's lmdb, directly: torchvision pickles a list of keys into the current folder."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f"{files[0]}: reading LSUN needs lmdb (pip install lmdb)") from error
    base = lmdb.open(str(files[0].parent), readonly=True, lock=False).begin()
    return list(base.cursor().iternext(values=False)), lambda k: Image.open(io.BytesIO(base.get(k)))


# The formats that data sets are published in: a reader, and the files of each split
PUBLISHED = {
    "cifar10": (open_cifar, {"train": "data_batch_[1-5]", "test": "test_batch"}),
    "fashion_mnist": (open_idx, {"train": "train-images-idx3-ubyte.gz",
                                 "test": "t10k-images-idx3-ubyte.gz"}),
    "lsun_bedroom": (open_lsun, {"train": "bedroom_train_lmdb/data.mdb",
                                 "test": "bedroom_val_lmdb/data.mdb"}),
}


def find_source(dataset, root, split):
    """(files, reader) of a data set in `root`, a folder or zip; files is empty if it is not there.
    """
    if root.is_file():
        return [root], open_zip
    if dataset in PUBLISHED:
        reader, names = PUBLISHED[dataset]
        files = sorted(root.rglob(names[split]))
        if files:
            return files, reader
    found = [Path(folder, name) for folder, _, names in os.walk(root, followlinks=True)
             for name in names]
    return sorted(file for file in found if is_image(file.relative_to(root))), open_images


def download(dataset, root):
    """Fetch a data set with torchvision into `root`; UserError where that cannot be."""
    from torchvision import datasets
    makers = {"cifar10": datasets.CIFAR10, "fashion_mnist": datasets.FashionMNIST,
              "celeba": datasets.CelebA}
    if dataset not in makers:
        raise UserError(f"--dataset {dataset} needs --data_dir: the folder or zip that holds it")
    print(f"downloading {dataset} to {root}", flush=True)
    try:
        makers[dataset](root, download=True)
    except Exception as error:  # network, quota, a missing helper package: all end alike
        reason = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise UserError(f"{dataset} could not be downloaded ({reason}): fetch it by hand and name "
                        "its folder or zip with --data_dir") from error


def fit(image, size, channels, aligned_celeba=False):
    """PIL image -> uint8 (channels, size, size): upright, centre square, resized.

    Shrinking averages over the area that a pixel covers (no aliasing); enlarging is bicubic.
    CelebA's aligned 178x218 images are cropped to the usual 128x128 around (89, 121).
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit grey, which PIL would clip and not scale
        image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).round().astype(np.uint8))
    image = image.convert("RGB" if channels == 3 else "L")
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    if aligned_celeba and image.size == (178, 218):
        side, left, top = 128, 25, 57
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.BOX if side > size else Image.BICUBIC, box=box)
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def decode_all(path, dataset, files, reader, size, channels, split):
    """Decode a source into the uint8 .npy `path`, with a line of progress every five seconds.

    Raises UserError naming the file or image at fault.
    """
    try:
        items, read = reader(files)
    except UserError:
        raise
    except Exception as error:  # a damaged file may raise anything
        raise UserError(f"{files[0]}: not a readable {dataset} file ({error})") from error
    if dataset == "celeba":
        # the official split is by file number; of a smaller set all are training images
        items = items[:162_770] if split == "train" else items[182_637:]
    if not len(items):
        raise UserError(f"no {split} images of {dataset} in {files[0]}")

    def decode(i):
        try:
            return fit(read(items[i]), size, channels, dataset == "celeba")
        except Exception as error:
            name = items[i] if isinstance(items[i], (str, Path)) else f"image {i} of {files[0]}"
            raise UserError(f"{name}: not a readable image ({error})") from error

    cache = np.lib.format.open_memmap(path, "w+", np.uint8, (len(items), channels, size, size))
    start = shown = time.time()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for first in range(0, len(items), 1000):
            last = min(first + 1000, len(items))
            for i, image in zip(range(first, last), pool.map(decode, range(first, last))):
                cache[i] = image
            if time.time() - shown > 5 or last == len(items):
                shown = time.time()
                rate = last / (shown - start)
                print(f"decoding {dataset} {split}: {last:,}/{len(items):,} images, {rate:,.0f}/s, "
                      f"ETA {duration((len(items) - last) / rate)}", flush=True)
    cache.flush()


def load_images(dataset, image_size, in_channels, data_dir=None, cache_dir=None, split="train"):
    """A data set as a uint8 array (N, in_channels, image_size, image_size), memory-mapped.

    data_dir: folder or zip; None looks in data/<dataset> and downloads what torchvision can.
    cache_dir: where the decoded .npy goes (default: beside the source). Its name holds a hash of
        the settings and of the source's names, sizes and dates: others never meet it.
    split: "train" or "test", where the source has both; a bare folder or zip is one of them.
    Raises UserError for a missing, empty or unreadable source, naming the file.
    """
    if dataset == "shapes":
        if data_dir:
            raise UserError("--data_dir: the data set shapes is drawn; say which --dataset it is")
        n, seed = (10_000, 0) if split == "train" else (2000, 1)
        return shapes(n, image_size, in_channels, seed)
    root = Path(data_dir or f"data/{dataset}")
    if data_dir and not root.exists():
        raise UserError(f"--data_dir {root}: no such file or folder")
    if not data_dir and not find_source(dataset, root, split)[0]:
        download(dataset, root)
    files, reader = find_source(dataset, root, split)
    if not files:
        raise UserError(f"no {split} images of {dataset} in {root}")

    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    stamp = json.dumps([dataset, split, image_size, in_channels, stats])
    stamp = hashlib.sha256(stamp.encode()).hexdigest()[:12]
    folder = Path(cache_dir or (root if root.is_dir() else root.parent))
    cache = folder / f"{dataset}-{split}-{image_size}x{in_channels}-{stamp}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not cache.exists():
            write_atomically(cache, lambda path: decode_all(path, dataset, files, reader,
                                                            image_size, in_channels, split))
        return np.load(cache, mmap_mode="r")
    except OSError as error:
        raise UserError(f"cannot write {cache} ({error.strerror}): choose another --cache_dir"
                        ) from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{cache} is damaged: delete it, and it is made anew") from error


def some_of(images, limit, seed):
    """`limit` of the images, chosen by the seed, in their order; 0: all. UserError: too few."""
    if limit > len(images):
        raise UserError(f"--limit {limit}: the data set has {len(images)} images")
    if not limit:
        return images
    chosen = np.random.default_rng([LIMIT, seed]).permutation(len(images))[:limit]
    return images[np.sort(chosen)]


CLEAN, NOISY, OUTLIER = 0, 1, 2


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


# ---------- Command line and run folder


def parse_args(argv=None):
    """The flags that were given, by name, and no others: `settle` fills in the rest."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
               argument_default=argparse.SUPPRESS,
               epilog="In brackets the default; a data set's preset (PRESETS) may set another.")
    for title, flags in FLAGS.items():
        group = p.add_argument_group(title)
        for name, (default, kind, text) in flags.items():
            if isinstance(kind, list):
                options = {"choices": kind, "type": type(kind[0])}
            else:
                options = {"action" if kind is ON_OFF else "type": kind}
            group.add_argument(f"--{name}", help=f"{text} ({default})", **options)
    group = p.add_argument_group("run folder")
    group.add_argument("--out", help="where it is (out/<dataset>-<mode>)")
    group = group.add_mutually_exclusive_group()
    group.add_argument("--resume", action="store_true",
                       help="go on from its checkpoint, with the settings stored there")
    group.add_argument("--overwrite", action="store_true", help="replace the run that is there")
    return vars(p.parse_args(argv))


def settle(given, stored):
    """The run's settings: defaults < preset < a resumed run's own < flags. UserError if foolish."""
    defaults = {name: flag[0] for flags in FLAGS.values() for name, flag in flags.items()}
    dataset = {**defaults, **stored, **given}["dataset"]
    special = f"{dataset}-{given.get('image_size')}"
    preset = PRESETS[special if special in PRESETS else dataset]
    cfg = {**defaults, **preset, **stored, **given}
    cfg = {name: cfg[name] for name in defaults if name != "device"}

    for key in FIXED:
        if stored and cfg[key] != stored[key]:
            raise UserError(f"--{key} {cfg[key]}: the checkpoint's network has {stored[key]}")
    if cfg["noise_p"] and not cfg["noise_std"] or given.get("noise_std") and not cfg["noise_p"]:
        raise UserError("--noise_p and --noise_std go together: one of them is 0")
    if cfg["reg_low"] and cfg["reg_share"] == 1:
        raise UserError("--reg_low needs a --reg_share below 1, such as .1")
    beta_max = cfg["beta_max"] or READINGS[cfg["reading"]][1]
    if beta_max < cfg["beta_min"]:
        raise UserError(f"beta_max {beta_max} is below beta_min {cfg['beta_min']}")
    return cfg


DIGITS = "[0-9]" * 7


def run_files(out):
    """The files of an earlier run in a folder."""
    patterns = ("ckpt.pt", f"ckpt_{DIGITS}.pt", "config.json", "log.jsonl", "data.png",
                f"samples_{DIGITS}.png")
    return [path for pattern in patterns for path in out.glob(pattern)]


def trim_log(log, step):
    """Drop lines past `step`, which will be logged again, and one that a kill cut short."""
    kept = []
    for line in log.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_atomically(log, lambda temporary: temporary.write_text("".join(kept)))


def save_checkpoint(out, state, keep):
    """Write ckpt.pt, whole at every moment; keep > 1 also as ckpt_<step>.pt, the newest `keep`."""

    def save(temporary):
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    newest = out / "ckpt.pt"
    write_atomically(newest, save)
    if keep > 1:
        write_atomically(out / f"ckpt_{state['step']:07d}.pt",
                         lambda temporary: shutil.copyfile(newest, temporary))
    for old in sorted(out.glob(f"ckpt_{DIGITS}.pt"))[:-keep if keep > 1 else None]:
        old.unlink()


# ---------- Training


class Objective(nn.Module):
    """The whole loss as one forward call, which is what DistributedDataParallel supports.

    x0 (B, C, H, W), t (B,), eps (B, C, H, W) -> (loss, dict of detached figures).
    """

    def __init__(self, net, diffusion, mode, perturbation):
        super().__init__()
        self.net, self.diffusion, self.perturbation = net, diffusion, perturbation
        self.loss = MODES[mode]

    def forward(self, x0, t, eps):
        return self.loss(self.net, self.diffusion, x0, t, eps, self.perturbation)


def update(objective, parts, weights, averages, optimizer, scaler, autocast, grad_clip, decay):
    """One optimiser step on the sum of parts, (x0, t, eps) each, and the EMA's.

    Returns {"loss": ..., the objective's figures, "grad_norm": ...}, scalars on the device: to
    read one would wait for it.
    """
    total = {}
    for i, part in enumerate(parts):
        objective.require_backward_grad_sync = i == len(parts) - 1
        with autocast:
            loss, figures = objective(*part)
        scaler.scale(loss / len(parts)).backward()
        for name, value in {"loss": loss.detach(), **figures}.items():
            total[name] = total.get(name, 0) + value / len(parts)
    scaler.unscale_(optimizer)
    total["grad_norm"] = nn.utils.clip_grad_norm_(weights, grad_clip or math.inf).detach()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        torch._foreach_lerp_(averages, weights, 1 - decay)
    return total


def alarm_times(T):
    """The time steps that `overfit` looks at: from nearly clean to nearly noise."""
    return [int(share * T) for share in (0.02, 0.1, 0.25, 0.5, 0.8)]


def overfit(net, diffusion, x0, times, cfg):
    """The alarm of one-step attacks (Wong et al. 2020): J after 10 steps over J after cfg's own.

    For each time step in `times`, on x0 (B, C, H, W): (J_pgd10, J_train), means over the batch of
    |eps_theta(x_t + s omega, t) - eps_theta(x_t, t)|^2, from the same x_t, radii and random start,
    the same at every call. 10 sign steps are of r / 4 each. A growing ratio says that training
    has learnt to deceive its own step. Reseeds torch, and calls `net` in eval mode.
    """
    pgd = dataclasses.replace(cfg, ascent_steps=10, ascent_step=0.25)
    training, found = net.training, []
    net.eval()
    for time_step in times:
        torch.manual_seed(mix(FIXED_BATCH, time_step))
        t = torch.full((len(x0),), time_step, device=x0.device)
        x_t = diffusion.diffuse(x0, t, torch.randn_like(x0))
        _, s = diffusion.at(t, x_t)
        r, _ = radius_and_weight(s, cfg)
        start = random_omega(r, x_t)
        with torch.no_grad():
            clean = net(x_t, t)
            omegas = [ascend(start.clone(), net, x_t, s, t, r, clean, c) for c in (pgd, cfg)]
            found.append([mean_square(net(x_t + s * omega, t) - clean).mean().item()
                          for omega in omegas])
    net.train(training)
    return found


def main(argv=None):
    """Entry point; see the module's docstring."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    given = parse_args(argv)
    rank, local, world, device = setup(given.pop("device", "auto"))
    cuda, lead = device.type == "cuda", rank == 0
    say = print if lead else lambda *_, **__: None
    resume, overwrite = given.pop("resume", False), given.pop("overwrite", False)
    out = Path(given.pop("out", f"out/{given.get('dataset', 'shapes')}-{given.get('mode', 'adv')}"))
    say(f"output {out}", flush=True)

    # --- settings: whatever can be wrong is found before anything is written

    saved = read_checkpoint(out) if resume else None
    stored = saved["config"] if resume else {}
    start = saved["step"] if resume else 0
    try:
        cfg = argparse.Namespace(**settle(given, stored))
    except (KeyError, TypeError) as error:
        raise UserError(f"{out}/ckpt.pt: its config is not one of train.py") from error
    if lead and run_files(out) and not (resume or overwrite):
        raise UserError(f"{out} holds a run: --resume continues it, --overwrite replaces it")
    part = cfg.batch_size // (world * cfg.accum)
    if cfg.mode != "dsm" and round(cfg.reg_share * part) < 1:
        raise UserError(f"--reg_share {cfg.reg_share}: of the {part} images that a process takes "
                        "at a time, that is none")
    if start >= cfg.steps:
        raise UserError(f"{out} is at step {start} of {cfg.steps}: more of them with --steps")
    if cfg.batch_size % (world * cfg.accum):
        raise UserError(f"--batch_size {cfg.batch_size} does not divide into {world} processes "
                        f"x {cfg.accum} parts")

    # --- network: the same initial weights on every rank

    torch.manual_seed(mix(INIT, cfg.seed))
    net = UNet(**{key: getattr(cfg, key) for key in UNET_KEYS})
    net = net.to(device, memory_format=torch.channels_last)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    weights, averages = list(net.parameters()), list(ema.parameters())
    diffusion = Diffusion(cfg.T, cfg.schedule, device)
    optimizer = torch.optim.Adam(weights, cfg.lr, fused=True)
    amp = cfg.amp
    if amp == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = "bf16" if bf16 else "fp16" if cuda else "off"
    autocast = torch.autocast(device.type, torch.float16 if amp == "fp16" else torch.bfloat16,
                              enabled=amp != "off")
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    if resume:
        try:
            net.load_state_dict(saved["model"])
            ema.load_state_dict(saved["ema"])
            optimizer.load_state_dict(saved["optimizer"])
            if saved["scaler"]:
                scaler.load_state_dict(saved["scaler"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{out}/ckpt.pt: its weights do not fit its config") from error
        del saved

    # --- data: decoded by one process a machine while the others wait

    source = (cfg.dataset, cfg.image_size, cfg.in_channels, cfg.data_dir, cfg.cache_dir)
    if world > 1:
        start_group(device)
        if local == 0:
            load_images(*source)
        dist.barrier()
    images = some_of(load_images(*source), cfg.limit, cfg.seed)
    kinds = choose_corruption(len(images), cfg.noise_p, cfg.outlier_p, cfg.seed)
    share = cfg.batch_size // world
    mine = slice(rank * share, (rank + 1) * share)

    def fetch(step):
        index = batch_index(step, cfg.batch_size, len(images), cfg.seed)[mine]
        batch = training_images(images, index, kinds, cfg.noise_std, cfg.seed)
        return batch.pin_memory() if cuda else batch

    # --- run folder

    log = out / "log.jsonl"
    try:
        if lead:
            out.mkdir(parents=True, exist_ok=True)
            for path in [*out.glob(".*.tmp"), *(run_files(out) if overwrite else [])]:
                path.unlink()
            if resume and log.exists():
                trim_log(log, start)
            (out / "config.json").write_text(json.dumps(vars(cfg), indent=2) + "\n")
            some = np.arange(min(64, len(images)))
            save_grid(to_uint8(training_images(images, some, kinds, cfg.noise_std, cfg.seed)),
                      out / "data.png")
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error
    if resume:
        changed = [f"{key} {stored.get(key)} -> {value}" for key, value in vars(cfg).items()
                   if stored.get(key) != value]
        say("; ".join([f"resuming at step {start:,}", *changed]))
    say(f"data {cfg.dataset}: {len(images):,} images {tuple(images.shape[1:])}, of which "
        f"{np.sum(kinds == NOISY):,} with noise of std {cfg.noise_std} and "
        f"{np.sum(kinds == OUTLIER):,} replaced by noise (frozen, seed {cfg.seed}; see data.png)")
    compiled = cuda if cfg.compile is None else cfg.compile
    say(f"net {sum(p.numel() for p in weights):,} parameters, mode {cfg.mode}, "
        f"{world} x {device.type}, {torch.get_num_threads()} threads, amp {amp}, "
        f"compile {'on' if compiled else 'off'}", flush=True)

    # --- loop

    if compiled:
        net.compile()
    perturbation = Perturbation(**{name: getattr(cfg, name)
                                   for name in Perturbation.__dataclass_fields__})
    objective = Objective(net, diffusion, cfg.mode, perturbation).train()
    if world > 1:
        objective = DistributedDataParallel(objective, device_ids=[device.index] if cuda else None,
                                            gradient_as_bucket_view=True)
    signals = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, _: signals.append(number))
    loader = ThreadPoolExecutor(1)
    ahead = loader.submit(fetch, start)
    step = kept = start
    recent, waited, stop = [], 0.0, False
    began = mark = time.perf_counter()

    while step < cfg.steps and not stop:
        tic = time.perf_counter()
        batch = ahead.result()
        waited += time.perf_counter() - tic
        ahead = loader.submit(fetch, step + 1)
        # stateless: all that is random in a step depends on (seed, rank, step): resume is exact.
        # Flips, t and eps are drawn for the whole batch: they do not depend on the processes
        torch.manual_seed(mix(STEP, cfg.seed, 0, step))
        for group in optimizer.param_groups:
            group["lr"] = cfg.lr * min(1, (step + 1) / max(1, cfg.warmup))
        x0 = batch.to(device, non_blocking=True)
        if cfg.flip:
            flipped = torch.rand(cfg.batch_size, 1, 1, 1, device=device)[mine] < 0.5
            x0 = torch.where(flipped, x0.flip(-1), x0)
        t = torch.randint(cfg.T, (cfg.batch_size,), device=device)[mine]
        eps = torch.empty((cfg.batch_size, *x0.shape[1:]), device=device,
                          memory_format=torch.channels_last).normal_()[mine]
        parts = zip(*(whole.chunk(cfg.accum) for whole in (
            x0.contiguous(memory_format=torch.channels_last), t, eps)))
        if rank:
            torch.manual_seed(mix(STEP, cfg.seed, rank, step))

        # the decay ramps up, so that a short run's average is not one of its first weights
        decay = min(cfg.ema, (1 + step) / (10 + step))
        figures = update(objective, list(parts), weights, averages, optimizer, scaler,
                         autocast, cfg.grad_clip, decay)
        recent.append(torch.stack(list(figures.values())))
        step += 1

        if world == 1:
            stop = bool(signals)
        elif not cuda or step % 10 == 0:
            # all ranks stop at the same step; on a GPU to agree costs a wait, hence every tenth
            asked = torch.tensor(float(len(signals)), device=device)
            dist.all_reduce(asked)
            stop = asked.item() > 0
        logs, saves, draws, monitors = (every and step % every == 0 for every in (
            cfg.log_every, cfg.save_every, cfg.sample_every, cfg.monitor_every))
        logs = logs or monitors  # the alarm is logged with the step that it is of
        ends = stop or step == cfg.steps
        # the figures stay on the device until something is due
        if not (logs or saves or draws or ends or len(recent) % 100 == 0):
            continue

        table = torch.stack(recent)
        if world > 1:
            dist.all_reduce(table)
        table = (table / world).cpu()
        # under fp16 the scaler skips a step whose gradient overflows
        sound = table[:, 0].isfinite() & (table[:, -1].isfinite() | scaler.is_enabled())
        if not sound.all():
            bad = step - len(recent) + 1 + int(sound.int().argmin())
            good = f"{out}/ckpt.pt, of step {kept}" if kept else "none was saved"
            raise UserError(f"the loss or its gradient is not finite at step {bad}; last good "
                            f"checkpoint: {good}")
        alarm = {}
        if monitors and lead:
            tic = time.perf_counter()
            # the first images as training sees them, the same at every call
            watched = training_images(images, np.arange(min(16, len(images))), kinds,
                                      cfg.noise_std, cfg.seed).to(device)
            pairs = overfit(net, diffusion, watched, alarm_times(cfg.T), perturbation)
            alarm = {"overfit": [pgd / own if own else None for pgd, own in pairs]}
            mark += time.perf_counter() - tic
        if logs:
            spent = (time.perf_counter() - mark) / len(recent)
            means = table.where(table.isfinite(), math.nan).nanmean(0).tolist()
            row = dict(zip(figures, means))
            row = {"step": step, **row, "img_s": cfg.batch_size / spent, "s_step": spent,
                   "data_wait": waited / len(recent) / spent, "eta_s": (cfg.steps - step) * spent,
                   **alarm}
            say(f"step {step:,}/{cfg.steps:,}  "
                + "  ".join(f"{name} {row[name]:.4f}" for name in figures)
                + f"  {row['img_s']:.1f} img/s  {spent:.3f} s/step  data {row['data_wait']:.1%}"
                + "".join(f"  overfit {max(r or 0 for r in value):.3f}" for value in alarm.values())
                + f"  ETA {duration(row['eta_s'])}", flush=True)
            if lead:
                with open(log, "a") as file:
                    file.write(json.dumps(row) + "\n")
        if logs or len(recent) >= 1000:
            recent, waited, mark = [], 0.0, time.perf_counter()
        tic = time.perf_counter()
        if (saves or ends) and lead:
            save_checkpoint(out, {
                "model": net.state_dict(), "ema": ema.state_dict(), "step": step,
                "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                "config": vars(cfg)}, cfg.keep)
        if saves or ends:
            kept = step
        if (draws or cfg.sample_every and step == cfg.steps) and lead:
            noise = image_noise(cfg.seed, range(64), images.shape[1:], device)
            x = sample(ema, diffusion, noise, steps=min(50, cfg.T))
            save_grid(to_uint8(x).cpu(), out / f"samples_{step:07d}.png")
        mark += time.perf_counter() - tic  # a picture's time is not a step's

    loader.shutdown()
    if world > 1:
        dist.destroy_process_group()
    if stop:
        number = signals[0] if signals else signal.SIGTERM
        say(f"stopped by {signal.Signals(number).name} at step {step:,}; saved, --resume continues")
        return 128 + number
    say(f"done: step {step:,} after {duration(time.perf_counter() - began)}, see {out}; "
        f"python sample.py {out} draws from it")


if __name__ == "__main__":
    run_cli(main)
