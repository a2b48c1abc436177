"""The driver of the results: the flags it gives, what it records, and the committed results."""

import gzip
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import evidence
import sample
import train
from losses import Perturbation, forward_units
from sample import UserError, save_grid


@pytest.fixture(scope="module")
def fashion(tmp_path_factory):
    """A folder with 80 images, black or white by their label, under the published names."""
    folder, truth = tmp_path_factory.mktemp("fashion"), np.arange(80) % 2
    images = np.broadcast_to(250 * truth[:, None, None], (80, 28, 28))
    for name, values in (("images-idx3", images), ("labels-idx1", truth)):
        # The published format: a header of the type and the shape, big-endian, then bytes.
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
        with gzip.open(folder / f"train-{name}-ubyte.gz", "wb") as file:
            file.write(header + values.astype(np.uint8).tobytes())
    return folder


@pytest.fixture
def drive(monkeypatch, fashion, tmp_path):
    """Run the driver in this process; returns the flags of each script that it called.

    The scripts do nothing but parse these flags and write what the driver looks for.
    """
    made = []

    def call(name, *words, log, **flags):
        words = [*map(str, words), *(f"--{key}={value}" for key, value in flags.items())]
        if name == "train.py":
            flags = train.make_parser(flags["dataset"]).parse_args(words)
            flags.out.mkdir(parents=True, exist_ok=True)
            (flags.out / "ckpt.pt").write_text(str(flags.steps))
            save_grid(np.zeros((64, 1, 16, 16), np.uint8), flags.out / "data.png")
        elif name == "sample.py":
            flags = sample.parse_args(words)
            flags.out.mkdir()
            np.savez(flags.out / "samples.npz", np.full((4, 16, 16, 1), 255, np.uint8))
        else:
            flags = evaluate.parse_args(words)
            figures = {key: len(made) + 0.5 for key in evidence.COMMANDS[flags.command][2]}
            about = {"num": flags.num, "seed": flags.seed, "features": "classifier.pt (12)",
                     "commit": "abc"}
            flags.json.write_text(json.dumps({
                **figures, "pixel_std_reference": 0.67, "provenance": about}))
            evaluate.save_sheet({"a": np.zeros((16, 1, 16, 16), np.uint8)}, flags.png)
        made.append(vars(flags))

    def run(*argv):
        made.clear()
        argv = [*argv, "--data_dir", fashion, "--out", tmp_path / "out", "--workers", 1]
        evidence.main([str(word) for word in argv])
        return made.copy()

    monkeypatch.setattr(evidence, "call", call)
    monkeypatch.setattr(evidence, "read_checkpoint",
                        lambda folder: {"step": int((folder / "ckpt.pt").read_text())})
    monkeypatch.setattr(evidence, "classifier", lambda dataset, args: "classifier.pt")
    monkeypatch.setattr(evidence, "stranger_share", lambda images, args: images.mean() / 255)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results.json")
    return run


def test_runs_are_trained_measured_and_not_repeated(drive, fashion):
    argv = ["answer", "--columns", "noise.2", "--rows", "dsm,adv_low", "--seeds", 1]
    flags, asked, low, _ = drive(*argv)
    assert (flags["mode"], flags["noise_std"], flags["seed"]) == ("dsm", 0.2, 1)
    assert flags["overwrite"] and flags["steps"] == 2000
    assert (asked["command"], asked["num"], asked["seed"]) == ("quality", 2000, 1)
    assert asked["features"] == "classifier.pt" and asked["data_dir"] == fashion
    assert (low["mode"], low["reg_t"], low["reg_share"]) == ("adv", 0.1, 1)
    assert drive(*argv) == []
    # More steps go on from the run that is there, fewer are refused and do not end the others.
    again, _ = drive(*argv, "--rows", "dsm", "--steps", 2001)
    assert again["resume"] and not again["overwrite"]
    with pytest.raises(UserError, match="dsm-1 is at step 2001, beyond 3: .*\n1 runs failed"):
        drive(*argv, "--rows", "dsm,random", "--steps", 3)
    assert drive(*argv, "--rows", "random", "--steps", 3) == []


def test_an_expert_is_initialised_from_a_plain_run(drive):
    argv = ["answer", "--rows", "expert", "--columns", "clean", "--steps", 100]
    plain, copy, asked = drive(*argv)
    assert (plain["mode"], plain["steps"], plain["init_from"]) == ("dsm", 100, None)
    assert plain["out"].name == "dsm-0" and copy["mode"] == "adv"
    assert (copy["t_max"], copy["steps"], asked["expert"]) == (0.1, 25, copy["out"])
    assert asked["samples"] == [copy["init_from"]] == [plain["out"]]
    stopped, = drive(*argv, "--rows", "expert_stop")
    assert (stopped["stop"], stopped["expert"]) == (0.2, copy["out"])
    assert stopped["samples"] == asked["samples"]
    # Stopped in its second part it goes on there.
    asked["json"].unlink()
    (copy["out"] / "ckpt.pt").write_text("10")
    again, _ = drive(*argv)
    assert again["resume"] and again["init_from"] is None and again["steps"] == 25


