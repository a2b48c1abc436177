"""Training as a user meets it: exact resume, signals, data sets, corruption, mistakes."""

import gzip
import io
import json
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import losses
import train
from conftest import TINY, Bomb, finish, fork
from losses import Perturbation
from sample import HOST, UserError, crop_resize, is_image, load_run, noise_estimate
from train import (CLEAN, NOISY, OUTLIER, Corruption, choose_corruption, load_images, own_noise,
                   shapes, training_images)

SMALL = [*TINY, "--image_size", "8", "--mult", "1", "--attention", "8", "--log_every", "1",
         "--mode", "dsm", "--reg_after", "0", "--cooldown", "0"]
SPOILED = ["--noise_p", "0.5", "--noise_std", "0.2", "--outlier_p", "0.1", "--limit", "20"]


def checkpoint(out):
    return torch.load(out / "ckpt.pt", weights_only=True)


def differ(a, b):
    """Whether two state dicts hold other weights."""
    return any(not torch.equal(a[key], b[key]) for key in a)


def assert_same_state(*runs):
    """Weights, EMA, optimiser, scaler and step of two runs are equal to the bit."""
    parts = [{name: checkpoint(out)[name] for name in ("step", "model", "ema", "optimizer",
                                                       "scaler")} for out in runs]
    torch.testing.assert_close(*parts, rtol=0, atol=0)


def logged(out, name="step"):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line)[name] for line in lines]


@pytest.fixture
def at_step(monkeypatch):
    """Let something happen within a step of training: each of them clips its gradient once."""

    def plant(number, act):
        clip, calls = nn.utils.clip_grad_norm_, []

        def watched(*args):
            calls.append(args)
            if len(calls) == number:
                act()
            return clip(*args)

        monkeypatch.setattr(nn.utils, "clip_grad_norm_", watched)

    return plant


# ---------- Loop and resume


