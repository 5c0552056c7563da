"""nnU-Net's raw format, the driver of its commands and the scores of its masks.

The commands are replaced by scripts that answer as nnU-Net does; the opt-in test at the
end runs nnU-Net itself (ULTRADINO_NNUNET_BIN names the bin folder of its environment).
"""

import json
import os
import stat
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from configs import fass
from ultradino_jax.data.datasets.masks import load_mask_folders
from ultradino_jax.evaluators.features import Preprocess
from ultradino_jax.evaluators.segmentation import nnunet
from ultradino_jax.evaluators.segmentation.evaluate import read_pairs
from ultradino_jax.evaluators.segmentation.nnunet_data import read_masks
from ultradino_jax.evaluators.segmentation.settings import read_settings

CLASSES = ("nothing", "head", "neck")
TRAINER = "nnUNetTrainer_1epoch"

# Stands for nnU-Net: what each command reads, writes and where, in nnU-Net 2.8.1.
FAKE = """
import json, os, pathlib, shutil, sys
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
raw, ready, trained = (pathlib.Path(os.environ["nnUNet_" + k]) for k in
                       ("raw", "preprocessed", "results"))
with open(raw.parent / "calls.txt", "a") as file:
    print(name, *arguments, file=file)
if name == "python":
    print("2.8.1 2.13.0")
    sys.exit()
if os.environ.get("FAKE_FAILS") == name:
    sys.exit("RuntimeError: no memory left")
number = arguments[arguments.index("-d") + 1] if "-d" in arguments else arguments[0]
dataset, = raw.glob(f"Dataset{number}_*")
if name == "nnUNetv2_plan_and_preprocess":
    (ready / dataset.name).mkdir(parents=True, exist_ok=True)
    shutil.copy(dataset / "splits_final.json", ready / dataset.name)
    if os.environ.get("FAKE_FAILS") == "planning":
        sys.exit("RuntimeError: no plans")
if name == "nnUNetv2_train":
    print("Epoch 0")
    print("Epoch time: 1.0 s")
    split, = json.loads((ready / dataset.name / "splits_final.json").read_text())
    trainer = arguments[arguments.index("-tr") + 1]
    fold = trained / dataset.name / f"{trainer}__nnUNetPlans__2d" / "fold_0"
    (fold / "validation").mkdir(parents=True)
    for case in split["val"]:
        shutil.copy(dataset / "labelsTr" / f"{case}.png", fold / "validation")
    (fold / "validation" / "summary.json").write_text("{}")
if name == "nnUNetv2_predict":
    out = pathlib.Path(arguments[arguments.index("-o") + 1])
    out.mkdir(parents=True)
    for image in pathlib.Path(arguments[arguments.index("-i") + 1]).iterdir():
        source = raw.parent / "answers" / image.name.replace("_0000", "")
        shutil.copy(source, out)
"""


def write_images(root, n=8, ignore=False):
    """Images of several sizes; bright squares are structures; two per patient."""
    rng = np.random.default_rng(0)
    lines = ["id,patient"]
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for i in range(n):
        mask = np.zeros((40 + i, 50), np.uint8)
        mask[5:20, 5:25], mask[22:34, 10:40] = 1, 2
        image = rng.integers(0, 50, mask.shape).astype(np.uint8) + 80 * mask
        if ignore:
            mask[:3] = 255
        # Names that nnU-Net's own naming would not survive.
        name = f"scan_{i:02d}_0000.v{i}"
        Image.fromarray(image).save(root / "images" / f"{name}.png")
        Image.fromarray(mask).save(root / "masks" / f"{name}.png")
        lines.append(f"{name},woman{i // 2}")
    (root / "patients.csv").write_text("\n".join(lines))


def make_config(root, **changes):
    c = fass.get_config("n2")
    c.data.name, c.data.path, c.data.classes = "folder", str(root), CLASSES
    c.data.test_fraction = 0.25
    c.model.image_size, c.seeds, c.replicates = 32, (3, 4), 50
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("nnunet") / "images"
    write_images(root)
    return root


@pytest.fixture
def exported(images, tmp_path):
    lines = []
    record = nnunet.export(make_config(images), tmp_path / "w", say=lines.append)
    assert len(lines) == 2
    return tmp_path / "w", record


