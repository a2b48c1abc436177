"""What rots, and what others wrote: found by flipping bytes in every file that is read."""

import json
import os
import zipfile

import numpy as np
import pytest
from PIL import Image

from conftest import TINY
from sample import UserError, find_files, is_image, read_json, run_cli
from train import load_images


def flip(path, at):
    """Flip one byte of a file, `at` a share of its length."""
    data = bytearray(path.read_bytes())
    data[int(at * len(data))] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
def test_a_flipped_byte_among_the_weights_is_found(run, tmp_path, mistake, at):
    copy = tmp_path / "ckpt.pt"
    copy.write_bytes((run / "ckpt.pt").read_bytes())
    flip(copy, at)
    error = mistake("sample", copy, "--out", tmp_path / "samples")
    assert "not a checkpoint of train.py: damaged" in error


@pytest.mark.parametrize("text", ["", "[1]", "3", '{"sampler"', "[" * 100_000, '{"a": NaN}'])
def test_json_that_is_no_dict_of_ours_reads_as_nothing(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    assert read_json(tmp_path / "a.json").keys() <= {"a"}


def test_a_cache_of_another_shape_is_refused(tmp_path):
    np.save(tmp_path / "arr.npy", np.zeros((3, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "set.npz", np.zeros((3, 8, 8, 3), np.uint8))
    assert load_images("folder", 4, 3, tmp_path / "set.npz", tmp_path).shape == (3, 3, 4, 4)
    cache, = tmp_path.glob("folder-*.npy")
    np.save(cache, np.zeros((3, 3, 4, 5), np.int8))
    with pytest.raises(UserError, match="is damaged, delete it: it holds int8"):
        load_images("folder", 4, 3, tmp_path / "set.npz", tmp_path)


def test_nothing_is_written_or_removed_outside_of_the_folder(run, tmp_path, in_process):
    victim = tmp_path / "victim.png"
    Image.new("RGB", (16, 16)).save(victim)
    with zipfile.ZipFile(tmp_path / "slip.zip", "w") as archive:
        archive.write(victim, str(tmp_path / "slipped.png"))
        archive.writestr(zipfile.ZipInfo(str(tmp_path / "slipped.png")), victim.read_bytes())
    with pytest.raises(UserError, match="is no name of a file in it"):
        in_process("sample", run, "--denoise", tmp_path / "slip.zip", "--out", tmp_path / "a")
    in_process("sample", run, "--num", 2, "--steps", 2, "--out", tmp_path / "s")
    note = tmp_path / "s/samples.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {
        "noise_std": {"../victim.png": 0.1}, "seed": 7}))
    in_process("sample", run, "--num", 2, "--steps", 2, "--out", tmp_path / "s", "--overwrite")
    assert victim.exists() and not (tmp_path / "slipped.png").exists()


def test_what_is_no_image_and_no_file_of_the_data(tmp_path, run):
    for name in ("a.h5", "b.mpg", ".c.png", "__MACOSX/d.png"):
        assert not is_image(name)
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UserError, match="or no file"):
        find_files(tmp_path)
    (tmp_path / "x.png").unlink()
    damaged = tmp_path / "run"
    damaged.mkdir()
    for name in ("ckpt.pt", "data.png"):
        (damaged / name).write_bytes((run / name).read_bytes())
    assert find_files(tmp_path) == []


def test_memory_that_is_not_there_is_one_line(tmp_path, mistake, capsys):
    assert "not enough memory" in mistake("train", *TINY, "--channels", 1_000_000, "--mode", "dsm",
                                          "--out", tmp_path)

    def shout():
        raise UserError("a name\nof two lines " + 1000 * "x")

    with pytest.raises(SystemExit):
        run_cli(shout)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and len(error) < 450


def test_names_that_are_too_long_and_the_current_folder(run, tmp_path, in_process, mistake,
                                                        monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    in_process("sample", run, "--num", 1, "--steps", 1, "--out", ".")
    assert (tmp_path / "here/000000.png").exists() and (tmp_path / "here.png").exists()
    for argv in (["train", *TINY, "--steps", 1, "--mode", "dsm", "--out", 300 * "x"],
                 ["evaluate", "overfit", run, "--num", 2, "--json", 251 * "x"]):
        assert "too long" in mistake(*argv)


def test_without_a_compiler_the_old_run_stays(run, tmp_path, mistake, monkeypatch):
    (tmp_path / "ckpt.pt").write_bytes((run / "ckpt.pt").read_bytes())
    (tmp_path / "config.json").write_bytes((run / "config.json").read_bytes())
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    error = mistake("train", *TINY, "--compile", "--overwrite", "--out", tmp_path)
    assert "needs a C++ compiler" in error
    assert (tmp_path / "ckpt.pt").read_bytes() == (run / "ckpt.pt").read_bytes()


def test_files_that_are_no_images_are_counted(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.jfif", "c.tga"):
        Image.new("RGB", (4, 4)).save(tmp_path / "photos" / name, format="PNG")
    (tmp_path / "photos/notes.txt").write_text("about them")
    assert len(load_images("folder", 4, 3, tmp_path / "photos", tmp_path)) == 3
    assert "decoding 3 images" in (text := capsys.readouterr().out)
    assert "1 other files are no images" in text