@pytest.mark.parametrize("mode, amp", [("adv", "fp16"), ("dsm", "bf16")])
def test_resume_is_exact(mode, amp, tmp_path, in_process, capsys):
    """6 steps = 3 + resume + 3: dropout, EMA, accumulation, corruption, several passes, scaler."""
    flags = [*SMALL, *SPOILED, "--mode", mode, "--amp", amp, "--accum", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    in_process("train", *flags, "--steps", 6, "--out", whole)
    in_process("train", *flags, "--steps", 3, "--out", parts)
    half = checkpoint(parts)["model"]
    in_process("train", "--resume", "--steps", 6, "--out", parts)
    shown = capsys.readouterr().out
    assert "resuming at step 3; steps 3 -> 6" in shown and f"amp {amp}" in shown
    assert_same_state(whole, parts)
    assert logged(whole, "loss") == logged(parts, "loss")
    end = checkpoint(whole)
    assert differ(half, end["model"]) and differ(end["ema"], end["model"])
    assert ("scale" in end["scaler"]) == (amp == "fp16")


def test_a_signal_to_one_of_two_processes_stops_both_and_resume_is_exact(tmp_path, at_step):
    """As torchrun starts them."""
    flags, log = [*SMALL, *SPOILED, "--mode", "adv", "--accum", 2], tmp_path / "log"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    forks = fork(log, "train", *flags, "--steps", 10**5, "--out", parts, ranks=2)
    deadline = time.time() + 60
    while not (parts / "log.jsonl").exists() and time.time() < deadline:
        time.sleep(0.02)
    forks[1].terminate()
    assert finish(forks) == 2 * [128 + signal.SIGTERM]
    step, shown = checkpoint(parts)["step"], (tmp_path / "log.0").read_text()
    assert shown.startswith("output") and f"stopped by SIGTERM at step {step};" in shown
    assert logged(parts) == list(range(1, step + 1))
    assert "step" not in (tmp_path / "log.1").read_text()
    for out, more in ((whole, flags), (parts, ["--resume"])):
        forks = fork(log, "train", *more, "--steps", step + 2, "--out", out, ranks=2)
        assert finish(forks) == [0, 0]
    assert_same_state(whole, parts)
    # torchrun repeats the signal to those that still save.
    at_step(1, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
    forks = fork(log, "train", "--resume", "--steps", step + 9, "--out", parts, ranks=2)
    assert finish(forks) == 2 * [128 + signal.SIGTERM] and checkpoint(parts)["step"] == step + 3

    # One of them reads the data; what is wrong with them is the error of both.
    (tmp_path / "data").mkdir()
    (tmp_path / "data/1.png").write_bytes(picture("red")[:60])
    broken = [*SMALL, "--dataset", "folder", "--data_dir", tmp_path / "data", "--out", parts,
              "--overwrite"]
    assert finish(fork(log, "train", *broken, ranks=2)) == [2, 2]
    for rank in range(2):
        assert "1.png of" in (tmp_path / f"log.{rank}").read_text()
    assert checkpoint(parts)["step"] == step + 3


def test_a_run_is_plain_until_the_regulariser_begins(tmp_path, in_process):
    runs = [tmp_path / mode for mode in ("dsm", "adv")]
    for out in runs:
        in_process("train", *SMALL, "--mode", out.name, "--reg_after", 0.5, "--steps", 4,
                   "--save_every", 2, "--keep", 2, "--log_every", 0, "--out", out)
    middle, end = ([torch.load(out / f"ckpt_{step:07d}.pt")["model"] for out in runs]
                   for step in (2, 4))
    assert not differ(*middle) and differ(*end)
    assert logged(runs[1], "loss")[0] > logged(runs[0], "loss")[0]
    # Who begins with another run's weights regularises from the first step.
    args, _ = train.parse_args(["--init_from", str(runs[0]), "--mode", "adv"])
    assert args.reg_after == 0


def test_the_loss_does_not_depend_on_how_the_batch_is_split(tmp_path):
    """Flips, noise and time steps belong to the image: one part, two, and two processes agree.

    So does what is regularised, but for omega, whose radius is so small here that it counts for
    nothing.
    """
    flags = [*SMALL, "--dropout", 0, "--steps", 3, "--mode", "adv", "--reg_t", 0.3, "--beta_min",
             1e-5, "--beta_max", 1e-5]
    found = []
    for accum, ranks in ((1, 1), (2, 1), (1, 2)):
        out = tmp_path / f"{accum}-{ranks}"
        forks = fork(tmp_path / "log", "train", *flags, "--accum", accum, "--out", out, ranks=ranks)
        assert finish(forks) == [0] * ranks
        found.append(logged(out, "dsm"))
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(set(found[0])) == 3
    assert found[0] == pytest.approx(found[2], rel=1e-4)


def test_the_seed_chooses_a_limited_data_set_and_every_pass_takes_each_image_once():
    images = shapes(50, 8, 3, 0)
    first, again, other = (train.limit_images(images, 10, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    rows = np.concatenate([np.flatnonzero((images == image).all((1, 2, 3))) for image in first])
    assert len(rows) == 10 and (np.diff(rows) > 0).all()
    seen = np.concatenate([train.batch_index(step, 8, 100, 5) for step in range(25)])
    assert np.array_equal(np.sort(seen), np.repeat(np.arange(100), 2))
    assert not np.array_equal(seen[:100], seen[100:])
    tiny = np.concatenate([train.batch_index(step, 7, 3, 5) for step in range(3)])
    assert np.array_equal(np.bincount(tiny), [7, 7, 7])


def test_a_resumed_run_changes_free_settings_and_refuses_fixed_ones(tmp_path, in_process, capsys,
                                                                    mistake, at_step, monkeypatch):
    out = tmp_path / "run"
    fresh, resume = [*SMALL, "--steps", 2, "--out", out], ["--resume", "--steps", 3, "--out", out]
    in_process("train", *fresh)
    capsys.readouterr()
    in_process("train", *resume, "--mode", "adv", "--lam", 0.5)
    shown = capsys.readouterr().out
    assert "mode dsm -> adv" in shown and "lam 0.3 -> 0.5" in shown and "mult" not in shown
    state, before = checkpoint(out), (out / "ckpt.pt").read_bytes()
    assert state["step"] == 3 and state["config"]["mode"] == "adv"
    assert "at step 3 of 3" in mistake("train", *resume)
    for flag in (["--channels", 16], ["--mult", "1,1"], ["--T", 100], ["--schedule", "cosine"],
                 ["--predict", "eps"]):
        assert flag[0] in mistake("train", *resume, *flag)
    assert "holds a run" in mistake("train", *fresh)
    # Nothing is removed before the first step has succeeded.
    with monkeypatch.context() as bare:
        bare.setenv("PATH", "")
        bare.delenv("CXX", raising=False)
        assert "needs a C++ compiler" in mistake("train", *fresh, "--overwrite", "--compile")
    at_step(1, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        in_process("train", *fresh, "--overwrite")
    assert (out / "ckpt.pt").read_bytes() == before
    in_process("train", *fresh, "--overwrite")
    assert checkpoint(out)["step"] == 2


def test_init_from_takes_weights_and_architecture_and_does_not_forget(tmp_path, in_process,
                                                                      mistake, monkeypatch):
    first, second = tmp_path / "plain", tmp_path / "adv"
    in_process("train", *SMALL, "--steps", 3, "--lr", "1e-2", "--limit", 500, "--predict", "v",
               "--out", first)
    begin = ["train", "--init_from", first, "--batch_size", 8, "--out", second]
    assert "--channels 16" in mistake(*begin, "--channels", 16)
    in_process(*begin, "--steps", 2, "--lr", 1e-6, "--sample_every", 0, "--ema", 0.99)
    old, new = checkpoint(first), checkpoint(second)
    assert new["step"] == 2 and new["config"]["mult"] == (1,) and new["config"]["mode"] == "adv"
    assert new["config"]["limit"] == 500  # Its data are the first run's.
    for part in ("model", "ema"):  # Both begin as the average, and hardly move.
        torch.testing.assert_close(new[part], old["ema"], rtol=0, atol=1e-4)
    assert differ(old["ema"], new["model"])
    # The data set is inherited too, unless another one is asked for: then nothing of the data is.
    other = tmp_path / "other.pt"
    torch.save({**old, "config": {**old["config"], "dataset": "celeba", "noise_p": 0.5}}, other)
    for flags, dataset, noise_p, limit in (([], "celeba", 0.5, 500),
                                           (["--dataset", "folder"], "folder", 0, 0)):
        args, _ = train.parse_args(["--init_from", str(other), *flags])
        assert (args.dataset, args.noise_p, args.limit) == (dataset, noise_p, limit)
        assert (args.steps, args.out.name) == (500_000, f"{dataset}-adv")
    args, _ = train.parse_args(["--init_from", str(other), "--t_max", "0.2", "--warmup", "7"])
    assert (args.reg_t, args.ema, args.cooldown, args.warmup) == (1, 0.99, 0.5, 7)
    # It is a run like any other: resumed, it keeps to its own weights.
    in_process("train", "--resume", "--out", second, "--steps", 3)
    assert checkpoint(second)["config"]["init_from"] == str(first)
    # An expert is trained on small t alone, of which all that --reg_t covers is regularised.
    ends, low = [], []
    monkeypatch.setattr(train, "stratified_t", lambda n, T, device: ends.append(T) or
                        losses.stratified_t(n, T, device))
    monkeypatch.setattr(train, "Objective", lambda *args: low.extend((
        args[-1].reg_t, args[-1].t_max, args[1].predict)) or losses.Objective(*args))
    in_process(*begin, "--steps", 1, "--overwrite", "--t_max", 0.2, "--reg_t", 0.1)
    assert (ends, low) == ([200], [0.1, 0.2, "v"]) and load_run(second).diffusion.predict == "v"


def test_reports_checkpoints_and_pictures(tmp_path, in_process, capsys):
    in_process("train", *SMALL, "--mode", "adv", "--steps", 5, "--log_every", 2, "--save_every", 2,
               "--keep", 2, "--sample_every", 3, "--T", 3, "--out", tmp_path)
    shown = capsys.readouterr().out
    assert shown.startswith(f"output {tmp_path}\n") and "9,000 with noise of std 0.2" in shown
    share = float(shown.split("% below half the median")[0].split()[-1])
    assert 9 < share < 11  # The clean tenth.
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {".lock", "ckpt.pt", "config.json", "data.png", "log.jsonl"}
    assert sorted(name for name in names if "_" in name) == [
        "ckpt_0000004.pt", "ckpt_0000005.pt", "samples_0000003.png", "samples_0000005.png"]
    assert torch.load(tmp_path / "ckpt_0000004.pt", weights_only=True)["step"] == 4
    (tmp_path / "ckpt_mine.pt").write_bytes(b"")
    in_process("train", "--resume", "--steps", 6, "--keep", 1, "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["ckpt.pt", "ckpt_mine.pt"]
    assert logged(tmp_path) == [2, 4, 5, 6]
    assert logged(tmp_path, "loss") == pytest.approx(
        np.add(logged(tmp_path, "dsm"), logged(tmp_path, "reg")), rel=1e-4)
    curves = np.asarray(Image.open(tmp_path / "curves.png")).astype(int)
    for left in (0, 320, 640):  # In each panel a curve, of a colour.
        assert (np.ptp(curves[30:280, left + 20:left + 250], axis=-1) > 100).any()


def test_average_of_the_weights_is_no_part_of_the_graph(tmp_path, in_process, monkeypatch):
    """An average under autograd would hold on to every step's graph until memory ends."""
    lerp, shares = torch._foreach_lerp_, []

    def watched(averages, weights, share):
        lerp(averages, weights, share)
        assert not any(p.requires_grad for p in averages)
        shares.append(share)

    monkeypatch.setattr(torch, "_foreach_lerp_", watched)
    in_process("train", *SMALL, "--dropout", 0, "--steps", 30, "--lr", "1e-2", "--warmup", 0,
               "--log_every", 10, "--ema", 0.2, "--out", tmp_path)
    # The decay ramps up to --ema: 1/10, 2/11, then .2.
    assert shares == pytest.approx([9 / 10, 9 / 11] + [0.8] * 28)
    fit = logged(tmp_path, "dsm")  # And the loss falls.
    assert fit[-1] < 0.85 * fit[0]  # Untrained: .92.


def test_non_finite_loss_names_the_step_and_the_last_good_checkpoint(tmp_path, in_process, mistake):
    flags = [*SMALL, "--out", tmp_path, "--grad_clip", 0, "--warmup", 0]
    in_process("train", *flags, "--steps", 2)
    good = (tmp_path / "ckpt.pt").read_bytes()
    error = mistake("train", "--resume", "--out", tmp_path, "--lr", "1e20", "--steps", 9)
    assert "not finite at step 4" in error and "of step 2" in error
    assert (tmp_path / "ckpt.pt").read_bytes() == good


def test_resume_drops_what_lay_beyond_and_bears_a_damaged_log_but_no_damaged_checkpoint(
        tmp_path, in_process, mistake):
    in_process("train", *SMALL, "--steps", 5, "--save_every", 1, "--keep", 5, "--out", tmp_path)
    shutil.copy(tmp_path / "ckpt_0000002.pt", tmp_path / "ckpt.pt")
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 2, "lo')
    (tmp_path / f".{HOST}.999999999.tmp.ckpt.pt").write_bytes(b"what a killed run left")
    in_process("train", "--resume", "--steps", 3, "--keep", 2, "--out", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*ckpt*")) == [
        "ckpt.pt", "ckpt_0000002.pt", "ckpt_0000003.pt"]
    assert logged(tmp_path) == [1, 2, 3]

    assert "is a file" in mistake("train", "--resume", "--out", tmp_path / "ckpt_0000003.pt")
    whole = checkpoint(tmp_path)
    for part in ("optimizer", "config", "model"):
        torch.save({**whole, part: {}}, tmp_path / "ckpt.pt")
        mistake("train", "--resume", "--steps", 4, "--out", tmp_path)


def test_the_data_of_a_run_may_not_change(tmp_path, in_process, capsys, mistake):
    photos, out = tmp_path / "photos", tmp_path / "run"
    photos.mkdir()
    for k in range(3):
        (photos / f"{k}.png").write_bytes(picture((k, 0, 0)))
    flags = [*SMALL, "--dataset", "folder", "--data_dir", photos]
    in_process("train", *flags, "--steps", 2, "--out", out)
    os.utime(photos / "0.png")  # Dates and places are no part of what data are.
    in_process("train", "--resume", "--steps", 3, "--out", out)
    assert capsys.readouterr().out.count("data folder: 3 images") == 2
    (photos / "new.png").write_bytes(picture("red"))
    error = mistake("train", "--resume", "--steps", 4, "--out", out)
    assert "3 files before, now 4" in error and "--new_data" in error
    in_process("train", "--resume", "--steps", 4, "--out", out, "--new_data")

    # A folder that is no run of ours keeps its files, also those with the names of a run's.
    (photos / "data.png").write_bytes(b"mine")
    assert "would become data" in mistake("train", *flags, "--out", photos / "run")
    assert "data.png is of no run" in mistake("train", *SMALL, "--out", photos, "--overwrite")
    assert (photos / "data.png").read_bytes() == b"mine"


def test_filter_and_aware_as_a_user_runs_them(tmp_path, in_process, capsys):
    flags = [*SMALL, "--image_size", 16, "--attention", 0, "--limit", 200, "--filter", "half"]
    for out, more in (("dsm", ["--steps", 1]), ("dsm", ["--steps", 2, "--resume"]),
                      ("aware", ["--steps", 1, "--mode", "aware", "--filter", 0.1])):
        in_process("train", *flags, *more, "--out", tmp_path / out)
        assert "takes 20 as clean" in capsys.readouterr().out
    # What is trained on is what is left: without noise.
    seen = torch.from_numpy(np.array(Image.open(tmp_path / "dsm/data.png"))).permute(2, 0, 1)
    assert noise_estimate(seen[None, :, 2:50:3, 2:50:3] / 127.5 - 1)[0] < 0.02


# ---------- Signals, and what else the machine does


@pytest.mark.parametrize("name, ignored", [("SIGTERM", False), ("SIGHUP", False),
                                           ("SIGUSR1", False), ("SIGHUP", True)])
def test_a_signal_saves_and_exits_unless_nohup_ignores_it(name, ignored, tmp_path, at_step,
                                                          in_process, capsys):
    number = getattr(signal, name)
    at_step(2, lambda: os.kill(os.getpid(), number))
    before = signal.signal(number, signal.SIG_IGN if ignored else lambda *_: None)
    ended = in_process("train", *SMALL, "--steps", 3, "--out", tmp_path)
    signal.signal(number, before)
    assert ended == (None if ignored else 128 + number)
    assert (f"stopped by {name} at step 2;" in capsys.readouterr().out) != ignored
    assert checkpoint(tmp_path)["step"] == logged(tmp_path)[-1] == (3 if ignored else 2)


def test_a_second_signal_ends_at_once_and_nobody_else_writes_to_a_run(
        tmp_path, at_step, in_process, mistake, monkeypatch):
    def interrupt_twice():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    at_step(1, interrupt_twice)
    flags = [*SMALL, "--steps", 2, "--out", tmp_path / "run"]
    assert finish(fork(tmp_path / "log", "train", *flags)) == [-signal.SIGINT]
    monkeypatch.undo()
    seen = []
    at_step(1, lambda: seen.append(mistake("train", *flags)))
    in_process("train", *flags)
    assert "another process writes to" in seen[0]
    assert checkpoint(tmp_path / "run")["step"] == 2


def test_a_closed_pipe_does_not_end_the_run(tmp_path):
    """As Ctrl-C closes `tee`, which gets it as well."""
    os.mkfifo(tmp_path / "log.0")
    forks = fork(tmp_path / "log", "train", *SMALL, "--steps", 3, "--out", tmp_path)
    with open(tmp_path / "log.0") as pipe:
        assert pipe.readline().startswith("output")
    assert finish(forks) == [0] and checkpoint(tmp_path)["step"] == 3


@pytest.mark.parametrize("script", ["train", "sample", "evaluate", "toy"])
def test_each_script_shows_a_mistake_in_one_line(script, tmp_path):
    assert finish(fork(tmp_path / "log", script, "--sterps", 3)) == [2]
    shown = (tmp_path / "log.0").read_text()
    assert shown.startswith("error: ") and shown.count("\n") == 1


def test_a_full_disk_is_one_line_and_what_was_there_stays_whole(tmp_path, at_step, in_process,
                                                                mistake):
    """The disk is full, as the kernel says it, when the temporary file is written."""
    out, drawn, figures = tmp_path / "run", tmp_path / "drawn", tmp_path / "figures.json"
    in_process("train", *SMALL, "--steps", 1, "--out", out)
    draw = ["sample", out, "--num", 3, "--steps", 1, "--out", drawn]
    in_process(*draw)
    (drawn / "000002.png").unlink()
    figures.write_text("{}")
    for file, *argv in (
            (drawn / "000002.png", *draw),
            (figures, "evaluate", "denoise", out, "--noise_std", 0.01, "--json", figures),
            (out / "ckpt.pt", "train", "--resume", "--steps", 2, "--out", out)):
        before = file.read_bytes() if file.exists() else None
        file.with_name(f".{HOST}.{os.getpid()}.tmp.{file.name}").symlink_to("/dev/full")
        assert "cannot be written" in (error := mistake(*argv)) or "No space left" in error
        assert before == (file.read_bytes() if file.exists() else None)
        in_process(*argv)
    log = out / "log.jsonl"
    at_step(2, lambda: (log.unlink(), log.symlink_to("/dev/full")))
    assert "No space left" in mistake("train", "--resume", "--steps", 5, "--save_every", 1, "--out",
                                      out)
    assert checkpoint(out)["step"] == 3  # None is ahead of the log.


# ---------- Data


def test_shapes_are_deterministic_and_anti_aliased():
    a, again, other = (shapes(200, 16, 3, seed) for seed in (0, 0, 1))
    assert a.shape == (200, 3, 16, 16) and a.dtype == np.uint8
    assert np.array_equal(a, again) and not np.array_equal(a, other)
    # A blurred edge has levels between background and colour.
    assert np.mean([len(np.unique(image.reshape(3, -1), axis=1).T) for image in a]) > 4


def test_corruption_is_frozen_and_exact():
    images, index = shapes(400, 16, 3, seed=0), np.arange(400)
    kinds = choose_corruption(400, 0.9, 0.1, seed=3)
    assert np.sum(kinds == OUTLIER) == 40
    few, many = (np.flatnonzero(choose_corruption(400, share, 0, 3)) for share in (0.3, 0.9))
    assert len(many) == 360 and np.isin(few, many).all()
    spoil = Corruption(kinds, 3, 0.2)
    x = training_images(images, index, spoil)
    shuffled = np.random.default_rng(0).permutation(400)
    assert torch.equal(training_images(images, shuffled, spoil), x[shuffled])
    assert not torch.equal(x, training_images(images, index, spoil._replace(seed=4)))
    clean = torch.from_numpy(images).float() / 127.5 - 1
    assert torch.equal(x[kinds == CLEAN], clean[kinds == CLEAN])
    noise, outliers = (x - clean)[kinds == NOISY], x[kinds == OUTLIER]
    assert noise.std().item() == pytest.approx(0.2, rel=0.01) and abs(noise.mean()) < 0.002
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1:]).mean() < 0.1
    assert outliers.abs().max() <= 1
    assert outliers.std().item() == pytest.approx(3**-0.5, rel=0.02)

    # Correlated noise has the same std, image for image, and escapes the estimate.
    smooth = spoil._replace(noise_blur=1.0)
    added = (training_images(images, index, smooth) - clean)[kinds == NOISY]
    assert (added.std((1, 2, 3)) / 0.2 - 1).abs().max() < 0.2
    levels = own_noise(images, index, spoil)
    assert levels[kinds == NOISY].min() > 0.1 > levels[kinds == CLEAN].max()
    assert own_noise(images, index, smooth)[kinds == NOISY].max() < 0.1
    assert torch.equal(levels[::7], own_noise(images, index[::7], spoil))


def test_outliers_may_be_images_of_another_set(tmp_path, in_process, capsys):
    folder = tmp_path / "black and white"
    folder.mkdir()
    for value in (0, 255):
        (folder / f"{value}.png").write_bytes(picture(3 * (value,)))
    flags = [*SMALL, "--steps", 1, "--noise_p", 0, "--noise_std", 0, "--outlier_p", 1]
    in_process("train", *flags, "--outlier_dir", folder, "--out", tmp_path / "run")
    assert "10,000 outliers" in capsys.readouterr().out
    tiles = np.asarray(Image.open(tmp_path / "run/data.png"))[2:50, 2:]
    assert set(np.unique(tiles)) == {0, 255} and tiles[:, :48].std() == 0


def picture(value):
    data = io.BytesIO()
    Image.new("RGB", (40, 30), value).save(data, "PNG")
    return data.getvalue()


def test_folder_and_zip_of_any_nesting_are_decoded_once(tmp_path, capsys):
    folder = tmp_path / "pictures"
    for i, name in enumerate(["b/deep/er/2.png", "a/1.PNG", "3.png", ".hidden/4.png", "._5.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture((10 * i, 100, 200)))
    (folder / "labels.csv").write_text("1,2")
    shutil.make_archive(folder, "zip", folder)
    for source in (folder, tmp_path / "pictures.zip"):
        cache = tmp_path / f"cache-{source.name}"
        x = load_images("folder", 8, 3, source, cache)
        assert x.shape == (3, 3, 8, 8) and x.dtype == np.uint8
        assert sorted(x[:, 0, 0, 0].tolist()) == [0, 10, 20]
        assert "decoding 3 images" in capsys.readouterr().out
        # Half of a file, which a killed process left, is never taken.
        (decoded,) = cache.iterdir()
        left = cache / f".{HOST}.999999999.tmp.{decoded.name}"
        left.write_bytes(b"half")
        assert np.array_equal(x, load_images("folder", 8, 3, source, cache))
        assert "decoding" not in capsys.readouterr().out and not left.exists()
        assert load_images("folder", 4, 1, source, cache).shape == (3, 1, 4, 4)
        decoded.write_bytes(decoded.read_bytes()[:50])
        with pytest.raises(UserError, match="is damaged, delete it"):
            load_images("folder", 8, 3, source, cache)
    (folder / "6.png").write_bytes(picture((60, 0, 0)))
    assert len(load_images("folder", 8, 3, folder)) == 4


def test_pixels_are_read_right_or_refused():
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (20, 0, 40, 20))
    assert (crop_resize(wide, 10, 3) == np.array([0, 0, 255])[:, None, None]).all()
    # The average over an area: a checkerboard of single pixels becomes grey, without aliasing.
    board = Image.fromarray((np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8))
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    for image in (board, half):
        assert abs(crop_resize(image, 8, 1).astype(int) - 127).max() <= 1
    same = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    assert np.array_equal(crop_resize(same, 8, 3).transpose(1, 2, 0), np.asarray(same))
    # Transparency shows white, as do CMYK's zeros.
    for mode in ("L", "P", "1", "RGBA", "LA", "CMYK"):
        white = mode in ("RGBA", "LA", "CMYK")
        assert (crop_resize(Image.new(mode, (9, 9), 0), 4, 3) == 255 * white).all()
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert (crop_resize(palette, 4, 3) == 255).all()
    for mode in ("F", "I", "I;16"):
        with pytest.raises(ValueError, match="range"):
            crop_resize(Image.new(mode, (4, 4)), 4, 1)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_odd_files_are_taken_and_odd_links_named(tmp_path):
    folder, odd = tmp_path / "pictures", tmp_path / "pictures" / "gone.png"
    (folder / "deep").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "deep" / "1.jpg",
                                        exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    Image.new("RGB", (8, 8)).save(folder / "2.gif")
    (folder / "deep" / "loop").symlink_to(folder)
    assert len(load_images("folder", 8, 3, folder, tmp_path)) == 2
    assert not any(map(is_image, ("a.h5", ".c.png", "__MACOSX/d.png", "/e.png", "../f.png")))
    np.savez(tmp_path / "three.npz", np.full((3, 8, 8, 3), 7, np.uint8))
    x = load_images("folder", 8, 3, tmp_path / "three.npz", tmp_path)
    assert x.shape == (3, 3, 8, 8) and (x == 7).all()
    np.savez(tmp_path / "floats.npz", np.zeros((3, 8, 8, 3)))
    with pytest.raises(UserError, match="floats.npz is not readable.*not uint8"):
        load_images("folder", 8, 3, tmp_path / "floats.npz", tmp_path)
    odd.symlink_to("nowhere")
    with pytest.raises(UserError, match="No such file.*gone.png"):
        load_images("folder", 8, 3, folder, tmp_path)


def test_cifar_batches(tmp_path, monkeypatch):
    def load(root, split="train"):
        return load_images("cifar10", 32, 3, root, tmp_path / "cache", split)

    folder, linked = tmp_path / "cifar", tmp_path / "linked"
    folder.mkdir()
    data = np.random.default_rng(0).integers(0, 256, (10, 3072), dtype=np.uint8)
    parts = {f"data_batch_{i + 1}": data[2 * i:2 * i + 2] for i in range(5)}
    for name, rows in {**parts, "test_batch": data[:3]}.items():
        (folder / name).write_bytes(pickle.dumps({b"data": rows, b"labels": [0, 1]}, protocol=2))
    linked.mkdir()
    (linked / "cifar").symlink_to(folder)
    monkeypatch.chdir(folder)
    for root in (folder, ".", linked):
        assert np.array_equal(load(root), data.reshape(-1, 3, 32, 32))
    assert len(load(folder, "test")) == 3
    # One batch less is not the set.
    (folder / "data_batch_3").unlink()
    with pytest.raises(UserError, match="No such file.*data_batch_3"):
        load(folder)
    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Bomb()}))
    with pytest.raises(UserError, match="data_batch_1.*not run"):
        load(folder)
    assert not (folder / "exploded").exists()


def test_fashion_mnist_files(tmp_path):
    def load(split="train"):
        return load_images("fashion_mnist", 28, 1, tmp_path, tmp_path, split)

    data = np.arange(5 * 28 * 28).astype(np.uint8).reshape(5, 28, 28)
    header = np.array([0x803, 5, 28, 28], ">i4").tobytes()
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(header + data.tobytes()))
    assert np.array_equal(load()[:, 0], data)
    for damaged in (path.read_bytes()[:-40], b"no gzip"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="train-images-idx3-ubyte.gz is not readable"):
            load()
    with pytest.raises(UserError, match="no images in"):
        load("test")


def test_celebas_faces_are_cropped(tmp_path):
    face = Image.new("RGB", (178, 218), "black")
    face.paste("white", (25, 57, 153, 185))
    face.save(tmp_path / "000001.png")
    assert (load_images("celeba", 64, 3, tmp_path, tmp_path / "cache") == 255).all()
    assert not (load_images("folder", 64, 3, tmp_path, tmp_path / "cache") == 255).all()


def test_lsun_lmdb(tmp_path):
    lmdb = pytest.importorskip("lmdb")
    (tmp_path / "bedroom_train_lmdb").mkdir()
    with lmdb.open(str(tmp_path / "bedroom_train_lmdb")) as base:
        with base.begin(write=True) as transaction:
            for k in range(4):
                transaction.put(f"{k}".encode(), picture((k, 0, 0)))
    x = load_images("lsun_bedroom", 16, 3, tmp_path, tmp_path)
    assert x[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


# ---------- Mistakes


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders and files to go wrong with."""
    root = tmp_path_factory.mktemp("places")
    for name in ("empty", "corrupt", "fine", "lsun/bedroom_train_lmdb"):
        (root / name).mkdir(parents=True)
    for name, data in {"corrupt/1.png": picture("red"), "corrupt/2.jpg": picture("red")[:60],
                       "fine/1.png": picture("red"), "false.zip": b"no zip",
                       "lsun/bedroom_train_lmdb/data.mdb": b"no lmdb"}.items():
        (root / name).write_bytes(data)
    return root


@pytest.mark.parametrize("line, words", [
    ("--dataset folder", "needs --data_dir"),
    ("--dataset folder --data_dir DIR/empty", "no images in"),
    ("--dataset folder --data_dir DIR/corrupt", "corrupt/2.jpg"),
    ("--dataset folder --data_dir DIR/false.zip", "false.zip is not readable"),
    ("--dataset folder --data_dir DIR/fine --cache_dir DIR/false.zip", "false.zip"),
    ("--dataset lsun_bedroom --data_dir DIR/lsun", "lmdb"),  # also where lmdb is not installed
    ("--data_dir DIR/fine", "which --dataset"),
    ("--limit 10001", "--limit 10001: the data set has 10000 images"),
    ("--image_size 18 --mult 1,2,2", "not a multiple of 4"),
    ("--mult 1,x", "'x' is not a whole number"),
    ("--noise_p 90", "'90' is not a number of at least 0 and at most 1"),
    ("--noise_std 0", "go together"),
    ("--schedule square", "unknown schedule"),
    ("--mode aware", "aware needs --filter"),
    ("--noise_p 1 --filter 1e-9 --limit 50", "--filter 1e-09 leaves no image"),
    ("--channels 1000000", "not enough memory"),
    ("--batch_size 9 --accum 2", "does not divide"),
    ("--device abacus", "device abacus"),
    ("--resume --out DIR/empty", "no checkpoint at"),
    ("--out DIR/false.zip", "is a file"),
])
def test_a_mistake_ends_in_one_line_and_nothing_is_written(line, words, places, mistake):
    before = sorted(places.rglob("*"))
    argv = line.replace("DIR", str(places)).split(" ")
    assert words in mistake("train", *TINY, "--steps", 1, *argv)
    assert sorted(places.rglob("*")) == before
    assert [path.name for path in Path().rglob("[!.]*") if path.is_file()] == ["FILE"]


def test_no_network_says_what_to_do(monkeypatch):
    def refuse(*_, **__):
        raise OSError("name resolution failed\nat length")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", refuse)
    with pytest.raises(UserError, match="could not be downloaded.*--data_dir: .*failed"):
        load_images("cifar10", 32, 3)
    # What cannot be downloaded and is there, but damaged, is named.
    path = Path("data/lsun_bedroom/bedroom_train_lmdb/data.mdb")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no lmdb")
    with pytest.raises(UserError, match="data.mdb is not readable"):
        load_images("lsun_bedroom", 32, 3)


def test_defaults_are_those_of_the_data_set_and_of_the_paper(capsys):
    """Who holds the paper corrects a default in losses.Perturbation, and the flags follow."""
    with pytest.raises(SystemExit, match="0"):
        train.main(["--dataset", "cifar10", "-h"])
    assert "(800000)" in capsys.readouterr().out
    config, fields = train.complete_config({"dataset": "cifar10"}), vars(Perturbation())
    assert {name: config[name] for name in fields} == fields
