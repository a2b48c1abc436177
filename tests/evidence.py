"""The paper's claims on real images at the scale of one small machine; not run by the tests.

    python tests/evidence.py --list                       the studies and what they would take
    python tests/evidence.py answer --workers 2           train, draw and measure what is missing
    python tests/evidence.py answer --record              the same, and keep it in assets/results.*
    python tests/evidence.py answer --tables              print the table of what is there
    python tests/evidence.py answer --picture a.png       put its images together
    python tests/evidence.py answer --rows dsm --seeds 0 --columns noise.2      one cell of it
    python tests/evidence.py --render                     results.md anew from results.json

A run is `train.py` with a network of 1.1 M parameters on Fashion-MNIST at 16x16 (60,000 images,
area-downsampled), or on CIFAR-10, and then a command of `evaluate.py` on the EMA weights. Each
lives in OUT/<column>/<row>-<seed>, with its log and <command>-<steps>-<num>.json. A driver that was
stopped goes on where it was; more --steps continue the runs of fewer, not the other way round. The
Frechet distance and KID look at the features of a small classifier, OUT/classifier.pt, which is
trained first on the clean labelled images: they compare with nothing published.
"""

import gzip
import itertools
import json
import os
import subprocess
import sys
from collections import defaultdict
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Lock

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from losses import Perturbation, forward_units  # noqa: E402
from model import read_checkpoint  # noqa: E402
from sample import (Parser, UserError, comma_list, number, run_cli, write_atomically,  # noqa: E402
                    write_json)
from train import ArrayUnpickler, load_images, open_source, published_files  # noqa: E402

RESULTS = ROOT / "assets/results.json"
COMMON = ("--image_size 16 --channels 32 --mult 1,2,2 --blocks 1 --attention 8 --dropout 0 "
          "--batch_size 64 --lr 1e-3 --warmup 200 --ema 0.999 --amp off "
          "--log_every 50 --sample_every 0 --save_every 250")
FASHION = "fashion_mnist"

# ---------- What is run. A column is a training set, a row is what differs in the training:
# name: (what a reader is told, flags of train.py)
COLUMNS = {
    "noise.2": ("90 % noisy, std .2", {"noise_p": 0.9, "noise_std": 0.2}),
    "all.2": ("100 % noisy, std .2", {"noise_p": 1, "noise_std": 0.2}),
    "cifar10": ("CIFAR-10, 90 % noisy, std .2",
                {"dataset": "cifar10", "noise_p": 0.9, "noise_std": 0.2}),
    "blurred": ("90 % noisy, std .2, correlated",
                {"noise_p": 0.9, "noise_std": 0.2, "noise_blur": 1}),
    "outliers": ("10 % outliers", {"outlier_p": 0.1}),
    "strangers": ("10 % photographs (CIFAR-10, grey)",
                  {"outlier_p": 0.1, "outlier_dir": "cifar10"}),
    "clean": ("clean data", {}),
    "noise.1": ("90 % noisy, std .1", {"noise_p": 0.9, "noise_std": 0.1}),
    "few": ("200 clean images", {"limit": 200}),
}
# What a user would set --filter to who knows only the quantiles that the start of a run prints:
# half the median; among outliers, of which a tenth is far away, a value in the gap. Of all.2 it
# leaves one image: only the row aware goes there.
FILTER = {"clean": 0.008, "noise.1": 0.064, "noise.2": 0.11, "all.2": 0.11, "blurred": 0.036,
          "outliers": 0.2, "strangers": 0.011, "few": 0.008, "cifar10": 0.11}
