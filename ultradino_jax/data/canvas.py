"""What a renderer on the device needs of an image: one canvas and the decisions.

All canvases are squares of one side Q, so that a batch has one shape whatever its
images are. The image lies in the upper left corner, the rest is zero and never read.
"""

import cv2
import numpy as np

from ultradino_jax.data.crops import CropDecisions


def place_on_canvas(
    image: np.ndarray, decisions: CropDecisions, side: int
) -> dict[str, np.ndarray]:
    """Puts an image on its canvas and moves the boxes along.

    An image that fits is copied as it is. A larger one is shrunk by averaging areas
    until its longer side is Q; its boxes become fractions of pixels.

    Args:
      image: uint8 [H, W, C].
      decisions: of `sample_crops` for this height and width.
      side: Q in pixels.

    Returns:
      canvas uint8 [Q, Q, C], boxes float32 [G+L, 4] in pixels of the canvas, and the
      other fields of the decisions as they are.
    """
    height, width, channels = image.shape
    boxes = decisions.boxes.astype(np.float32)
    longest = max(height, width)
    if longest > side:
        small = [max(1, round(n * side / longest)) for n in (height, width)]
        image = cv2.resize(image, small[::-1], interpolation=cv2.INTER_AREA)
        image = image.reshape(*small, channels)
        y, x = small[0] / height, small[1] / width
        boxes = (decisions.boxes * [y, x, y, x]).astype(np.float32)
    canvas = np.zeros((side, side, channels), np.uint8)
    canvas[: image.shape[0], : image.shape[1]] = image
    return {**vars(decisions), "canvas": canvas, "boxes": boxes}