def test_the_dataset_is_what_nnunet_documents(images, exported):
    """documentation/dataset_format.md: names, folders, keys of dataset.json."""
    work, record = exported
    names = sorted(p.name for p in (work / "raw").iterdir())
    assert names == ["Dataset500_images_n2_seed3", "Dataset501_images_n2_seed4"]
    folder = work / "raw" / names[0]
    facts = json.loads((folder / "dataset.json").read_text())
    assert facts["channel_names"] == {"0": "ultrasound"}
    assert facts["labels"] == {"background": 0, "head": 1, "neck": 2}
    assert facts["file_ending"] == ".png"
    assert facts["overwrite_image_reader_writer"] == "NaturalImage2DIO"
    labels = sorted(p.stem for p in (folder / "labelsTr").iterdir())
    assert facts["numTraining"] == len(labels)
    for name, cases in (("imagesTr", labels), ("imagesTs", None)):
        found = sorted(p.name for p in (folder / name).iterdir())
        assert cases is None or found == [f"{c}_0000.png" for c in cases]
    tests = {p.name[:9] for p in (folder / "imagesTs").iterdir()}
    assert tests and not tests & set(labels)
    # One fold, which is our split by patient.
    (fold,) = json.loads((folder / "splits_final.json").read_text())
    assert sorted(fold["train"] + fold["val"]) == labels and len(fold["train"]) == 2
    data = load_mask_folders(images, classes=CLASSES)
    split = read_settings(make_config(images)).split(data, 3)
    cases = record["seeds"]["3"]["cases"]
    for name, members in {**fold, "test": tests}.items():
        assert {cases[c] for c in members} == set(split.split(name).ids)
    # Pixels, unchanged and in one channel; labels no value but classes.
    for case, identifier in cases.items():
        row = int(np.flatnonzero(data.ids == identifier)[0])
        part = "imagesTs" if case in tests else "imagesTr"
        pixels = np.asarray(Image.open(folder / part / f"{case}_0000.png"))
        np.testing.assert_array_equal(pixels, data[row])
        if case in labels:
            mask = np.asarray(Image.open(folder / "labelsTr" / f"{case}.png"))
            np.testing.assert_array_equal(mask, data.mask(row))
            assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1, 2}


def test_ignored_pixels_become_the_label_after_the_classes(tmp_path):
    """documentation/ignore_label.md: called 'ignore', the highest value."""
    write_images(tmp_path / "images", ignore=True)
    config = make_config(tmp_path / "images", seeds=(0,))
    nnunet.export(config, tmp_path / "w", say=lambda _: None)
    (folder,) = (tmp_path / "w" / "raw").iterdir()
    labels = json.loads((folder / "dataset.json").read_text())["labels"]
    assert labels == {"background": 0, "head": 1, "neck": 2, "ignore": 3}
    for path in (folder / "labelsTr").iterdir():
        mask = np.asarray(Image.open(path))
        assert (mask[:3] == 3).all() and mask[3:].max() == 2


def test_another_config_in_the_same_folder_is_refused(images, exported):
    work, record = exported
    same = nnunet.export(make_config(images), work, say=lambda _: None)
    assert same == record
    with pytest.raises(ValueError, match="holds an export with .*seeds: "):
        nnunet.export(make_config(images, seeds=(5,)), work, say=lambda _: None)


