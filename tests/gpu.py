"""What the CUDA paths do, in numbers: run by hand where there is a card; small on a CPU as a test.

    python tests/gpu.py check                    CUDA against the CPU, one check after another
    python tests/gpu.py bench                    img/s, memory, share of the card's peak, a peer
    python tests/gpu.py cifar10 --data_dir FOLDER --features FILE.pt    dsm and adv side by side
    python tests/gpu.py warm                     compile beforehand what bench and cifar10 need
    python tests/gpu.py bench dsm adv:reg_t=0.1 dsm:channels=64 --all batch_size=8 --device cpu

A verb ends within its --minutes, with what it has: --out/<verb>.json is a list of records {name,
figures, error, provenance}, written after each item; an item that fails leaves its error there, and
the next one goes on. A row is a mode of losses.py, or diffusers (its UNet2DModel trained by dsm);
after it options for this row alone: flags of train.py, and eager, compiled or reduce-overhead.

A machine without a network is given: wheels of diffusers, httpx and importlib_metadata; the images
of CIFAR-10 as a folder or zip; the file that tests/features.py writes. All that a later call on
that machine needs lies in --runs; the compiler keeps its own cache.
"""

import argparse
import atexit
import contextlib
import copy
import functools
import gc
import importlib.util
import json
import platform
import signal
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import losses  # noqa: E402
import sample  # noqa: E402
from losses import (Diffusion, Objective, Perturbation, forward_units,  # noqa: E402
                    stratified_t)
from model import UNET_KEYS, build_network, read_checkpoint  # noqa: E402
from sample import (Parser, UserError, a_path, draw_images, image_noise, load_run,  # noqa: E402
                    number, run_cli, save_npz, setup_device, to_uint8, write_json)
from train import (choose_corruption, load_images, make_parser,  # noqa: E402
                   shapes, training_images, update)

SMALL = "image_size=32:channels=64:mult=1,2:blocks=1:attention=16:batch_size=32"
TINY = "image_size=16:channels=8:mult=1:blocks=1:attention=0:batch_size=8"
LSUN = "image_size=256:mult=1,1,2,2,4,4:dropout=0"
LOW_T = "adv:reg_t=0.1"  # the recommended form
PEER = "diffusers"
HOW = ("eager", "compiled", "reduce-overhead")
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16 FLOP/s of the SXM cards

# ---------- A row, and the step that it takes


def read_row(row, args):
    """The settings of a row: train.py's, and `how` and `peer`.  UserError for a foolish one."""
    name, *options = row.split(":")
    argv = ["--mode", "dsm" if name == PEER else name]
    how = "compiled" if args.device.type == "cuda" else "eager"
    for option in [*args.all.split(":"), *options]:
        key, _, value = option.partition("=")
        if option in HOW:
            how = option
        elif option:
            argv += [f"--{key}", value] if value else [f"--{key}"]
    try:
        settings = make_parser("cifar10").parse_args(argv)
    except UserError as error:
        raise UserError(f"row {row}: {error}") from error
    if settings.amp == "auto":
        settings.amp = "bf16" if args.device.type == "cuda" else "off"
    settings.how, settings.peer = how, name == PEER
    return settings


