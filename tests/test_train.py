"""Training as a user meets it: exact resume, data sets, corruption, signals, mistakes."""

import gzip
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from conftest import ROOT, TINY, command, environment, script
from model import build_network
from sample import HOST, UserError, run_cli


def checkpoint(out):
    return torch.load(Path(out) / "ckpt.pt", weights_only=True)


def assert_same_state(a, b):
    """Weights, EMA and optimiser of two checkpoints are equal to the bit."""
    a, b = checkpoint(a), checkpoint(b)
    assert a["step"] == b["step"]
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    for key, state in a["optimizer"]["state"].items():
        assert all(torch.equal(value, b["optimizer"]["state"][key][name])
                   for name, value in state.items())


# ---------------------------------------------------------------------------------------------
# Loop and resume


@pytest.mark.parametrize("mode", ["dsm", "adv"])
def test_resume_is_exact(mode, tmp_path, in_process, capsys):
    """20 steps = 10 + resume + 10: dropout, EMA, accumulation, corruption, several passes."""
    flags = [*TINY, "--mode", mode, "--accum", "2", "--noise_p", "0.5", "--noise_std", "0.2",
             "--outlier_p", "0.1", "--log_every", "5"]
    in_process("train", *flags, "--steps", 20, "--out", tmp_path / "whole")
    in_process("train", *flags, "--steps", 10, "--out", tmp_path / "parts")
    half = checkpoint(tmp_path / "parts")["model"]
    in_process("train", "--resume", "--steps", 20, "--out", tmp_path / "parts")
    assert "resuming at step 10; steps 10 -> 20" in capsys.readouterr().out
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    whole = checkpoint(tmp_path / "whole")
    assert any(not torch.equal(half[key], whole["model"][key]) for key in half)
    assert any(not torch.equal(whole["ema"][key], whole["model"][key]) for key in half)

    rows = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "parts")]
    assert [row["step"] for row in rows[1]] == [5, 10, 15, 20]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


