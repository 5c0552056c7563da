"""Writes phantom images in the layout of the real downloads, quirks included.

What a loader trips over in the real archives is here on purpose: a header with a
trailing blank, alpha channels, patient numbers of no fixed width, pickled arrays,
file counts that do not match, names that are not ASCII. A reader that passes on these
folders is one that was written for the real ones.

Every writer takes (out, patients, seed, size) and is a pure function of the last three:
the same bytes each time. size: pixels of the longer side; None means the sizes of the
real set.
"""

import csv
import sys
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ultradino_jax.data.phantom.render import (
    FASS_STRUCTURES,
    JNU_STRUCTURES,
    PLANES,
    PhantomImage,
    render_phantom,
)
from ultradino_jax.whole import whole_file

PER_PATIENT = 12
# The number after "Plane" in the file names of FETAL_PLANES_DB: it leaks the label.
PLANE_CODES = {
    "Other": 1,
    "Fetal abdomen": 2,
    "Fetal brain": 3,
    "Maternal cervix": 4,
    "Fetal femur": 5,
    "Fetal thorax": 6,
}
FETAL_PLANES_SIZES = ((480, 692), (392, 640), (519, 768), (531, 707), (559, 745))
FASS_FOLDER = "Fetal Abdominal Structures Segmentation Dataset Using Ultrasonic Images"
COUNTRIES = {
    "Algeria": "DZA",
    "Egypt": "EGY",
    "Ghana": "GHA",
    "Malawi": "MWI",
    "Uganda": "UGA",
}


def fitted(shape: tuple[int, int], size: int | None) -> tuple[int, int]:
    """`shape` (H, W) scaled until its longer side is `size` pixels."""
    if size is None:
        return shape
    scale = size / max(shape)
    return max(16, round(shape[0] * scale)), max(16, round(shape[1] * scale))


