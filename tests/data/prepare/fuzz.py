"""Damages files of every kind at random and sends them through prepare."""

import collections
import gzip
import io
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import cv2
import nibabel
import numpy as np
import tifffile
from PIL import Image
from pydicom.data import get_testdata_file

from ultradino_jax.data.cache import INDEX
from ultradino_jax.data.formats.restricted_pickle import load_npy_pickle
from ultradino_jax.jsonl import read_rows
from ultradino_jax.prepare import lookup, prepare

_DICOM = (
    "examples_ybr_color.dcm",  # multi-frame, JPEG
    "examples_palette.dcm",
    "examples_rgb_color.dcm",
    "examples_jpeg2k.dcm",
    "SC_rgb_rle_2frame.dcm",
    "MR_small_bigendian.dcm",
    "image_dfl.dcm",
)


def originals() -> list[bytes]:
    """One sound file of every kind that prepare reads."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:96, :128]
    fan = (np.hypot(y + 20, x - 64) > 30) & (abs(x - 64) < 0.7 * (y + 20))
    speckle = cv2.GaussianBlur(rng.rayleigh(60, (4, 96, 128)), (0, 0), 1).clip(6, 255)
    stack = np.where(fan, speckle, 0).astype(np.uint8)
    files = []
    for extension in (".png", ".jpg", ".tiff", ".bmp", ".webp"):
        files.append(cv2.imencode(extension, stack[0])[1].tobytes())
    for form in ("GIF", "JPEG2000", "PPM", "TIFF"):
        pages = [Image.fromarray(page) for page in stack]
        many = form in ("GIF", "TIFF")
        more = {"save_all": True, "append_images": pages[1:]} if many else {}
        file = io.BytesIO()
        pages[0].save(file, form, **more)
        files.append(file.getvalue())
    for pixels in (stack[0].astype(np.float16), stack[0].astype(np.uint16) << 4):
        file = io.BytesIO()
        tifffile.imwrite(file, pixels, bigtiff=True, compression="zlib")
        files.append(file.getvalue())
    image = nibabel.Nifti1Image(stack.T, np.eye(4))
    files += [image.to_bytes(), gzip.compress(image.to_bytes())]
    for name in _DICOM:
        files.append(Path(get_testdata_file(name, download=False)).read_bytes())
    for array, allowed in ((stack, False), (np.array({"image": stack[0]}), True)):
        file = io.BytesIO()
        np.save(file, array, allow_pickle=allowed)
        files.append(file.getvalue())
    assert load_npy_pickle(files[-1])["image"].shape == (96, 128)
    head = (
        "ObjectType = Image\nNDims = 3\nDimSize = 128 96 4\nElementType = MET_UCHAR\n"
    )
    for compressed in (False, True):
        body = zlib.compress(stack.tobytes()) if compressed else stack.tobytes()
        tail = f"CompressedData = {compressed}\nElementDataFile = LOCAL\n"
        files.append((head + tail).encode() + body)
    files += [_video(stack, "MJPG", "avi"), _video(stack, "mp4v", "mp4")]
    files += [_zip(files[:6]), _tar(files[:6], "w"), _tar(files[:6], "w:gz")]
    return files


def _video(stack: np.ndarray, codec: str, suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"clip.{suffix}"
        code = cv2.VideoWriter_fourcc(*codec)
        writer = cv2.VideoWriter(str(path), code, 5, stack.shape[:0:-1])
        for frame in stack:
            writer.write(cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR))
        writer.release()
        return path.read_bytes()


def _zip(files: list[bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for number, data in enumerate(files):
            archive.writestr(f"member{number}", data)
    return out.getvalue()


def _tar(files: list[bytes], mode: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for number, data in enumerate(files):
            info = tarfile.TarInfo(f"member{number}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """Truncates, flips bits anywhere or in the header, cuts or repeats a stretch."""
    how = rng.integers(5)
    if how == 0:
        return data[: int(rng.integers(len(data)))]
    if how in (1, 2):
        damaged = bytearray(data)
        reach = len(data) if how == 1 else min(len(data), 600)
        for place in rng.integers(reach, size=rng.integers(1, 17)):
            damaged[place] ^= 1 << int(rng.integers(8))
        return bytes(damaged)
    start, stop = sorted(rng.integers(len(data), size=2).tolist())
    if how == 3:
        return data[:start] + data[stop:]
    return data[:stop] + data[start:]


def fuzz(folder: Path, count: int, seed: int, workers: int, timeout: float) -> dict:
    """Damages, prepares and accounts for `count` files below `folder`.

    Returns the number of files by what became of them. Raises AssertionError when a
    file is neither among the records nor among the skipped.
    """
    rng = np.random.default_rng(seed)
    inputs, output = folder / "inputs", folder / "cache"
    inputs.mkdir(parents=True)
    sound = originals()
    for number in range(count):
        data = damage(sound[number % len(sound)], rng)
        (inputs / f"{number:05d}").write_bytes(data)
    prepare(inputs, output, workers=workers, timeout=timeout, progress=False)
    fate = {}
    for entry in read_rows(output / "skipped.jsonl"):
        fate.setdefault(entry["id"], entry["reason"])
    for path in output.glob("shard-*.npy"):
        for row in np.load(path).astype(INDEX):
            fate[row["file"].tobytes().hex()] = "kept"
    outcome: dict[str, str] = {}
    for file_id, path in lookup(inputs, [inputs], folder / "cache.key"):
        name = path.partition("!")[0]
        if file_id in fate and outcome.get(name) != "kept":
            outcome[name] = fate[file_id]
        else:
            outcome.setdefault(name, "")
    lost = [name for name, what in outcome.items() if not what]
    assert len(outcome) == count and not lost, f"{len(lost)} inputs unaccounted: {lost}"
    return dict(collections.Counter(outcome.values()).most_common())
