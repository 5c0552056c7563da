"""Collects results into shards, so that a killed run goes on where it was.

After each shard a journal entry says how far the input was read and what was counted.
A run that finds journals drops whatever came after the last one and reads on from
there: the same inputs then give the same bytes, however often it was killed.
"""

import fcntl
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from ultradino_jax.data.cache import (
    FORMAT,
    INDEX,
    VERSION,
    OutputError,
    record_name,
    write_shard,
)
from ultradino_jax.data.prepare.dedup import ExcludeList, NearIndex
from ultradino_jax.data.prepare.file import MemberResult
from ultradino_jax.data.prepare.report import write_report
from ultradino_jax.data.prepare.scan import Key
from ultradino_jax.errors import UserError, damaged
from ultradino_jax.whole import check_same, read_json, whole_file, write_json

DEDUP = ("near", "exact", "none")


class CacheBuilder:
    """Writes one cache, from results added in the order of the inputs. Use in a `with`.

    root: its directory. plan: options and input digest; a cache is only resumed, or
    found complete, under the same plan. cursor: (entry, member) to go on from.
    Raises UserError when the directory holds something else, OutputError when it
    cannot be written.
    """

    def __init__(
        self,
        root: Path,
        plan: dict,
        key: Key,
        exclude: ExcludeList,
        dedup: str,
        shard_records: int,
    ):
        self._root, self._work = root, root / ".work"
        self._plan, self._key = plan, key
        self._exclude, self._dedup = exclude, dedup
        self._shard_records = shard_records
        self.cursor = (0, 0)
        self.counts: dict[str, Counter] = {
            "inputs": Counter(),
            "frames": Counter(),
            "skipped_inputs": Counter(),
            "dropped_frames": Counter(),
        }
        self._moments = [0, 0, 0]
        self._shards: list[dict] = []
        self._names: list[str] = []  # of the records kept
        self._exact: dict[bytes, int] = {}
        self._near = NearIndex()
        self._start_shard()
        self.manifest: dict | None = None  # of a cache that is already finished
        self._lock = None

    def __enter__(self) -> "CacheBuilder":
        try:
            self.manifest = self._open()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if self._lock is not None:
            self._lock.close()

    @property
    def records(self) -> int:
        """Records kept so far."""
        return len(self._names)

    def _start_shard(self) -> None:
        self._payloads: list[bytes] = []
        self._rows: list[np.void] = []
        self._skipped: list[str] = []

    def _open(self) -> dict | None:
        """The manifest of a finished cache, else None with the journals read."""
        manifest, plan = self._root / "manifest.json", self._work / "plan.json"
        if manifest.exists():
            content = read_json(manifest)
            if content.get("format") != FORMAT:
                raise UserError(f"{manifest}: belongs to something else")
            self._check_plan(content.get("plan") or {})
            shutil.rmtree(self._work, ignore_errors=True)
            return content
        try:
            self._work.mkdir(parents=True, exist_ok=True)
            self._lock = open(self._work / "lock", "w")  # noqa: SIM115
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self._root}: another prepare is at work") from None
            if plan.exists():
                self._check_plan(read_json(plan))
            elif [p.name for p in self._root.iterdir()] != [".work"]:
                raise UserError(f"{self._root}: not empty, and no cache of prepare")
            else:
                write_json(plan, self._plan)
        except OSError as error:
            raise OutputError(f"cannot write {self._root}: {error}") from error
        self._resume()
        return None

    def _resume(self) -> None:
        while (path := self._journal(len(self._shards))).exists():
            with damaged(path):
                self._read_journal(read_json(path))
        done = {shard["file"] for shard in self._shards}
        done |= {name.replace(_AR, ".npy") for name in done}
        # What was cut off when it was written; earlier versions called it .tmp.
        for file in (*self._root.glob("shard-*"), *self._root.glob("*.tmp")):
            if file.name not in done:
                file.unlink(missing_ok=True)

    def _read_journal(self, entry: dict) -> None:
        self.cursor = tuple(entry["cursor"])
        self.counts = {k: Counter(v) for k, v in entry["counts"].items()}
        self._moments = entry["moments"]
        self._shards.append(entry["shard"])
        index = np.load(self._root / entry["shard"]["file"].replace(_AR, ".npy"))
        for row in index:
            self._remember(row)

    def _check_plan(self, found: dict) -> None:
        check_same(
            found,
            self._plan,
            self._root,
            "a cache",
            "choose another output, or delete it",
        )

    def _journal(self, number: int) -> Path:
        return self._work / f"{number:05d}.json"

    def _remember(self, row: np.void) -> None:
        self._exact.setdefault(row["sha256"].tobytes(), len(self._names))
        if self._dedup == "near":
            self._near.add(row["near"])
        self._names.append(record_name(row))

    def add(self, entry: int, file_id: bytes, result: MemberResult) -> None:
        """Keeps or drops what one file or archive member gave. Raises OutputError."""
        whole = result.member < 0
        self.cursor = (entry + 1, 0) if whole else (entry, result.member + 1)
        self.counts["inputs"]["read"] += 1
        if result.reason:
            self.counts["skipped_inputs"][result.reason] += 1
            self._skip(file_id, result.reason, detail=result.detail)
        self.counts["frames"]["in_files"] += result.count
        self.counts["frames"]["not_sampled"] += result.count - len(result.frames)
        patient = self._key.hash("patient", result.patient)
        study = self._key.hash("study", result.study)
        for frame in result.frames:
            reason, twin = self._verdict(frame)
            if reason:
                self._drop(file_id, frame.frame, reason, twin)
                continue
            for record in frame.records:
                twin = self._near.find(record.near) if self._dedup == "near" else None
                if twin is not None:
                    self._drop(file_id, frame.frame, "near_duplicate", twin)
                    continue
                row = np.zeros(1, INDEX)[0]
                row["file"] = np.frombuffer(file_id, np.uint8)
                row["frame"], row["box"] = frame.frame, record.box
                row["patient"] = np.frombuffer(patient, np.uint8)
                row["study"] = np.frombuffer(study, np.uint8)
                row["sha256"] = np.frombuffer(frame.sha256, np.uint8)
                row["near"] = record.near
                row["height"], row["width"] = record.height, record.width
                row["text_lines"] = min(record.text_lines, 65535)
                self._keep(row, record)
        if len(self._payloads) >= self._shard_records:
            self._seal()

    def _verdict(self, frame) -> tuple[str, int | None]:
        """Reason to drop a whole frame, and the record it repeats."""
        near = [frame.near, *(record.near for record in frame.records)]
        if self._exclude.matches(frame.sha256, near):
            return "excluded", None
        if frame.reason:
            return frame.reason, None
        twin = self._exact.get(frame.sha256) if self._dedup != "none" else None
        return ("", None) if twin is None else ("exact_duplicate", twin)

    def _keep(self, row: np.void, record) -> None:
        self._remember(row)
        self._rows.append(row)
        self._payloads.append(record.payload)
        self.counts["frames"]["kept"] += 1
        self._moments[0] += record.height * record.width
        self._moments[1] += record.total
        self._moments[2] += record.total_squares

    def _drop(self, file_id: bytes, frame: int, reason: str, twin: int | None) -> None:
        self.counts["dropped_frames"][reason] += 1
        like = {} if twin is None else {"like": self._names[twin]}
        self._skip(file_id, reason, frame=frame, **like)

    def _skip(self, file_id: bytes, reason: str, **more) -> None:
        more = {name: value for name, value in more.items() if value != ""}
        self._skipped.append(json.dumps({"id": file_id.hex(), "reason": reason} | more))

    def _seal(self) -> None:
        """Writes the shard, then the journal entry that makes it count."""
        number = len(self._shards)
        stem = self._root / f"shard-{number:05d}"
        self._shards.append(write_shard(stem, self._payloads, np.stack(self._rows)))
        entry = {
            "cursor": self.cursor,
            "counts": self.counts,
            "moments": self._moments,
            "shard": self._shards[-1],
            "skipped": self._skipped,
        }
        try:
            write_json(self._journal(number), entry)
        except OSError as error:
            raise OutputError(f"cannot write {self._work}: {error}") from error
        self._start_shard()

    def finish(self, versions: dict) -> dict:
        """Writes the last shard, the reports and the manifest; returns the manifest."""
        last = self._skipped
        if self._payloads:
            self._seal()
            last = []
        count, total, squares = self._moments
        mean = total / count / 255 if count else 0.0
        # Integers up to here: the difference of two large sums loses no digits.
        variance = (squares * count - total**2) / count**2 if count else 0
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "records": self.records,
            "channels": 1,
            "mean": [mean],
            "std": [variance**0.5 / 255],
            "counts": {k: dict(sorted(v.items())) for k, v in self.counts.items()},
            "shards": self._shards,
            "plan": self._plan,
            "versions": versions,
        }
        try:
            with (
                whole_file(self._root / "skipped.jsonl") as fresh,
                open(fresh, "w") as file,
            ):
                for number in range(len(self._shards)):
                    for line in read_json(self._journal(number))["skipped"]:
                        file.write(line + "\n")
                file.writelines(line + "\n" for line in last)
            write_report(self._root, manifest)
            write_json(self._root / "manifest.json", manifest)
        except OSError as error:
            raise OutputError(f"cannot write {self._root}: {error}") from error
        shutil.rmtree(self._work, ignore_errors=True)
        return manifest


_AR = ".array_record"
