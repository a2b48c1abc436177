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

from evaluate import check_writable, listed, png  # noqa: E402
from losses import Perturbation, forward_units  # noqa: E402
from model import UserError, read_checkpoint, run_cli  # noqa: E402
from sample import Parser, number, write_atomically  # noqa: E402
from train import ArrayUnpickler, find_source, load_images, open_cifar, open_idx  # noqa: E402

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
    # as many images as noise.2 leaves clean, a draw of their own; measured against all
    "tenth": {"limit": 6000},
    "few": {"limit": 200},
    "cifar10": {"dataset": "cifar10", "noise_p": 0.9, "noise_std": 0.2},
}
# row: the objective and what of it, or of the training set, differs
ROWS = {
    "dsm": {"mode": "dsm"},
    "random": {"mode": "random"},
    "random_1": {"mode": "random", "lam": 1},
    "random_3": {"mode": "random", "lam": 3},
    "adv": {"mode": "adv"},
    "adv_epsilon": {"mode": "adv", "reading": "epsilon"},
    "adv_l2": {"mode": "adv", "ascent_norm": "l2"},
    "adv_l2x3": {"mode": "adv", "ascent_norm": "l2", "ascent_steps": 3},
    "invariant": {"mode": "invariant"},
}
# with the penalty on 30 % of each batch: for the sign step 4.5 forward-units instead of 8
ROWS |= {f"{row}_share": {**ROWS[row], "reg_share": 0.3}
         for row in ("adv", "adv_epsilon", "adv_l2", "adv_l2x3", "invariant")}
# on the tenth of each batch that has the smallest t, or on 30 %, or with other weights
ROWS |= {f"{row}_low": {**ROWS[row], "reg_share": 0.1, "reg_low": True}
         for row in ("adv", "adv_l2", "adv_l2x3")}
ROWS |= {"adv_low_0.3": {**ROWS["adv_low"], "reg_share": 0.3}}
ROWS |= {f"adv_{lam}_low": {**ROWS["adv_low"], "lam": lam} for lam in (0.1, 1)}
# plain until 80 % of the steps, then `late`
ROWS |= {"adv_late": {"mode": "dsm", "late": ROWS["adv"]},
         "adv_late_share": {"mode": "dsm", "late": ROWS["adv_share"]},
         "adv_late_low": {"mode": "dsm", "late": ROWS["adv_low"]}}
# a tenth of the learning rate in the last fifth
ROWS |= {f"{row}_cool": {**ROWS[row], "late": {**ROWS[row], "lr": 1e-4, "ema": 0.995}}
         for row in ("dsm", "adv_low")}
# command of evaluate.py: its flags, at most so many images, what is printed of its JSON (of few
# images KID, since the Frechet distance depends on their number)
QUALITY = ["residual_noise", "noise_images", "pixel_std", "brightness_std", "fid", "kid_mean",
           "precision", "recall"]
COMMANDS = {
    "quality": ("--steps 50", 2000, QUALITY),
    "memorization": ("--steps 50 --features pixels", 2000,
                     ["set", "copied", "d1", "d1/d2", "similar 50%", "> 0.95", "> 0.99"]),
    "steps": ("--steps 100,30,10 --sampler ddpm,ddim --spacing respaced,naive", 500,
              ["sampler", "spacing", "steps", "residual_noise", "pixel_std", "kid_mean"]),
    "attack": ("--steps 20 --norm l2 --budget 0.1", 250,
               ["attack", "residual_noise", "pixel_std", "kid_mean", "mse", "norm_max"]),
}
NAMES = {"residual_noise": "noise left", "noise_images": "noise images", "pixel_std": "pixel std",
         "brightness_std": "brightness std", "fid": "FD", "kid_mean": "KID"}
# study: command, columns, rows, seeds, training steps
STUDIES = {
    "frontier": ("quality", ["noise.2"],
                 ["dsm", "adv_low", "adv_share", "adv", "adv_l2_share", "random", "random_1",
                  "random_3", "adv_low_0.3", "adv_0.1_low", "adv_1_low", "adv_l2_low",
                  "adv_l2x3_low"], [0], 2000),
    "readings": ("quality", ["noise.2"],
                 ["dsm", "adv_share", "adv_epsilon_share", "adv_l2_share", "adv_l2x3_share",
                  "invariant_share"], [0], 2000),
    "table": ("quality", ["clean", "outliers", "noise.1"],
              ["dsm", "adv_low", "adv_share", "adv_l2_share", "adv", "random"], [0], 2000),
    "tenth": ("quality", ["tenth"], ["dsm"], [0], 2000),
    "headline": ("quality", ["noise.2"],
                 ["dsm", "random", "adv", "adv_low", "adv_share", "adv_late", "adv_late_share"],
                 [0, 1], 5000),
    "few_steps": ("steps", ["noise.2"], ["dsm", "adv"], [0], 5000),
    "attack": ("attack", ["noise.2"], ["dsm", "adv"], [0], 5000),
    "copies": ("memorization", ["few"], ["dsm", "adv_share"], [0], 2000),
    "cifar10": ("quality", ["cifar10"], ["dsm", "adv_share", "adv_low"], [0], 5000),
    "cool": ("quality", ["cifar10", "noise.2"], ["dsm_cool", "adv_low_cool"], [0], 6250),
}