def test_other_training_sets_and_commands(drive, tmp_path):
    limited, asked = drive("copies", "--rows", "dsm")
    assert limited["limit"] == 200 and limited["noise_p"] == 0
    assert asked["holdout"] == "fashion_mnist" and asked["features"] == "pixels"
    other = ["--cifar10_dir", tmp_path]
    cifar, _ = drive("answer", "--columns", "cifar10", "--rows", "dsm", *other)
    assert cifar["dataset"] == "cifar10" and cifar["data_dir"] == tmp_path
    aware, _, _, plain, _, whole, drawn, stopped = drive(
        "answer", "--columns", "strangers", "--rows", "aware,dsm,dsm_stop", *other)
    assert aware["filter"] == evidence.FILTER["strangers"] and aware["outlier_dir"] == tmp_path
    assert (whole["stop"], stopped["stop"]) == (0, 0.2) and drawn["run"] == plain["out"]
    assert stopped["samples"] == [drawn["out"]] and (drawn["stop"], drawn["num"]) == (0.2, 2000)
    figures = json.loads(stopped["json"].read_text())
    assert figures["strangers"] == 1 and 0.4 < figures["strangers_reference"] < 0.6


def test_record_replaces_the_rows_of_the_same_runs(drive, capsys):
    old = {"trained on": "noise.2", "row": "dsm", "training steps": 2000, "seed": 0, "FD": 9.0}
    other = {**old, "seed": 1, "FD": 7.25}
    columns = ["row", "seed", "noise left", "FD"]
    evidence.RESULTS.write_text(evidence.dump([{
        "study": "answer", "heading": "H", "title": "T.", "command": "c", "columns": columns,
        "rows": [other, old, other]}]))
    drive("answer", "--rows", "dsm,adv", "--columns", "noise.2", "--record")
    clean, dsm, kept, too, adv = json.loads(evidence.RESULTS.read_text())[0]["rows"]
    assert clean["row"] == "clean images" and clean["pixel std"] == 0.67
    assert (dsm["FD"], dsm["forward-units"], adv["forward-units"]) == (1.5, 3, 8)
    assert dsm["provenance"].keys() == {"num", "seed", "features", "commit"}
    assert kept == too == other  # A run may have several rows.
    text = evidence.RESULTS.with_suffix(".md").read_text()
    assert "## H\n\nT. `c`\n\n| row | seed | noise left | FD | made at |" in text
    assert "| dsm (plain) | 0 | 1.5 | 1.5 | abc |" in text
    assert "| dsm (plain) | 1 |  | 7.25 |  |" in text
    assert "| adv (the paper's) | 2000 | 0 | 8 | 3.5 |" in capsys.readouterr().out


def test_pictures_have_the_training_data_and_each_run(drive, tmp_path):
    drive("answer", "--columns", "noise.2", "--rows", "dsm,adv")
    drive("answer", "--columns", "noise.2,clean", "--picture", tmp_path / "a.png")
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    assert picture.shape == (20 + 3 * 52, 190 + 2 * 402 + 8, 3)
    # Black images in the first column's three rows, and nothing in the second.
    assert not picture[22::52, 192].any() and picture[:, -100].min() == 255


def test_the_committed_results_are_rendered_and_complete():
    records = json.loads(evidence.RESULTS.read_text())
    assert evidence.RESULTS.with_suffix(".md").read_text() == evidence.rendered(records)
    assert evidence.RESULTS.read_text() == evidence.dump(records)
    assert evidence.STUDIES.keys() <= {record["study"] for record in records}
    for record in records:
        assert record.keys() - {"picture"} == {"study", "heading", "title", "command", "columns",
                                               "rows"}
        if "picture" in record:
            assert (evidence.RESULTS.parent / record["picture"]).exists()
        for row in record["rows"]:
            assert row.keys() <= {*record["columns"], "provenance"}
            about = row.get("provenance", {})
            assert about.get("commit") or about.get("source") or record["study"] == "words"


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_classifier_tells_the_classes_apart(fashion, tmp_path):
    images = np.full((500, 16, 16, 3), 128, np.uint8)
    np.savez(tmp_path / "grey.npz", images)
    args = SimpleNamespace(data_dir=fashion, cifar10_dir=tmp_path / "grey.npz", cache_dir=None,
                           out=tmp_path)
    net = torch.jit.load(evidence.classifier("fashion_mnist", args))
    both = torch.tensor([0, 250], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 16, 16)
    features, logits = net(both)
    assert features.shape == (2, 64) and logits.argmax(1).tolist() == [0, 1]
    # Another one tells photographs, here all grey, from them.
    args.classifiers = {"strangers": evidence.classifier("strangers", args)}
    for value, share in ((0, 0), (128, 1), (250, 0)):
        garments = np.full((3, 1, 16, 16), value, np.uint8)
        assert evidence.stranger_share(garments, args) == share


def test_labels_are_in_the_order_of_the_images(tmp_path):
    for name in "jihgfedcba":
        (tmp_path / name).mkdir()
        for k in range(ord(name) - 95):
            Image.new("L", (16, 16), ord(name)).save(tmp_path / name / f"{k}.png")
    images = train.load_images("cifar10", 16, 3, tmp_path)
    assert np.array_equal(images[:, 0, 0, 0], 97 + evidence.labels("cifar10", tmp_path))
    for k in range(1, 6):
        batch = {b"data": np.full((2, 3072), k, np.uint8), b"labels": [k, k]}
        (tmp_path / f"data_batch_{k}").write_bytes(pickle.dumps(batch))
    assert evidence.labels("cifar10", tmp_path).tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_studies_and_costs(capsys):
    assert evidence.units("adv_share") == forward_units("adv", Perturbation(reg_share=0.3))
    assert evidence.units("expert") == 3 + 8 / 4
    evidence.main(["--list"])
    assert "few_steps: dsm, adv; noise.2; `steps`; at most 22,000" in capsys.readouterr().out
    for command, columns, rows in evidence.STUDIES.values():
        assert command in evidence.COMMANDS
        assert {*columns} <= evidence.COLUMNS.keys() and {*rows} <= evidence.ROWS.keys()
