"""One input file -> encoded records, or the reason why there are none."""

import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import NamedTuple

import cv2
import numpy as np

from ultradino_jax.data.cache import encode
from ultradino_jax.data.formats import archives
from ultradino_jax.data.formats.frames import MAX_BYTES, MAX_SIDE, Clip
from ultradino_jax.data.formats.listing import is_junk
from ultradino_jax.data.formats.readers import HEAD, kind_of, read_clip
from ultradino_jax.data.formats.stills import to_grey
from ultradino_jax.data.formats.unreadable import Unreadable
from ultradino_jax.data.formats.video import read_video
from ultradino_jax.data.prepare.burned_text import count_text_lines
from ultradino_jax.data.prepare.dedup import near_hash, pixel_sha256
from ultradino_jax.data.prepare.region import (
    Box,
    bmode_boxes,
    chroma,
    crop,
    find_regions,
    has_colour_flow,
)

_MIN_SIDE = 32
_MIN_CONTRAST = 2.0  # standard deviation, grey levels
_PAGE_LINES = 8  # text-like lines that make a region a page


@dataclass(frozen=True)
class Settings:
    """What prepare does to every frame; see `prepare.prepare` for the meanings."""

    short_side: int = 256
    encoding: str = "jpeg"
    fps: float = 3.0
    max_frames: int = 32
    region: bool = True
    hashes_only: bool = False


class Task(NamedTuple):
    """Part of one input. entry: its number; name: path below the input's root.

    start, stop: members of an archive; stop is None for a whole file of unknown kind.
    """

    entry: int
    path: str
    name: str
    start: int = 0
    stop: int | None = None


class Record(NamedTuple):
    """One region of one frame, ready to write."""

    box: int
    payload: bytes
    near: np.ndarray
    height: int
    width: int
    total: int  # sum of grey levels
    total_squares: int
    text_lines: int


@dataclass
class FrameResult:
    """Records of one frame, or the reason why there are none."""

    frame: int
    sha256: bytes
    near: np.ndarray
    records: list[Record] = field(default_factory=list)
    reason: str = ""


@dataclass
class MemberResult:
    """Outcome of one input. member: its number in the archive, -1 for a plain file.

    patient, study: as in the input; only their keyed hashes are ever written.
    """

    member: int
    reason: str = ""
    detail: str = ""
    count: int = 0
    patient: str = ""
    study: str = ""
    frames: list[FrameResult] = field(default_factory=list)


def run_task(task: Task, settings: Settings, emit) -> None:
    """Works through a task and reports by emit(kind, value).

    ("beat", member): still alive, at this member. ("member", MemberResult).
    ("split", (count, part, damaged)): an archive of `count` members, to be asked for in
    parts. Never raises for what is wrong with the input.
    """
    emit("beat", task.start)
    try:
        if any(map(is_junk, task.name.split("/"))):
            raise Unreadable("junk")
        kind, data = _open(task.path)
        if kind not in archives.KINDS:
            emit("member", _run_member(data, kind, task.path, task.name, -1, settings))
        elif task.stop is None:
            _list_archive(task, kind, emit)
        else:
            _run_part(task, kind, settings, emit)
    except Unreadable as error:
        emit("member", MemberResult(-1, error.reason, error.detail))


def _list_archive(task: Task, kind: str, emit) -> None:
    count, damaged = archives.count_members(
        task.path, kind, lambda _: emit("beat", task.start)
    )
    if not count and not damaged:
        raise Unreadable("empty")
    emit("split", (count, archives.PART.get(kind, archives.PART_STREAM), damaged))


def _run_part(task: Task, kind: str, settings: Settings, emit) -> None:
    assert task.stop is not None  # an archive is listed first
    member = task.start
    try:
        for member, name, content in archives.read_members(
            task.path, kind, task.start, task.stop, lambda m: emit("beat", m)
        ):
            name = f"{task.name}/{name}"
            if any(map(is_junk, name.replace("\\", "/").split("/"))):
                result = MemberResult(member, "junk")
            elif isinstance(content, Unreadable):
                result = MemberResult(member, content.reason, content.detail)
            else:
                inner = kind_of(content[:HEAD])
                result = _run_member(content, inner, None, name, member, settings)
            emit("member", result)
            member += 1
    except Exception as error:
        # A stream that breaks takes the rest of the part with it.
        for lost in range(member, task.stop):
            emit("member", MemberResult(lost, "unreadable", type(error).__name__))


def _open(path: str) -> tuple[str, bytes]:
    """Kind and contents of a file; archives and videos are not read here."""
    try:
        # Not to hang on a pipe that took the file's place since the scan.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable("not_a_file")
            head = file.read(HEAD)
            if not head:
                raise Unreadable("empty")
            kind = kind_of(head)
            if not kind:
                raise Unreadable("unsupported")
            if kind == "video" or kind in archives.KINDS:
                return kind, b""
            if status.st_size > MAX_BYTES:
                raise Unreadable("too_large")
            file.seek(0)
            return kind, file.read(status.st_size)
    except PermissionError:
        raise Unreadable("no_permission") from None
    except OSError as error:
        raise Unreadable("unreadable", type(error).__name__) from None


