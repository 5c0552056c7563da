"""Text-like marks that remain inside an ultrasound region: an audit, not a cleaner."""

import cv2
import numpy as np

# (kernel side in pixels, contrast in grey levels): fine and coarse strokes.
_PASSES = ((5, 50), (9, 70))
_LETTERS = 4  # fewer marks in a row are not called text


def count_text_lines(pixels: np.ndarray) -> int:
    """Number of text-like lines in a grey picture [H,W] uint8 at its original size.

    A line is four or more thin bright marks of one height and one grey level, side by
    side on one baseline. Small (under 8 px), faint, dark and slanted text is missed.
    """
    return max(
        _count_rows(_marks(pixels, side, contrast)) for side, contrast in _PASSES
    )


def _marks(pixels: np.ndarray, side: int, contrast: int) -> list[tuple]:
    """Letter-sized strokes as (left, right, baseline, height, ink)."""
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (side, side))
    strokes = cv2.morphologyEx(pixels, cv2.MORPH_TOPHAT, kernel)
    _, strokes = cv2.threshold(strokes, contrast, 1, cv2.THRESH_BINARY)
    # Outlines cost a tenth of labelled components, and letters are few.
    outlines, _ = cv2.findContours(strokes, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    marks = []
    for x, y, width, height in map(cv2.boundingRect, outlines):
        if not 6 <= height <= 60 or width > 2.5 * height:
            continue
        part = slice(y, y + height), slice(x, x + width)
        area = cv2.countNonZero(strokes[part])
        # Solid blobs are not letters, unless as slim as an I or a 1.
        if area <= 0.85 * width * height or width <= 0.4 * height:
            ink = cv2.mean(pixels[part], strokes[part])[0]
            marks.append((x, x + width, y + height, height, ink))
    return sorted(marks)


def _count_rows(marks: list[tuple]) -> int:
    """Chains of at least _LETTERS neighbouring marks, from left to right."""
    lines, rows = 0, []
    for left, right, base, height, ink in marks:
        rows = [row for row in rows if left - row[0] <= 1.5 * row[2]]
        for row in rows:
            if (
                left - row[0] >= -2
                and abs(base - row[1]) <= 0.25 * row[2]
                and 0.65 <= height / row[2] <= 1.5
                and abs(ink - row[3]) <= 30
            ):
                row[:] = [right, base, height, ink, row[4] + 1]
                lines += row[4] == _LETTERS
                break
        else:
            rows.append([right, base, height, ink, 1])
    return lines
