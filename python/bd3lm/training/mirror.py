"""A copy of a run at a URL: made while it trains, and taken back where the local one is gone.

The copy has the layout of the run: ``config.json``, ``metrics.jsonl`` and ``checkpoint/`` with its
numbered folders and pointers. A folder is uploaded with its ``config.json`` last, a pointer after
the folder that it names, and an older folder is removed after the pointer. An upload may end at any
moment: ``latest`` names a whole checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from bd3lm.checkpoint.record import parse_json, read_bytes
from bd3lm.checkpoint.remote import CONFIG, download_checkpoint, pointed
from bd3lm.checkpoint.steps import BEST, FOLDER, LATEST, StepFolders, step_of
from bd3lm.config import TrainConfig, from_dict
from bd3lm.errors import CheckpointError, ConfigError, ExistsError, StorageError
from bd3lm.files import write_text
from bd3lm.storage import Remote
from bd3lm.training.settings import check_resumed

BEFORE = ("tokenizer.json", "metrics.jsonl")
"""Files of a run that are copied before the checkpoint that is built on them."""
AFTER = ("samples.txt", "summary.json")
"""Files that say that a run has ended, hence copied after its last checkpoint."""


class Mirror:
    """Uploads the checkpoints of a run in a thread of its own.

    Only the newest state counts: where an upload takes longer than the time between two saves, the
    next one begins with the last checkpoint.

    Args:
        url: of the copy.
        out: directory of the run.
        checkpoints: its checkpoints; a folder stays there until it is uploaded.
    """

    def __init__(self, url: str, out: Path, checkpoints: StepFolders) -> None:
        self.remote = Remote(url, "mirror")
        self._checkpoints = self.remote.below(FOLDER)
        self._out, self._local = out, checkpoints
        self._sent: dict[str, bytes] = {}
        self._changed = threading.Condition()
        self._due = self._closing = False
        self._failure: Exception | None = None
        self._warned: Exception | None = None
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Upload the settings, which shows that the URL can be written to, and then the rest.

        Raises:
            StorageError: the storage refuses to take them.
        """
        self._replace(CONFIG, (self._out / CONFIG).read_bytes())
        self.update()

    def update(self) -> None:
        """Upload the present state of the run soon; returns at once."""
        with self._changed:
            self._due = True
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="bd3lm-mirror", daemon=True)
            self._thread.start()

    def warn(self, note: Callable[[str], None]) -> None:
        """Pass on the sentence of an upload that failed since the last call."""
        failure = self._failure
        if failure is not None and failure is not self._warned:
            note(f"mirror: {failure}; the next checkpoint is uploaded again")
            self._warned = failure

    def finish(self) -> None:
        """Upload what is left, and wait for it.

        Raises:
            StorageError: the last upload failed; the local run is complete.
        """
        self.update()
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread, self._closing = None, False
        if self._failure is not None:
            raise StorageError(
                f"{self.remote} lacks the end of this run, which is whole in {self._out}: "
                f"{self._failure}"
            ) from self._failure

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._due or self._closing)
                if not self._due:
                    return
                self._due = False
            try:
                self.upload()
                self._failure = None
            except Exception as error:
                self._failure = error

    def upload(self) -> None:
        """Bring the copy to the present state of the run.

        Raises:
            Bd3lmError: the storage refuses a request.
        """
        ended = self._contents(AFTER)  # read first: what is written later belongs to a later state
        self._replace(CONFIG, (self._out / CONFIG).read_bytes())
        with self._local.held(BEST) as best, self._local.held(LATEST) as latest:
            for folder in (best, latest):
                if folder is not None:
                    self._upload_folder(folder)
            for name, content in self._contents(BEFORE).items():
                self._replace(name, content)
            for pointer, folder in ((BEST, best), (LATEST, latest)):
                if folder is not None:
                    self._replace(f"{FOLDER}/{pointer}", folder.name.encode() + b"\n")
        for name, content in ended.items():
            self._replace(name, content)
        self._prune()

    def _contents(self, names: Sequence[str]) -> dict[str, bytes]:
        """Content of those of the run's files that are there."""
        files = {name: self._out / name for name in names}
        return {name: file.read_bytes() for name, file in files.items() if file.is_file()}

    def _upload_folder(self, folder: Path) -> None:
        """Upload a checkpoint that is not there yet."""
        remote = self._checkpoints.below(folder.name)
        content = read_bytes(folder / CONFIG)
        if remote.read(CONFIG) == content:
            return
        if folder.name in self._pointed():
            raise ExistsError(f"{remote} is of another run; choose another mirror")
        self._checkpoints.remove(folder.name)
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            name = file.relative_to(folder).as_posix()
            if name != CONFIG:
                remote.upload(file, name)
        remote.upload(folder / CONFIG, CONFIG)

    def _pointed(self) -> list[str | None]:
        return [pointed(self._checkpoints, pointer) for pointer in (LATEST, BEST)]

    def _prune(self) -> None:
        """Remove all folders but the last ones that are whole, and those that are pointed to."""
        needed = self._pointed()
        last, kept = _step(needed[0]), 0
        steps = [name for name in self._checkpoints.folders() if step_of(name) is not None]
        for name in sorted(steps, key=_step, reverse=True):
            whole = _step(name) <= last and CONFIG in self._checkpoints.sizes(name)
            kept += whole
            if name not in needed and not (whole and kept <= self._local.keep):
                self._checkpoints.remove(name)

    def _replace(self, name: str, content: bytes) -> None:
        if self._sent.get(name) != content:
            self.remote.replace(name, content)
            self._sent[name] = content


