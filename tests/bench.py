"""Seconds and memory of training steps, side by side; not run by the tests.

    python tests/bench.py                              CIFAR-10's network, batch 16, fp32
    python tests/bench.py dsm adv dsm:amp=bf16 adv:amp=bf16
    python tests/bench.py dsm adv adv:reg_share=0.3:ascent_norm=l2 --batch_size 8
    python tests/bench.py dsm:channels=32 dsm:channels=64 dsm:channels=128

A row is a mode of losses.py, or the name of another library's network trained by dsm, which runs
where that package is installed; after it, options for this row alone: any flag below, or a field of
`losses.Perturbation`. A step is train.py's own `update`: Adam, clipping, EMA. All rows take one
step after the other, --repeats times, so that a slow moment of the machine meets all of them; the
peak memory, measured first, is that of a process of its own. Then, for the network of the first
row, ddim sampling against the bare network, and the seconds to make a batch from a memory-mapped
cache. pytorch-ddpm's model.py has to be importable as pytorch_ddpm.
"""

import argparse
import dataclasses
import importlib.util
import platform
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from losses import MODES, Diffusion, Perturbation, forward_units  # noqa: E402
from model import UNET_KEYS, UNet, UserError, run_cli  # noqa: E402
from sample import Parser, image_noise, number, sample, setup  # noqa: E402
from train import (FLAGS, NOISY, ON_OFF, Objective, batch_index, training_images,  # noqa: E402
                   update)

