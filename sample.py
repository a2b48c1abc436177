"""Draw images from a trained model; clean noisy ones with it; hand it to diffusers.

    python sample.py out/cifar10-adv --num 50000 --sampler ddim --steps 100
    torchrun --nproc_per_node=8 -- sample.py out/cifar10-adv --num 50000
    python sample.py out/cifar10-adv --denoise photos --noise_std 0.2
    python sample.py out/cifar10-adv --export cifar10-adv
    python sample.py out/cifar10-dsm --expert out/expert   (of train.py --t_max: it draws the end)

Image k depends on (--seed, k) and the weights alone: not on the batch size, nor on how many
processes share the work (but for rounding: at times one level of 255). An interrupted run,
started again, draws the missing images only.
"""

import argparse
import contextlib
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
import time
import zipfile
from datetime import timedelta
from itertools import count, cycle
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

# Read when torch is imported: beside another process, threads that wait by spinning take several
# times as long; on an idle machine they save a fifth.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn

from losses import Diffusion, denoise
from model import build_network, read_checkpoint, write_diffusers

# ---------- Plumbing that every script shares: mistakes, flags, devices, progress, files, seeds


class UserError(Exception):
    """A mistake that the user can mend: shown as one line, exit status 2, no traceback."""


def run_cli(main):
    """Run a script's `main()`; a `UserError` ends in one line on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # A file's name may be what it cannot encode.
        stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except UserError as error:
        message = error
    except OSError as error:  # A full disk, no permission, a long name, a folder that has moved.
        message = f"{error.filename or 'writing'}: {error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if memory or "can't allocate memory" in str(error):
            message = "not enough memory: a smaller --batch_size, --num or network needs less"
        elif "onnection closed by peer" in str(error) or "onnection reset by peer" in str(error):
            message = "another of the processes has ended, and says why"
        else:
            raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"error: {' '.join(str(message).split())[:400]}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def user_errors(*kinds, prefix=""):
    """Turn exceptions of these kinds into a `UserError` that begins with `prefix`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{prefix}{error}") from error


def number(kind, low, high=sys.float_info.max):
    """An argparse type: an int or float within [low, high]."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= kind(text) <= high:
                return kind(text)
        word = "a whole number" if kind is int else "a number"
        upper = "" if high == sys.float_info.max else f" and at most {high}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {word} of at least {low}{upper}")

    return parse


def comma_list(kind, *choices):
    """An argparse type: values with commas between, each parsed by `kind`, or one of `choices`."""

    def parse(text):
        values = [kind(part) for part in text.split(",")]
        if choices and not set(values) <= set(choices):
            raise argparse.ArgumentTypeError(f"{text!r} is not of {', '.join(choices)}")
        return values

    return parse


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Ends the help of a flag with its default, where it has one."""

    def _get_help_string(self, action):
        hidden = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        return action.help + ("" if hidden or not action.option_strings else " (%(default)s)")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage of forty flags before them."""

    def __init__(self, **options):
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False} | options)

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} -h)")


def setup_device(device="auto"):
    """(rank, local rank, world size, torch.device) of this process, alone or under torchrun.

    device: "auto" takes CUDA, then MPS, then the CPU.  Raises UserError if it is not there.
    Under torchrun it joins the process group; only rank 0 has a standard output from then on.
    """
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if device == "auto":
        mps = torch.backends.mps.is_available() and world == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    with user_errors(RuntimeError, AssertionError, prefix=f"device {device}: "):
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
        torch.zeros(1, device=device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    if world > 1:  # A day's patience: one process decodes, or draws, while the others wait.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
    if rank:
        sys.stdout = open(os.devnull, "w", errors="backslashreplace")
    return rank, local, world, device


def duration(seconds):
    """Seconds -> "1:02:03"."""
    return str(timedelta(seconds=int(seconds)))


def tell(text, end="\n"):
    """Print at once; where a terminal or pipe has closed, from then on nothing is shown."""
    try:
        print(text, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def ticker(title, total):
    """A line of progress with a rate and an ETA: call what it returns with how many are done."""
    start = shown = time.time()

    def tick(done):
        nonlocal shown
        now = time.time()
        if now - (start if done >= total else shown) > 2:
            shown = now
            rate = done / (now - start)
            tell(f"\r{title}: {done:,.0f}/{total:,}  {rate:,.1f}/s  ETA "
                 f"{duration((total - done) / rate)}   ", end="\n" if done >= total else "")

    return tick


HOST = platform.node().replace(".", "_")


def remove_leftovers(folder):
    """Delete the temporary files of processes of this machine that are no more."""
    for path in folder.glob(f".{HOST}.*.tmp.*"):
        try:
            os.kill(int(path.name.split(".")[2]), 0)
        except (ProcessLookupError, ValueError):
            path.unlink(missing_ok=True)
        except OSError:
            pass  # It lives, and is another user's.


def write_atomically(path, save):
    """Let `save(temporary path)` write a file, then rename it to `path`: whole or not there."""
    temporary = path.with_name(f".{HOST}.{os.getpid()}.tmp.{path.name}")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(row):
    """A dict with None, which JSON has, for the floats that are not finite."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()}


