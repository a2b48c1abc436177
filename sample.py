"""Draw images from a trained model.

    python sample.py out/cifar10-adv --num 50000 --sampler ddim --steps 100
    torchrun --nproc_per_node=8 -- sample.py out/cifar10-adv --num 50000

Image k depends on (--seed, k) and the weights alone: not on the batch size, nor on how many
processes share the work (but for rounding: at times one level of 255). An interrupted run,
started again, draws the missing images only.
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torchvision.utils import make_grid

from losses import Diffusion
from model import UserError, load_model, run_cli

# ---------- Samplers


def timesteps(T, steps):
    """`steps` of the T time steps, evenly spaced from T-1 down to 0; [T-1] alone for one.

    Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"{steps} sampling steps: between 1 and T = {T}")
    return np.linspace(T - 1, 0, steps).round().astype(int).tolist()


def visits(T, steps, spacing):
    """(t, prev) of each sampling step, the last prev -1 for the clean image; see `sample`."""
    chosen = timesteps(T, steps)
    return list(zip(chosen, [t - 1 for t in chosen] if spacing == "naive" else [*chosen[1:], -1]))


def denoise_step(net, diffusion, x, t, prev, sampler, noise, clip=True):
    """One step x_t -> x_prev; t > prev are ints, prev = -1 the clean image.

    ddpm: a draw from the posterior q(x_prev | x_t, x0), its variance the smaller of Ho et al.'s
    two. ddim: the deterministic step of Song et al. 2021, sqrt(a') x0 + sqrt(1 - a') eps.
    clip: clamp the denoised estimate to [-1, 1] first, so that mean and eps both see it.
    noise: a function that returns standard normals of x's shape.
    """
    a = diffusion.alpha_bar[t].item()
    a_prev = diffusion.alpha_bar[prev].item() if prev >= 0 else 1.0
    batch_t = torch.full((len(x),), t, device=x.device)
    x0 = diffusion.x0_from_eps(x, batch_t, net(x, batch_t))
    if clip:
        x0 = x0.clamp(-1, 1)

    if sampler == "ddim":
        eps = diffusion.eps_from_x0(x, batch_t, x0)
        return a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * eps

    alpha = a / a_prev
    mean = (a_prev**0.5 * (1 - alpha) * x0 + alpha**0.5 * (1 - a_prev) * x) / (1 - a)
    if prev < 0:
        return mean
    return mean + ((1 - alpha) * (1 - a_prev) / (1 - a)) ** 0.5 * noise()


@torch.no_grad()
def sample(net, diffusion, noise, sampler="ddim", steps=100, spacing="respaced", clip=True,
           perturb=None, progress=None):
    """Denoise pure noise in `steps` network calls; returns x0 of noise's shape, (B, ...).

    noise: function returning fresh standard normals (B, ...); the first draw is x_T.
    spacing: "respaced" steps from one of the chosen time steps to the next. "naive" takes the
        one-step t -> t-1 update at each of them, which leaves noise behind (see README).
    perturb: hook (x, t) -> x on the state before each step, where an attack goes.
    progress: hook (i, steps), called after each step.
    """
    x = noise()
    for i, (t, prev) in enumerate(visits(diffusion.T, steps, spacing)):
        if perturb is not None:
            x = perturb(x, t)
        x = denoise_step(net, diffusion, x, t, prev, sampler, noise, clip)
        if progress is not None:
            progress(i + 1, steps)
    return x


# The first word of every seed, so that no two uses of randomness share a stream
INIT, ORDER, CHOICE, CORRUPT, STEP, IMAGE, SHAPES, TOY, ATTACK, FIXED_BATCH, EOT, LIMIT = \
    range(1, 13)