def diffusers(args):
    """diffusers' UNet2DModel."""
    from diffusers import UNet2DModel

    def blocks(kind, sizes):
        return tuple(f"Attn{kind}" if size in args.attention else kind for size in sizes)

    sizes = [args.image_size // 2**i for i in range(len(args.mult))]
    net = UNet2DModel(
        sample_size=args.image_size, in_channels=args.in_channels, out_channels=args.in_channels,
        layers_per_block=args.blocks, dropout=args.dropout,
        block_out_channels=tuple(args.channels * m for m in args.mult), attention_head_dim=None,
        down_block_types=blocks("DownBlock2D", sizes),
        up_block_types=blocks("UpBlock2D", sizes[::-1]))
    forward = net.forward
    net.forward = lambda x, t: forward(x, t, return_dict=False)[0]
    return net


def improved_diffusion(args):
    """The UNetModel of openai/improved-diffusion."""
    from improved_diffusion.unet import UNetModel

    factors = [args.image_size // size for size in args.attention]
    return UNetModel(args.in_channels, args.channels, args.in_channels, args.blocks, factors,
                     args.dropout, args.mult, num_heads=1)


def pytorch_ddpm(args):
    """The UNet of w86763777/pytorch-ddpm, its model.py saved as pytorch_ddpm.py."""
    from pytorch_ddpm import UNet

    levels = [i for i in range(len(args.mult)) if args.image_size // 2**i in args.attention]
    return UNet(1000, args.channels, args.mult, levels, args.blocks, args.dropout)


FIELDS = [field.name for field in dataclasses.fields(Perturbation)]
PEERS = {peer.__name__: peer for peer in (diffusers, improved_diffusion, pytorch_ddpm)}


def row_args(row, args):
    """(mode or peer, args with the row's own options); UserError on one that does not exist."""
    name, *options = row.split(":")
    argv = []
    for option in options:
        key, _, value = option.partition("=")
        argv += [f"--{key}", value] if value else [f"--{key}"]
    own = make_parser().parse_args(argv, argparse.Namespace(**vars(args)))
    for key in ("repeats", "threads", "device", "cached"):
        if getattr(own, key) != getattr(args, key):
            raise UserError(f"row {row}: --{key} is for all rows")
    if name in PEERS and (own.in_channels != 3 or own.channels % 32):
        raise UserError(f"row {row}: the peers' networks are RGB, of a width that 32 divides")
    return name, own


def network(name, args):
    """The network of a mode, ours, or of a peer."""
    if name in PEERS:
        return PEERS[name](args)
    return UNet(**{key: getattr(args, key) for key in UNET_KEYS})


def contestant(name, args, device):
    """(a function that takes one step, the network) of a mode, or of a peer's network on dsm."""
    torch.manual_seed(0)
    net = network(name, args)
    # a network whose last layers are zero has no gradient for the ascent to follow
    for p in net.parameters():
        if p.dim() > 1 and p.requires_grad and p.std() < 1e-4:
            torch.nn.init.xavier_uniform_(p.flatten(1))

    ours = name in MODES
    layout = torch.channels_last if ours or args.channels_last else torch.contiguous_format
    net = net.to(device, memory_format=layout)
    if args.compile:
        net.compile()
    weights = [p for p in net.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in weights]
    optimizer = torch.optim.Adam(weights, 2e-4, fused=True)
    perturbation = Perturbation(**{key: getattr(args, key) for key in FIELDS})
    objective = Objective(net, Diffusion(device=device), name if ours else "dsm", perturbation)
    objective.train()
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    autocast = nullcontext()
    if args.amp != "off":
        dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
        autocast = torch.autocast(device.type, dtype)
    x0 = torch.randn(args.batch_size, args.in_channels, args.image_size, args.image_size,
                     device=device).contiguous(memory_format=layout)

    def step():
        part = x0, torch.randint(1000, (len(x0),), device=device), torch.randn_like(x0)
        update(objective, [part], weights, averages, optimizer, scaler, autocast, 1.0, 0.999)

    return step, net


def seconds(function, device):
    """Wall-clock seconds of one call, the device's work included."""
    tic = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - tic


def resident(field):
    """MiB of this process by Linux's count: "VmRSS" now, "VmHWM" the most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_memory(row, args):
    """MiB that three steps of a row add to the process (CUDA: its allocator's peak).

    A compiled row's include the compiler; nan where there is no /proc.
    """
    name, args = row_args(row, args)
    torch.set_num_threads(args.threads)
    device = setup(args.device)[3]
    if device.type != "cuda" and not Path("/proc/self/status").exists():
        return float("nan")
    with torch.device("meta"):
        network(name, args)  # a library's own modules are no memory of the step
    before = resident("VmRSS")
    step, _ = contestant(name, args, device)
    for _ in range(3):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resident("VmHWM") - before


def data_seconds(args, folder):
    """Seconds to make one noisy batch from a memory-mapped cache, pages read at random."""
    shape = (args.cached, args.in_channels, args.image_size, args.image_size)
    images = np.lib.format.open_memmap(Path(folder, "cache.npy"), "w+", np.uint8, shape)
    for first in range(0, args.cached, 1000):
        images[first:first + 1000] = first // 1000 % 256
    kinds = np.full(args.cached, NOISY)
    times = []
    for step in range(args.repeats + 1):
        tic = time.perf_counter()
        index = batch_index(step, args.batch_size, args.cached, 0)
        training_images(images, index, kinds, 0.2, 0)
        times.append(time.perf_counter() - tic)
    return statistics.median(times[1:])


def make_parser():
    """The flags; those of train.py keep their name, kind and help."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=number(int, 2), default=7, help="timed steps of each row (7)")
    p.add_argument("--batch_size", type=number(int, 1), default=16, help="images a step (16)")
    p.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="autocast (off)")
    p.add_argument("--compile", action="store_true", help="torch.compile the networks")
    p.add_argument("--channels_last", action="store_true",
                   help="peers too in this layout (ours always are)")
    p.add_argument("--threads", type=number(int, 1), default=torch.get_num_threads(),
                   help="CPU threads (one a core)")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (auto)")
    p.add_argument("--cached", type=number(int, 100), default=10_000,
                   help="images in the synthetic cache that batches are read from (10000)")
    shared = {name: flag for flags in FLAGS.values() for name, flag in flags.items()}
    for name in (*UNET_KEYS, *FIELDS):
        default, kind, text = shared[name]
        default = {"image_size": 32, "mult": (1, 2, 2, 2)}.get(name, default)
        options = {"action" if kind is ON_OFF else "type": kind}
        if isinstance(kind, list):
            options = {"choices": kind, "type": type(kind[0])}
        p.add_argument(f"--{name}", default=default, help=f"{text} ({default})", **options)
    return p


def main(argv=None):
    """Entry point; see the module's docstring."""
    p = make_parser()
    p.add_argument("rows", nargs="*", help="dsm random adv diffusers, and such")
    args = p.parse_args(argv)
    rows = args.rows or ["dsm", "random", "adv", *PEERS]
    torch.set_num_threads(args.threads)
    device = setup(args.device)[3]
    known = {*MODES, *PEERS}
    settings = {row: row_args(row, args) for row in rows}
    unknown = [name for name, _ in settings.values() if name not in known]
    if unknown:
        raise UserError(f"row {unknown[0]}: one of {', '.join(sorted(known))}")
    absent = {name for name, _ in settings.values()
              if name in PEERS and not importlib.util.find_spec(name)}
    if absent:
        print(f"not installed, left out: {', '.join(sorted(absent))}")
    settings = {row: named for row, named in settings.items() if named[0] not in absent}
    if not settings:
        raise UserError("no row is left")

    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{device} ({processor}), {args.threads} threads, torch {torch.__version__}, amp "
          f"{args.amp}, batch {args.batch_size} of {args.image_size} pixels", flush=True)
    memory = {}
    for row in settings:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            memory[row] = pool.submit(peak_memory, row, args).result()
    contestants = {row: contestant(*named, device) for row, named in settings.items()}
    times = {row: [] for row in contestants}
    for i in range(args.repeats + 2):  # the first two warm up
        for row, (step, _) in contestants.items():
            spent = seconds(step, device)
            if i >= 2:
                times[row].append(spent)

    base = statistics.median(next(iter(times.values())))
    print("\n| step | million parameters | s (median) | fastest to slowest | x the first | "
          "forward-units | images / s | MiB |\n|---|---|---|---|---|---|---|---|")
    for row, spent in times.items():
        middle, (name, own) = statistics.median(spent), settings[row]
        units = forward_units(name if name in MODES else "dsm", own)
        parameters = sum(p.numel() for p in contestants[row][1].parameters() if p.requires_grad)
        print(f"| {row} | {parameters / 1e6:.2f} | {middle:.3f} | {min(spent):.3f} to "
              f"{max(spent):.3f} | {middle / base:.2f} | {units:.3g} | "
              f"{own.batch_size / middle:.1f} | {memory[row]:,.0f} |", flush=True)

    first = next(iter(contestants))
    net, args = contestants[first][1].eval(), settings[first][1]
    diffusion, batch = Diffusion(device=device), min(64, args.batch_size * 4)
    shape = (args.in_channels, args.image_size, args.image_size)
    x, t = torch.randn(batch, *shape, device=device), torch.zeros(batch, device=device).long()
    bare, sampled = [], []
    with torch.no_grad():
        net(x, t)
        for _ in range(3):
            noise = image_noise(0, range(batch), shape, device)
            sampled.append(seconds(lambda: sample(net, diffusion, noise, "ddim", 4), device))
            bare.append(seconds(lambda: [net(x, t) for _ in range(4)], device))
    sampled, bare = statistics.median(sampled) / 4, statistics.median(bare) / 4
    print(f"\nddim, batch {batch}: {sampled:.3f} s a step, the bare network {bare:.3f} s "
          f"({sampled / bare:.3f}x)")
    with tempfile.TemporaryDirectory() as folder:
        print(f"a noisy batch from {args.cached:,} cached images: {data_seconds(args, folder):.4f} "
              "s, made while the step before it runs")


if __name__ == "__main__":
    run_cli(main)