# `stop` is a flag of evaluate.py's: the row's run is that of `of`.
ROWS = {
    "dsm": ("dsm (plain)", {"mode": "dsm"}),
    "random": ("random", {"mode": "random"}),
    "adv": ("adv (the paper's)", {"mode": "adv"}),
    "adv_low": ("adv --reg_t 0.1", {"mode": "adv", "reg_t": 0.1}),
    "adv_after": ("adv --reg_t 0.1 --reg_after 0.75",
                  {"mode": "adv", "reg_t": 0.1, "reg_after": 0.75}),
    # With the falling rate that the embedded shapes have.
    "adv_after_cool": ("adv --reg_t 0.1 --reg_after 0.75 --cooldown 0.75 --ema 0.99",
                       {"mode": "adv", "reg_t": 0.1, "reg_after": 0.75, "cooldown": 0.75,
                        "ema": 0.99}),
    "adv_share": ("adv --reg_share 0.3", {"mode": "adv", "reg_share": 0.3}),
    "invariant_share": ("invariant --reg_share 0.3", {"mode": "invariant", "reg_share": 0.3}),
    "filter": ("dsm --filter", {"mode": "dsm", "filter": "own"}),
    "aware": ("aware", {"mode": "aware", "filter": "own"}),
    # Where no image is clean, nothing teaches it the times of less noise than the images have.
    "aware_stop": ("aware --stop 0.2", {"of": "aware", "stop": 0.2}),
    "ip": ("DDPM-IP", {"mode": "ip"}),
    "dsm_v": ("dsm --predict v", {"mode": "dsm", "predict": "v"}),
    "adv_low_v": ("adv --reg_t 0.1 --predict v", {"mode": "adv", "reg_t": 0.1, "predict": "v"}),
    "dsm_stop": ("dsm --stop 0.2", {"of": "dsm", "stop": 0.2}),
    "dsm_stop.4": ("dsm --stop 0.4", {"of": "dsm", "stop": 0.4}),
    "dsm_stop.6": ("dsm --stop 0.6", {"of": "dsm", "stop": 0.6}),
    "dsm_v_stop.4": ("dsm --predict v --stop 0.4", {"of": "dsm_v", "stop": 0.4}),
    "adv_low_stop.4": ("adv --reg_t 0.1 --stop 0.4", {"of": "adv_low", "stop": 0.4}),
    "expert_stop": ("dsm + adv expert, --stop 0.2", {"of": "expert", "stop": 0.2}),
    # dsm draws, but for t < T / 10 a copy does, fine-tuned for a quarter of the steps.
    "expert": ("dsm + adv expert", {"mode": "adv", "t_max": 0.1, "ema": 0.99, "cooldown": 0,
                                    "expert_of": "dsm"}),
    # What of the expert's gain is the second network's, and what the smaller objective would do.
    "expert_dsm": ("dsm + dsm expert", {"mode": "dsm", "t_max": 0.1, "ema": 0.99, "cooldown": 0,
                                        "expert_of": "dsm"}),
}
# Command of evaluate.py: (flags, number of images, {key of its JSON: name in the tables}).
# Of few images KID is taken, since the Frechet distance depends on their number.
FIGURES = {"residual_noise": "noise left", "noise_images": "noise images",
           "strangers": "strangers", "pixel_std": "pixel std",
           "brightness_std": "brightness std", "fid": "FD", "kid_mean": "KID",
           "precision": "precision", "recall": "recall"}
FEW = {key: FIGURES[key] for key in ("residual_noise", "pixel_std", "kid_mean")}
COMMANDS = {
    "quality": ("--steps 50", 2000, FIGURES),
    "memorization": ("--steps 50 --features pixels", 2000,
                     {"set": "set", "copied": "copied", "d1": "d1", "d1/d2": "d1/d2",
                      "similar 50%": "similarity", "> 0.95": "above .95", "> 0.99": "above .99"}),
    "steps": ("--steps 100,30,10 --sampler ddpm,ddim --spacing respaced,naive", 500,
              {"sampler": "sampler", "spacing": "spacing", "steps": "sampling steps", **FEW}),
    "denoise": ("--noise_std 0.1,0.2", 300,
                {"noise_std": "noise std", "input psnr": "PSNR, dB",
                 "one-shot gain": "one-shot gain", "ancestral gain": "ancestral gain",
                 "ancestral residual": "noise left"}),
    "attack": ("--steps 20 --norm l2 --budget 0.1", 250,
               {"attack": "attack", **FEW, "mse": "mse", "norm_max": "largest push"}),
}
# study: (command, columns, rows)
STUDIES = {
    "answer": ("quality", [column for column in COLUMNS if column != "few"],
               [row for row in ROWS if not row.endswith("_share")]),
    "attack": ("attack", ["noise.2"], ["dsm", "adv_low"]),
    "denoise": ("denoise", ["noise.2", "cifar10"], ["dsm", "adv_low"]),
    "copies": ("memorization", ["few"], ["dsm", "adv_share"]),
    "few_steps": ("steps", ["noise.2"], ["dsm", "adv"]),
}

LABELS = {name: label for name, (label, _) in (COLUMNS | ROWS).items()}


def run_of(row):
    """The row whose training this row measures."""
    return ROWS[row][1].get("of", row)