def mix(*numbers):
    """Hash non-negative integers, the first of them one of the above, into a 63-bit seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def image_noise(seed, indices, shape, device, use=IMAGE):
    """Noise for `sample`: a generator of its own for each image, seeded by (use, seed, index).

    Drawn on the CPU, so that a GPU starts from the same noise. Returns a function without
    arguments -> (len(indices), *shape) on `device`.
    """
    generators = [torch.Generator().manual_seed(mix(use, seed, k)) for k in indices]

    def draw():
        return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    return draw


# ---------- Pictures


def to_uint8(x):
    """[-1, 1] float (..., ) -> uint8 0..255, rounded and clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images, path, columns=8):
    """Write uint8 images (N, C, H, W), C 1 or 3, as one PNG; small ones are enlarged."""
    images = torch.as_tensor(images)
    scale = max(1, 48 // images.shape[-1])
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    grid = make_grid(images, nrow=columns, padding=2, pad_value=255)
    Image.fromarray(grid.permute(1, 2, 0).numpy()).save(path)


# ---------- Processes, shared by every script


def setup(device="auto"):
    """(rank, local rank, world size, torch.device) of this process, alone or under torchrun.

    device: "auto" takes CUDA, then MPS, then the CPU.  Raises UserError if it is not there.
    On a CPU under Linux the process keeps memory that it frees, for its next step.
    """
    rank, local, world = (int(os.environ.get(name, default)) for name, default in
                          (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    if device == "auto":
        mps = torch.backends.mps.is_available() and world == 1
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        device = torch.device(device)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    elif sys.platform == "linux":
        # glibc hands the activations' memory back every step: the page faults cost adv 5 %.
        # Before 2.35 it takes no threshold above 32 MiB
        mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        if mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25):
            mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    return rank, local, world, device


def start_group(device):
    """Join the process group that torchrun describes: NCCL on CUDA, gloo elsewhere.

    A day's patience: one process decodes a data set, or draws pictures, while the others wait.
    """
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))


def duration(seconds):
    """Seconds -> "1:02:03"."""
    return str(timedelta(seconds=int(seconds)))


@contextlib.contextmanager
def ticker(title, total, lead=True):
    """A line of progress with a rate and an ETA: call what it yields with how many are done."""
    start = shown = time.time()

    def tick(done):
        nonlocal shown
        now = time.time()
        if lead and now - (start if done >= total else shown) > 2:
            shown = now
            rate = done / (now - start)
            print(f"\r{title}: {done:,.0f}/{total:,}  {rate:,.1f}/s  ETA "
                  f"{duration((total - done) / rate)}   ", end="", flush=True)

    try:
        yield tick
    finally:
        if shown > start:
            print(flush=True)


# ---------- Command line


def number(kind, low, high=None, open_high=False):
    """An argparse type: an int or float within [low, high], or [low, high) if open_high."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        above = high is not None and (value >= high if open_high else value > high)
        if not value >= low or above or value == float("inf"):
            upper = "" if high is None else f" and {'below' if open_high else 'at most'} {high}"
            word = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {word}, at least {low}{upper}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the usage of forty flags before them."""

    def error(self, message):
        raise UserError(f"{message} (see {self.prog} -h)")


def parse_args(argv=None):
    """The command line; UserError where it is wrong."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="run folder of train.py, or a checkpoint file")
    p.add_argument("--num", type=number(int, 1), default=64, help="how many images (64)")
    p.add_argument("--sampler", choices=["ddim", "ddpm"], default="ddim",
                   help="deterministic, or ancestral as in the paper (ddim)")
    p.add_argument("--steps", type=number(int, 1), default=100,
                   help="network calls per image, 1 to T (100)")
    p.add_argument("--spacing", choices=["respaced", "naive"], default="respaced",
                   help="naive: one-step updates at strided time steps; leaves noise (respaced)")
    p.add_argument("--seed", type=number(int, 0), default=0, help="seed of image 0, 1, ... (0)")
    p.add_argument("--batch_size", type=number(int, 1), default=64,
                   help="images at a time, per process; does not change them (64)")
    p.add_argument("--raw", action="store_true", help="raw weights instead of the EMA")
    p.add_argument("--out", type=Path, help="output folder (RUN/samples)")
    p.add_argument("--overwrite", action="store_true", help="replace images of other settings")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (auto)")
    return p.parse_args(argv)


def write_atomically(path, save):
    """Let `save(temporary path)` write a file, then rename it to `path`: whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def weights_hash(net):
    """First 16 hex digits of the SHA-256 of all parameters, to tell one model from another."""
    digest = hashlib.sha256()
    for p in net.parameters():
        digest.update(p.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_run(path, device, raw=False):
    """A trained model to draw from: (net, its Diffusion, its config, where the weights are from).

    Raises UserError as `load_model`, or when the config has no noise schedule.
    """
    net, config, step = load_model(path, device, ema=not raw)
    try:
        diffusion = Diffusion(config["T"], config["schedule"], device)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: no noise schedule in its config") from error
    return net, diffusion, config, {"run": str(path), "step": step,
                                    "weights": "raw" if raw else "EMA",
                                    "weights_sha256": weights_hash(net)}


def model_shape(config):
    """(C, H, W) of the images that a run draws."""
    return config["in_channels"], config["image_size"], config["image_size"]


def claim_folder(out, provenance, overwrite):
    """Check that the images in `out` were drawn as `provenance` says, or clear them; write it."""
    note = out / "samples.json"
    images = sorted(out.glob("[0-9]" * 6 + ".png"))
    try:
        old = dict(json.loads(note.read_text()))
    except (OSError, ValueError, TypeError):
        old = {}
    changed = [key for key, value in provenance.items()
               if key not in ("num", "run") and old.get(key) != value]
    if images and changed and not overwrite:
        raise UserError(f"{out} holds images of other settings ({', '.join(changed)} differ): "
                        "use --overwrite or another --out")
    text = json.dumps(provenance, indent=2) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in [*out.glob(".*.tmp"), *(images if changed else [])]:
            path.unlink()
        (out / "samples.npz").unlink(missing_ok=True)
        write_atomically(note, lambda temporary: temporary.write_text(text))
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}") from error