def test_resume_on_two_processes_is_exact(tmp_path):
    flags = ["train.py", *TINY, "--log_every", "4", "--accum", "2", "--noise_p", "0.5",
             "--noise_std", "0.2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = script(*flags, "--steps", 8, "--save_every", 4, "--keep", 2, "--out", whole, processes=2)
    assert done.returncode == 0 and done.stdout.count("output") == 1, done.stderr
    parts.mkdir()
    shutil.copy(whole / "ckpt_0000004.pt", parts / "ckpt.pt")
    done = script(*flags, "--steps", 8, "--out", parts, "--resume", processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


def test_the_loss_does_not_depend_on_how_the_batch_is_split(tmp_path, in_process):
    """Flips, noise and time steps belong to the image: one part, two, and two processes agree.

    So does what is regularised, but for omega, whose radius is so small here that it counts for
    nothing.
    """
    flags = [*TINY, "--dropout", 0, "--steps", 6, "--log_every", 1]
    mode = ["--mode", "adv", "--reg_t", 0.3, "--beta_min", 1e-5, "--beta_max", 1e-5]
    for name, accum in (("one", 1), ("two", 2)):
        in_process("train", *flags, *mode, "--accum", accum, "--out", tmp_path / name)
    done = script("train.py", *flags, *mode, "--out", tmp_path / "processes", processes=2)
    assert done.returncode == 0, done.stderr
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("one", "two", "processes")]
    one, two, processes = ([json.loads(line)["dsm"] for line in log.splitlines()] for log in logs)
    assert one == pytest.approx(two, rel=1e-4) and len(set(one)) == 6
    assert one == pytest.approx(processes, rel=1e-4)


def test_a_limited_data_set_is_the_seeds_choice():
    images = train.shapes(50, 8, 3, 0)
    first, again, other = (train.limit_images(images, 10, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    rows = [np.flatnonzero((images == image).all((1, 2, 3))) for image in first]
    assert all(len(row) == 1 for row in rows)
    assert all(np.diff(np.concatenate(rows)) > 0)
    assert train.limit_images(images, 0, 0) is images
    assert np.array_equal(train.limit_images(images, 50, 0), images)


def test_every_pass_takes_each_image_once():
    seen = np.concatenate([train.batch_index(step, 8, 100, 5) for step in range(25)])
    assert np.array_equal(np.sort(seen), np.repeat(np.arange(100), 2))
    assert not np.array_equal(seen[:100], seen[100:])
    tiny = np.concatenate([train.batch_index(step, 7, 3, 5) for step in range(3)])
    assert np.array_equal(np.bincount(tiny), [7, 7, 7])


def test_a_resumed_run_changes_free_settings_and_refuses_fixed_ones(tmp_path, in_process, capsys):
    out = tmp_path / "run"
    in_process("train", *TINY, "--mode", "dsm", "--steps", 2, "--out", out)
    capsys.readouterr()
    in_process("train", "--out", out, "--resume", "--mode", "adv", "--lam", "0.5", "--steps", 4)
    text = capsys.readouterr().out
    assert "mode dsm -> adv" in text and "lam 0.3 -> 0.5" in text and "mult" not in text
    state = checkpoint(out)
    assert state["step"] == 4 and state["config"]["mode"] == "adv"
    before = (out / "ckpt.pt").read_bytes()
    for flag in (["--channels", 16], ["--mult", "1,1"], ["--T", 100], ["--schedule", "cosine"]):
        with pytest.raises(UserError, match=flag[0]):
            in_process("train", "--out", out, "--resume", "--steps", 6, *flag)
    with pytest.raises(UserError, match="holds a run"):
        in_process("train", *TINY, "--steps", 2, "--out", out)
    with pytest.raises(UserError, match="go together"):
        in_process("train", *TINY, "--steps", 2, "--out", out, "--overwrite", "--noise_std", 0)
    # Nothing is removed before the first step has succeeded.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "update", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            in_process("train", *TINY, "--steps", 2, "--out", out, "--overwrite")
    assert (out / "ckpt.pt").read_bytes() == before
    in_process("train", *TINY, "--steps", 1, "--out", out, "--overwrite")
    assert checkpoint(out)["step"] == 1


def test_init_from_takes_weights_and_architecture_and_does_not_forget(tmp_path, in_process):
    first, second = tmp_path / "plain", tmp_path / "adv"
    in_process("train", *TINY, "--mode", "dsm", "--steps", 4, "--lr", "1e-2", "--out", first)
    before = (first / "ckpt.pt").read_bytes()
    in_process("train", "--mode", "adv", "--init_from", first, "--batch_size", 8, "--steps", 2,
               "--lr", 1e-6, "--sample_every", 0, "--ema", 0.99, "--out", second)
    old, new = checkpoint(first), checkpoint(second)
    assert (first / "ckpt.pt").read_bytes() == before and new["step"] == 2
    assert new["config"]["mult"] == (1, 2) and new["config"]["mode"] == "adv"
    for part in ("model", "ema"):  # Both begin as the average, and hardly move.
        for name, value in old["ema"].items():
            torch.testing.assert_close(new[part][name], value, rtol=0, atol=1e-4)
    assert any(not torch.equal(new["model"][name], value) for name, value in old["ema"].items())
    # It is a run like any other: resumed, it keeps to its own weights.
    in_process("train", "--resume", "--out", second, "--steps", 3)
    assert checkpoint(second)["config"]["init_from"] == str(first)
    with pytest.raises(UserError, match="--channels 16"):
        in_process("train", "--init_from", first, "--channels", 16, "--out", tmp_path / "other")


def test_reports_checkpoints_and_pictures(tmp_path, in_process, capsys):
    out = tmp_path / "run"
    in_process("train", *TINY, "--steps", 9, "--log_every", 3, "--save_every", 2, "--keep", 3,
               "--sample_every", 6, "--T", 5, "--out", out, "--noise_p", 0.9, "--noise_std", 0.2)
    text = capsys.readouterr().out
    assert text.startswith(f"output {out}\n") and "9,000 with noise of std 0.2" in text
    assert "s/step" in text and "ETA" in text and "data" in text
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "ckpt.pt", "ckpt_0000006.pt", "ckpt_0000008.pt", "ckpt_0000009.pt", "config.json",
        "data.png", "log.jsonl", "samples_0000006.png", "samples_0000009.png"]
    assert torch.load(out / "ckpt_0000006.pt", weights_only=True)["step"] == 6
    (out / "ckpt_mine.pt").write_bytes(b"")
    in_process("train", "--resume", "--steps", 10, "--keep", 1, "--out", out)
    assert sorted(path.name for path in out.glob("*.pt")) == ["ckpt.pt", "ckpt_mine.pt"]
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [3, 6, 9, 10]
    for row in rows:
        assert row["loss"] == pytest.approx(row["dsm"] + row["reg"], rel=1e-4)
        assert {"grad_norm", "equivariance", "omega", "img_s", "s_step", "data_wait"} <= row.keys()
    config = json.loads((out / "config.json").read_text())
    assert config["lam"] == 0.3 and config["reading"] == "sigma" and config["channels"] == 8


def test_average_of_the_weights_is_no_part_of_the_graph(tmp_path, in_process, monkeypatch):
    """An average under autograd would hold on to every step's graph until memory ends."""
    lerp, seen = torch._foreach_lerp_, []

    def watched(averages, weights, share):
        lerp(averages, weights, share)
        seen.append((share, any(p.requires_grad for p in averages)))

    monkeypatch.setattr(torch, "_foreach_lerp_", watched)
    in_process("train", *TINY, "--steps", 4, "--ema", 0.2, "--out", tmp_path)
    # the decay ramps up to --ema: 1/10, 2/11, then .2
    assert [grad for _, grad in seen] == [False] * 4
    assert [share for share, _ in seen] == pytest.approx([9 / 10, 9 / 11, 0.8, 0.8])


def test_loss_falls(tmp_path, in_process):
    in_process("train", *TINY, "--mode", "adv", "--dropout", 0, "--steps", 60, "--lr", "3e-3",
               "--warmup", 0, "--log_every", 20, "--out", tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["dsm"] < 0.7 * rows[0]["dsm"]


def test_non_finite_loss_names_the_step_and_the_last_good_checkpoint(tmp_path, in_process):
    flags = [*TINY, "--out", tmp_path, "--log_every", 3, "--grad_clip", 0, "--warmup", 0]
    in_process("train", *flags, "--steps", 3)
    good = (tmp_path / "ckpt.pt").read_bytes()
    with pytest.raises(UserError, match=r"not finite at step \d;.*of step 3"):
        in_process("train", "--resume", "--out", tmp_path, "--lr", "1e20", "--steps", 9)
    assert (tmp_path / "ckpt.pt").read_bytes() == good
    # The weights of the first step are finite, and useless: they are no good checkpoint.
    with pytest.raises(UserError, match="not finite at step 1;.*none was saved"):
        in_process("train", *flags, "--lr", "1e20", "--steps", 2, "--save_every", 1, "--overwrite")


def test_a_branch_from_an_older_checkpoint_drops_what_lay_beyond(tmp_path, in_process):
    in_process("train", *TINY, "--steps", 6, "--save_every", 1, "--keep", 6, "--log_every", 1,
               "--out", tmp_path)
    (tmp_path / "ckpt.pt").write_bytes((tmp_path / "ckpt_0000003.pt").read_bytes())
    in_process("train", "--resume", "--steps", 5, "--keep", 3, "--out", tmp_path)
    assert [path.name for path in sorted(tmp_path.glob("ckpt_*.pt"))] == [
        "ckpt_0000003.pt", "ckpt_0000004.pt", "ckpt_0000005.pt"]
    log = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="is a file"):
        in_process("train", "--resume", "--out", tmp_path / "ckpt_0000004.pt")


def test_the_data_of_a_run_may_not_change_and_its_own_pictures_are_no_data(tmp_path, in_process,
                                                                           capsys):
    photos, out = tmp_path / "photos", tmp_path / "photos" / "run"
    photos.mkdir()
    for k in range(3):
        (photos / f"{k}.png").write_bytes(picture((k, 0, 0)))
    flags = [*TINY, "--dataset", "folder", "--data_dir", photos, "--out", out]
    in_process("train", *flags, "--steps", 2, "--sample_every", 2)
    in_process("sample", out, "--num", 2, "--steps", 1)
    in_process("train", "--resume", "--steps", 3, "--out", out)
    assert capsys.readouterr().out.count("data folder: 3 images") == 2
    os.utime(photos / "0.png")  # Dates and places are no part of what data are.
    in_process("train", "--resume", "--steps", 4, "--out", out)
    (photos / "new.png").write_bytes(picture("red"))
    with pytest.raises(UserError, match="3 files before, now 4.*--new_data"):
        in_process("train", "--resume", "--steps", 5, "--out", out)
    in_process("train", "--resume", "--steps", 5, "--out", out, "--new_data")

    # A folder that is no run of ours keeps its files, also those with the names of a run's.
    (photos / "data.png").write_bytes(b"mine")
    with pytest.raises(UserError, match="would become data"):
        in_process("train", *TINY, "--dataset", "folder", "--data_dir", photos, "--out", photos)
    for more in ([], ["--overwrite"]):
        with pytest.raises(UserError, match="data.png is of no run"):
            in_process("train", *TINY, "--steps", 1, "--out", photos, *more)
    assert (photos / "data.png").read_bytes() == b"mine"


def test_two_runs_do_not_share_a_folder(tmp_path, in_process):
    tmp_path.mkdir(exist_ok=True)
    held = train.lock_folder(tmp_path)
    with pytest.raises(UserError, match="another process trains"):
        in_process("train", *TINY, "--steps", 1, "--out", tmp_path)
    held.close()
    in_process("train", *TINY, "--steps", 1, "--out", tmp_path)


def test_a_run_that_was_killed_before_its_first_step_starts_anew(tmp_path, in_process, capsys):
    (tmp_path / ".lock").touch()
    in_process("train", *TINY, "--steps", 2, "--resume", "--out", tmp_path)
    assert "no checkpoint yet: starting anew" in capsys.readouterr().out
    assert checkpoint(tmp_path)["step"] == 2


def test_a_closed_pipe_does_not_end_the_run(tmp_path):
    argv = ["train.py", *TINY, "--steps", 12, "--log_every", 1, "--out", tmp_path / "run"]
    process = subprocess.Popen(command(*argv), cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env=environment(), text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0 and process.stderr.read() == ""
    assert checkpoint(tmp_path / "run")["step"] == 12


def test_resume_bears_a_damaged_log_and_refuses_a_damaged_checkpoint(tmp_path, in_process):
    in_process("train", *TINY, "--steps", 2, "--log_every", 1, "--out", tmp_path)
    log = tmp_path / "log.jsonl"
    log.write_bytes(log.read_bytes() + b'{"step": 7}\n{"loss": 1}\n\xff[3]\n{"step": 3, "lo')
    (tmp_path / f".ckpt.pt.{HOST}.999999999.tmp").write_bytes(b"what a killed run left")
    in_process("train", "--resume", "--steps", 3, "--out", tmp_path)
    assert not list(tmp_path.glob(".*.tmp"))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2, 3]
    with pytest.raises(UserError, match="at step 3 of 3"):
        in_process("train", "--resume", "--out", tmp_path)

    whole = checkpoint(tmp_path)
    for change in ({"optimizer": {}}, {"config": {}}, {"config": {"T": 1}}, {"model": {}},
                   {"config": {**whole["config"], "channels": 16}}):
        torch.save({**whole, **change}, tmp_path / "ckpt.pt")
        with pytest.raises(UserError, match="config|checkpoint"):
            in_process("train", "--resume", "--steps", 4, "--out", tmp_path)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_on_the_cpu(amp, tmp_path, in_process, capsys):
    """The same code as on a GPU, scaler and inner step included; and its resume is exact."""
    flags = [*TINY, "--amp", amp, "--log_every", 2]
    in_process("train", *flags, "--steps", 6, "--out", tmp_path / "whole")
    assert f"amp {amp}" in capsys.readouterr().out
    in_process("train", *flags, "--steps", 2, "--out", tmp_path / "parts")
    in_process("train", "--resume", "--steps", 6, "--out", tmp_path / "parts")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    assert ("scale" in checkpoint(tmp_path / "whole")["scaler"]) == (amp == "fp16")


def start(out, *argv, processes=1):
    """A long run in the background, returned when it has logged a step."""
    argv = ["train.py", *TINY, "--steps", 100_000, "--log_every", 1, "--out", out, *argv]
    process = subprocess.Popen(command(*argv, processes=processes), cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    deadline = time.time() + 120
    while not (out / "log.jsonl").exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    return process


@pytest.mark.parametrize("name, processes", [("SIGHUP", 1), ("SIGTERM", 2)])
def test_a_signal_saves_and_exits(name, processes, tmp_path):
    out = tmp_path / "run"
    process = start(out, processes=processes)
    process.send_signal(getattr(signal, name))
    text, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and f"stopped by {name}" in text, errors
    if processes == 1:
        assert process.returncode == 128 + getattr(signal, name) and errors == ""
    step = checkpoint(out)["step"]
    assert step > 0 and json.loads((out / "log.jsonl").read_text().splitlines()[-1])["step"] == step


def test_a_second_signal_ends_at_once_and_a_mistake_of_one_ends_all(tmp_path, monkeypatch):
    process = start(tmp_path / "run", "--sample_every", "1", "--image_size", "64",
                    "--attention", "0")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT

    begun = time.time()
    done = script("train.py", *TINY, "--steps", 1, "--out", tmp_path / "run", processes=2)
    assert done.returncode and time.time() - begun < 60
    assert "holds a run" in done.stderr and "gloo" not in done.stderr.lower()


def test_sigkill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    out = tmp_path / "run"
    process = start(out, "--save_every", "1", "--keep", "2")
    deadline = time.time() + 60
    while not (out / "ckpt.pt").exists() and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(np.random.default_rng().uniform(0, 0.5))
    process.kill()
    process.wait()
    step = checkpoint(out)["step"]
    done = script("train.py", "--resume", "--out", out, "--steps", step + 2, "--save_every", "0")
    assert done.returncode == 0 and f"resuming at step {step}" in done.stdout, done.stderr
    steps = [json.loads(line)["step"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 3))


# ---------------------------------------------------------------------------------------------
# Data


def test_shapes_are_deterministic_and_anti_aliased():
    a = train.shapes(200, 16, 3, seed=0)
    assert a.shape == (200, 3, 16, 16) and a.dtype == np.uint8
    assert np.array_equal(a, train.shapes(200, 16, 3, seed=0))
    assert not np.array_equal(a, train.shapes(200, 16, 3, seed=1))
    assert train.shapes(5, 28, 1, 0).shape == (5, 1, 28, 28)
    # a blurred edge has levels between background and colour
    levels = [len(np.unique(image.reshape(3, -1), axis=1).T) for image in a]
    assert np.mean(levels) > 4
    assert (a[:, :, 0, 0] == a[:, :, -1, -1]).all() and (a[:, 0, 0, 0] == a[:, 1, 0, 0]).all()


def test_corruption_is_frozen_and_exact():
    images = train.shapes(400, 16, 3, seed=0)
    kinds = train.choose_corruption(400, 0.9, 0.1, seed=3)
    assert np.sum(kinds == train.OUTLIER) == 40
    assert np.sum(train.choose_corruption(400, 0.9, 0, 3) == train.NOISY) == 360
    assert np.isin(np.flatnonzero(train.choose_corruption(400, 0.3, 0, 3)),
                   np.flatnonzero(train.choose_corruption(400, 0.9, 0, 3))).all()
    index = np.arange(400)
    x = train.training_images(images, index, kinds, 0.2, 3)
    shuffled = np.random.default_rng(0).permutation(400)
    assert torch.equal(train.training_images(images, shuffled, kinds, 0.2, 3), x[shuffled])
    clean = torch.from_numpy(images).float() / 127.5 - 1
    noise = (x - clean)[torch.from_numpy(kinds == train.NOISY)]
    assert torch.equal(x[kinds == train.CLEAN], clean[kinds == train.CLEAN])
    assert noise.std().item() == pytest.approx(0.2, rel=0.01) and abs(noise.mean()) < 0.002
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1:]).mean() < 0.1
    outliers = x[torch.from_numpy(kinds == train.OUTLIER)]
    assert outliers.abs().max() <= 1
    assert outliers.std().item() == pytest.approx(3**-0.5, rel=0.02)
    assert not torch.equal(x, train.training_images(images, index, kinds, 0.2, 4))


def picture(value, size=(40, 30), mode="RGB"):
    image = Image.new(mode, size, value)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def test_folder_and_zip_of_any_nesting_are_decoded_once(tmp_path, capsys):
    folder = tmp_path / "pictures"
    for i, name in enumerate(["b/deep/er/2.png", "a/1.PNG", "3.png", ".hidden/4.png", "._5.png"]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture((10 * i, 100, 200)))
    (folder / "labels.csv").write_text("1,2")
    with zipfile.ZipFile(tmp_path / "pictures.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
    for source in (folder, tmp_path / "pictures.zip"):
        cache = tmp_path / f"cache-{source.name}"
        x = train.load_images("folder", 8, 3, source, cache)
        assert x.shape == (3, 3, 8, 8) and x.dtype == np.uint8
        assert "decoding" in capsys.readouterr().out
        assert sorted(x[:, 0, 0, 0].tolist()) == [0, 10, 20]
        again = train.load_images("folder", 8, 3, source, cache)
        assert np.array_equal(x, again) and "decoding" not in capsys.readouterr().out
        # other settings, or other files, are decoded anew; half a file is never taken
        assert train.load_images("folder", 4, 1, source, cache).shape == (3, 1, 4, 4)
        left = cache / f".{next(cache.glob('*-8x3-*')).name}.{HOST}.999999999.tmp"
        left.write_bytes(b"half")
        assert np.array_equal(x, train.load_images("folder", 8, 3, source, cache))
    capsys.readouterr()
    (folder / "6.png").write_bytes(picture((60, 0, 0)))
    assert len(train.load_images("folder", 8, 3, folder, tmp_path / "cache-pictures")) == 4
    train.load_images("folder", 8, 3, folder)
    (beside,) = folder.glob("folder-train-8x3-*.npy")
    beside.write_bytes(beside.read_bytes()[:50])
    with pytest.raises(UserError, match="is damaged, delete it"):
        train.load_images("folder", 8, 3, folder)


def test_images_are_cropped_resizes_and_converts():
    wide = Image.new("RGB", (60, 20), "red")
    wide.paste("blue", (20, 0, 40, 20))
    assert (train.crop_resize(wide, 10, 3)[:, :, :] == np.array([0, 0, 255])[:, None, None]).all()
    # area average: a checkerboard of single pixels becomes its mean, no aliasing
    board = Image.fromarray((np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8))
    assert abs(train.crop_resize(board, 8, 1).astype(int) - 127).max() <= 1
    for mode in ("L", "P", "RGBA", "CMYK", "1"):
        assert train.crop_resize(Image.new(mode, (9, 9)), 4, 3).shape == (3, 4, 4)
    deep = Image.fromarray(np.array([[0, 257 * 40], [257 * 200, 65535]], np.uint16))
    assert train.crop_resize(deep, 2, 1).flatten().tolist() == [0, 40, 200, 255]
    same = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    assert np.array_equal(train.crop_resize(same, 8, 3).transpose(1, 2, 0), np.asarray(same))
    face = Image.new("RGB", (178, 218), "black")
    face.paste("white", (25, 57, 153, 185))
    assert (train.crop_resize(face, 64, 3, train.CELEBA_FACE) == 255).all()
    assert not (train.crop_resize(face, 64, 3) == 255).all()


def test_pixels_are_read_right_or_refused():
    """Transparency shows white; 16 bits are scaled; values of an unknown range are refused."""
    for mode in ("RGBA", "LA"):
        hidden = Image.new(mode, (4, 4), 0)
        assert (train.crop_resize(hidden, 4, 3) == 255).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert abs(train.crop_resize(half, 4, 1).astype(int) - 127).max() <= 1
    palette = Image.new("P", (4, 4), 0)
    palette.info["transparency"] = 0
    assert (train.crop_resize(palette, 4, 3) == 255).all()
    for mode in ("F", "I"):
        with pytest.raises(ValueError, match="range"):
            train.crop_resize(Image.new(mode, (4, 4)), 4, 1)


def test_odd_files_are_taken_and_odd_links_named(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    damaged = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(damaged, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    (folder / "deep" / "1.jfif").write_bytes(damaged.getvalue())
    Image.new("RGB", (8, 8)).save(folder / "2.tga")
    (folder / "deep" / "loop").symlink_to(folder)
    assert len(train.load_images("folder", 8, 3, folder, tmp_path)) == 2
    np.savez(tmp_path / "three.npz", np.full((3, 8, 8, 3), 7, np.uint8))
    x = train.load_images("folder", 8, 3, tmp_path / "three.npz", tmp_path)
    assert x.shape == (3, 3, 8, 8) and (x == 7).all()
    np.savez(tmp_path / "floats.npz", np.zeros((3, 8, 8, 3)))
    with pytest.raises(UserError, match="floats.npz is not readable.*not uint8"):
        train.load_images("folder", 8, 3, tmp_path / "floats.npz", tmp_path)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError, match="gone.png is a link that leads nowhere"):
        train.load_images("folder", 8, 3, folder, tmp_path)


def test_cifar_batches(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
    for i in range(5):
        part = {b"data": data[2 * i:2 * i + 2], b"labels": [0, 1]}
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(part, protocol=2))
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": data[:3]}, protocol=2))
    for root in (tmp_path, folder):
        x = train.load_images("cifar10", 32, 3, root, tmp_path / "cache")
        assert np.array_equal(x, data.reshape(-1, 3, 32, 32))
        assert len(train.load_images("cifar10", 32, 3, root, tmp_path / "cache", "test")) == 3

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert len(train.load_images("cifar10", 32, 3, ".", tmp_path / "cache")) == 10
    # Links are followed; one batch less, or a second copy, is not the set.
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "cifar").symlink_to(folder)
    assert len(train.load_images("cifar10", 32, 3, tmp_path / "linked", tmp_path / "cache")) == 10
    (tmp_path / "copies").mkdir()
    shutil.copytree(folder, tmp_path / "copies" / "one")
    (tmp_path / "copies" / "one" / "data_batch_3").unlink()
    with pytest.raises(UserError, match="data_batch_3 of cifar10 is missing"):
        train.load_images("cifar10", 32, 3, tmp_path / "copies", tmp_path / "cache")
    shutil.copytree(folder, tmp_path / "copies" / "two")
    with pytest.raises(UserError, match="several copies of cifar10"):
        train.load_images("cifar10", 32, 3, tmp_path / "copies", tmp_path / "cache")
    shutil.rmtree(tmp_path / "copies")
    shutil.rmtree(tmp_path / "linked")

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/exploded",)

    (folder / "data_batch_1").write_bytes(pickle.dumps({b"data": Bomb()}))
    with pytest.raises(UserError, match="data_batch_1.*not run"):
        train.load_images("cifar10", 32, 3, tmp_path, tmp_path / "cache")
    assert not (tmp_path / "exploded").exists()


def test_fashion_mnist_files(tmp_path):
    data = np.arange(5 * 28 * 28, dtype=np.int64).reshape(5, 28, 28).astype(np.uint8)
    header = np.array([0x803, 5, 28, 28], ">i4").tobytes()
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(header + data.tobytes()))
    x = train.load_images("fashion_mnist", 28, 1, tmp_path, tmp_path)
    assert np.array_equal(x[:, 0], data)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz is not readable"):
        train.load_images("fashion_mnist", 28, 1, tmp_path, tmp_path)
    path.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="gz is not readable"):
        train.load_images("fashion_mnist", 28, 1, tmp_path, tmp_path)
    with pytest.raises(UserError, match="no images in"):
        train.load_images("fashion_mnist", 28, 1, tmp_path, tmp_path, "test")