def units(row):
    """Forward-units of a training step of the row, in the mean; an expert's come on top."""
    settings = ROWS[run_of(row)][1]
    own = forward_units(settings["mode"], Perturbation.of(settings))
    return units(settings["expert_of"]) + own / 4 if "expert_of" in settings else own


# ---------- The classifier whose features the distances take


def source(dataset, args):
    """What names the data set to the scripts: {flag: value}."""
    folder = args.cifar10_dir if dataset == "cifar10" else args.data_dir
    flags = {"data_dir": folder, "cache_dir": args.cache_dir}
    return {flag: value for flag, value in flags.items() if value}


def labels(dataset, root):
    """The classes of the training images, int64 (N,), in their order."""
    files = published_files(dataset, root, "train")
    if dataset == FASHION:
        with gzip.open(str(files[0]).replace("images-idx3", "labels-idx1")) as file:
            return torch.tensor(list(file.read()[8:]))
    if files:
        batches = [ArrayUnpickler(open(file, "rb"), encoding="bytes").load() for file in files]
        return torch.tensor([label for batch in batches for label in batch[b"labels"]])
    # A folder or a zip has one folder for each class.
    names = [Path(item).parent.name for item in open_source(dataset, root).names]
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
    """Path of the data set's classifier, TorchScript; it is trained where it is not there yet.

    Of "strangers": tells photographs (1) from garments (0), both grey.
    """
    path = args.out / ("classifier.pt" if dataset == FASHION else f"classifier-{dataset}.pt")
    if path.exists():
        return path
    channels = 3 if dataset == "cifar10" else 1
    sets = [FASHION, "cifar10"] if dataset == "strangers" else [dataset]
    images = [np.array(load_images(name, 16, channels, **source(name, args))) for name in sets]
    if dataset == "strangers":
        truth = torch.arange(2).repeat_interleave(torch.tensor([len(part) for part in images]))
    else:
        truth = labels(dataset, Path(source(dataset, args).get("data_dir", f"data/{dataset}")))
    images = torch.from_numpy(np.concatenate(images)).expand(-1, 3, -1, -1)
    torch.manual_seed(0)
    net = Classifier(channels)
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(5):
        right = 0
        for index in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            logits = net(images[index])[1]
            nn.functional.cross_entropy(logits, truth[index]).backward()
            optimizer.step()
            right += (logits.argmax(1) == truth[index]).sum().item()
    write_atomically(path, torch.jit.script(net.eval()).save)
    print(f"{path}: {right / len(images):.3f} of the training images right", flush=True)
    return path


@torch.no_grad()
def stranger_share(images, args):
    """Share of uint8 images (N, C, H, W) that are photographs, by the classifier of strangers."""
    net = torch.jit.load(str(args.classifiers["strangers"]))
    parts = torch.from_numpy(np.array(images)).expand(-1, 3, -1, -1).split(1000)
    return torch.cat([net(part)[1].argmax(1) for part in parts]).double().mean().item()


# ---------- Runs

training = defaultdict(Lock)  # Rows of one run wait for each other.


