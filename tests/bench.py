"""Seconds and memory of a training step, side by side; not run by the tests.

    python tests/bench.py                                  CIFAR-10's network, batch 16, fp32
    python tests/bench.py --amp bf16 --modes dsm,adv
    python tests/bench.py --image_size 16 --in_channels 1 --channels 32 --mult 1,2,2 --blocks 1 \\
        --attention 8 --dropout 0 --batch_size 64          the network of README's Fashion-MNIST

A step is train.py's own `update`: Adam, clipping, EMA. diffusers' UNet2DModel goes through the same
where that package is installed. All contestants take one step after the other, --repeats times, so
that a slow moment of the machine meets all of them. Then ddim sampling against the bare network,
the batches that a step would wait for, and each contestant's peak memory in a process of its own.
"""

import argparse
import copy
import importlib.util
import platform
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from losses import MODES, Diffusion, Perturbation  # noqa: E402
from model import UNET_KEYS, UNet, UserError, run_cli  # noqa: E402
from sample import Parser, image_noise, number, sample, setup  # noqa: E402
from train import FLAGS, NOISY, Objective, batch_index, training_images, update  # noqa: E402

UNITS = {"dsm": 3, "random": 6, "adv": 8, "invariant": 8, "diffusers": 3}


def diffusers_net(args):
    """diffusers' network of the same architecture, as (x, t) -> eps; args as `UNet`'s."""
    from diffusers import UNet2DModel

    def blocks(kind, sizes):
        return tuple(f"Attn{kind}" if size in args.attention else kind for size in sizes)

    sizes = [args.image_size // 2**i for i in range(len(args.mult))]
    groups = next(g for g in range(min(32, args.channels // 4), 0, -1) if args.channels % g == 0)
    net = UNet2DModel(
        sample_size=args.image_size, in_channels=args.in_channels, out_channels=args.in_channels,
        layers_per_block=args.blocks, dropout=args.dropout, norm_num_groups=groups,
        block_out_channels=tuple(args.channels * m for m in args.mult), attention_head_dim=None,
        down_block_types=blocks("DownBlock2D", sizes),
        up_block_types=blocks("UpBlock2D", sizes[::-1]))

    class Unwrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x, t, return_dict=False)[0]

    return Unwrapped()


def contestant(name, args, device):
    """(a function that takes one step, the network) of a mode, or of "diffusers"."""
    torch.manual_seed(0)
    ours = name != "diffusers"
    net = UNet(**{key: getattr(args, key) for key in UNET_KEYS}) if ours else diffusers_net(args)
    # a network whose last layers are zero has no gradient for the ascent to follow
    for p in net.parameters():
        if p.dim() > 1 and p.std() < 1e-4:
            torch.nn.init.xavier_uniform_(p)
    net = net.to(device, memory_format=torch.channels_last if ours else torch.contiguous_format)
    weights = list(net.parameters())
    averages = [copy.deepcopy(p.detach()) for p in weights]
    optimizer = torch.optim.Adam(weights, 2e-4, fused=True)
    diffusion = Diffusion(device=device)
    objective = Objective(net, diffusion, name if ours else "dsm", Perturbation()).train()
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
    autocast = nullcontext()
    if args.amp != "off":
        dtype = torch.float16 if args.amp == "fp16" else torch.bfloat16
        autocast = torch.autocast(device.type, dtype)
    if args.compile:
        net.compile()
    x0 = torch.randn(args.batch_size, args.in_channels, args.image_size, args.image_size,
                     device=device)
    if ours:
        x0 = x0.contiguous(memory_format=torch.channels_last)

    def step():
        update(objective, [x0], weights, averages, optimizer, scaler, autocast, 1.0, 0.999)

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


def peak_memory(name, args):
    """MiB that three steps of a contestant add to the process (CUDA: its allocator's peak)."""
    torch.set_num_threads(args.threads)
    device = setup(args.device)[3]
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


def parse_args(argv=None):
    """The command line; UserError where it is wrong."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--modes", default="dsm,random,adv,diffusers",
                   help=f"with commas between, of {','.join(UNITS)} (dsm,random,adv,diffusers)")
    p.add_argument("--repeats", type=number(int, 2), default=7, help="timed steps of each (7)")
    p.add_argument("--batch_size", type=number(int, 1), default=16, help="images a step (16)")
    p.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="autocast (off)")
    p.add_argument("--compile", action="store_true", help="torch.compile the networks")
    p.add_argument("--threads", type=number(int, 1), default=torch.get_num_threads(),
                   help="CPU threads (one a core)")
    p.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (auto)")
    p.add_argument("--cached", type=number(int, 100), default=10_000,
                   help="images in the synthetic cache that batches are read from (10000)")
    network = {"image_size": 32, "mult": (1, 2, 2, 2)}
    for name in UNET_KEYS:
        default, kind, text = FLAGS["network and diffusion"][name]
        default = network.get(name, default)
        p.add_argument(f"--{name}", type=kind if callable(kind) else int, default=default,
                       help=f"{text} ({default})")
    return p.parse_args(argv)


def main(argv=None):
    """Entry point; see the module's docstring."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = setup(args.device)[3]
    if args.modes.split(",")[0] not in MODES or not set(args.modes.split(",")) <= set(UNITS):
        raise UserError(f"--modes {args.modes}: of {','.join(UNITS)}, one of ours first")
    names = [name for name in args.modes.split(",")
             if name != "diffusers" or importlib.util.find_spec("diffusers")]
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"{device} ({processor}), {args.threads} threads, torch {torch.__version__}, amp "
          f"{args.amp}, batch {args.batch_size} of {args.image_size} pixels", flush=True)

    steps, nets = zip(*(contestant(name, args, device) for name in names))
    print(f"{sum(p.numel() for p in nets[0].parameters()):,} parameters", flush=True)
    times = {name: [] for name in names}
    for i in range(args.repeats + 2):  # the first two warm up
        for name, step in zip(names, steps):
            spent = seconds(step, device)
            if i >= 2:
                times[name].append(spent)
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        memory = {name: pool.apply(peak_memory, (name, args)) for name in names}
    base = statistics.median(times[names[0]])
    print(f"\n| step | s (median) | fastest to slowest | x {names[0]} | forward-units | MiB |\n"
          "|---|---|---|---|---|---|")
    for name in names:
        middle, spread = statistics.median(times[name]), sorted(times[name])
        print(f"| {name} | {middle:.3f} | {spread[0]:.3f} to {spread[-1]:.3f} | "
              f"{middle / base:.2f} | {UNITS[name]} | {memory[name]:,.0f} |", flush=True)

    net, diffusion, batch = nets[0].eval(), Diffusion(device=device), min(64, args.batch_size * 4)
    shape = (args.in_channels, args.image_size, args.image_size)
    x, t = torch.randn(batch, *shape, device=device), torch.zeros(batch, device=device).long()
    bare, sampled = [], []
    with torch.no_grad():
        net(x, t)
        for i in range(args.repeats):
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
