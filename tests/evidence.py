"""The paper's claims on real images at the scale of a CPU; not run by the tests.

    python tests/evidence.py --list                    the studies, their runs, what they would take
    python tests/evidence.py headline --workers 2      trains, draws and measures what is missing
    python tests/evidence.py headline --tables         prints the table of what is there
    python tests/evidence.py headline --picture a.png  puts its images together
    python tests/evidence.py headline --rows dsm --seeds 0          one cell of it

A run is `train.py` on Fashion-MNIST at 16x16 (60,000 real images, area-downsampled) with a network
of 1.1 M parameters, then a command of `evaluate.py` on EMA weights. Each lives in
OUT/<column>/<row>-<seed>, with its log and <command>-<steps>-<num>.json, from which the tables are
printed. Stopped, it goes on where it was; the studies share runs, and one of more steps continues
those of fewer, but not the other way round: run them in the order of --list.
The Frechet distance and KID look at the features of a small classifier, which is trained first, on
the clean labelled images: OUT/classifier.pt. They compare with nothing published.
"""

import argparse
import gzip
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import warnings
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from losses import Perturbation, forward_units  # noqa: E402
from model import UserError, read_checkpoint, run_cli  # noqa: E402
from sample import Parser, number, write_atomically  # noqa: E402
from train import ArrayUnpickler, find_source, load_images  # noqa: E402

COMMON = ("--image_size 16 --channels 32 --mult 1,2,2 --blocks 1 --attention 8 --dropout 0 "
          "--batch_size 64 --lr 1e-3 --warmup 200 --ema 0.999 --log_every 50 "
          "--sample_every 0 --save_every 250")
FASHION = "fashion_mnist"
# column: the training set
COLUMNS = {
    "clean": {},
    "noise.1": {"noise_p": 0.9, "noise_std": 0.1},
    "noise.2": {"noise_p": 0.9, "noise_std": 0.2},
    "outliers": {"outlier_p": 0.1},
    "few": {"limit": 200},
    "cifar10": {"dataset": "cifar10", "noise_p": 0.9, "noise_std": 0.2},
}
# row: the objective and what of it, or of the training set, differs
ROWS = {
    "dsm": {"mode": "dsm"},
    "dsm_tenth": {"mode": "dsm", "limit": 6000, "noise_p": 0, "noise_std": 0},
    "random": {"mode": "random"},
    "random_1": {"mode": "random", "lam": 1},
    "random_3": {"mode": "random", "lam": 3},
    "adv": {"mode": "adv"},
    "adv_epsilon": {"mode": "adv", "reading": "epsilon"},
    "adv_l2": {"mode": "adv", "ascent_norm": "l2"},
    "adv_l2x3": {"mode": "adv", "ascent_norm": "l2", "ascent_steps": 3},
    "invariant": {"mode": "invariant"},
}
# an adversarial row on 30 % of each batch: 4.5 forward-units instead of 8
ROWS |= {f"{row}_share": {**ROWS[row], "reg_share": 0.3} for row in [*ROWS][5:]}
ROWS |= {f"adv_{lam}_share": {**ROWS["adv_share"], "lam": lam} for lam in (0.1, 1)}
# plain until 80 % of the steps, then `late`; so of no use to a study of more steps
ROWS["adv_late"] = {"mode": "dsm", "late": ROWS["adv"]}
# command of evaluate.py: its flags, at most so many images, what is printed of its JSON
QUALITY = ["residual_noise", "pixel_std", "fid", "kid_mean", "precision", "recall"]
COMMANDS = {
    "quality": ("--steps 50", 2000, QUALITY),
    "memorization": (f"--steps 50 --holdout {FASHION} --features pixels", 2000,
                     ["set", "copied", "d1", "d1/d2", "similar 50%", "> 0.95", "> 0.99"]),
    "steps": ("--steps 100,30,10 --sampler ddpm,ddim --spacing respaced,naive", 500,
              ["sampler", "spacing", "steps", "residual_noise", "pixel_std", "fid"]),
    "attack": ("--steps 20 --norm l2 --budget 0.1", 250,
               ["attack", "residual_noise", "pixel_std", "fid", "mse", "norm_max"]),
}
NAMES = {"residual_noise": "noise left", "pixel_std": "pixel std", "fid": "FD", "kid_mean": "KID"}
# study: command, columns, rows, seeds, training steps
STUDIES = {
    "frontier": ("quality", ["noise.2"],
                 ["dsm", "adv_share", "adv", "adv_l2_share", "random", "random_1", "random_3",
                  "adv_0.1_share", "adv_1_share"], [0], 2000),
    "readings": ("quality", ["noise.2"],
                 ["dsm_tenth", "adv_epsilon_share", "adv_l2x3_share", "invariant_share"],
                 [0], 2000),
    "table": ("quality", ["clean", "outliers", "noise.1"],
              ["dsm", "adv_share", "adv_l2_share"], [0], 2000),
    "headline": ("quality", ["noise.2"], ["dsm", "adv_share", "adv", "random", "adv_late"],
                 [0, 1], 5000),
    "few_steps": ("steps", ["noise.2"], ["dsm", "adv"], [0], 5000),
    "attack": ("attack", ["noise.2"], ["dsm", "adv"], [0], 5000),
    "copies": ("memorization", ["few"], ["dsm", "adv_share"], [0], 2000),
    "cifar10": ("quality", ["cifar10"], ["dsm", "adv_share"], [0], 5000),
}