def call(script, *words, log, **flags):
    """One of the project's scripts in a process with one thread; UserError when it fails."""
    words = [*words, *(f"--{name}={value}" for name, value in flags.items())]
    with open(log, "a") as file:
        code = subprocess.run(
            [sys.executable, ROOT / script, *words], stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    if code:
        raise UserError(f"{script} failed with status {code}: see {log}")


def train(column, row, steps, seed, folder, args):
    """Train a run to `steps`, as far as that is not done, and first what it starts from."""
    flags = {"dataset": FASHION, **COLUMNS[column][1], **ROWS[row][1], "seed": seed}
    flags |= {"out": folder, "device": args.device, **source(flags["dataset"], args)}
    if "filter" in flags:
        flags["filter"] = FILTER[column]
    if "outlier_dir" in flags:
        flags["outlier_dir"] = args.cifar10_dir or ROOT / "data/cifar10"
    if plain := flags.pop("expert_of", None):
        flags["init_from"] = folder.with_name(f"{plain}-{seed}")
        train(column, plain, steps, seed, flags["init_from"], args)
        steps //= 4
    with training[folder]:
        saved = read_checkpoint(folder)["step"] if (folder / "ckpt.pt").exists() else 0
        if saved > steps:
            raise UserError(f"{folder} is at step {saved}, beyond {steps}: studies of fewer steps "
                            "come first, or take another --out")
        words = [*COMMON.split(), "--overwrite"]
        if saved:
            words = ["--resume"]
            flags.pop("init_from", None)
        if saved < steps:
            call("train.py", *words, log=f"{folder}.log", steps=steps, **flags)


def result_path(column, row, seed, args):
    """Where the figures of a run are, once it is done."""
    num = COMMANDS[args.command][1]
    # An expert fits a run of one number of steps: that of another number does not go on from it.
    name = run_of(row)
    if "expert_of" in ROWS[name][1]:
        name = f"{name}_{args.steps}"
    stop = f"-stop{ROWS[row][1]['stop']}" if "stop" in ROWS[row][1] else ""
    return args.out / column / f"{name}-{seed}" / f"{args.command}-{args.steps}-{num}{stop}.json"


def run_one(column, row, seed, args):
    """Train and measure a run, as far as that is not done."""
    path = result_path(column, row, seed, args)
    if path.exists():
        return
    print(f"{column} {row} {seed}", flush=True)
    folder = run = path.parent
    folder.parent.mkdir(parents=True, exist_ok=True)
    train(column, run_of(row), args.steps, seed, folder, args)

    words, num, _ = COMMANDS[args.command]
    words, log = words.split(), f"{folder}.log"
    dataset = COLUMNS[column][1].get("dataset", FASHION)
    sampling = {"num": num, "seed": seed, "device": args.device}
    if "stop" in ROWS[row][1]:
        sampling["stop"] = ROWS[row][1]["stop"]
    if plain := ROWS[run_of(row)][1].get("expert_of"):
        run, sampling["expert"] = folder.with_name(f"{plain}-{seed}"), folder
    flags = {"json": path, **source(dataset, args)}
    if args.command != "denoise":
        flags["png"] = path.with_suffix(".png")
        flags |= ({"holdout": dataset} if args.command == "memorization" else
                  {"features": args.classifiers[dataset]})

    has_strangers = args.command == "quality" and "outlier_dir" in COLUMNS[column][1]
    if has_strangers:  # Its samples are looked at twice.
        drawn, flags["reference"] = path.with_suffix(""), dataset
        call("sample.py", run, *words, log=log, out=drawn, **sampling)
        run = drawn
    call("evaluate.py", args.command, run, *words, log=log, **sampling, **flags)
    if has_strangers:
        figures = json.loads(path.read_text())
        images = np.load(drawn / "samples.npz")["arr_0"].transpose(0, 3, 1, 2)
        clean = load_images(dataset, 16, 1, **source(dataset, args))
        figures["strangers"] = stranger_share(images, args)
        figures["strangers_reference"] = stranger_share(clean, args)
        write_json(path, figures)


def run_all(args):
    """Train and measure what is missing of the study; the errors of the runs that failed."""
    args.out.mkdir(parents=True, exist_ok=True)
    datasets = {COLUMNS[column][1].get("dataset", FASHION) for column in args.columns}
    if any("outlier_dir" in COLUMNS[column][1] for column in args.columns):
        datasets.add("strangers")
    args.classifiers = {dataset: classifier(dataset, args) for dataset in datasets
                        if args.command != "memorization"}

    def error_of(run):
        try:
            run_one(*run, args)
        except UserError as error:  # One run that fails does not end the others.
            return " ".join(map(str, run)) + f": {error}"

    runs = [(column, row, seed) for seed, column, row in itertools.product(
        args.seeds, args.columns, args.rows) if (column, row) != ("all.2", "filter")]
    with ThreadPool(args.workers) as pool:
        return [*filter(None, pool.imap_unordered(error_of, runs))]


# ---------- Results: a list of records {study, heading, title, command, columns, rows}, some with
# a picture. A row is {column: figure}; a figure is a number, a text or [mean, std]. What a row was
# made by lies in its "provenance".

ABOUT = ("commit", "num", "sampler", "steps", "spacing", "stop", "expert_sha256", "seed", "weights",
         "weights_sha256", "features", "reference", "reference_num", "kid_subset", "norm", "budget",
         "attack_steps", "share", "eot")
OF_CLEAN = ("commit", "features", "reference", "reference_num")  # What clean images depend on.
INTRO = """# Every figure that was measured

Rendered from results.json by `python tests/evidence.py --render`: edit that file, not this one.
"made at" is the commit of the code that measured.
"""


def collect(args):
    """The rows of the runs that are measured, and of the clean images that each looked at."""
    rows, seen, names = [], set(), COMMANDS[args.command][2]
    for column, row, seed in itertools.product(args.columns, args.rows, args.seeds):
        path = result_path(column, row, seed, args)
        if not path.exists():
            continue
        data = json.loads(path.read_text())
        found = data.get("rows", [data])
        about = {key: data["provenance"][key] for key in ABOUT if key in data["provenance"]}
        clean = {name: found[0][f"{key}_reference"] for key, name in names.items()
                 if f"{key}_reference" in found[0]}
        if clean and column not in seen:
            seen.add(column)
            rows.append({"trained on": column, "row": "clean images", **clean, "provenance": {
                key: about[key] for key in OF_CLEAN if key in about}})
        for one in found:
            figures = {name: one[key] for key, name in names.items() if key in one}
            rows.append({"trained on": column, "row": row, "training steps": args.steps,
                         "seed": seed, "forward-units": round(units(row), 3), **figures,
                         "provenance": about})
    return rows


def record(args):
    """Put the study's rows into its record in results.json, in place of those of the same runs."""
    rows, records = collect(args), json.loads(RESULTS.read_text())
    known, = (one for one in records if one["study"] == args.study)
    run = ("trained on", "row", "training steps", "seed")
    new = [[row.get(name) for name in run] for row in rows]
    old = [row for row in known["rows"] if [row.get(name) for name in run] not in new]
    names = [*COLUMNS, "clean images", *ROWS]
    known["rows"] = sorted(old + rows, key=lambda row: (
        names.index(row["trained on"]), names.index(row["row"]), row.get("seed", 0)))
    write(records)


def dump(records):
    """The text of results.json: one line for each row, so that a difference shows what changed."""
    blocks = []
    for one in records:
        head = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in one.items()
                if key != "rows"]
        rows = ",\n".join(f"   {json.dumps(row)}" for row in one["rows"])
        blocks.append(" {\n" + ",\n".join([*head, '  "rows": [\n' + rows + "\n  ]"]) + "\n }")
    return "[\n" + ",\n".join(blocks) + "\n]\n"