def progress(items: Iterable, total: int, what: str) -> Iterator:
    """Yields `items`; past ten seconds reports rate and time left on stderr."""
    start = last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= 10:
            rate = done / (now - start)
            left = (total - done) / rate
            print(
                f"phantom {what}: {done}/{total} images, "
                f"{rate:.1f}/s, {left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
            last = now
        yield item


def write_csv(path: Path, rows: list, delimiter=",", encoding="utf-8") -> None:
    """Rows, the header first, as text with LF line ends."""
    with (
        whole_file(path) as fresh,
        open(fresh, "w", newline="", encoding=encoding) as file,
    ):
        csv.writer(file, delimiter=delimiter, lineterminator="\n").writerows(rows)


def write_png(path: Path, pixels: np.ndarray, mode: str = "L") -> None:
    """uint8 [H, W] or [H, W, 3] as a PNG of Pillow mode `mode`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, compress_level=3)


# --- FETAL_PLANES_DB ------------------------------------------------------------------


def write_fetal_planes(
    out: Path,
    patients: int,
    seed=0,
    size: int | None = None,
    settings: int | None = None,
):
    """FETAL_PLANES_DB (Zenodo 3904280): RGBA PNGs and a ';' table.

    The last header is "Train " with a blank; Image_name has no suffix; the picture size
    changes from patient to patient; Train goes by patient, odd numbers train.
    settings: see `render_phantom`.
    """
    root = Path(out) / "FETAL_PLANES_ZENODO"
    header = "Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train "
    rows: list[list] = [header.split(";")]
    total = patients * PER_PATIENT
    counts: dict[str, int] = {}
    for index in progress(range(total), total, "fetal_planes"):
        number = index // PER_PATIENT + 1
        shape = fitted(FETAL_PLANES_SIZES[number % len(FETAL_PLANES_SIZES)], size)
        phantom = render_phantom(
            index,
            seed=seed,
            size=shape,
            images_per_patient=PER_PATIENT,
            settings=settings,
        )
        if index % PER_PATIENT == 0:
            counts = dict.fromkeys(PLANES, 0)
        counts[phantom.plane] += 1
        name = (
            f"Patient{number:05d}_Plane{PLANE_CODES[phantom.plane]}"
            f"_{counts[phantom.plane]}_of_{PER_PATIENT // len(PLANES)}"
        )
        # Most files have an alpha channel; a few do not.
        mode = "RGB" if number % 8 == 0 else "RGBA"
        write_png(root / "Images" / f"{name}.png", phantom.image, mode)
        rows.append(
            [
                name,
                number,
                phantom.plane,
                phantom.brain_plane,
                phantom.operator,
                phantom.machine,
                number % 2,
            ]
        )
    write_csv(root / "FETAL_PLANES_DB_data.csv", rows, ";")


def write_african(out: Path, patients: int, seed=0, size: int | None = None):
    """African planes (Zenodo 7540448): four planes, one folder per country.

    `patients` are dealt to five countries and numbered anew in each, so a patient's
    number is only unique together with its Center.
    """
    root = Path(out) / "Zenodo_dataset"
    planes = ("Fetal abdomen", "Fetal brain", "Fetal femur", "Fetal thorax")
    rows: list[list] = [["Filename", "Center", "Patient_num", "Plane", "Train"]]
    shape = fitted((480, 640), size)
    total = 6 * patients
    for index in progress(range(total), total, "african"):
        number, country = divmod(index // 6, len(COUNTRIES))
        phantom = render_phantom(index, seed=seed, size=shape, images_per_patient=6)
        if phantom.plane not in planes:
            continue
        center = list(COUNTRIES)[country]
        code = planes.index(phantom.plane)
        name = f"patient{number + 1:03d}_{COUNTRIES[center]}_plane{code}"
        write_png(root / center / f"{name}.png", phantom.image)
        rows.append([name, center, number + 1, phantom.plane, int(number % 2 == 0)])
    write_csv(root / "African_planes_database.csv", rows)


# --- segmentation sets ----------------------------------------------------------------


def write_fass(out: Path, patients: int, seed=0, size: int | None = None):
    """FASS (Mendeley 4gcpm9dsc3): IMAGES/*.png and ARRAY_FORMAT/*.npy.

    The arrays are pickled dicts {"image", "structures": {name: uint8 0/1}}. One picture
    in eight is grey, the rest RGB; the picture inside the array is not always that of
    the PNG (here: without overlays); the liver's outline is drawn generously, so masks
    overlap by a pixel; "P0" comes before the patient's number, so widths differ.
    """
    root = Path(out) / FASS_FOLDER
    shape = fitted((768, 1024), size)
    counts = np.random.default_rng([seed, 4]).integers(3, 8, patients)
    keys = [(p, k) for p in range(patients) for k in range(counts[p])]
    (root / "ARRAY_FORMAT").mkdir(parents=True, exist_ok=True)
    for n, (patient, k) in enumerate(progress(keys, len(keys), "fass")):
        index = patient * 8 + k
        options = {"seed": seed, "size": shape, "images_per_patient": 8, "task": "fass"}
        phantom = render_phantom(index, **options)
        stem = f"P0{patient + 1}_IMG{k + 1}"
        mode = "L" if n % 8 == 2 else "RGB"
        write_png(root / "IMAGES" / f"{stem}.png", phantom.image, mode)
        inside = phantom.image
        if n % 4 == 1:
            inside = render_phantom(index, overlays=False, **options).image
        if mode == "RGB":
            inside = np.repeat(inside[:, :, None], 3, 2)
        structures = {name: phantom.masks[name] for name in FASS_STRUCTURES}
        structures["liver"] = cv2.dilate(structures["liver"], np.ones((3, 3), np.uint8))
        np.save(
            root / "ARRAY_FORMAT" / f"{stem}.npy",
            np.array({"image": inside, "structures": structures}, object),
        )


def write_jnu_ifm(out: Path, patients: int, seed=0, size: int | None = None):
    """JNU-IFM (figshare 14371652): us_data/<video>/{image,mask,mask_enhance}.

    Masks hold 0, 7 (symphysis) and 8 (head). A second video of a woman carries the
    same timestamp and a suffix, at times Chinese; its last frame has a picture but
    neither mask nor row in frame_label.csv, and the frame before it no colour preview.
    """
    root = Path(out) / "JNU-IFM" / "us_data"
    shape = fitted((1026, 1295), size)
    frames = 6
    rows: list[list] = [["frame_id", "frame_label"]]
    total = 2 * frames * patients
    for index in progress(range(total), total, "jnu_ifm"):
        patient, order = divmod(index, 2 * frames)
        part, frame = divmod(order, frames)
        if frame == 0:
            rows[1:] = []  # a new video
        phantom = render_phantom(
            index,
            seed=seed,
            size=shape,
            images_per_patient=2 * frames,
            overlays=False,
            task="jnu",
        )
        second = ("I1", "__B_产科_0")[patient % 2]
        video = _timestamp(seed, patient) + ("", second)[part]
        folder, stem = root / video, f"{video}_{frame}"
        write_png(folder / "image" / f"{stem}.png", phantom.image, "RGB")
        if part == 0 or frame < frames - 1:
            mask = 7 * phantom.masks["symphysis"] + 8 * phantom.masks["head"]
            write_png(folder / "mask" / f"{stem}_mask.png", mask)
            rows.append([frame, frame_label(phantom)])
            if part == 0 or frame < frames - 2:
                preview = np.zeros((*shape, 3), np.uint8)
                preview[mask == 7], preview[mask == 8] = (255, 0, 0), (0, 255, 0)
                write_png(folder / "mask_enhance" / f"{stem}_mask.png", preview, "RGB")
        if frame == frames - 1:
            write_csv(folder / "frame_label.csv", rows, encoding="utf-8-sig")


def frame_label(phantom: PhantomImage) -> int:
    """JNU-IFM's code: 3 none, 4 only symphysis, 5 only head, 6 both."""
    symphysis, head = (bool(phantom.masks[name].any()) for name in JNU_STRUCTURES)
    return 3 + symphysis + 2 * head


def _timestamp(seed: int, patient: int) -> str:
    rng = np.random.default_rng([seed, 5, patient])
    month, day, hour = rng.integers(1, 13), rng.integers(1, 29), rng.integers(8, 18)
    minute, second = rng.integers(0, 60, 2)
    return f"2019{month:02d}{day:02d}T{hour:02d}{minute:02d}{second:02d}"


def write_psfhs(out: Path, patients: int, seed=0, size: int | None = None):
    """PSFHS (Zenodo 10969427): MetaImage files image_mha and label_mha.

    Three equal channels come first, [3, 256, 256]; labels are 0, 1 (symphysis), 2
    (head); every other file is compressed; names are numbers, no patient is named.
    """
    root = Path(out) / "PSFHS"
    shape = (size or 256, size or 256)
    for index in progress(range(patients), patients, "psfhs"):
        phantom = render_phantom(
            index,
            seed=seed,
            size=shape,
            images_per_patient=1,
            overlays=False,
            task="jnu",
        )
        label = phantom.masks["symphysis"] + 2 * phantom.masks["head"]
        stem, packed = f"{3744 + index:05d}.mha", index % 2 == 1
        write_mha(root / "image_mha" / stem, np.stack([phantom.image] * 3), packed)
        write_mha(root / "label_mha" / stem, label, packed)


def write_mha(path: Path, pixels: np.ndarray, compressed: bool = False) -> None:
    """uint8 array as a MetaImage: a text header, then raw or zlib bytes.

    DimSize lists the axes of the array last to first (x runs fastest).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.ascontiguousarray(pixels, np.uint8).tobytes()
    body = zlib.compress(data) if compressed else data
    axes = pixels.ndim
    header = {
        "ObjectType": "Image",
        "NDims": axes,
        "BinaryData": True,
        "BinaryDataByteOrderMSB": False,
        "CompressedData": compressed,
        **({"CompressedDataSize": len(body)} if compressed else {}),
        "TransformMatrix": " ".join(str(int(v)) for v in np.eye(axes).ravel()),
        "Offset": " ".join(["0"] * axes),
        "ElementSpacing": " ".join(["1"] * axes),
        "DimSize": " ".join(str(n) for n in pixels.shape[::-1]),
        "ElementType": "MET_UCHAR",
        "ElementDataFile": "LOCAL",
    }
    text = "".join(f"{key} = {value}\n" for key, value in header.items())
    path.write_bytes(text.encode("ascii") + body)


# --- images without labels ------------------------------------------------------------


def write_folder(out: Path, patients: int, seed=0, size: int | None = None):
    """A plain folder of grey images, PNG and JPEG, one subfolder per patient."""
    shape = fitted((384, 512), size)
    total = patients * PER_PATIENT
    for index in progress(range(total), total, "folder"):
        patient, order = divmod(index, PER_PATIENT)
        phantom = render_phantom(
            index, seed=seed, size=shape, images_per_patient=PER_PATIENT
        )
        stem = Path(out) / f"patient{patient + 1:05d}" / f"{order:02d}"
        if order % 3 == 2:
            Image.fromarray(phantom.image).save(stem.with_suffix(".jpg"), quality=92)
        else:
            write_png(stem.with_suffix(".png"), phantom.image)