def units(row):
    """Forwards that a training step of the row takes, see `losses.forward_units`."""
    def cost(mode, late=None, lr=None, ema=None, **settings):
        own = forward_units(mode, Perturbation(**settings))
        return 0.8 * own + 0.2 * cost(**late) if late else own

    return cost(**ROWS[row])


def source(dataset, args):
    """What names the data set to the scripts: {flag: value}."""
    flags = {"data_dir": args.cifar10_dir if dataset == "cifar10" else args.data_dir,
             "cache_dir": args.cache_dir}
    return {flag: value for flag, value in flags.items() if value}


def labels(dataset, folder, split):
    """The published classes, int64 (N,), in the order of the images; UserError: not there."""
    files, reader = find_source(dataset, Path(folder), split)
    if reader is open_idx:
        files = [file.with_name(file.name.replace("images-idx3", "labels-idx1")) for file in files]
        if not files[0].exists():
            raise UserError(f"{files[0]} is not there")
        with gzip.open(files[0]) as file:
            return torch.from_numpy(np.frombuffer(file.read(), np.uint8, offset=8).astype(int))
    if reader is open_cifar:
        batches = [ArrayUnpickler(open(file, "rb"), encoding="bytes").load() for file in files]
        return torch.tensor([label for batch in batches for label in batch[b"labels"]])
    # a folder or zip with one folder for each class
    names, numbers = np.unique([Path(item).parent.name for item in reader(files)[0]],
                               return_inverse=True)
    if len(names) != 10:
        raise UserError(f"{folder}: {dataset} has a folder for each of 10 classes, here are "
                        f"{len(names)}")
    return torch.from_numpy(numbers)


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
    folder = where.get("data_dir", f"data/{dataset}")
    images = torch.from_numpy(np.array(load_images(dataset, 16, channels, **where)))
    truth = labels(dataset, folder, "train")
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
    # a zip or folder of images is one split, it has no others to test with
    sources = [find_source(dataset, Path(folder), split)[0] for split in ("train", "test")]
    split = "train" if sources[0] == sources[1] else "test"
    with torch.no_grad():
        test = torch.from_numpy(np.array(load_images(dataset, 16, channels, **where, split=split)))
        right = net(test.expand(-1, 3, -1, -1))[1].argmax(1) == labels(dataset, folder, split)
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
    # a late start fits one number of steps: another's run does not go on from it
    name = f"{row}_{args.steps}" if "late" in ROWS[row] else row
    return args.out / column / f"{name}-{seed}" / f"{args.command}-{args.steps}-{num}.json"


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
    where = source(flags["dataset"], args)
    flags |= where
    stages = [(args.steps, {})]
    if late:
        stages = [(args.steps * 4 // 5, {}), (args.steps, late)]
    for last, change in stages:
        saved = read_checkpoint(folder)["step"] if (folder / "ckpt.pt").exists() else 0
        if saved > args.steps:
            raise UserError(f"{folder} is at step {saved}, beyond --steps {args.steps}: studies of "
                            "fewer steps come first, or take another --out")
        if saved < last:
            how = ["--resume"] if saved else [*COMMON.split(), "--overwrite"]
            how += [f"--{name}" if value is True else f"--{name}={value}"
                    for name, value in (flags | change).items()]
            call("train.py", "--out", folder, "--steps", last, *how, log=log)
    extra, most, _ = COMMANDS[args.command]
    own = {"num": min(args.num, most), "seed": seed, "json": result,
           "png": result.with_suffix(".png"), **where}
    if args.command == "memorization":
        own["holdout"] = flags["dataset"]
    else:
        own["features"] = args.classifiers[flags["dataset"]]
    call("evaluate.py", args.command, folder, *extra.split(),
         *(f"--{name}={value}" for name, value in own.items()), log=log)
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
    found = [statistics.mean(values)]
    if len(values) > 1:
        found.append(statistics.stdev(values))
    return " +- ".join(f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.2g}" for value in found)


def table(args):
    """The study's runs that are measured, as a markdown table: means over the seeds."""
    shown = COMMANDS[args.command][2]
    lines = [["trained on", "row", "seeds", "forward-units",
              *(NAMES.get(name, name) for name in shown)]]
    lines.append(["---"] * len(lines[0]))
    for column in args.columns:
        data = [None] * len(shown)
        for row in args.rows:
            files = {seed: measured(column, row, seed, args) for seed in args.seeds}
            found = {seed: json.loads(file.read_text())
                     for seed, file in files.items() if file.exists()}
            for same in zip(*(one.get("rows", [one]) for one in found.values())):
                # a result older than a figure has none
                cells = ["" if any(name not in figures for figures in same) else
                         spread([figures[name] for figures in same]) for name in shown]
                seeds = ", ".join(map(str, found))
                lines.append([column, row, seeds, f"{units(row):.3g}", *cells])
                data = [x if x is not None else same[0].get(f"{name}_reference")
                        for x, name in zip(data, shown)]
        if any(data):
            lines.append([column, "clean images", "", "",
                          *("" if x is None else spread([x]) for x in data)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def picture(args):
    """The images of the first seed's runs, one below the other with their names, as one PNG.

    Above those of a column training images, as its first run saw them.
    """
    parts = []
    for column in args.columns:
        seen = False
        for row in args.rows:
            result = measured(column, row, args.seeds[0], args)
            drawn = result.with_suffix(".png")
            if not drawn.exists():
                continue
            if args.command == "quality" and not seen:
                parts.append(([f"{column}: trained on"], first_tiles(result.parent / "data.png")))
                seen = True
            names = [f"{column}: {row}"]
            if args.command == "attack":
                attacks = json.loads(result.read_text())["rows"]
                names = [f"{row}\n{one['attack']}" for one in attacks]
            parts.append((names, Image.open(drawn)))
    if not parts:
        raise UserError(f"no pictures of {args.study} in {args.out}")
    margin = 170
    whole = Image.new("RGB", (margin + max(part.width for _, part in parts),
                              sum(part.height for _, part in parts)), "white")
    pen, font, top = ImageDraw.Draw(whole), ImageFont.load_default(13), 0
    for names, part in parts:
        for k, name in enumerate(names):
            pen.text((4, top + 50 * k + 12), name, fill="black", font=font)
        whole.paste(part, (margin, top))
        top += part.height
    whole.save(args.picture, optimize=True)


def first_tiles(path):
    """The first two rows of train.py's picture, eight tiles each, as one row."""
    data, width, height = Image.open(path), 400, 50
    strip = Image.new("RGB", (2 * width + 2, height + 2), "white")
    for k in range(2):
        part = data.crop((0, k * height, width + 2, (k + 1) * height + 2))
        strip.paste(part, (k * width, 0))
    return strip


def parse_args(argv=None):
    """The command line; UserError where it is wrong."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("study", nargs="?", choices=list(STUDIES), default="frontier",
                   help="see --list (frontier)")
    p.add_argument("--list", action="store_true", help="show the studies' runs, run nothing")
    p.add_argument("--tables", action="store_true", help="print the table, run nothing")
    p.add_argument("--picture", type=png, help="put its images together as a PNG, run nothing")
    for flag, kind in (("columns", listed(str, *COLUMNS)), ("rows", listed(str, *ROWS)),
                       ("seeds", listed(number(int, 0)))):
        p.add_argument(f"--{flag}", type=kind, help="only these, commas between (the study's)")
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
    args.columns = list(dict.fromkeys(args.columns or columns))
    args.rows = list(dict.fromkeys(args.rows or rows))
    args.seeds = list(dict.fromkeys(args.seeds or seeds))
    args.steps = args.steps or steps
    return args


def main(argv=None):
    """Entry point; see the module's docstring."""
    # a TorchScript file is what evaluate.py reads, deprecated or not
    warnings.filterwarnings("ignore", ".*torch.jit.script")
    args = parse_args(argv)
    if args.list:
        trained = {}
        for study, (command, columns, rows, seeds, steps) in STUDIES.items():
            total = 0
            for run in itertools.product(columns, rows, seeds):
                # what an earlier study has trained is there
                total += units(run[1]) * max(0, steps - trained.get(run, 0))
                trained[run] = max(steps, trained.get(run, 0))
            print(f"{study}: {', '.join(rows)}; {', '.join(columns)}; seeds {seeds}; {steps} steps "
                  f"of 64; `{command}`; {total:,.0f} forwards of 64 images")
        return
    if args.picture:
        check_writable(args.picture)
        return picture(args)
    failed = []
    if not args.tables:
        check_writable(args.out / "classifier.pt")
        args.classifiers = {dataset: classifier(dataset, args) for dataset in {
            COLUMNS[column].get("dataset", FASHION) for column in args.columns}
            if args.command != "memorization"}
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