def units(row):
    """Forwards that a training step of the row takes, see `losses.forward_units`."""
    settings = {name: value for name, value in ROWS[row].items()
                if name not in ("late", "limit", "noise_p", "noise_std")}
    own = forward_units(settings.pop("mode"), Perturbation(**settings))
    return 0.8 * own + 0.2 * units("adv") if "late" in ROWS[row] else own


def source(dataset, args):
    """What names the data set to the scripts: {flag: value}."""
    flags = {"data_dir": args.cifar10_dir if dataset == "cifar10" else args.data_dir,
             "cache_dir": args.cache_dir}
    return {flag: value for flag, value in flags.items() if value}


def labels(dataset, folder, split):
    """The published classes, int64 (N,), in the order of the images; UserError: not there."""
    files, reader = find_source(dataset, Path(folder or f"data/{dataset}"), split)
    if dataset == FASHION:
        files = [file.with_name(file.name.replace("images-idx3", "labels-idx1")) for file in files]
        if not files or not files[0].exists():
            raise UserError(f"no labels beside the {split} images of {dataset}")
        with gzip.open(files[0]) as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=8).astype(int))
    if reader.__name__ == "open_cifar":
        batches = [ArrayUnpickler(open(file, "rb"), encoding="bytes").load() for file in files]
        return torch.tensor([label for batch in batches for label in batch[b"labels"]])
    # a folder or zip with one folder for each class
    names = [Path(item).parent.name for item in reader(files)[0]]
    return torch.from_numpy(np.unique(names, return_inverse=True)[1])


class Classifier(nn.Module):
    """uint8 (B, 3, H, W), grey repeated -> features (B, 64), logits (B, 10)."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(1024, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        features = self.body(x[:, :self.channels].float() / 127.5 - 1)
        return features, self.head(features)


def classifier(dataset, args):
    """Path of the data set's classifier, TorchScript, trained where it is not there yet."""
    path = args.out / ("classifier.pt" if dataset == FASHION else f"classifier-{dataset}.pt")
    if path.exists():
        return path
    channels, where = 1 if dataset == FASHION else 3, source(dataset, args)
    images = torch.from_numpy(np.array(load_images(dataset, 16, channels, **where)))
    truth = labels(dataset, where.get("data_dir"), "train")
    torch.manual_seed(0)
    net = Classifier(channels)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(5):
        for index in torch.randperm(len(images)).split(128):
            x = images[index].expand(-1, 3, -1, -1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x)[1], truth[index]).backward()
            optimizer.step()
    net.eval()
    # a zip is one split, it has no test images
    split = "train" if Path(where.get("data_dir", ".")).is_file() else "test"
    with torch.no_grad():
        test = torch.from_numpy(np.array(load_images(dataset, 16, channels, **where, split=split)))
        right = net(test.expand(-1, 3, -1, -1))[1].argmax(1) == labels(
            dataset, where.get("data_dir"), split)
    write_atomically(path, torch.jit.script(net).save)
    print(f"{path}: {right.double().mean():.3f} of the {split} images right", flush=True)
    return path


running = set()