def read_json(path):
    """The dict in a JSON file; {} where it is missing, damaged or something else."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        data = json.loads(path.read_text())
        return data if isinstance(data, dict) else {}
    return {}


def write_json(path, data):
    """Write JSON, whole or not at all."""
    text = json.dumps(data, indent=2, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def check_writable(path):
    """Make a file's folder; UserError, before the work, if the file cannot be written."""
    with user_errors(OSError, prefix=f"cannot write {path}: "):
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "ab").close()
        if path.stat().st_size == 0:
            path.unlink()


def commit():
    """The short hash of the code's commit, with a + if a tracked file differs; "" without git."""
    with contextlib.suppress(OSError):
        return subprocess.run(["git", "describe", "--always", "--exclude=*", "--dirty=+"],
                              cwd=Path(__file__).parent, capture_output=True, text=True
                              ).stdout.strip()
    return ""


def claim_folder(out):
    """Make a folder this process's own; the lock that is returned dies with the process.

    What killed processes left there is removed. Raises UserError if another one writes there.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / ".lock", "w")
    with user_errors(BlockingIOError, prefix=f"another process writes to {out}: "):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    remove_leftovers(out)
    return file


def to_uint8(x):
    """[-1, 1] float (..., ) -> uint8 0..255, rounded and clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images, path, columns=8):
    """Write uint8 images (N, C, H, W), C 1 or 3, as one PNG; small ones are enlarged."""
    images = np.asarray(images)
    scale = max(1, 48 // images.shape[-1])
    columns = min(columns, len(images))
    tiles = images.transpose(0, 2, 3, 1).repeat(scale, 1).repeat(scale, 2)
    # White above and to the left of each, and whole white tiles at the end.
    tiles = np.pad(tiles, ((0, -len(images) % columns), (2, 0), (2, 0), (0, 0)),
                   constant_values=255)
    rows = [np.concatenate(tiles[i:i + columns], 1) for i in range(0, len(tiles), columns)]
    sheet = np.pad(np.concatenate(rows), ((0, 2), (0, 2), (0, 0)), constant_values=255)
    Image.fromarray(sheet.squeeze()).save(path, "PNG")


BLUE, RED, GREY, BLACK = (40, 90, 200), (215, 40, 30), (170, 170, 170), (0, 0, 0)
COLOURS = (BLUE, RED, GREY, (30, 140, 60), (230, 140, 20), (130, 60, 170))


def draw_layers(layers, texts=(), size=160):
    """Layers [(xy, colour, width)] in [-1, 1]^2, y upwards, as a square PIL image of `size` pixels.

    xy: dots (n, 2) of radius `width`, or lines (m, n, 2) of that width, in half pixels.
    texts: [((x, y), text, colour, Pillow's anchor)].
    """
    side = 2 * size  # drawn twice as large and then shrunk, so that lines are smooth
    image = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(image)
    for xy, colour, width in layers:
        # Diverged dots are kept on the frame; far outside, Pillow's integers would overflow
        edge = 0.99 if np.ndim(xy) == 2 else 9
        xy = (np.nan_to_num(xy, nan=edge).clip(-edge, edge) * [1, -1] + 1) * side / 2
        for line in xy if xy.ndim == 3 else ():
            pen.line([tuple(point) for point in line], colour, width)
        for x, y in xy if xy.ndim == 2 else ():
            pen.ellipse((x - width, y - width, x + width, y + width), colour)
    for (x, y), text, colour, anchor in texts:
        pen.text(((1 + x) * size, (1 - y) * size), text, colour, ImageFont.load_default(22), anchor)
    pen.rectangle((0, 0, side - 1, side - 1), outline=GREY, width=2)
    return image.resize((size, size), Image.LANCZOS)


def draw_chart(curves, x_label, y_label, high=None, size=160):
    """Curves {name: points (n, 2)}, the axes up to `high` (x, y), else to all; as `draw_layers`.

    Points that are not finite are left out.
    """
    curves = {name: np.asarray(xy, dtype=float) for name, xy in curves.items()}
    curves = {name: xy[np.isfinite(xy).all(1)] for name, xy in curves.items()}
    every = np.concatenate(list(curves.values()))
    low = every.min(0)
    high = every.max(0) if high is None else high
    layers = [([[(-0.9, 0.75), (-0.9, -0.78), (0.9, -0.78)]], GREY, 2)]
    texts = [((-0.9, 0.8), f"{y_label}, {low[1]:.2g} to {high[1]:.2g}", BLACK, "ls"),
             ((0.9, -0.82), f"{x_label}, {low[0]:.3g} to {high[0]:.2g}", BLACK, "rt")]
    for i, (name, xy), colour in zip(count(), curves.items(), cycle(COLOURS)):
        xy = (xy - low) / np.maximum(np.subtract(high, low), 1e-12) * (1.8, 1.5) - (0.9, 0.78)
        layers += [(xy[None], colour, 4), (xy, colour, 4)]
        texts.append(((0.9, 0.7 - 0.15 * i), name, colour, "rt"))
    return draw_layers(layers, texts, size)


# The first word of every seed, so that no two uses of randomness share a stream.
INIT, ORDER, CHOICE, CORRUPT, STEP, IMAGE, SHAPES, TOY, ATTACK, FIXED_BATCH, EOT, LIMIT = \
    range(1, 13)


def seed_for(*numbers):
    """Hash non-negative integers, the first of them one of the above, into a 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def image_noise(seed, indices, shape, device, use=IMAGE):
    """Noise for `sample`: a generator of its own for each image, seeded by (use, seed, index).

    Drawn on the CPU, so that a GPU starts from the same noise. Returns a function without
    arguments -> (len(indices), *shape) on `device`.
    """
    generators = [torch.Generator().manual_seed(seed_for(use, seed, int(k))) for k in indices]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


# ---------- Reading images: a folder, a zip or an npz


class Source(NamedTuple):
    """Images that are not decoded yet."""

    names: Sequence  # one for each image
    read: Callable  # name -> PIL image
    files: dict  # name below the root -> (bytes, date of its last change or checksum)
    split: str | None = None  # None where the source is one bare set of images


def numbered(images):
    """(names, read) of a `Source` that is an array, uint8 (N, H, W) or (N, H, W, 3)."""
    return [f"{k:06d}" for k in range(len(images))], lambda k: Image.fromarray(images[int(k)])


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif")


def is_image(name):
    """By its suffix, unless hidden, the Macintosh's shadow of a file, or outside of its zip."""
    strange = any(part.startswith((".", "/", "__MACOSX")) for part in Path(name).parts)
    return name.lower().endswith(SUFFIXES) and not strange


def find_files(root):
    """The files below a folder, sorted; links are followed, each real folder is read once."""

    def refuse(error):
        raise error

    seen, found = set(), []
    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found += [Path(folder, name) for name in names]
    return sorted(found)


def size_and_date(root, files):
    """What tells whether files below `root` have changed, as `Source.files`."""
    return {file.relative_to(root).as_posix(): (file.stat().st_size, file.stat().st_mtime_ns)
            for file in files}


def open_images(root):
    """The `Source` of a folder or zip of images, or of an npz with arr_0, uint8 (N, H, W, C).

    Raises UserError, naming the file, for one that is missing, empty or damaged.
    """
    with user_errors(Exception, prefix=f"{root} is not readable: "):
        if root.is_dir():
            names = [file for file in find_files(root) if is_image(str(file.relative_to(root)))]
            source = Source(names, Image.open, size_and_date(root, names))
        elif root.suffix == ".npz":
            images = np.load(root)["arr_0"]
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
                raise ValueError(f"arr_0 is {images.dtype} {images.shape}, not uint8 (N, H, W, C)")
            images = images[..., 0] if images.shape[-1] == 1 else images
            source = Source(*numbered(images), size_and_date(root.parent, [root]))
        else:
            archive = zipfile.ZipFile(root)
            files = {entry.filename: (entry.file_size, entry.CRC) for entry in archive.infolist()
                     if is_image(entry.filename)}
            source = Source(sorted(files), lambda name: Image.open(io.BytesIO(archive.read(name))),
                            files)
    if not source.names:
        raise UserError(f"no images in {root}: no {', '.join(SUFFIXES)}")
    return source


def crop_resize(image, size, channels, box=None):
    """PIL image -> uint8 (channels, size, size): upright, centre square or `box`, resized.

    Shrinking averages over the area that a pixel covers (no aliasing); enlarging is bicubic.
    What is transparent turns white.  Raises ValueError for values of more than 8 bits.
    """
    if image.mode[0] in "IF":
        raise ValueError(f"its mode is {image.mode}, of a range that is not known: save 8 bits")
    with contextlib.suppress(Exception):  # With a damaged EXIF block an image is taken as upright.
        image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    side = min(image.size)
    left, top = ((length - side) // 2 for length in image.size)
    left, top, right, bottom = box or (left, top, left + side, top + side)
    way = Image.BOX if right - left > size else Image.BICUBIC
    image = image.resize((size, size), way, box=(left, top, right, bottom))
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


# ---------- Samplers

SAMPLERS = ("ddpm", "ddim")


def step_pairs(diffusion, steps, spacing="respaced", stop=0.0):
    """(t, prev) of each sampling step, evenly spaced from (T-1, ...) to (0, -1); see `sample`."""
    chosen = np.linspace(diffusion.T - 1, 0, steps).round().astype(int).tolist()
    pairs = list(zip(chosen, [t - 1 for t in chosen] if spacing == "naive" else [*chosen[1:], -1]))
    noisy = int((diffusion.noise_level[chosen] >= stop).sum())
    return pairs if noisy == steps else [*pairs[:noisy], (chosen[noisy], -1)]


def denoise_step(net, diffusion, x, t, prev, sampler, noise, clip=True):
    """One step x_t -> x_prev (B, ...); t >= prev are ints, or int64 (B,); prev = -1: clean images.

    ddpm: a draw from the posterior q(x_prev | x_t, x0), its variance the smaller of Ho et al.'s
    two. ddim: the deterministic step of Song et al. 2021, sqrt(a') x0 + sqrt(1 - a') eps.
    clip: clamp the denoised estimate to [-1, 1] first, so that mean and eps both see it.
    noise: a function that returns standard normals of x's shape.
    """
    t, prev = (torch.as_tensor(time).expand(len(x)) for time in (t, prev))
    a = diffusion.alpha_bar[t]
    a_prev = torch.where(prev < 0, 1.0, diffusion.alpha_bar[prev])
    t = t.to(x.device, non_blocking=True)
    x0 = denoise(net, diffusion, x, t)
    if clip:
        x0 = x0.clamp(-1, 1)

    def scale(factor, y):
        return factor.to(y, non_blocking=True).view(-1, *[1] * (y.dim() - 1)) * y

    if sampler == "ddim":
        eps = diffusion.eps_from_x0(x, t, x0)
        return scale(a_prev.sqrt(), x0) + scale((1 - a_prev).sqrt(), eps)

    alpha = a / a_prev
    mean = (scale(a_prev.sqrt() * (1 - alpha) / (1 - a), x0)
            + scale(alpha.sqrt() * (1 - a_prev) / (1 - a), x))
    if (prev < 0).all():
        return mean
    return mean + scale(((1 - alpha) * (1 - a_prev) / (1 - a)).sqrt(), noise())


@torch.no_grad()
def sample(net, diffusion, noise, sampler="ddim", steps=100, spacing="respaced", clip=True,
           perturb=None, progress=None, stop=0.0):
    """Denoise pure noise in `steps` network calls; returns x0 of noise's shape, (B, ...).

    noise: function returning fresh standard normals (B, ...); the first draw is x_T.
    spacing: "respaced" steps from one of the chosen time steps to the next. "naive" takes the
        one-step t -> t-1 update at each of them, which leaves noise behind.
    perturb: hook (x, t) -> x on the state before each step, where an attack goes.
    progress: hook (i, steps), called after each step.
    stop: end with the denoised estimate at the first time whose noise s / sqrt(a) is below this:
        before the times at which a model of noisy data has learned to draw their noise. Of its
        std n, n^2 / sqrt(n^2 + stop^2) is left by an ideal one.
    """
    x = noise()
    for i, (t, prev) in enumerate(step_pairs(diffusion, steps, spacing, stop)):
        if perturb is not None:
            x = perturb(x, t)
        x = denoise_step(net, diffusion, x, t, prev, sampler, noise, clip)
        if progress is not None:
            progress(i + 1, steps)
    return x


def haar(x):
    """|a - b - c + d| of the 2x2 pixels of images (..., H, W), twice the finest Haar detail.

    x: a tensor, or an array of signed numbers. The edge of an odd size is left out.
    """
    height, width = x.shape[-2] // 2 * 2, x.shape[-1] // 2 * 2
    a, b, c, d = (x[..., i:height:2, j:width:2] for i in (0, 1) for j in (0, 1))
    return abs(a - b - c + d)


MAD = 0.6745  # The median of |N(0, 1)|; Donoho's estimate of the noise's std divides by it.


def noise_estimate(x):
    """The noise's std in images (B, C, H, W) of 2x2 pixels or more, each its own: (B,).

    Median |finest diagonal Haar coefficient| / .6745 (Donoho & Johnstone 1994), over all channels.
    Texture counts as noise: clean photographs of 32 pixels have .02 to .1 on the [-1, 1] scale.
    """
    return haar(x).flatten(1).quantile(0.5, dim=1) / 2 / MAD


@torch.no_grad()
def clean_images(net, diffusion, noisy, std, noise, sampler="ddim", steps=1):
    """Denoise images (B, C, H, W) with noise of std (B,), in `steps` network calls; (B, C, H, W).

    An image begins as x_t = sqrt(a) noisy at the time whose noise s / sqrt(a) is nearest to its
    own, and goes down from there as `sample` does. One step returns D(x_t). noise: as of `sample`.
    """
    own = (diffusion.noise_level - std.cpu()[:, None]).abs().argmin(1)
    times = (own * torch.linspace(1, 0, steps)[:, None]).round().long()  # (steps, B)
    x = diffusion.at(own.to(noisy.device), noisy)[0] * noisy
    for t, prev in zip(times, [*times[1:], -1]):
        x = denoise_step(net, diffusion, x, t, prev, sampler, noise)
    return x


def draw_images(net, diffusion, shape, indices, seed=0, sampler="ddim", steps=100,
                spacing="respaced", batch_size=64, device="cpu", title="images", hook=None,
                noisy=None, stop=0.0):
    """Draw the images of these indices, a batch at a time: yields (indices, uint8 (B, C, H, W)).

    hook: function(indices of a batch) -> the `perturb` of `sample`.
    noisy: (images (N, C, H, W), std (N,)): instead of drawing, clean those of these indices.
    Raises UserError where an image is not finite.
    """
    tick = ticker(title, len(indices))
    for first in range(0, len(indices), batch_size):
        batch = list(indices[first:first + batch_size])
        noise = image_noise(seed, batch, shape, device)
        if noisy:
            x, std = (part[batch].to(device) for part in noisy)
            x = clean_images(net, diffusion, x, std, noise, sampler, steps)
        else:
            x = sample(net, diffusion, noise, sampler, steps, spacing, stop=stop,
                       perturb=hook and hook(batch),
                       progress=lambda i, n: tick(first + len(batch) * i / (n + 1)))
        if not x.isfinite().all():
            raise UserError(f"{title}: an image is not finite; the weights may have exploded")
        tick(first + len(batch))
        yield batch, to_uint8(x).cpu().numpy()


# ---------- A trained model


class Run(NamedTuple):
    """A trained model to draw from, in eval mode, its weights without gradients."""

    net: nn.Module
    diffusion: Diffusion
    config: dict  # as the checkpoint holds it
    shape: tuple  # (C, H, W) of its images
    origin: dict  # provenance: run, step, weights, weights_sha256


def load_run(path, device="cpu", raw=False):
    """The `Run` in a run folder or checkpoint file: EMA weights, or the raw ones.

    Raises UserError for a checkpoint that is missing, damaged or foreign.
    """
    with user_errors(ValueError):
        checkpoint = read_checkpoint(path)
    config = checkpoint["config"]
    with user_errors(KeyError, TypeError, ValueError, RuntimeError,
                     prefix=f"{path}: its config or weights are not train.py's: "):
        net = build_network(config)
        net.load_state_dict(checkpoint["model" if raw else "ema"])
        diffusion = Diffusion(config["T"], config["schedule"], device, config["predict"])
    digest = hashlib.sha256()
    for p in net.parameters():
        digest.update(p.detach().numpy().tobytes())
    net = net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    shape = (config["in_channels"], config["image_size"], config["image_size"])
    return Run(net, diffusion, config, shape, {
        "run": str(path), "step": checkpoint["step"], "weights": "raw" if raw else "EMA",
        "weights_sha256": digest.hexdigest()[:16]})


def check_alike(run, other):
    """UserError unless two runs have the same time steps, and networks of the same kind."""
    for key in ("in_channels", "image_size", "T", "schedule", "predict"):
        if other.config[key] != run.config[key]:
            raise UserError(f"{other.origin['run']}: its {key} is {other.config[key]}, that of "
                            f"{run.origin['run']} is {run.config[key]}")


def with_expert(run, path, device, raw=False):
    """A run with the network of another, of `train.py --t_max U`, where t < U T; None: as it is.

    Raises UserError for an expert that does not fit, and for one of all t.
    """
    if path is None:
        return run
    expert = load_run(path, device, raw)
    check_alike(run, expert)
    share = expert.config.get("t_max", 1.0)
    if share == 1:
        raise UserError(f"--expert {path}: it was not fine-tuned by train.py --t_max")
    end = share * run.diffusion.T

    def net(x, t):
        late = t < end
        n = int(late.sum())
        if n in (0, len(t)):
            return (expert.net if n else run.net)(x, t)
        return torch.where(late.view(-1, 1, 1, 1), expert.net(x, t), run.net(x, t))

    return run._replace(net=net, origin={**run.origin, "expert": str(path),
                                         "expert_sha256": expert.origin["weights_sha256"]})


# ---------- The command


def add_sampling_flags(flag):
    """The flags of whatever draws images, by an `add_argument`."""
    flag("--sampler", choices=SAMPLERS, default="ddim", help="ddpm: ancestral")
    flag("--steps", type=number(int, 1), default=100,
         help="network calls an image, fewer with --stop")
    flag("--spacing", choices=["respaced", "naive"], default="respaced",
         help="naive: one-step updates at strided time steps, which leave noise")
    flag("--stop", type=number(float, 0), default=0.0,
         help="end with the denoised estimate once the noise s / sqrt(alpha_bar) is below this; "
              "2 to 4.5 times the std of the data's noise were best after dsm")
    flag("--expert", type=Path,
         help="another run, for the last steps: what train.py --t_max has fine-tuned of this one")
    flag("--seed", type=number(int, 0), default=0, help="seed of image 0, 1, ...")
    flag("--raw", action="store_true", help="raw weights instead of the EMA")
    flag("--batch_size", type=number(int, 1), default=64,
         help="images at a time in a process; it does not change them")


def parse_args(argv=None):
    """The command line; UserError where it is wrong."""
    p = Parser(description=__doc__)
    flag = p.add_argument
    flag("run", type=Path, help="run folder or checkpoint of train.py, or a diffusers folder")
    flag("--num", type=number(int, 1), default=64, help="how many images to draw")
    add_sampling_flags(flag)
    flag("--denoise", type=Path,
         help="instead clean these images, a folder, zip or npz; --steps is then 1, else 100")
    flag("--noise_std", type=number(float, 0),
         help="their noise's std on the [-1, 1] scale; else an estimate for each, which is printed")
    flag("--export", type=Path, help="instead write a folder that diffusers opens")
    flag("--out", type=Path,
         help="output folder, with a sheet beside it; else samples or denoised in the run's, or, "
              "of a file without a run, in out/<its name>")
    flag("--overwrite", action="store_true", help="replace images of other settings")
    flag("--device", default="auto", help="cpu, cuda, cuda:1 or mps")
    p.set_defaults(steps=None)
    args = p.parse_args(argv)
    args.steps = args.steps or (1 if args.denoise else 100)
    if args.noise_std is not None and not args.denoise:
        raise UserError("--noise_std is the noise of the images to --denoise")
    if args.export and args.expert:
        raise UserError("--export writes one network: not with --expert")
    if args.denoise and (args.stop or args.spacing != "respaced"):
        raise UserError("--stop and --spacing are for drawing; --denoise knows neither")
    return args


def prepare_folder(out, picture, provenance, overwrite):
    """Make the folder `out` ready for images of `provenance`, which it writes there.

    Images of the same settings stay, to be completed. Raises UserError for files that are not
    this script's, and for more images or those of other settings, unless `overwrite` clears them.
    Returns the folder's lock, to hold until the process ends.
    """
    note = out / "samples.json"
    before = read_json(note)
    if "sampler" not in before and (picture.exists() or any(out.glob("[!.]*"))):
        raise UserError(f"{out} or {picture} is not of sample.py: take another --out")
    changed = [key for key in {**before, **provenance} if key not in ("num", "run", "expert")
               and before.get(key) != provenance.get(key)] if before else []
    if before.get("num", 0) > provenance["num"]:
        changed.append("num")
    if changed and not overwrite:
        raise UserError(f"{out} holds images of other settings ({', '.join(changed)} differ): "
                        "use --overwrite or another --out")
    lock = claim_folder(out)
    names = filter(is_image, before.get("noise_std") or image_names(before.get("num", 0)))
    for path in [picture, *(out / name for name in [*names, "samples.npz"])] if changed else []:
        path.unlink(missing_ok=True)
    write_json(note, provenance)
    check_writable(picture)
    return lock


def image_names(num):
    """The files of drawn images, such as 000041.png."""
    return [f"{k:06d}.png" for k in range(num)]


def read_noisy(root, shape):
    """Images to clean: (names of the PNGs to write, uint8 (N, C, H, W), cropped and resized)."""
    source, names, images = open_images(root), [], []
    for name in source.names:
        path = Path(name).relative_to(root) if root.is_dir() else Path(name)
        names.append(str(path.with_suffix(".png")))
        with user_errors(Exception, prefix=f"{root}: {name} is not readable: "):
            images.append(crop_resize(source.read(name), shape[-1], shape[0]))
    if len(set(names)) < len(names):
        raise UserError(f"{root}: two of its images have one name but for the suffix")
    return names, np.stack(images)


def export(run, folder, overwrite):
    """Write a `Run` as a folder of diffusers."""
    if folder.exists() and not (overwrite and (folder / "model_index.json").exists()):
        raise UserError(f"--export {folder} exists: take another, or --overwrite the model there")
    with user_errors(ValueError, OSError, prefix=f"--export {folder}: "):
        write_diffusers(run.net, run.config, folder)
    tell(f"DDPMPipeline.from_pretrained('{folder}') draws from the {run.origin['weights']} "
         "weights; its UNet2DModel is in unet")


def main(argv=None):
    """Draw, clean or export."""
    args = parse_args(argv)
    rank, _, world, device = setup_device(args.device)
    run = with_expert(load_run(args.run, device, args.raw), args.expert, device, args.raw)
    net, diffusion, shape, lead = run.net, run.diffusion, run.shape, rank == 0
    if args.steps > diffusion.T:
        raise UserError(f"--steps {args.steps}: the model was trained with T = {diffusion.T}")
    if args.export:
        tell(f"output {args.export}")
        return export(run, args.export, args.overwrite)
    folder = args.run if args.run.is_dir() else args.run.parent
    if not (folder / "ckpt.pt").exists():
        folder = Path("out", args.run.stem)
    out = args.out or folder / ("denoised" if args.denoise else "samples")
    picture = Path(f"{out.resolve()}.png")
    provenance = {**run.origin, "num": args.num, "sampler": args.sampler, "steps": args.steps,
                  "spacing": args.spacing, "stop": args.stop, "seed": args.seed}
    names, noisy = image_names(args.num), None
    if args.denoise:
        if out.resolve().is_relative_to(args.denoise.resolve()):
            raise UserError(f"--out {out} is in the folder to clean: take another --out")
        names, before = read_noisy(args.denoise, shape)
        x = torch.from_numpy(before).float() / 127.5 - 1
        std = noise_estimate(x)
        if args.noise_std is not None:
            std = torch.full_like(std, args.noise_std)
        noisy = x, std
        provenance |= {"num": len(names), "denoised": str(args.denoise),
                       "denoised_sha256": hashlib.sha256(before.tobytes()).hexdigest()[:16],
                       "noise_std": dict(zip(names, std.tolist()))}
    if lead:
        tell(f"output {out}")
        tell(f"{run.origin['weights']} weights of step {run.origin['step']}, {args.sampler} "
             f"{args.steps} steps ({args.spacing}), {len(names)} images on {world} x "
             f"{device.type}")
        lock = prepare_folder(out, picture, provenance, args.overwrite)  # noqa: F841
        if args.denoise and args.noise_std is None:
            for name, level in zip(names, std.tolist()):
                tell(f"{name}: noise of std {level:.3f}")
    if world > 1:
        dist.barrier()

    mine = range(rank, len(names), world)
    todo = [k for k in mine if not (out / names[k]).exists()]
    if len(todo) < len(mine):
        tell(f"{len(mine) - len(todo)} of {len(mine)} images are there already")
    start = time.time()

    for batch, images in draw_images(net, diffusion, shape, todo, args.seed, args.sampler,
                                     args.steps, args.spacing, args.batch_size, device, noisy=noisy,
                                     stop=args.stop):
        for k, image in zip(batch, images):
            image = Image.fromarray(image.transpose(1, 2, 0).squeeze())
            (out / names[k]).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(out / names[k], lambda temporary: image.save(temporary, "PNG"))

    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if lead:
        images = np.empty((len(names), *shape[1:], shape[0]), np.uint8)
        for k, name in enumerate(names):
            with user_errors(Exception, prefix=f"{out / name} is damaged, delete it: "):
                images[k] = np.asarray(Image.open(out / name)).reshape(images.shape[1:])
        write_atomically(out / "samples.npz", lambda temporary: np.savez(temporary, images))
        shown = images[:64].transpose(0, 3, 1, 2)
        if args.denoise:  # Pairs, before and after.
            shown = np.stack([before[:32], shown[:32]], axis=1).reshape(-1, *shape)
        save_grid(shown, picture)
        tell(f"{len(names)} images, samples.npz (arr_0, uint8 NHWC) and samples.json in {out}, "
             f"the first {min(len(names), 64)} in {picture}, {duration(time.time() - start)}")


if __name__ == "__main__":
    run_cli(main)