@pytest.fixture
def commands(tmp_path):
    folder = tmp_path / "env" / "bin"
    folder.mkdir(parents=True)
    names = ("plan_and_preprocess", "train", "predict")
    for name in ("python", *(f"nnUNetv2_{n}" for n in names)):
        path = folder / name
        path.write_text(f"#!{sys.executable} -IS\n{FAKE}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def answers(work, images, wrong=()):
    """What the fake predicts: the truth, but for images in `wrong` only background."""
    data = load_mask_folders(images, classes=CLASSES)
    (work / "answers").mkdir(exist_ok=True)
    for i in range(len(data)):
        mask = data.mask(i) * (i not in wrong)
        Image.fromarray(mask).save(work / "answers" / f"case{i:05d}.png")
    return data


def test_the_chain_ends_in_results_of_our_metrics(images, exported, commands, capfd):
    work, record = exported
    dataset = record["seeds"]["3"]["dataset"]
    tests = sorted((work / "raw" / dataset / "imagesTs").iterdir())
    wrong = int(tests[0].name[4:9])
    data = answers(work, images, wrong=(wrong,))
    options = dict(trainer=TRAINER, device="cpu", processes=1, say=lambda _: None)
    nnunet.run(work, commands.parent, **options)
    calls = (work / "calls.txt").read_text().splitlines()
    fold = f"500 2d 0 -tr {TRAINER} -device cpu"
    assert calls[1].startswith("nnUNetv2_plan_and_preprocess -d 500 -c 2d --verify")
    assert calls[2] == f"nnUNetv2_train {fold}"
    tested = f"-i {work}/raw/{dataset}/imagesTs -o {work}/masks/{TRAINER}/seed3"
    assert calls[3].startswith("nnUNetv2_predict -d 500 -c 2d -f 0 -tr")
    assert calls[3].endswith(tested)
    assert len(calls) == 7 and "Epoch time" in (work / "logs/seed3.log").read_text()
    # Again: nothing is left to do but to ask for the versions.
    nnunet.run(work, commands, **options)
    assert len((work / "calls.txt").read_text().splitlines()) == 8
    results = nnunet.collect(work, say=lambda _: None)
    assert results == json.loads((work / "results.json").read_text())
    entry = results["entries"]["nnunet"]
    assert results["format"] == "ultradino_segmentation"
    assert entry["method"] == "nnunet"
    assert results["nnunet"] == {
        "trainer": TRAINER, "nnunetv2": "2.8.1", "torch": "2.13.0",
    }  # fmt: skip
    # By hand: the truth in all test images but one, where there is nothing.
    run = entry["runs"][0]
    assert run["val"] == pytest.approx(1.0) and run["test"]["n"] == len(tests)
    sums = np.zeros((3, 2))
    for path in tests:
        row = int(path.name[4:9])
        mask = cv2.resize(data.mask(row), (32, 32), interpolation=cv2.INTER_NEAREST)
        found = mask * (row != wrong)
        for k in range(3):
            both = ((found == k) & (mask == k)).sum()
            sums[k] += (2 * both, (found == k).sum() + (mask == k).sum())
    dice = sums[:, 0] / sums[:, 1]
    pooled = run["test"]["pooled"]
    assert pooled["dice"] == pytest.approx(dice.mean())
    assert pooled["foreground_dice"] == pytest.approx(dice[1:].mean()) != 1.0
    kept = work / "nnunet" / "seed3" / "predictions"
    assert len(list(kept.iterdir())) == len(tests)


def test_what_is_missing_is_said_in_one_line(
    images, exported, commands, tmp_path, monkeypatch
):
    work, _ = exported
    quiet = dict(trainer=TRAINER, device="cpu", say=lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"pip install 'nnunetv2"):
        nnunet.run(work, tmp_path / "nowhere", **quiet)
    with pytest.raises(FileNotFoundError, match="export first"):
        nnunet.run(tmp_path / "empty", commands, **quiet)
    answers(work, images)
    # It fails after the split was copied: not to be taken for a plan.
    monkeypatch.setenv("FAKE_FAILS", "planning")
    for _ in range(2):
        with pytest.raises(ValueError, match="preprocess ended with 1: .*no plans"):
            nnunet.run(work, commands, **quiet)
    monkeypatch.setenv("FAKE_FAILS", "nnUNetv2_train")
    with pytest.raises(ValueError, match="nnUNetv2_train ended with 1: .*no memory"):
        nnunet.run(work, commands, **quiet)
    monkeypatch.delenv("FAKE_FAILS")
    nnunet.run(work, commands, **quiet)
    calls = (work / "calls.txt").read_text()
    assert calls.count("plan_and_preprocess -d 500") == 3  # and not once it was done
    lost = sorted((work / "masks" / TRAINER / "seed3").iterdir())[0]
    mask = np.asarray(Image.open(lost))
    lost.unlink()
    with pytest.raises(ValueError, match=f"1 of 2 predictions are missing, .*{lost}"):
        nnunet.collect(work)
    Image.fromarray(mask[:-1]).save(lost)
    with pytest.raises(ValueError, match="the image is"):
        nnunet.collect(work)


@pytest.mark.parametrize("letterbox", [False, True])
def test_masks_come_into_the_square_as_labels_do(images, tmp_path, letterbox):
    data = answers(tmp_path, images)
    preprocess = Preprocess(32, 1, (0.0,), (1.0,), letterbox=letterbox)
    rows = np.array([2, 5])
    found = read_masks(tmp_path / "answers", rows, data, preprocess)
    labels = read_pairs(data, preprocess).masks[rows]
    scored = labels != 255
    assert scored.all() == (not letterbox) and scored.mean() > 0.8
    np.testing.assert_array_equal(found[scored], labels[scored])
    assert not found[~scored].any()


def test_length_of_trainers():
    assert nnunet.epochs_of("nnUNetTrainer") == 1000
    assert nnunet.epochs_of("nnUNetTrainer_250epochs") == 250
    assert nnunet.epochs_of("nnUNetTrainer_1epoch") == 1
    assert nnunet.epochs_of("nnUNetTrainerNoMirroring") is None


@pytest.mark.slow
@pytest.mark.skipif(
    "ULTRADINO_NNUNET_BIN" not in os.environ,
    reason="ULTRADINO_NNUNET_BIN names no environment with nnunetv2",
)
def test_nnunet_itself(images, tmp_path, monkeypatch):
    """The whole chain with a trainer of 300 steps; minutes on a CPU."""
    monkeypatch.setenv(
        "nnUNet_extTrainer", str(Path(__file__).parent / "nnunet_trainer")
    )
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    nnunet.export(make_config(images, seeds=(3,)), tmp_path)
    nnunet.run(
        tmp_path,
        os.environ["ULTRADINO_NNUNET_BIN"],
        trainer="nnUNetTrainer_quick_4epochs",
        device="cpu",
        processes=1,
    )
    run = nnunet.collect(tmp_path)["entries"]["nnunet"]["runs"][0]
    # The squares are bright: a network that learns finds them, and does better than
    # the mean mask, as their places in the stretched images hardly differ.
    mean_mask = run["baselines"]["mean_mask"]["foreground_dice"]
    assert run["test"]["pooled"]["foreground_dice"] > 0.95 > mean_mask