def test_celeba_crop_and_lsun_lmdb(tmp_path):
    faces = tmp_path / "celeba" / "img_align_celeba"
    faces.mkdir(parents=True)
    face = Image.new("RGB", (178, 218), "black")
    face.paste("white", (25, 57, 153, 185))
    for k in range(3):
        face.save(faces / f"{k:06d}.png")
    x = train.load_images("celeba", 64, 3, tmp_path / "celeba", tmp_path)
    assert x.shape == (3, 3, 64, 64) and (x == 255).all()

    (tmp_path / "bedroom_train_lmdb").mkdir()
    (tmp_path / "bedroom_train_lmdb" / "data.mdb").write_bytes(b"")
    try:
        import lmdb
    except ImportError:
        with pytest.raises(UserError, match="lmdb"):
            train.load_images("lsun_bedroom", 64, 3, tmp_path, tmp_path)
        return
    (tmp_path / "bedroom_train_lmdb" / "data.mdb").unlink()
    with lmdb.open(str(tmp_path / "bedroom_train_lmdb")) as environment:
        with environment.begin(write=True) as transaction:
            for k in range(4):
                transaction.put(f"{k}".encode(), picture((k, 0, 0)))
    x = train.load_images("lsun_bedroom", 16, 3, tmp_path, tmp_path)
    assert x[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


# ---------------------------------------------------------------------------------------------
# Mistakes


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders and files to go wrong with."""
    root = tmp_path_factory.mktemp("places")
    (root / "empty").mkdir()
    for name in ("corrupt", "fine"):
        (root / name).mkdir()
        (root / name / "1.png").write_bytes(picture("red"))
    (root / "corrupt" / "2.jpg").write_bytes(picture("red")[:60])
    (root / "false.zip").write_text("no zip")
    with zipfile.ZipFile(root / "none.zip", "w") as archive:
        archive.writestr("readme.txt", "no pictures")
        archive.writestr("folder.png/", "")
    (root / "garbled_lmdb" / "bedroom_train_lmdb").mkdir(parents=True)
    (root / "garbled_lmdb" / "bedroom_train_lmdb" / "data.mdb").write_bytes(b"no lmdb")
    (root / "run").mkdir()
    (root / "run" / "ckpt.pt").write_bytes(b"PK no checkpoint")
    return root


@pytest.mark.parametrize("argv, words", [
    (["--dataset", "imagenet"], "invalid choice: 'imagenet'"),
    (["--dataset", "folder"], "needs --data_dir"),
    (["--dataset", "lsun_bedroom"], "needs --data_dir"),
    (["--dataset", "folder", "--data_dir", "DIR/missing"], "No such file or directory"),
    (["--dataset", "folder", "--data_dir", "DIR/empty"], "no images in"),
    (["--dataset", "folder", "--data_dir", "DIR/corrupt"], "2.jpg is not a readable image"),
    (["--dataset", "folder", "--data_dir", "DIR/false.zip"], "false.zip is not readable"),
    (["--dataset", "folder", "--data_dir", "DIR/none.zip"], "no images in"),
    (["--dataset", "folder", "--data_dir", "DIR/fine", "--cache_dir", "DIR/false.zip"],
     "another --cache_dir"),
    (["--dataset", "lsun_bedroom", "--data_dir", "DIR/garbled_lmdb"], "lmdb"),
    (["--data_dir", "DIR/fine"], "which --dataset"),
    (["--mult", "0"], "at least one level"),
    (["--resume", "--overwrite"], "which of them"),
    (["--out", ""], "the path is empty"),
    (["--out", "DIR/false.zip"], "is a file"),
    (["--image_size", "18", "--mult", "1,2,2"], "not a multiple of 4"),
    (["--attention", "5"], "resolutions are"),
    (["--mult", "1,x"], "'1,x' is not whole numbers"),
    (["--noise_p", "90"], "'90' is not a number of at least 0 and at most 1"),
    (["--noise_p", "nan"], "'nan' is not a number"),
    (["--noise_std", "0"], "go together"),
    (["--noise_p", "0", "--noise_std", "0.1"], "go together"),
    (["--outlier_p", "-1"], "--outlier_p"),
    (["--steps", "many"], "'many' is not a whole number"),
    (["--batch_size", "9", "--accum", "2"], "does not divide"),
    (["--reg_t", "0"], "--reg_t"),
    (["--init_from", "DIR/empty"], "no checkpoint at"),
    (["--limit", "10001"], "--limit 10001: the data set has 10000 images"),
    (["--beta_max", "0.001"], "below --beta_min"),
    (["--dropout", "1"], "below 1"),
    (["--device", "abacus"], "device abacus"),
    (["--resume", "--out", "DIR/empty"], "no checkpoint at"),
    (["--resume", "--out", "DIR/run"], "not a checkpoint of train.py"),
    (["--out", "DIR/false.zip/run"], "--out"),
    (["--sterps", "3"], "unrecognized arguments: --sterps"),
])
def test_a_mistake_ends_in_one_line_and_status_2(argv, words, places, tmp_path, capsys,
                                                 monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(path for path in places.rglob("*"))
    argv = [part.replace("DIR", str(places)) for part in argv]
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        run_cli(lambda: train.main([*TINY, "--steps", "1", *argv]))
    message = capsys.readouterr().err
    assert end.value.code == 2 and message.startswith("error: ")
    assert words in message and message.count("\n") == 1
    assert sorted(path for path in places.rglob("*")) == before
    assert not any(tmp_path.iterdir())


def test_a_mistake_as_the_user_sees_it(tmp_path):
    done = script("train.py", "--dataset", "cifar100", "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: argument --dataset: invalid choice")
    shown = script("train.py", "--dataset", "cifar10", "-h")
    assert shown.returncode == 0 and not shown.stderr and "(800000)" in shown.stdout


def test_no_network_says_what_to_do(tmp_path, monkeypatch):
    from torchvision import datasets

    def refuse(*_, **__):
        raise OSError("name resolution failed\nat length")

    monkeypatch.chdir(tmp_path)
    for name in ("CIFAR10", "FashionMNIST", "CelebA"):
        monkeypatch.setattr(datasets, name, refuse)
    for dataset in ("cifar10", "fashion_mnist", "celeba"):
        with pytest.raises(UserError, match="could not be downloaded .*--data_dir") as error:
            train.load_images(dataset, 32, 3)
        assert "\n" not in str(error.value)


def test_the_regulariser_has_one_set_of_defaults_and_a_field_needs_no_flag():
    """Who holds the paper corrects a default in losses.Perturbation, and the flags follow."""
    config = train.complete_config({})
    fields = vars(train.Perturbation())
    assert {name: config[name] for name in fields} == fields


def test_presets_fit_their_networks_and_the_published_sizes():
    sizes = {"cifar10": 35_746_307, "celeba": 78_700_803}
    for name in train.PRESETS:
        config = train.complete_config({"dataset": name})
        with torch.device("meta"):
            net = build_network(config)
        assert sizes.get(name) in (None, sum(p.numel() for p in net.parameters()))
        assert set(train.PRESETS[name]) <= set(config)