def read_back(path, shape):
    """A PNG as uint8 (H, W, C); one that a crash damaged is removed, for the next start."""
    try:
        return np.asarray(Image.open(path)).reshape(shape)
    except (OSError, ValueError, SyntaxError) as error:
        path.unlink()
        raise UserError(f"{path} was damaged and is removed: run the same command again") from error


def main(argv=None):
    """Entry point; see the module's docstring."""
    args = parse_args(argv)
    rank, _, world, device = setup(args.device)
    net, diffusion, config, origin = load_run(args.run, device, args.raw)
    if args.steps > diffusion.T:
        raise UserError(f"--steps {args.steps}: the model was trained with T = {diffusion.T}")
    run = Path(args.run)
    out = args.out or (run if run.is_dir() else run.parent) / "samples"
    provenance = {**origin, "num": args.num, "sampler": args.sampler, "steps": args.steps,
                  "spacing": args.spacing, "seed": args.seed}
    if rank == 0:
        print(f"output {out}")
        print(f"{origin['weights']} weights of step {origin['step']}, {args.sampler} {args.steps} "
              f"steps ({args.spacing}), {args.num} images on {world} x {device.type}", flush=True)
        claim_folder(out, provenance, args.overwrite)
    if world > 1:
        start_group(device)
        dist.barrier()

    def path(k):
        return out / f"{k:06d}.png"

    mine = range(rank, args.num, world)
    todo = [k for k in mine if not path(k).exists()]
    if rank == 0 and len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} images are there already")
    shape = model_shape(config)
    start = time.time()

    with ticker("images", len(todo) * world, rank == 0) as tick:
        for first in range(0, len(todo), args.batch_size):
            batch = todo[first:first + args.batch_size]

            def progress(i, steps):
                tick((first + len(batch) * i / steps) * world)

            noise = image_noise(args.seed, batch, shape, device)
            x = sample(net, diffusion, noise, args.sampler, args.steps, args.spacing,
                       progress=progress)
            images = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
            for k, image in zip(batch, images):
                image = Image.fromarray(image.squeeze())
                write_atomically(path(k), lambda temporary: image.save(temporary, "PNG"))

    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        images = np.stack([read_back(path(k), (*shape[1:], shape[0])) for k in range(args.num)])
        write_atomically(out / "samples.npz", lambda temporary: save_npz(temporary, images))
        save_grid(images[:64].transpose(0, 3, 1, 2), f"{out}.png")
        print(f"{args.num} images, samples.npz (arr_0, uint8 NHWC) and samples.json in {out}, "
              f"the first {min(args.num, 64)} in {out}.png, {duration(time.time() - start)}")


def save_npz(path, *arrays, **named):
    """np.savez under exactly this name, which the function would end in .npz itself."""
    with open(path, "wb") as file:
        np.savez(file, *arrays, **named)


if __name__ == "__main__":
    run_cli(main)