def write(records):
    """Write results.json, and results.md, which is rendered from it."""
    for path, text in ((RESULTS, dump(records)), (RESULTS.with_suffix(".md"), rendered(records))):
        write_atomically(path, lambda temporary: temporary.write_text(text))


def rendered(records):
    """The text of results.md: a table of each record, of many training sets one for each."""
    parts = [INTRO]
    for one in records:
        command = f" `{one['command']}`" if one["command"] else ""
        parts.append(f"## {one['heading']}\n\n{one['title']}{command}\n")
        if "picture" in one:
            parts.append(f"![{one['heading']}]({one['picture']})\n")
        sets = dict.fromkeys(row.get("trained on") for row in one["rows"])
        if len(sets) < 3:
            parts.append(table(one["columns"], one["rows"]))
            continue
        columns = [name for name in one["columns"] if name != "trained on"]
        for name in sets:
            rows = [row for row in one["rows"] if row.get("trained on") == name]
            parts += [f"### {LABELS.get(name, name)}\n"] * bool(name) + [table(columns, rows)]
    parts.append("## Names in tests/evidence.py\n")
    for title, known in (("trained on", COLUMNS), ("row", ROWS)):
        lines = []
        for name, (label, settings) in known.items():
            # What names another row, or the column's value in FILTER, is no flag.
            words = [f"{key}={value}" if key in ("of", "expert_of", "filter") else
                     f"--{key} {value}" for key, value in settings.items()]
            lines.append([label, f"`{name}`", f"`{' '.join(words)}`" if words else ""])
        parts.append(markdown([title, "its name", "settings"], lines))
    return "\n".join(parts)


def table(columns, rows):
    """A markdown table of rows: columns without any figure are left out."""
    lines = []
    for row in rows:
        about = row.get("provenance", {})
        names = {key: LABELS.get(row[key], row[key]) for key in ("trained on", "row") if key in row}
        lines.append({**row, **names, "made at": about.get("commit", about.get("source"))})
    used = [name for name in [*columns, "made at"]
            if any(line.get(name) is not None for line in lines)]
    return markdown(used, [[cell(line.get(name)) for name in used] for line in lines])


