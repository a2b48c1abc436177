"""The driver of the README's results: its figures are those of the JSON files, its runs resume."""

import gzip
import json

import numpy as np
import pytest
import torch
from conftest import script
from PIL import Image

import evidence
from losses import Perturbation, forward_units
from model import UserError
from train import load_images


def idx(path, values):
    """Write the published format: a header of the type and the shape, big-endian, then bytes."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
    with gzip.open(path, "wb") as file:
        file.write(header + values.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """A folder with 80 images, black or white by their label, under the published names."""
    folder, truth = tmp_path_factory.mktemp("fashion"), np.arange(80) % 2
    for name in ("train", "t10k"):
        idx(folder / f"{name}-images-idx3-ubyte.gz",
            np.broadcast_to(250 * truth[:, None, None], (80, 28, 28)))
        idx(folder / f"{name}-labels-idx1-ubyte.gz", truth)
    return folder


def test_runs_are_trained_measured_and_not_repeated(fashion, tmp_path):
    argv = ["tests/evidence.py", "headline", "--rows", "dsm,adv_late", "--seeds", 1, "--num", 10,
            "--steps", 5, "--workers", 2, "--data_dir", fashion, "--out", tmp_path]
    done = script(*argv)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "noise.2/adv_late_5-1.log").read_text()
    assert "mode dsm" in log and "resuming at step 4; mode dsm -> adv; steps 4 -> 5" in log
    result = tmp_path / "noise.2/dsm-1/quality-5-10.json"
    figures = json.loads(result.read_text())
    about = figures["provenance"]
    assert (about["num"], about["step"], about["seed"]) == (10, 5, 1)
    assert f"| {figures['fid']:.3f} |" in done.stdout

    written = result.stat().st_mtime_ns
    assert script(*argv).returncode == 0 and result.stat().st_mtime_ns == written
    # one that fails does not keep the other from being done
    beyond = script(*argv, "--steps", 3)
    assert beyond.returncode == 2 and "is at step 5, beyond --steps 3" in beyond.stderr
    assert (tmp_path / "noise.2/adv_late_3-1/quality-3-10.json").exists()

    picture = tmp_path / "a.png"
    assert script(*argv, "--picture", picture).returncode == 0
    # ten tiles a run, below sixteen of training images; a margin for the names
    assert np.array(Image.open(picture)).shape == (3 * 52, 170 + 802, 3)


def test_what_a_run_is_trained_on_and_measured_with(fashion, tmp_path, monkeypatch):
    """The flags that each script gets, at several states of the run."""
    calls, state = [], {"step": 0}

    def call(name, *argv, log):
        words = [str(word) for word in argv]
        calls.append((name, [word.removeprefix("--") for word in words if word[:2] == "--"]))

    monkeypatch.setattr(evidence, "call", call)
    monkeypatch.setattr(evidence, "read_checkpoint", lambda folder: state)

    def flags(column, row, saved, study="headline"):
        args = evidence.parse_args([study, "--out", str(tmp_path), "--data_dir", str(fashion)])
        args.classifiers = dict.fromkeys(["fashion_mnist", "cifar10"], "c.pt")
        calls.clear()
        folder = evidence.measured(column, row, 0, args).parent
        folder.mkdir(parents=True, exist_ok=True)
        if saved:
            state["step"] = saved
            (folder / "ckpt.pt").touch()
        evidence.do((column, row, 0), args)
        return [*calls]

    (train, words), (evaluate, look) = flags("tenth", "dsm", 0)
    assert {"mode=dsm", "limit=6000", "overwrite", "dataset=fashion_mnist"} <= {*words}
    assert not any("noise" in word for word in words) and "features=c.pt" in look
    assert f"data_dir={fashion}" in words and f"data_dir={fashion}" in look
    # a late start: fresh, stopped in the first part, stopped in the second
    for saved, modes in ((0, ["dsm", "adv"]), (1000, ["dsm", "adv"]), (4000, ["adv"]),
                         (4500, ["adv"]), (5000, [])):
        parts = [words for name, words in flags("noise.2", "adv_late", saved)[:-1]]
        assert [f"mode={mode}" for mode in modes] == [
            next(word for word in words if word[:5] == "mode=") for words in parts]
        assert all(("resume" in words) == bool(saved) for words in parts[:1])
        assert all("noise_std=0.2" in words for words in parts)
    share = [words for name, words in flags("noise.2", "adv_late_share", 4000)[:-1]]
    assert len(share) == 1 and {"mode=adv", "reg_share=0.3", "resume"} <= {*share[0]}
    plain, cool = [words for name, words in flags("noise.2", "adv_low_cool", 0)[:-1]]
    assert "lr=0.0001" not in plain
    assert {"lr=0.0001", "ema=0.995", "mode=adv", "reg_low"} <= {*cool}
    assert {"reg_low", "reg_share=0.1"} <= {*flags("noise.2", "adv_low", 0)[0][1]}
    look = flags("few", "dsm", 0, "copies")[-1][1]
    assert "holdout=fashion_mnist" in look and not any(w.startswith("features=") for w in look)


@pytest.mark.parametrize("command", ["steps", "attack", "memorization"])
def test_what_is_printed_is_in_the_json(command, run, in_process, tmp_path):
    extra, _, shown = evidence.COMMANDS[command]
    argv = [word for word in extra.split() if word != "--features" and word != "pixels"]
    if "--steps" in argv:
        argv[argv.index("--steps") + 1] = "2"
    in_process("evaluate", command, run, "--num", 10, *argv, "--features", "pixels",
               "--reference_num", 40, "--png", tmp_path / "a.png", "--cache_dir", tmp_path,
               "--json", tmp_path / "a.json")
    for row in json.loads((tmp_path / "a.json").read_text())["rows"]:
        assert {*shown} <= {*row}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_classifier_tells_the_classes_apart(fashion, tmp_path, capsys):
    args = evidence.parse_args(["--data_dir", str(fashion), "--out", str(tmp_path)])
    path = evidence.classifier("fashion_mnist", args)
    assert "1.000 of the test images right" in capsys.readouterr().out
    net = torch.jit.load(path)
    features, logits = net(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert features.shape == (2, 64) and logits.argmax(1).tolist() == [0, 0]


def test_labels_are_in_the_order_of_the_images(tmp_path):
    for name in "jihgfedcba":
        (tmp_path / name).mkdir()
        for k in range(ord(name) - 95):
            Image.new("L", (16, 16), ord(name)).save(tmp_path / name / f"{k}.png")
    truth = evidence.labels("cifar10", tmp_path, "train")
    images = load_images("cifar10", 16, 3, tmp_path)
    assert np.array_equal(images[:, 0, 0, 0], 97 + truth)
    for image in (tmp_path / "a").iterdir():
        image.unlink()
    with pytest.raises(UserError, match="a folder for each of 10 classes, here are 9"):
        evidence.labels("cifar10", tmp_path, "train")


def test_the_table_has_the_mean_over_the_seeds(tmp_path):
    def write(row, seed, name, value):
        folder = tmp_path / "noise.2" / f"{row}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        shown = dict.fromkeys(evidence.QUALITY, value)
        (folder / name).write_text(json.dumps({**shown, "pixel_std_reference": 0.673}))

    write("dsm", 0, "quality-5000-2000.json", 1.0)
    write("dsm", 1, "quality-5000-2000.json", 3.0)
    write("adv", 0, "quality-2000-2000.json", 9.0)  # of another study
    write("adv_late_5000", 1, "quality-5000-2000.json", 4.0)
    text = evidence.table(evidence.parse_args(["headline", "--out", str(tmp_path)]))
    first = text.splitlines()[2]
    assert first.startswith("| noise.2 | dsm | 0, 1 | 3 | 2.000 +- 1.414 |")
    assert "| adv |" not in text and "9.000" not in text
    assert "| noise.2 | adv_late | 1 | 4 | 4.000 |" in text
    assert text.splitlines()[-1].split(" | ")[6] == "0.673"


def test_the_studies_name_what_there_is():
    for command, columns, rows, _, _ in evidence.STUDIES.values():
        assert command in evidence.COMMANDS
        assert {*columns} <= {*evidence.COLUMNS} and {*rows} <= {*evidence.ROWS}
    assert evidence.units("adv_share") == forward_units("adv", Perturbation(reg_share=0.3))
    assert evidence.units("adv_late") == pytest.approx(0.8 * 3 + 0.2 * 8)
    assert evidence.units("adv_late_share") == pytest.approx(0.8 * 3 + 0.2 * 4.5)
    assert evidence.units("adv_low_cool") == pytest.approx(3.5)
    assert evidence.parse_args(["--seeds", "1,1,0"]).seeds == [1, 0]
    for argv in (["--rows", "advs"], ["--seeds", "x"], ["--picture", "a.jpg"]):
        with pytest.raises(UserError, match=argv[0]):
            evidence.parse_args(argv)