def open_mirror(url: str, out: Path, keep: int, *, resume: bool) -> None:
    """Look at the copy before a run begins or continues.

    A run that is resumed takes its last checkpoint from the copy if that is later than the local
    one, which may be gone.

    Args:
        url: of the copy.
        out: directory of the run, locked.
        keep: last checkpoints that stay in it.
        resume: continue what is there.

    Raises:
        ExistsError: the URL holds a run, and ``resume`` is off.
        ConfigError: the run there is another than the one in ``out``.
        CheckpointError: the copy is damaged.
        StorageError: the storage refuses a request.
    """
    remote = Remote(url, "mirror")
    content = remote.read(CONFIG)
    if content is None:
        return
    if not resume:
        raise ExistsError(
            f"{remote} already holds a run; choose another --mirror, or continue it with --resume"
        )
    if (out / CONFIG).is_file():
        own = _settings(read_bytes(out / CONFIG), out / CONFIG)
        check_resumed(own, _settings(content, f"{remote}/{CONFIG}"), remote)
    folders = StepFolders(out / FOLDER, keep)
    latest = folders.latest()
    local = None if latest is None else latest.name
    if _step(pointed(remote.below(FOLDER), LATEST)) > _step(local):
        _restore(remote, content, out, folders)


def mirrored_config(url: str) -> TrainConfig | None:
    """Settings of the run whose copy is at a URL; None where there is none.

    Raises:
        CheckpointError: they are damaged.
    """
    remote = Remote(url, "mirror")
    content = remote.read(CONFIG)
    return None if content is None else _settings(content, f"{remote}/{CONFIG}")


def _restore(remote: Remote, settings: bytes, out: Path, folders: StepFolders) -> None:
    """Download a run: the folders that its pointers name, every file compared with its digest.

    Its settings are first, so that a directory that is not complete can be resumed again, and the
    files of a run that has ended are last.
    """

    def fetch(names: Sequence[str]) -> None:
        for name in names:
            if name in present:
                remote.download(name, out / name)

    present = remote.sizes()
    if not (out / CONFIG).is_file():
        write_text(out / CONFIG, settings.decode())
    fetch(BEFORE)
    checkpoints = remote.below(FOLDER)
    for pointer in (BEST, LATEST):
        name = pointed(checkpoints, pointer)
        if name is None:
            continue
        if not (folders.root / name).is_dir():
            with folders.new(_step(name)) as folder:
                download_checkpoint(checkpoints.below(name), folder)
        folders.point(pointer, _step(name))
    fetch(AFTER)


def _settings(content: bytes, source: object) -> TrainConfig:
    try:
        return from_dict(TrainConfig, parse_json(content, source))
    except ConfigError as error:
        raise CheckpointError(f"{source}: {error}") from error


def _step(folder: str | None) -> int:
    """Step of a checkpoint's folder; -1 where there is none."""
    step = None if folder is None else step_of(folder)
    return -1 if step is None else step
