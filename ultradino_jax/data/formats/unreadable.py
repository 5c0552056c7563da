"""The reasons for which an input leaves no record, in words that name no patient."""

from ultradino_jax.errors import UserError

REASONS = {
    "empty": "the file has no bytes",
    "unreadable": "damaged or truncated",
    "junk": "a file of the operating system, or hidden",
    "unsupported": "not a picture, clip or archive this reads",
    "missing_decoder": "needs a decoder that is not installed",
    "no_pixels": "DICOM without pixel data (directory, report, waveform, plan)",
    "bad_frame_count": "number of frames is zero, missing or not a number",
    "too_large": "more bytes or pixels than any ultrasound frame has",
    "video": "a video: prepare reads it, frame by frame",
    "archive": "an archive: prepare reads it, or unpack it",
    "unsafe_pickle": "pickle that could run code",
    "unsafe_member": "archive member with a path that leaves the archive, or a link",
    "nested_archive": "archive inside an archive: unpack the outer one first",
    "encrypted": "archive member that needs a password",
    "video_in_archive": "videos are read from files: unpack the archive first",
    "not_a_file": "broken link, device, pipe or directory loop",
    "no_permission": "may not be read",
    "timeout": "took longer than the time limit for one file, twice",
    "worker_died": "ended its process twice (decoder crash or out of memory)",
    "not_ultrasound": "DICOM of another modality",
    "not_bmode": "the tags name only M-mode, spectra, waveforms or graphics",
    "no_region": "no ultrasound region in the tags or in the pixels",
    "colour": "colour Doppler or another colour overlay",
    "text_page": "so much text that it looks like a report or a screen",
    "blank": "no contrast",
    "too_small": "fewer than 32 pixels on a side",
    "exact_duplicate": "the same pixels were kept before",
    "near_duplicate": "nearly the same picture was kept before",
    "excluded": "matches an image on the exclude list",
}


class Unreadable(UserError):
    """One input that yields no frames. reason: a key of REASONS.

    detail: a fixed phrase. It is written to disk, so it must never quote the input:
    decoders' own messages can hold names and dates.
    """

    def __init__(self, reason: str, detail: str = ""):
        assert reason in REASONS, reason
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        detail = f" ({self.detail})" if self.detail else ""
        return f"{REASONS[self.reason]}{detail}"