def call(script, *argv, log):
    """One of the project's scripts in a process with one thread; UserError when it fails."""
    with open(log, "a") as file:
        process = subprocess.Popen(
            [sys.executable, ROOT / script, *map(str, argv)], stdout=file,
            stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    running.add(process)
    code = process.wait()
    running.discard(process)
    if code:
        raise UserError(f"{script} failed with status {code}: see {log}")


def measured(column, row, seed, args):
    """Where the figures of a run are, once it is done."""
    num = min(args.num, COMMANDS[args.command][1])
    return args.out / column / f"{row}-{seed}" / f"{args.command}-{args.steps}-{num}.json"


def do(run, args):
    """Train and measure one (column, row, seed), as far as that is not done."""
    column, row, seed = run
    result = measured(*run, args)
    if result.exists():
        return
    folder = result.parent
    print(f"{column} {row} seed {seed}: begun", flush=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.parent / f"{folder.name}.log"
    flags = {"dataset": FASHION, **COLUMNS[column], **ROWS[row], "seed": seed}
    late = flags.pop("late", None)
    flags |= source(flags["dataset"], args)
    stages = [(args.steps, {})]
    if late:
        stages = [(args.steps * 4 // 5, {}), (args.steps, late)]
    for last, change in stages:
        saved = read_checkpoint(folder)["step"] if (folder / "ckpt.pt").exists() else 0
        if saved > args.steps:
            raise UserError(f"{folder} is at step {saved}, beyond --steps {args.steps}")
        if saved < last:
            how = ["--resume"] if saved else [*COMMON.split(), "--overwrite"]
            how += [f"--{name}={value}" for name, value in (flags | change).items()]
            call("train.py", "--out", folder, "--steps", last, *how, log=log)
    extra, most, _ = COMMANDS[args.command]
    own = [f"--{name}={value}" for name, value in source(flags["dataset"], args).items()]
    if "--features" not in extra:
        own += ["--features", args.classifiers[flags["dataset"]]]
    own += ["--png", result.with_suffix(".png")]
    call("evaluate.py", args.command, folder, "--num", min(args.num, most), *extra.split(), *own,
         "--json", result, log=log)
    print(f"{column} {row} seed {seed}: done", flush=True)


def attempt(run, args):
    """`do`; one run that fails does not end the others, its error is returned."""
    try:
        do(run, args)
    except UserError as error:
        return f"{' '.join(map(str, run))}: {error}"


def spread(values):
    """Mean, and standard deviation where there are several; a text or whole number as it is."""
    if not isinstance(values[0], float):
        return str(values[0])
    text = f"{statistics.mean(values):.3f}"
    return text + (f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def table(args):
    """The study's runs that are measured, as a markdown table: means over the seeds."""
    shown = COMMANDS[args.command][2]
    lines = [["trained on", "row", "seeds", "forward-units",
              *(NAMES.get(name, name) for name in shown)]]
    lines.append(["---"] * len(lines[0]))
    for column in args.columns:
        data = None
        for row in args.rows:
            files = [measured(column, row, seed, args) for seed in args.seeds]
            found = [json.loads(file.read_text()) for file in files if file.exists()]
            for same in zip(*(one.get("rows", [one]) for one in found)):
                cells = [spread([figures[name] for figures in same]) for name in shown]
                lines.append([column, row, str(len(found)), f"{units(row):.3g}", *cells])
                data = [same[0].get(f"{name}_reference") for name in shown]
        if data and any(data):
            lines.append([column, "clean images", "", "", *(f"{x:.3f}" if x else "" for x in data)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(args):
    """The images of the first seed's runs, one below the other with their names, as one PNG.

    Above them training images, as the first of these runs saw them.
    """
    seed, shown, parts = args.seeds[0], COMMANDS[args.command][2], []
    for column, row in itertools.product(args.columns, args.rows):
        result = measured(column, row, seed, args)
        if result.exists():
            found = json.loads(result.read_text()).get("rows", [{}])
            names = [" ".join(str(one[name]) for name in shown
                              if name in one and not isinstance(one[name], float)) for one in found]
            parts.append((row, names if args.command in ("attack", "steps") else [""],
                          Image.open(result.with_suffix(".png"))))
            if len(parts) == 1 and args.command == "quality":
                # eight columns of tiles: the first two rows become one
                data, (width, tile) = Image.open(result.parent / "data.png"), (400, 50)
                strip = Image.new("RGB", (2 * width + 2, tile + 2), "white")
                for k in range(2):
                    strip.paste(data.crop((0, k * tile, width + 2, (k + 1) * tile + 2)),
                                (k * width, 0))
                parts.insert(0, ("training images", [""], strip))
    if not parts:
        raise UserError(f"no pictures of {args.study} in {args.out}")
    margin = 130
    whole = Image.new("RGB", (margin + max(part.width for *_, part in parts),
                              sum(part.height for *_, part in parts)), "white")
    pen, font, top = ImageDraw.Draw(whole), ImageFont.load_default(13), 0
    for row, names, part in parts:
        for k, name in enumerate(names):
            pen.text((4, top + 50 * k + 12), f"{row}\n{name}", fill="black", font=font)
        whole.paste(part, (margin, top))
        top += part.height
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    whole.save(args.picture, optimize=True)


def parse_args(argv=None):
    """The command line; UserError where it is wrong."""

    def some(text):
        return text.split(",")

    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", nargs="?", choices=list(STUDIES), default="headline")
    p.add_argument("--list", action="store_true", help="show the studies' runs, run nothing")
    p.add_argument("--tables", action="store_true", help="print the table, run nothing")
    p.add_argument("--picture", type=Path, help="PNG of its images, made of what is there")
    p.add_argument("--columns", type=some, help="only these, with commas between (the study's)")
    p.add_argument("--rows", type=some, help="only these, with commas between (the study's)")
    p.add_argument("--seeds", type=some, help="only these, with commas between (the study's)")
    p.add_argument("--steps", type=number(int, 1), help="training steps (the study's)")
    p.add_argument("--num", type=number(int, 10), default=2000,
                   help="images to measure (2000; at most 500 for few_steps, 250 for attack)")
    p.add_argument("--workers", type=number(int, 1), default=torch.get_num_threads(),
                   help="runs side by side, one thread each (one a core)")
    p.add_argument("--data_dir", help="folder with Fashion-MNIST; else data/, filled by download")
    p.add_argument("--cifar10_dir", help="folder or zip of CIFAR-10; else likewise")
    p.add_argument("--cache_dir", help="folder of the decoded images; else beside the data")
    p.add_argument("--out", type=Path, default=Path("out/evidence"), help="(out/evidence)")
    args = p.parse_args(argv)
    args.command, columns, rows, seeds, steps = STUDIES[args.study]
    args.columns, args.rows = args.columns or columns, args.rows or rows
    args.seeds = [number(int, 0)(seed) for seed in args.seeds or map(str, seeds)]
    args.steps = args.steps or steps
    for flag, known in (("columns", COLUMNS), ("rows", ROWS)):
        if unknown := set(getattr(args, flag)) - set(known):
            raise UserError(f"--{flag} {','.join(unknown)}: not of {', '.join(known)}")
    return args


def main(argv=None):
    """Entry point; see the module's docstring."""
    # a TorchScript file is what evaluate.py reads, deprecated or not
    warnings.filterwarnings("ignore", ".*torch.jit.script")
    args = parse_args(argv)
    if args.list:
        for study, (command, columns, rows, seeds, steps) in STUDIES.items():
            total = sum(units(row) for row in rows) * len(columns) * len(seeds) * steps
            print(f"{study}: {', '.join(rows)}; {', '.join(columns)}; seeds {seeds}; {steps} steps "
                  f"of 64; `{command}`; {total:,.0f} forwards of 64 images")
        return
    failed = []
    if args.picture:
        return picture(args)
    if not args.tables:
        args.out.mkdir(parents=True, exist_ok=True)
        args.classifiers = {dataset: classifier(dataset, args) for dataset in {
            COLUMNS[column].get("dataset", FASHION) for column in args.columns}}
        runs = [(column, row, seed)
                for seed in args.seeds for column in args.columns for row in args.rows]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            with ThreadPool(args.workers) as pool:
                failed = [*filter(None, pool.imap_unordered(lambda run: attempt(run, args), runs))]
        finally:
            for process in list(running):  # a run without its driver would meet the next one's
                process.terminate()
                process.wait()
        for text in failed:
            print(text, file=sys.stderr)
    print(table(args))
    if failed:
        raise UserError(f"{len(failed)} runs failed, see above")


if __name__ == "__main__":
    run_cli(main)