def _run_member(
    data: bytes,
    kind: str,
    path: str | None,
    name: str,
    member: int,
    settings: Settings,
) -> MemberResult:
    try:
        if not data and kind != "video":
            raise Unreadable("empty")
        if path is None and kind in archives.KINDS:
            raise Unreadable("nested_archive")
        if kind == "video":
            if path is None:
                raise Unreadable("video_in_archive")
            clip = read_video(path, settings.fps, settings.max_frames)
        else:
            clip = read_clip(
                data,
                kind,
                settings.fps,
                settings.max_frames,
                any_modality=not settings.region,
                path=path,
            )
        frames = _run_clip(clip, settings)
    except Unreadable as error:
        return MemberResult(member, error.reason, error.detail)
    except MemoryError:
        return MemberResult(member, "too_large")
    except Exception as error:
        # Decoders raise whatever they like on damaged bytes. Only the type is kept:
        # messages quote the file.
        return MemberResult(member, "unreadable", type(error).__name__)
    patient, study = _groups(name)
    return MemberResult(
        member,
        count=clip.count,
        patient=f"dicom\0{clip.patient}" if clip.patient else patient,
        study=f"dicom\0{clip.study}" if clip.study else study,
        frames=frames,
    )


def _groups(name: str) -> tuple[str, str]:
    """Patient and study of a file without tags, from its name or else its folder.

    Knows the names of FETAL_PLANES_DB (Patient00001_...), the African set
    (patient001_DZA_...), FASS (P01_IMG1) and HC18 (001_2HC). A file in the top folder
    with no such name stands alone.
    """
    path = PurePosixPath(name)
    folder = str(path.parent)
    known = re.match(
        r"(?:(patient\d+(?:_[A-Z]{3}(?=_))?)|(P\d+)_IMG\d|(\d+)_\d?HC\b)",
        path.name,
        re.IGNORECASE,
    )
    if known:
        patient = next(g for g in known.groups() if g).lower()
        return patient, f"{folder}/{patient}"
    return (folder, folder) if folder != "." else (name, name)


def _run_clip(clip: Clip, settings: Settings) -> list[FrameResult]:
    if not clip.frames:
        raise Unreadable("unreadable")
    if max(max(f.shape[:2]) for f in clip.frames) > MAX_SIDE:
        raise Unreadable("too_large")
    # A hash list has to name every frame, whatever the region finder thinks of it.
    strict = settings.region and not settings.hashes_only
    pairs = [_grey_and_chroma(frame, settings.region) for frame in clip.frames]
    grey, spreads = [g for g, _ in pairs], [spread for _, spread in pairs]
    boxes = None
    if settings.region and clip.regions:
        boxes = bmode_boxes(clip.regions, *grey[0].shape)
        if boxes == [] and strict:
            raise Unreadable("not_bmode")
    results = []
    # Pages of a TIFF can differ in size: one search per size, over all its frames.
    searched = {}
    for position, frame, spread in zip(clip.chosen, grey, spreads, strict=True):
        if settings.region and frame.shape not in searched:
            same = [i for i, g in enumerate(grey) if g.shape == frame.shape]
            searched[frame.shape] = find_regions(
                [grey[i] for i in same], [spreads[i] for i in same], boxes
            )
        whole = (Box(0, 0, *frame.shape), np.ones(frame.shape, bool))
        regions = searched[frame.shape] if settings.region else [whole]
        result = FrameResult(position, pixel_sha256(frame), near_hash(frame))
        _add_records(result, frame, spread, regions, settings)
        results.append(result)
    reasons = {result.reason for result in results}
    if len(reasons) == 1 and reasons != {""} and not settings.hashes_only:
        raise Unreadable(reasons.pop())  # one line for the file, not one per frame
    return results


def _grey_and_chroma(
    frame: np.ndarray, wanted: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Luma [H,W], and `region.chroma` [H,W] where it is wanted and there is any."""
    if frame.ndim == 2:
        return frame, None
    red, green, blue = cv2.split(frame)
    if np.array_equal(red, green) and np.array_equal(green, blue):
        return red, None  # the luma of equal channels, and most ultrasound in colour
    return to_grey(frame), chroma(frame) if wanted else None


def _add_records(
    result: FrameResult,
    frame: np.ndarray,
    spread: np.ndarray | None,
    regions: list[tuple[Box, np.ndarray]],
    settings: Settings,
) -> None:
    """Fills result.records from the frame's regions; result.reason if none is left."""
    if not regions:
        flooded = spread is not None and (spread > 30).mean() > 0.1
        result.reason = "colour" if flooded else "no_region"
    for number, (box, mask) in enumerate(regions):
        inside = None if spread is None else spread[box.y0 : box.y1, box.x0 : box.x1]
        pixels = crop(frame, box, mask)
        if min(pixels.shape) < _MIN_SIDE:
            result.reason = "too_small"
        elif has_colour_flow(inside, mask):
            result.reason = "colour"
        elif cv2.meanStdDev(pixels, mask=mask.view(np.uint8))[1] < _MIN_CONTRAST:
            result.reason = "blank"
        else:
            record = _record(number, pixels, settings)
            if settings.region and record.text_lines >= _PAGE_LINES:
                result.reason = "text_page"
            else:
                result.records.append(record)
    if result.records:
        result.reason = ""


def _record(number: int, pixels: np.ndarray, settings: Settings) -> Record:
    near = near_hash(pixels)
    height, width = pixels.shape
    if settings.hashes_only:
        return Record(number, b"", near, height, width, 0, 0, 0)
    text_lines = count_text_lines(pixels)
    if settings.short_side and min(height, width) > settings.short_side:
        scale = settings.short_side / min(height, width)
        height, width = (max(1, round(n * scale)) for n in (height, width))
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    levels = np.bincount(pixels.ravel(), minlength=256)
    values = np.arange(256)
    return Record(
        number,
        encode(pixels, settings.encoding),
        near,
        height,
        width,
        int(levels @ values),
        int(levels @ values**2),
        text_lines,
    )
