"""The builders on phantom data in the layout of the real downloads."""

import dataclasses
import http.server
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ultradino_jax.data.datasets import african_planes, fetal_planes
from ultradino_jax.data.datasets.labelled import check_splits
from ultradino_jax.data.phantom.layouts import write_african, write_fetal_planes

tfds.disable_progress_bar()


@pytest.fixture(scope="module")
def download(tmp_path_factory):
    """FETAL_PLANES_ZENODO/ with 9 patients of 12 images; patient 8 is RGB."""
    root = tmp_path_factory.mktemp("download")
    write_fetal_planes(root, 9, size=40)
    return root


@pytest.fixture(scope="module")
def data(download, tmp_path_factory):
    return fetal_planes.load(tmp_path_factory.mktemp("tfds"), manual_dir=download)


def edited(download, tmp_path, change):
    """A copy of the download whose csv text went through `change`."""
    copy = tmp_path / "copy"
    shutil.copytree(download, copy)
    table = copy / "FETAL_PLANES_ZENODO" / fetal_planes.TABLE
    table.write_text(change(table.read_text()))
    return copy


def test_records_hold_the_bytes_of_the_files(download, data):
    images = download / "FETAL_PLANES_ZENODO" / "Images"
    assert len(data) == 108 == len(list(images.iterdir()))
    modes = set()
    for i in range(len(data)):
        file = images / f"{data.ids[i]}.png"
        assert data.read.png(data.stored[i]) == file.read_bytes()
        with Image.open(file) as image:
            modes.add(image.mode)
            if i % 10 == 0:
                np.testing.assert_array_equal(data[i], image.convert("L"))
    assert modes == {"RGBA", "RGB"}


def test_columns_come_from_the_table(download, data):
    table = download / "FETAL_PLANES_ZENODO" / fetal_planes.TABLE
    header, *lines = table.read_text().splitlines()
    assert header.endswith(";Train ")  # the real header's trailing blank
    for line in lines:
        name, patient, plane, brain, operator, machine, train = line.split(";")
        i = int(np.flatnonzero(data.ids == name)[0])
        assert data.patients[i] == patient
        assert data.classes[data.labels[i]] == plane
        assert data.groups["brain_plane"][i] == brain
        assert data.groups["operator"][i] == operator
        assert data.groups["machine"][i] == machine
        assert (data.splits[i] != "test") == (train == "1")


def test_validation_is_a_fifth_of_the_training_patients(data):
    patients = {s: set(data.patients[data.splits == s]) for s in set(data.splits)}
    assert {s: len(p) for s, p in patients.items()} == {"train": 4, "val": 1, "test": 4}
    assert not patients["train"] & patients["val"]
    check_splits(data)


def test_the_split_does_not_depend_on_the_storage(download, data, tmp_path):
    """A zip, unpacked without the outer folder, rows reversed: the same set."""
    copy = tmp_path / "flat.zip"
    root = download / "FETAL_PLANES_ZENODO"
    with zipfile.ZipFile(copy, "w") as archive:
        for file in root.rglob("*.png"):
            archive.write(file, file.relative_to(root))
        header, *lines = (root / fetal_planes.TABLE).read_text().splitlines()
        lines = [" ; ".join(line.split(";")) for line in reversed(lines)]
        archive.writestr(fetal_planes.TABLE, "\ufeff" + "\r\n".join([header, *lines]))
        archive.writestr(f"__MACOSX/._{fetal_planes.TABLE}", "not a table")
    manual = tmp_path / "manual"
    manual.mkdir()
    copy.rename(manual / "FETAL_PLANES_ZENODO.zip")
    other = fetal_planes.load(tmp_path / "tfds", manual_dir=manual)
    assert other.split_hash() == data.split_hash()
    assert other.read.png(other.stored[5]) == data.read.png(data.stored[5])
    seeds = {
        fetal_planes.complete_splits(
            data.take(data.splits != "val"), val_fraction=0.5, test_fraction=0, seed=s
        ).split_hash()
        for s in range(4)
    }
    assert len(seeds) > 1