def cell(value):
    """A figure as text: three decimals, two from 10 on, two digits below .01."""
    if isinstance(value, list):
        return " +- ".join(map(cell, value))
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{round(value, 3 if abs(value) < 10 else 2):g}"


def markdown(head, lines):
    """A markdown table of texts."""
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


# ---------- Pictures


def picture(args):
    """The images of the first seed as one labelled PNG: a row for each run, a column for each set.

    The attack's have a row for each attack; above the others are the training images.
    """
    width = 50 * min(8, 16 // len(args.columns)) + 2
    strips = defaultdict(dict)  # {label: {column: image}}
    for row, column in itertools.product(args.rows, args.columns):
        result = result_path(column, row, args.seeds[0], args)
        if not result.exists():
            continue
        names = [LABELS[row]]
        if args.command == "attack":
            names = [f"{names[0]}:\n{one['attack']}"
                     for one in json.loads(result.read_text())["rows"]]
        else:
            data = Image.open(result.parent / "data.png")
            strips["training data"][column] = data.crop((0, 0, width, 52))
        images = Image.open(result.with_suffix(".png"))
        left = images.width - 802  # evaluate.py's own labels are cut off.
        for k, name in enumerate(names):
            strips[name][column] = images.crop((left, 50 * k, left + width, 50 * k + 52))

    margin, head, pen = 190, 20, {"fill": "black", "font": ImageFont.load_default(13)}
    places = {column: margin + i * (width + 8) for i, column in enumerate(args.columns)}
    sheet = Image.new("RGB", (margin + len(places) * (width + 8) - 8, head + 52 * len(strips)),
                      "white")
    draw = ImageDraw.Draw(sheet)
    for column, left in places.items():
        draw.text((left, 2), LABELS[column], **pen)
    for top, (name, parts) in zip(itertools.count(head, 52), strips.items()):
        draw.text((4, top + 26), name, anchor="lm", **pen)
        for column, part in parts.items():
            sheet.paste(part, (places[column], top))
    sheet.save(args.picture, optimize=True)


# ---------- Command line


def main(argv=None):
    """Entry point; see the module's docstring."""
    p = Parser(description=__doc__)
    flag = p.add_argument
    flag("study", nargs="?", choices=list(STUDIES), default="answer", help="see --list")
    flag("--list", action="store_true", help="show the studies, run nothing")
    flag("--render", action="store_true", help="write results.md anew, run nothing")
    flag("--tables", action="store_true", help="print the table, run nothing")
    flag("--record", action="store_true", help="keep the rows in assets/results.json")
    flag("--picture", type=Path, help="PNG to put its images into, run nothing")
    flag("--columns", type=comma_list(str, *COLUMNS), help="only these; else the study's")
    flag("--rows", type=comma_list(str, *ROWS), help="only these; else the study's")
    flag("--seeds", type=comma_list(number(int, 0)), default=[0], help="of training and drawing")
    flag("--steps", type=number(int, 1), default=2000, help="of training")
    flag("--workers", type=number(int, 1), default=torch.get_num_threads(),
         help="runs side by side, one thread each")
    flag("--device", default="auto", help="of training and measuring")
    flag("--data_dir", help="folder with Fashion-MNIST; else data/, filled by download")
    flag("--cifar10_dir", help="folder or zip of CIFAR-10; else likewise")
    flag("--cache_dir", help="folder of the decoded images; else out/cache")
    flag("--out", type=Path, default=Path("out/evidence"), help="folder of the runs")
    args = p.parse_args(argv)
    args.command, columns, rows = STUDIES[args.study]
    args.columns, args.rows = args.columns or columns, args.rows or rows
    if args.list:
        for study, (command, columns, rows) in STUDIES.items():
            total = sum(map(units, {*map(run_of, rows)})) * len(columns) * args.steps
            print(f"{study}: {', '.join(rows)}; {', '.join(columns)}; `{command}`; at most "
                  f"{total:,.0f} forward-units of 64 images a seed")
        return
    if args.render:
        return write(json.loads(RESULTS.read_text()))
    if args.picture:
        return picture(args)
    failed = [] if args.tables else run_all(args)
    rows = collect(args)
    columns = [name for name in max(rows, key=len, default=()) if name != "provenance"]
    print(table(columns, rows) if rows else "nothing is measured yet")
    if args.record:
        record(args)
    if failed:
        raise UserError("\n".join([*failed, f"{len(failed)} runs failed"]))


if __name__ == "__main__":
    run_cli(main)
