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


def test_a_run_of_each_kind_is_trained_measured_and_not_repeated(fashion, tmp_path):
    argv = ["tests/evidence.py", "headline", "--rows", "adv_late,dsm_tenth", "--seeds", 1, "--num",
            10, "--steps", 5, "--workers", 1, "--data_dir", fashion, "--out", tmp_path]
    done = script(*argv)
    # 80 images have no tenth of 60,000: this run fails, the other one does not
    assert done.returncode == 2 and "noise.2 dsm_tenth 1: train.py failed" in done.stderr
    log = (tmp_path / "noise.2/adv_late-1.log").read_text()
    assert "mode dsm" in log and "resuming at step 4; mode dsm -> adv; steps 4 -> 5" in log
    result = tmp_path / "noise.2/adv_late-1/quality-5-10.json"
    figures = json.loads(result.read_text())
    assert figures["provenance"]["num"] == 10 and figures["provenance"]["step"] == 5
    assert f"| {figures['fid']:.3f} |" in done.stdout

    written = result.stat().st_mtime_ns
    again = script(*argv[:3], "adv_late", *argv[4:])
    assert again.returncode == 0 and result.stat().st_mtime_ns == written
    beyond = script(*argv[:3], "adv_late", *argv[4:], "--steps", 3)
    assert beyond.returncode == 2 and "is at step 5, beyond --steps 3" in beyond.stderr


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_classifier_tells_the_classes_apart(fashion, tmp_path, capsys):
    args = evidence.parse_args(["--data_dir", str(fashion), "--out", str(tmp_path)])
    path = evidence.classifier("fashion_mnist", args)
    assert "1.000 of the test images right" in capsys.readouterr().out
    net = torch.jit.load(path)
    features, logits = net(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert features.shape == (2, 64) and logits.argmax(1).tolist() == [0, 0]


def test_labels_are_in_the_order_of_the_images(tmp_path):
    for name, grey in (("cat", 9), ("airplane", 5), ("dog", 3)):
        (tmp_path / name).mkdir()
        for k in range(grey):
            Image.new("L", (16, 16), 20 * grey).save(tmp_path / name / f"{k}.png")
    truth = evidence.labels("cifar10", tmp_path, "train")
    images = load_images("cifar10", 16, 3, tmp_path)
    grey = images[:, 0, 0, 0]
    assert [set(grey[truth == k]) for k in range(3)] == [{100}, {180}, {60}]


def test_the_table_has_the_mean_over_the_seeds(tmp_path):
    def write(row, seed, name, value):
        folder = tmp_path / "noise.2" / f"{row}-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        shown = dict.fromkeys(evidence.QUALITY, value)
        (folder / name).write_text(json.dumps({**shown, "pixel_std_reference": 0.673}))

    write("dsm", 0, "quality-5000-2000.json", 1.0)
    write("dsm", 1, "quality-5000-2000.json", 3.0)
    write("adv", 0, "quality-2000-2000.json", 9.0)  # of another study
    write("adv_late", 1, "quality-5000-2000.json", 4.0)
    text = evidence.table(evidence.parse_args(["--out", str(tmp_path)]))
    first = text.splitlines()[2]
    assert first.startswith("| noise.2 | dsm | 2 | 3 | 2.000 +- 1.414 |")
    assert "| adv |" not in text and "9.000" not in text
    assert "| noise.2 | adv_late | 1 | 4 | 4.000 |" in text
    assert text.splitlines()[-1].split(" | ")[5] == "0.673"


def test_the_studies_name_what_there_is(tmp_path):
    for command, columns, rows, _, _ in evidence.STUDIES.values():
        assert command in evidence.COMMANDS
        assert {*columns} <= {*evidence.COLUMNS} and {*rows} <= {*evidence.ROWS}
    assert evidence.units("adv_share") == forward_units("adv", Perturbation(reg_share=0.3))
    assert evidence.units("adv_late") == pytest.approx(0.8 * 3 + 0.2 * 8)
    with pytest.raises(UserError, match="--rows advs: not of dsm"):
        evidence.parse_args(["--rows", "advs"])