def test_download_fetches_the_zip(download, data, tmp_path, monkeypatch):
    served = tmp_path / "served"
    served.mkdir()
    published = fetal_planes.PUBLISHED
    assert published.url.startswith("https://zenodo.org/records/3904280/files/")
    name = published.url.rsplit("/", 1)[1]
    shutil.make_archive(str(served / name.removesuffix(".zip")), "zip", download)
    handler = partial(QuietHandler, directory=served)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        here = dataclasses.replace(published, url=url)
        monkeypatch.setattr(fetal_planes, "PUBLISHED", here)
        with pytest.raises(FileNotFoundError, match="not prepared.*manual_dir=FOLDER"):
            fetal_planes.load(tmp_path / "tfds")
        (tmp_path / "empty").mkdir()
        with pytest.raises(FileNotFoundError, match="FOLDER with FETAL_PLANES_ZENODO"):
            fetal_planes.load(tmp_path / "tfds", manual_dir=tmp_path / "empty")
        other = fetal_planes.load(tmp_path / "tfds", download=True)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert other.split_hash() == data.split_hash()
    # Now that it is prepared, neither a download nor the files are asked for.
    again = fetal_planes.load(tmp_path / "tfds")
    assert again.split_hash() == data.split_hash()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def test_split_files_as_the_reference_ships_them(data, tmp_path):
    files = []
    for k, split in enumerate(("train", "val", "test")):
        lines = ["Image_name,Patient_num,Plane,label"]
        for i in range(len(data)):
            if int(data.patients[i]) % 3 == k and i % 12 != 11:
                label = data.labels[i]
                name, plane = data.ids[i], data.classes[label]
                lines.append(f"{name},{data.patients[i]},{plane},{label}")
        files.append(tmp_path / f"{split}_split.csv")
        files[-1].write_text("\n".join(lines))
    chosen = fetal_planes.apply_split_files(data, files)
    assert len(chosen) == 99
    for k, split in enumerate(("train", "val", "test")):
        patients = chosen.patients[chosen.splits == split].astype(int)
        assert set(patients % 3) == {k}
    check_splits(chosen)

    with pytest.raises(ValueError, match="'Patient.*' is listed twice"):
        fetal_planes.apply_split_files(data, [files[0], files[0], files[2]])
    with pytest.raises(ValueError, match="three are needed, got 2"):
        fetal_planes.apply_split_files(data, files[:2])
    first = files[1].read_text().splitlines()
    files[1].write_text("\n".join([first[0], "Patient99_Plane1_1_of_1,99,Other,0"]))
    with pytest.raises(ValueError, match="'Patient99_Plane1_1_of_1' is not in fetal"):
        fetal_planes.apply_split_files(data, files)
    # One image of a training patient slips into validation.
    train = files[0].read_text().splitlines()
    files[1].write_text("\n".join([*first, train[-1]]))
    files[0].write_text("\n".join(train[:-1]))
    leaking = fetal_planes.apply_split_files(data, files)
    with pytest.raises(ValueError, match=r"1 patients .*'\d' in train and val"):
        check_splits(leaking)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("US_Machine", "Scanner"), "no column 'US_Machine'; there"),
        (lambda t: t.replace("Fetal femur", "Femur"), "unknown class 'Femur'; known"),
        (
            lambda t: t.replace("Patient00003_", "Patient99_"),
            "12 of 108 images have no",
        ),
        (lambda t: t[: t.index("\n") + 1], "no row below the header"),
        (lambda t: t.replace(";1\n", ";2\n", 1), "is '2', not 0 or 1"),
        (lambda t: t.replace(";1\n", "\n", 1), "line 2: 6 values for 7 columns"),
    ],
)
def test_bad_tables(download, tmp_path, change, message):
    copy = edited(download, tmp_path, change)
    with pytest.raises(ValueError, match=message):
        fetal_planes.load(tmp_path / "tfds", manual_dir=copy)


def test_patients_in_both_official_splits_are_refused(download, tmp_path):
    def change(text):  # the first image of patient 1, a training patient
        return text.replace(";1\n", ";0\n", 1)

    copy = edited(download, tmp_path, change)
    with pytest.raises(ValueError, match="1 patients .*first '1' in train and test"):
        fetal_planes.load(tmp_path / "tfds", manual_dir=copy)


def test_missing_places_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fetal_planes.load(tmp_path, manual_dir=tmp_path / "nowhere")
    (tmp_path / "manual").mkdir()
    (tmp_path / "manual" / "readme.txt").write_text("hello")
    with pytest.raises(
        FileNotFoundError, match=r"no FETAL_PLANES_DB_data.csv in .*man"
    ):
        fetal_planes.load(tmp_path, manual_dir=tmp_path / "manual")


def test_african_planes_from_the_tar(tmp_path):
    write_african(tmp_path / "out", 10, size=32)
    manual = tmp_path / "manual"
    manual.mkdir()
    with tarfile.open(manual / "Zenodo_dataset.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "out" / "Zenodo_dataset", "Zenodo_dataset")
    data = african_planes.load(tmp_path / "tfds", manual_dir=manual)
    files = list((tmp_path / "out").rglob("*.png"))
    assert len(data) == len(files) > 20
    by_name = {f.stem: f for f in files}
    for i in range(len(data)):
        file = by_name[data.ids[i]]
        assert data.read.png(data.stored[i]) == file.read_bytes()
        assert data.groups["center"][i] == file.parent.name
        assert data.patients[i].startswith(f"{file.parent.name}/")
    assert len(set(data.patients)) == 10  # two in each country, both numbered 1, 2


def test_data_sets_phantom_and_prepare_import_neither_jax_nor_tensorflow():
    code = (
        "import sys; import ultradino_jax.data.datasets.open, ultradino_jax.phantom; "
        "import ultradino_jax.prepare; sys.exit(bool("
        "{'jax', 'tensorflow', 'ml_collections', 'tensorflow_datasets'}"
        " & set(sys.modules)))"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3]
    )