def diffusers_network(settings):
    """diffusers' UNet2DModel of the same shape as ours; the import is this row's alone."""
    from diffusers import UNet2DModel

    def blocks(kind, sizes):
        return tuple(f"Attn{kind}" if size in settings.attention else kind for size in sizes)

    sizes = [settings.image_size // 2**i for i in range(len(settings.mult))]
    net = UNet2DModel(
        sample_size=settings.image_size, in_channels=3, out_channels=3, dropout=settings.dropout,
        layers_per_block=settings.blocks, attention_head_dim=None,
        block_out_channels=tuple(settings.channels * m for m in settings.mult),
        norm_num_groups=min(32, settings.channels // 4),
        down_block_types=blocks("DownBlock2D", sizes),
        up_block_types=blocks("UpBlock2D", sizes[::-1]))
    forward = net.forward
    net.forward = lambda x, t: forward(x, t, return_dict=False)[0]
    return net


def awake(net):
    """`net` with its near-zero layers drawn anew: a fresh one gives the ascent no gradient."""
    for p in net.parameters():
        if p.dim() > 1 and p.std() < 1e-4:
            torch.nn.init.xavier_uniform_(p.flatten(1))
    return net


@functools.lru_cache(maxsize=1)
def build_trainer(peer, how, amp, backend, device, *network):
    """A network and all that trains it; rows that differ in the objective alone share it."""
    torch.manual_seed(0)
    settings = argparse.Namespace(**dict(zip(UNET_KEYS, network)))
    net = awake(diffusers_network(settings) if peer else build_network(vars(settings)))
    net = net.to(device, memory_format=torch.channels_last)
    if how == "reduce-overhead" and backend == "inductor":
        net.compile(dynamic=False, mode=how)
    elif how != "eager":
        net.compile(dynamic=False, backend=backend)
    weights = list(net.parameters())
    half = torch.float16 if amp == "fp16" else torch.bfloat16
    return SimpleNamespace(
        net=net, weights=weights, averages=[p.detach().clone() for p in weights],
        optimizer=torch.optim.Adam(weights, 2e-4, fused=True), diffusion=Diffusion(device=device),
        scaler=torch.amp.GradScaler(device.type, enabled=amp == "fp16"),
        autocast=torch.autocast(device.type, half, enabled=amp != "off"))


def make_step(settings, args):
    """(a function that takes one step as train.py does, what it trains) of a row."""
    device = args.device
    t = build_trainer(settings.peer, settings.how, settings.amp, args.backend, device,
                      *(getattr(settings, key) for key in UNET_KEYS))
    objective = Objective(t.net, t.diffusion, settings.mode, perturbation_of(settings)).train()
    size = settings.image_size
    some = torch.randn(settings.batch_size, settings.in_channels, size, size, device=device)
    some = some.contiguous(memory_format=torch.channels_last)

    def step(x0=some):
        part = x0, stratified_t(len(x0), t.diffusion.T, device), torch.randn_like(x0)
        return update(objective, [part], t.weights, t.averages, t.optimizer, t.scaler, t.autocast,
                      1.0, 0.999)

    return step, t


def perturbation_of(settings):
    """The losses.Perturbation of a row's settings."""
    return Perturbation(**{key: getattr(settings, key)
                           for key in Perturbation.__dataclass_fields__})


def synchronize(device):
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function, device, times=1):
    """Wall-clock seconds of one call, the device's work included; the mean over `times` calls."""
    synchronize(device)
    tic = time.perf_counter()
    for _ in range(times):
        function()
    synchronize(device)
    return (time.perf_counter() - tic) / times


def compiled_graphs():
    """How many graphs torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


# ---------- Items: whatever one of them does, the next runs and the file is whole


class OutOfTime(BaseException):
    """The minutes are over; no handler of ordinary errors may swallow it."""


CHILDREN = []
atexit.register(lambda: [child.kill() for child in CHILDREN if child.poll() is None])


def launch(script, *argv, log=None):
    """Start a script in a process of its own, which dies with this one; log: file for its words."""
    command = [sys.executable, str(ROOT / script), *map(str, argv)]
    child = subprocess.Popen(command, cwd=ROOT, stdout=open(log, "w") if log else None,
                             stderr=subprocess.STDOUT)
    CHILDREN.append(child)
    return child


def provenance(args):
    """What every figure depends on."""
    cuda = args.device.type == "cuda"
    return {"card": torch.cuda.get_device_name(args.device) if cuda else platform.machine(),
            "torch": torch.__version__, "python": platform.python_version(),
            "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d")}


def run_items(args, items):
    """Run items (name, function without arguments -> figures, own provenance); returns records."""
    records, common = [], provenance(args)
    chosen = args.only.split(",") if args.only else None
    signal.signal(signal.SIGALRM, lambda *_: throw(OutOfTime()))
    for name, function, about in items:
        if chosen and name not in chosen:
            continue
        record = {"name": name, "figures": None, "error": None, "provenance": {**common, **about}}
        records.append(record)
        began = time.monotonic()
        try:
            if began > args.deadline:
                raise OutOfTime
            # Repeated, in case that a library swallows even this.
            signal.setitimer(signal.ITIMER_REAL, args.deadline - began + 0.01, 5)
            record["figures"] = function()
        except OutOfTime:
            record["error"] = f"no time left of {args.minutes} minutes"
        except Exception:
            record["error"] = traceback.format_exc()[-2500:]
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        gc.collect()
        record["seconds"] = round(time.monotonic() - began, 2)
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
            record["MiB_left"] = torch.cuda.memory_allocated(args.device) / 2**20
        write_json(args.out / f"{args.verb}.json", records)
        text = record["error"] or json.dumps(record["figures"], default=str)
        print(f"--- {name}, {record['seconds']} s: {text[-1500:]}", flush=True)
    return records


def throw(error):
    """`raise` as a function."""
    raise error


# ---------- check


@contextlib.contextmanager
def exact():
    """fp32 without TF32, cuDNN's deterministic algorithms."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def loss_and_gradient(net, settings, device):
    """(loss, all gradients in one vector) of an objective, on the CPU, from seeded inputs.

    beta is fixed and omega's start is drawn on the CPU, as the inputs are: devices have streams of
    their own.
    """
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(0)  # t on the CPU, and dropout
    size, n = settings.image_size, settings.batch_size
    x0, eps = torch.randn(2, n, settings.in_channels, size, size, generator=g).to(device)
    t = stratified_t(n, 1000).to(device)
    start = losses.random_omega

    def same_omega(r, like):
        return r * (2 * torch.rand(like.shape, generator=g).to(device) - 1)

    cfg = replace(perturbation_of(settings), beta_min=0.5, beta_max=0.5)
    objective = Objective(net, Diffusion(device=device), settings.mode, cfg).train()
    torch.manual_seed(0)
    try:
        losses.random_omega = same_omega
        loss, _ = objective(x0, t, eps)
    finally:
        losses.random_omega = start
    grads = torch.autograd.grad(loss, list(net.parameters()))
    return loss.item(), torch.cat([grad.flatten() for grad in grads]).cpu()


def difference(one, other):
    """Relative differences of two results of `loss_and_gradient`."""
    return {"loss": abs(one[0] - other[0]) / abs(other[0]),
            "gradient": ((one[1] - other[1]).norm() / other[1].norm()).item()}


def check_gradients(args):
    """The device's loss and gradients against the CPU's, fp32; sign steps may flip at a zero."""
    found = {}
    for row in ("dsm", "random", "adv:ascent_norm=l2", "adv", "invariant", LOW_T):
        settings = read_row(f"{row}:dropout=0", args)
        torch.manual_seed(0)
        net = awake(build_network(vars(settings)))
        with exact():
            ends = [loss_and_gradient(copy.deepcopy(net).to(device), settings, device)
                    for device in (args.device, torch.device("cpu"))]
        found[row] = difference(*ends)
        found[row]["holds"] = max(found[row].values()) < (1e-2 if settings.mode in
                                                          ("adv", "invariant") else 1e-4)
    return found


def check_precision(args):
    """Mean loss of the last fifth of 100 steps in bf16 and fp16, and its ratio to fp32's."""
    found = {}
    for row in ("dsm", LOW_T):
        for amp in ("off", "bf16", "fp16"):
            settings = read_row(f"{row}:eager:dropout=0:amp={amp}", args)
            build_trainer.cache_clear()  # the same weights for each
            step, _ = make_step(settings, args)
            n, count = settings.batch_size, 3 if args.tiny else 100
            images = torch.from_numpy(shapes(8 * n, settings.image_size, 3, 0)).float() / 127.5 - 1
            images = images.to(args.device).contiguous(memory_format=torch.channels_last)
            torch.manual_seed(0)
            table = torch.stack([step(images[i % 8 * n:][:n])["loss"] for i in range(count)])
            late = table[-(count // 5 or 1):].mean().item()
            found[f"{row} {amp}"] = {"loss": late, "finite": bool(table.isfinite().all()),
                                     "ratio": late / found.get(f"{row} off", {"loss": late}
                                                               )["loss"]}
    return found


def check_compiled(args):
    """Compiled against eager with dropout, the random numbers being eager's in both; the cost."""
    import torch._inductor.config as inductor
    found, before = {}, inductor.fallback_random
    torch.compiler.reset()
    inductor.fallback_random = True
    try:
        for row in ("dsm", LOW_T)[:2 - args.tiny]:
            settings = read_row(f"{row}:dropout=0.1", args)
            torch.manual_seed(0)
            net = awake(build_network(vars(settings))).to(args.device)
            with exact():
                eager = loss_and_gradient(net, settings, args.device)
                net.compile(dynamic=False, backend=args.backend)
                graphs, tic = compiled_graphs(), time.perf_counter()
                compiled = loss_and_gradient(net, settings, args.device)
                found[row] = {**difference(compiled, eager), "graphs": compiled_graphs() - graphs,
                              "first_step_s": time.perf_counter() - tic}
    finally:
        inductor.fallback_random = before
        torch.compiler.reset()
    return found


def check_masks(args, ways=HOW[:2]):
    """Dropout's masks in the clean branch, the inner step and the moved one, from one seed.

    `inner` and `moved` are their distance from `clean`, `other` that of another seed. The residual
    is that of an omega of nothing: exactly zero if the masks agree.
    """
    found = {}
    for how in ways:
        settings = read_row(f"adv:dropout=0.3:{how}", args)
        torch.manual_seed(0)
        net = awake(build_network(vars(settings))).to(args.device).train()
        if how == "compiled":
            net.compile(dynamic=False, backend=args.backend)
        shape = (settings.batch_size, 3, settings.image_size, settings.image_size)
        x, t = torch.randn(shape, device=args.device), torch.arange(shape[0], device=args.device)
        views = {"clean": (net, 0), "inner": (losses.frozen(net), 0), "moved": (net, 0),
                 "other": (net, 1)}
        ends = {}
        with exact():
            for name, (view, seed) in views.items():
                torch.manual_seed(seed)
                own = x.clone().requires_grad_(name == "inner")
                ends[name] = view(own, t).detach()
            rows = {name: (ends[name] - ends["clean"]).abs().max().item()
                    for name in ("inner", "moved", "other")}
            cfg = Perturbation(beta_min=1e-30, beta_max=1e-30)
            for mode in ("random", "adv"):
                objective = Objective(net, Diffusion(device=args.device), mode, cfg).train()
                rows[f"residual {mode}"] = objective(x, t, torch.randn_like(x))[1][
                    "equivariance"].item()
        found[how] = rows
    torch.compiler.reset()
    return found


def check_waits(args):
    """How often ten steps wait for the device, and where first; dsm, and the recommended form."""
    found = {}
    for row in ("dsm", LOW_T):
        step, _ = make_step(read_row(f"{row}:eager", args), args)
        step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if args.device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            try:
                for _ in range(10):
                    step()
            finally:
                if args.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        # One warning says that the mode is a prototype.
        waits = [w for w in caught if "synchroniz" in str(w.message)
                 and "prototype" not in str(w.message)]
        found[row] = {"waits": len(waits), "first": str(waits[0])[:500] if waits else None}
    return found


def start_runs(args):
    """Runs of train.py in the background: two equal ones, and one that is stopped and resumed.

    Returns {name: (folder, what waits for it)}.
    """
    tiny = ["--channels", 8, "--batch_size", 8, "--steps", 60] if args.tiny else ["--steps", 1500]
    flags = ["--mode", "adv", "--reg_t", "0.1", "--dropout", "0.1", "--no-compile",
             "--device", args.device.type, "--sample_every", 0, "--log_every", 1, *tiny]

    def start(name, *more):
        out = args.runs / name
        return launch("train.py", *flags, *more, "--out", out, log=args.runs / f"{name}.log")

    def stop_and_resume(child, log):
        """(exit status of the stopped run, the step that it was saved at)."""
        while child.poll() is None and not (log.exists() and log.read_text().count("\n") > 3):
            time.sleep(0.02)
        child.terminate()
        status = child.wait()
        if status != 143:
            words = log.parent.with_suffix(".log").read_text()
            raise RuntimeError(f"train.py ended with {status}: {words[-1000:]}")
        step = read_checkpoint(log.parent)["step"]
        start(log.parent.name, "--resume").wait()
        return status, step

    children = {name: start(name, "--overwrite") for name in ("stopped", "whole", "again")}
    stopped = ThreadPoolExecutor(1).submit(stop_and_resume, children["stopped"],
                                           args.runs / "stopped" / "log.jsonl")
    return {"stopped": (args.runs / "stopped", stopped.result),
            **{name: (args.runs / name, children[name].wait) for name in ("whole", "again")}}


def check_resume(runs):
    """A run that SIGTERM stopped and --resume continued, against one left alone; and two alone.

    `resumed` and `two_alone` are the largest differences of a weight after the last step.
    """
    status, stopped_at = runs["stopped"][1]()
    states = {}
    for name, (folder, wait) in runs.items():
        wait()
        states[name] = read_checkpoint(folder)

    def apart(name):
        return max((states[name]["model"][key] - value).abs().max().item()
                   for key, value in states["whole"]["model"].items())

    return {"status": status, "stopped_at": stopped_at, "steps": states["stopped"]["step"],
            "resumed": apart("stopped"), "two_alone": apart("again")}


def check_sampling(args, runs):
    """Levels of 255 between the device's images and the CPU's, as sampled and without TF32."""
    found, cpu = {}, torch.device("cpu")
    for sampler in ("ddim", "ddpm"):
        ends = {}
        for name, device, context in (("cpu", cpu, exact), ("exact", args.device, exact),
                                      ("tf32", args.device, contextlib.nullcontext)):
            run = load_run(runs["whole"][0], device)
            with context():
                ends[name] = np.concatenate([part.astype(int) for _, part in draw_images(
                    run.net, run.diffusion, run.shape, range(16), sampler=sampler, steps=20,
                    device=device)])
        for name in ("exact", "tf32"):
            apart = abs(ends[name] - ends["cpu"])
            found[f"{sampler} {name}"] = {"levels": int(apart.max()), "share": (apart > 0).mean()}
    return found


def check_inception(args):
    """Features of the (random) Inception against the CPU's, and whether cuDNN is on for them."""
    net, _ = evaluate.random_inception()
    images = torch.from_numpy(shapes(2 if args.tiny else 16, 32, 3, 0))
    ends = []
    for device in (args.device, torch.device("cpu")):
        with evaluate.full_precision():
            flags = {"enabled": torch.backends.cudnn.enabled,
                     "tf32": torch.backends.cudnn.allow_tf32}
            ends.append(net.to(device).eval()(images.to(device))[0].cpu())
    return {"apart": ((ends[0] - ends[1]).norm() / ends[1].norm()).item(),
            "cudnn": flags, "cudnn_version": torch.backends.cudnn.version()}


def check_command(args, runs, command, *flags):
    """The figures of one of evaluate.py's commands on the device."""
    file = args.runs / f"{command}.json"
    evaluate.main([command, str(runs["whole"][0]), "--device", args.device.type, "--json",
                   str(file), *flags])
    found = json.loads(file.read_text())
    return found.get("rows", {key: found[key] for key in found if key != "provenance"})


def check(args):
    """All checks, the cheapest and weightiest first."""
    if not args.all:
        args.all = TINY if args.tiny else SMALL
    needed = not args.only or {"resume", "sampling", "quality"} & set(args.only.split(","))
    runs = start_runs(args) if needed else {}
    few = ["--num", "16", "--batch_size", "16"]
    small = [*few, "--features", "pixels" if args.tiny else "random", "--reference_num", "32"]
    begin = torch.cuda.memory_allocated() if args.device.type == "cuda" else 0

    def memory():
        build_trainer.cache_clear()
        gc.collect()
        return {"MiB": (torch.cuda.memory_allocated() - begin) / 2**20
                if args.device.type == "cuda" else 0.0}

    items = [("waits", lambda: check_waits(args)),
             ("inception", lambda: check_inception(args)),
             ("precision", lambda: check_precision(args)),
             ("resume", lambda: check_resume(runs)),
             ("sampling", lambda: check_sampling(args, runs)),
             ("gradients", lambda: check_gradients(args)),
             ("masks", lambda: check_masks(args)),
             ("compiled", lambda: check_compiled(args))]
    for command, flags in (("quality", [*small, "--steps", "10"]), ("overfit", few[:2]),
                           ("attack", [*small, "--steps", "10"]),
                           ("steps", [*small, "--steps", "10,5"]), ("denoise", few),
                           ("memorization", [*small, "--steps", "10"])):
        items.append((command, functools.partial(check_command, args, runs, command, *flags)))
    items.append(("memory", memory))
    about = {"network": args.all, "dtype": "fp32 unless named"}
    return run_items(args, [(*item, about) for item in items])


# ---------- bench


def resident(field):
    """MiB of this process by Linux's count: "VmRSS" now, "VmHWM" the most so far; else nan."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    lines = status.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def cpu_memory(row, args):
    """MiB that three steps of a row add to a process of its own on the CPU, a compiler's too."""
    torch.set_num_threads(args.threads)
    setup_device(args.device)
    settings = read_row(row, args)
    with torch.device("meta"):  # a library's own modules are no memory of the step
        diffusers_network(settings) if settings.peer else build_network(vars(settings))
    before = resident("VmRSS")
    step, _ = make_step(settings, args)
    for _ in range(3):
        step()
    return resident("VmHWM") - before


def cpu_memory_apart(row, args):
    """`cpu_memory` in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(cpu_memory, row, args).result()


def count_flops(row, args):
    """Floating-point operations of one step of a row, the convolutions' and matrices'."""
    from torch.utils.flop_counter import FlopCounterMode
    step, _ = make_step(read_row(f"{row}:eager", args), args)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def measure_rows(rows, args, flops):
    """{row: figures}, the rows taken in turn, so that a slow moment meets all of them.

    On CUDA a time is the mean of five steps, since to wait after each would stall the launches.
    """
    cuda, found, steps = args.device.type == "cuda", {}, {}
    block = 5 if cuda else 1
    for row in rows:
        settings = read_row(row, args)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        graphs = compiled_graphs()
        step, t = make_step(settings, args)
        first = seconds(step, args.device)
        steps[row] = step
        found[row] = {
            "million_parameters": sum(p.numel() for p in t.weights) / 1e6, "how": settings.how,
            "amp": settings.amp, "batch_size": settings.batch_size, "first_step_s": first,
            "units": forward_units(settings.mode, perturbation_of(settings)),
            "graphs": compiled_graphs() - graphs}
    for step in steps.values():
        step()
    times = {row: [] for row in steps}
    for _ in range(args.repeats):
        for row, step in steps.items():
            times[row].append(seconds(step, args.device, block))
    for row, spent in times.items():
        middle = statistics.median(spent)
        if cuda:
            peak = torch.cuda.max_memory_allocated() / 2**20
        else:
            peak = cpu_memory_apart(row, args)
        found[row] |= {"s": middle, "s_min": min(spent), "s_max": max(spent), "peak_MiB": peak,
                       "img_s": found[row]["batch_size"] / middle}
        counted = flops.get(row.split(":eager")[0].split(":compiled")[0])
        if counted:
            card = provenance(args)["card"]
            best = next((rate for name, rate in PEAK.items() if name in card), None)
            found[row] |= {"tflop_step": counted / 1e12, "tflop_s": counted / middle / 1e12,
                           "share_of_peak": best and counted / middle / best}
    return found


def measure_ddim(args):
    """ddim's images a second in fp32 as sample.py draws, and its cost over the bare network's."""
    settings = read_row("dsm:eager:amp=off", args)
    _, t = make_step(settings, args)
    net = t.net.eval()
    n = 4 if args.tiny else 64 if args.device.type == "cpu" else 256
    steps = 2 if args.tiny else 5 if args.device.type == "cpu" else 50
    shape = (settings.in_channels, settings.image_size, settings.image_size)
    noise = image_noise(0, range(n), shape, args.device)
    x, times = noise(), torch.zeros(n, device=args.device, dtype=torch.long)

    def bare():
        with torch.no_grad():
            for _ in range(steps):
                net(x, times)

    bare()
    spent = [seconds(lambda: sample.sample(net, t.diffusion, noise, "ddim", steps), args.device)
             for _ in range(2)]
    alone = min(seconds(bare, args.device) for _ in range(2))
    return {"steps": steps, "batch": n, "s_step": min(spent) / steps,
            "over_bare_network": min(spent) / alone, "img_s": n / min(spent)}


def largest_batch(mode, args):
    """The largest batch of LSUN's 256-pixel network that a step fits with, found by its memory."""
    cuda = args.device.type == "cuda"
    own = "" if args.tiny else LSUN

    # cuDNN's search for the fastest algorithms costs more than the steps, and memory of its own.
    @torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=True)
    def peak(n):
        settings = read_row(f"{mode}:{own}:eager:batch_size={n}", args)
        step, _ = make_step(settings, args)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        step()
        spent = seconds(step, args.device)
        return (torch.cuda.max_memory_allocated() / 2**20 if cuda else resident("VmHWM")), spent

    low, high = peak(10)[0], peak(20)[0]  # reg_t = .1 regularises a whole number of these
    room = torch.cuda.mem_get_info()[1] / 2**20 - 1500 if cuda else high + 16
    n = min(int(10 + 10 * (room - low) / max(high - low, 1)), 512 if cuda else 24)
    for _ in range(4):
        try:
            used, spent = peak(n)
            return {"batch_size": n, "peak_MiB": used, "room_MiB": room, "img_s": n / spent}
        except torch.OutOfMemoryError:
            n = int(0.92 * n)
        gc.collect()
        torch.cuda.empty_cache()
    raise RuntimeError(f"out of memory at a batch of {n}, too")


def profile(row, args):
    """The ten costliest kernels of three steps of a row, and the device's busy share."""
    from torch.profiler import ProfilerActivity
    cuda = args.device.type == "cuda"
    step, _ = make_step(read_row(row, args), args)
    step()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
                                ) as profiler:
        spent = seconds(step, args.device, 3)
    found = profiler.key_averages()
    kind = "device" if cuda else "cpu"
    if cuda:
        found = [event for event in found if event.device_type.name == "CUDA"]
    total = {event.key[:80]: getattr(event, f"self_{kind}_time_total") / 3000 for event in found}
    top = sorted(total.items(), key=lambda pair: -pair[1])[:10]
    return {"ms_step": 1000 * spent, f"{kind}_ms_step": sum(total.values()),
            "top_ms": dict(top)}


def bench(args):
    """Rows given by name; or all that there is to measure, the weightiest first."""
    cuda = args.device.type == "cuda"
    args.all = args.all or (TINY if args.tiny else "" if cuda else "batch_size=16")
    there = importlib.util.find_spec(PEER)
    four = ["dsm", "adv", LOW_T, "random"]
    flops, items = {}, []

    def counting():
        for row in four:
            flops[row] = count_flops(row, args)
        return flops

    def add_rows(rows):
        # On CUDA each is an item; on a CPU, which others use too, all of them are one, in turn.
        for group in ([row] for row in rows) if cuda else [rows] if rows else []:
            items.append((" ".join(group), functools.partial(measure_rows, group, args, flops),
                          {"rows": group, "flags": args.all}))

    if args.rows:
        add_rows(args.rows)
    else:
        about = {"flags": args.all}
        items.append(("flops", counting, about))
        profiles = [(f"profile {row}", functools.partial(profile, f"{row}:eager", args), about)
                    for row in ("dsm", LOW_T)[args.tiny:]]
        if cuda:
            # Eager rows take seconds; a graph of the compiled ones took 100 s where this was run.
            add_rows([f"{row}:eager" for row in four])
            items += profiles
            add_rows([f"{PEER}:eager"] * bool(there))
            add_rows([f"{row}:compiled" for row in four])
            add_rows([f"{PEER}:compiled"] * bool(there))
        else:
            add_rows(["dsm", "random", "adv", LOW_T] + [PEER] * bool(there))
            items += profiles
        items.append(("ddim", lambda: measure_ddim(args), about))
        if cuda or args.tiny:
            items += [(f"lsun {row}", functools.partial(largest_batch, row, args), about)
                      for row in ("dsm", LOW_T, "adv")[2 * args.tiny:]]
        if cuda:
            add_rows(["dsm:reduce-overhead", "adv:reduce-overhead"])
    for row in args.rows:
        read_row(row, args)
    records = run_items(args, items)
    print_rows([pair for record in records for pair in (record["figures"] or {}).items()
                if isinstance(pair[1], dict) and "s_min" in pair[1]])
    return records


def print_rows(pairs):
    """The rows as a table of Markdown; x: how much longer than the first row of the same kind."""
    base = {}
    print("\n| step | million parameters | s (median) | fastest to slowest | x the first | "
          "forward-units | images / s | MiB | share of peak |\n" + "|---" * 9 + "|")
    for row, f in pairs:
        first = base.setdefault(f["how"], f["s"])
        share = f.get("share_of_peak")
        print(f"| {row} | {f['million_parameters']:.2f} | {f['s']:.4f} | {f['s_min']:.4f} to "
              f"{f['s_max']:.4f} | {f['s'] / first:.2f} | {f['units']:.3g} | {f['img_s']:.1f} | "
              f"{f['peak_MiB']:,.0f} | {f'{share:.1%}' if share else '-'} |")


# ---------- cifar10: dsm and the recommended form on 90 % noisy images, at equal time

RUNS = {"dsm": ["--mode", "dsm"], "adv-low-t": ["--mode", "adv", "--reg_t", "0.1"]}
SAMPLES = 5000


def train_flags(args, name):
    """train.py's flags of one of RUNS."""
    sizes = ["--channels", 64, "--batch_size", 128, "--log_every", 100, "--save_every", 1000]
    if args.tiny:
        sizes = [flag for option in TINY.split(":") for flag in f"--{option}".split("=")]
        sizes += ["--log_every", 1]
    return ["--dataset", "cifar10", "--data_dir", args.data_dir, "--cache_dir", args.runs / "cache",
            *RUNS[name], "--noise_p", 0.9, "--noise_std", 0.2, "--dropout", 0, *sizes, "--lr", 4e-4,
            "--warmup", 500, "--ema", 0.999, "--sample_every", 0, "--device", args.device.type]


def together(args, script, commands):
    """Run a script with several lists of flags, side by side; tiny ones in this process."""
    if args.tiny:
        for flags in commands:
            script.main([str(flag) for flag in flags])
        return
    children = [launch(Path(script.__file__).name, *flags) for flags in commands]
    if any([child.wait() for child in children]):
        raise RuntimeError(f"{script.__name__} ended with {[c.returncode for c in children]}")


def quality(args, sets):
    """{name: figures of evaluate.py quality} of sets {name: npz} against the clean images."""
    together(args, evaluate, [
        ["quality", file, "--reference", "cifar10", "--data_dir", args.data_dir, "--cache_dir",
         args.runs / "cache", "--features", args.features, "--batch_size", 250, "--device",
         args.device.type, "--json", args.runs / f"quality-{name}.json"]
        for name, file in sets.items()])
    return {name: json.loads((args.runs / f"quality-{name}.json").read_text()) for name in sets}


def save_parts(run, stem):
    """The EMA weights in float16, in files of at most 15 MiB that torch.load reads; their names."""
    parts, size = [{}], 0
    for name, value in run.net.state_dict().items():
        size += 2 * value.numel()
        if size > 15 * 2**20 - 2**18:
            parts.append({})
            size = 2 * value.numel()
        parts[-1][name] = value.half().cpu()
    for i, part in enumerate(parts):
        torch.save(part, f"{stem}-ema{i}.pt")
    return [f"{Path(stem).name}-ema{i}.pt" for i in range(len(parts))]


def cifar10(args):
    """Train both until the time is up but for what measuring takes; draw; measure; keep weights."""
    if not args.data_dir or not args.features:
        raise UserError("cifar10 needs --data_dir and --features")
    size, num = (16, 40) if args.tiny else (32, SAMPLES)
    folders = {name: args.runs / f"cifar10-{name}" for name in RUNS}
    drawn = {name: args.runs / f"cifar10-{name}-samples" for name in RUNS}
    images = load_images("cifar10", size, 3, args.data_dir, args.runs / "cache")
    kinds = choose_corruption(len(images), 0.9, 0, 0)
    index = np.linspace(0, len(images) - 1, min(num, len(images))).astype(int)
    noisy = to_uint8(training_images(images, index, kinds, 0.2, 0)).numpy()
    training = {name: launch("train.py", *train_flags(args, name), "--steps", 10**6, "--out", out,
                             *["--resume"] * (out / "config.json").exists(),
                             log=args.runs / f"cifar10-{name}.log")
                for name, out in folders.items()}

    def baselines():
        """The training images themselves, clean and as they are, while the networks compile."""
        for name, some in (("clean", images[index]), ("noisy", noisy)):
            save_npz(args.runs / f"{name}.npz", some.transpose(0, 2, 3, 1))
        # One after the other: the first leaves the reference's statistics in the cache.
        return {name: quality(args, {name: args.runs / f"{name}.npz"})[name]
                for name in ("clean", "noisy")}

    def train_them():
        logs = [out / "log.jsonl" for out in folders.values()]
        while ((time.monotonic() < args.deadline - args.reserve or not all(map(Path.exists, logs)))
               and all(child.poll() is None for child in training.values())):
            time.sleep(0.1)
        for child in training.values():
            child.terminate()
        found = {}
        for name, child in training.items():
            status, log = child.wait(), folders[name] / "log.jsonl"
            if status != 143:
                words = (args.runs / f"cifar10-{name}.log").read_text()
                raise RuntimeError(f"train.py ended with {status}: {words[-1000:]}")
            last = [json.loads(line) for line in log.read_text().splitlines()][-20:]
            found[name] = {"status": status, "step": read_checkpoint(folders[name])["step"],
                           **{key: statistics.median(row[key] for row in last)
                              for key in ("dsm", "img_s", "s_step", "data_wait")}}
        return found

    def draw_and_measure():
        together(args, sample, [[folders[name], "--num", num, "--steps", 2 if args.tiny else 50,
                                 "--batch_size", 500, "--overwrite", "--device", args.device.type,
                                 "--out", drawn[name]] for name in RUNS])
        return quality(args, {name: drawn[name] / "samples.npz" for name in RUNS})

    def grid():
        strips = {"clean": images[index[:16]], "training": noisy[:16]}
        for name in RUNS:
            with np.load(drawn[name] / "samples.npz") as file:
                strips[name] = file["arr_0"][:16].transpose(0, 3, 1, 2)
        evaluate.save_sheet(strips, args.out / "cifar10.png")
        return {"file": "cifar10.png"}

    def weights():
        return {name: save_parts(load_run(out), args.out / f"cifar10-{name}")
                for name, out in folders.items()}

    about = {"flags": {name: " ".join(map(str, train_flags(args, name))) for name in RUNS},
             "N": num, "sampler": "ddim 50", "weights": "EMA", "features": str(args.features)}
    return run_items(args, [(*item, about) for item in (
        ("baselines", baselines), ("training", train_them), ("quality", draw_and_measure),
        ("grid", grid), ("weights", weights))])


# ---------- warm


def warm(args):
    """One step of what bench and cifar10 compile, in processes of their own, side by side."""
    rows = args.rows or ["dsm", "adv", LOW_T, PEER, "dsm:reduce-overhead", "adv:reduce-overhead"]
    jobs = [("tests/gpu.py", "bench", row, "--repeats", 2, "--minutes", args.minutes, "--out",
             args.runs / f"warm-{i}", "--device", args.device.type, "--all", args.all,
             *["--tiny"] * args.tiny) for i, row in enumerate(rows)]
    if args.data_dir:
        load_images("cifar10", 16 if args.tiny else 32, 3, args.data_dir, args.runs / "cache")
        jobs[2:2] = [("train.py", *train_flags(args, name), "--steps", 1, "--overwrite", "--out",
                      args.runs / f"warm-{name}") for name in RUNS]

    def run_job(job):
        if time.monotonic() > args.deadline:
            return {"status": None}
        tic, log = time.monotonic(), args.runs / f"warm-{jobs.index(job)}.log"
        child = launch(*job, log=log)
        try:
            child.wait(max(1, args.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
        return {"status": child.wait(), "s": time.monotonic() - tic, "end": log.read_text()[-500:]}

    def run_jobs():
        # Five at a time: each compiles on several cores, and their batches share the memory.
        with ThreadPoolExecutor(2 if args.device.type == "cpu" else 5) as pool:
            return {" ".join(map(str, job))[:200]: found
                    for job, found in zip(jobs, pool.map(run_job, jobs))}

    return run_items(args, [("warm", run_jobs, {})])


VERBS = {"check": (check, 2.5), "bench": (bench, 3.5), "cifar10": (cifar10, 6.5),
         "warm": (warm, 2.5)}


def parse_args(argv=None):
    """The command line; UserError where it is wrong."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("verb", choices=VERBS, help="what to do")
    p.add_argument("rows", nargs="*", help="of bench and warm; else all that are worth it")
    p.add_argument("--minutes", type=number(float, 0.01), help="the verb's own 2.5, 3.5 or 6.5")
    p.add_argument("--device", default="auto", help="cpu, cuda or cuda:1")
    p.add_argument("--all", default="", help="options of all rows, such as batch_size=8:amp=bf16")
    p.add_argument("--repeats", type=number(int, 2), default=7, help="timings of a row (7)")
    p.add_argument("--threads", type=number(int, 1), help="CPU threads")
    p.add_argument("--only", help="of check: items to run, with commas between")
    p.add_argument("--tiny", action="store_true", help="the tests' sizes, without inductor")
    p.add_argument("--data_dir", type=a_path, help="CIFAR-10's images, a folder or zip")
    p.add_argument("--features", type=a_path, help="what tests/features.py wrote")
    p.add_argument("--reserve", type=number(float, 0), default=110,
                   help="seconds of cifar10 that are left for drawing and measuring (110)")
    p.add_argument("--out", type=a_path, default=ROOT / "out/gpu", help="results (out/gpu)")
    p.add_argument("--runs", type=a_path, default=ROOT / "out/gpu",
                   help="runs of train.py and caches, which a second call goes on with (out/gpu)")
    args = p.parse_args(argv)
    args.minutes = args.minutes or VERBS[args.verb][1]
    args.deadline = time.monotonic() + 60 * args.minutes
    args.backend = "eager" if args.tiny else "inductor"
    return args


def main(argv=None):
    """Entry point; see the module's docstring."""
    args = parse_args(argv)
    args.threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(args.threads)
    args.device = setup_device(args.device)[3]
    print(f"output {args.out}", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    args.runs.mkdir(parents=True, exist_ok=True)
    limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else \
        "cache_size_limit"
    setattr(torch._dynamo.config, limit, 64)  # a graph for each batch size, network and precision
    VERBS[args.verb][0](args)


if __name__ == "__main__":
    run_cli(main)
