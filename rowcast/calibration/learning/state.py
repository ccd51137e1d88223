"""The folder that a training command works in, `OUTPUT.state`, until its result stands whole at `OUTPUT`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rowcast.calibration.learning.part import Unfinished, World
from rowcast.calibration.owner import DESCRIPTION, REMOVED, SETTINGS, check_owner, made_by, remove_work, state_of, worked_in_by
from rowcast.errors import UserError
from rowcast.runtime.checkpoint.safetensors_file import SafetensorsSource
from rowcast.runtime.checkpoint.safetensors_header import read_header, read_metadata

RESULT, REPLACED = "result", "replaced"
REPLACES = "replaces"
"""Beside the settings of a state: the sha256 of the description of the result that it was begun to replace, or null."""
CHEAP = {SETTINGS, "text.bin", "text.json", "writing.json", "sensitivities.safetensors"}
"""Files of a state that took seconds: where there is nothing else, other settings just begin anew."""
REMADE = {RESULT, "stored"}
"""What is made anew, however much of it there is."""
OPTIONS = {
    "judged_tokens": "--judged", "written_tokens": "--written", "most_bytes": "--size", "texts": "--text", "contexts": "--context",
    "compiled": "--compile", "start_fingerprint": "--start", "model": "the model", "fingerprint": "the model",
    "stored": "the model", "windows_begin_with": "what windows begin with", "processes": "the number of processes",
    "format": "the version of rowcast",
}  # fmt: skip
"""What settings are called in a command, where that is not their name."""


class WorkFolder:
    """Settings, text, training state and unfinished result of one command, at `path`."""

    def __init__(
        self, output: Path, settings: Mapping[str, Any], *, restart: bool, leads: bool = True, reads: Sequence[Path] = ()
    ) -> None:
        """Go on where the same settings (plain JSON values, `command` among them) were left, or begin. Only the process that `leads`
        writes. `reads`: what the result is made of.

        Raises UserError where `output` or the folder beside it is another command's or holds other things or what is read, cannot be
        written, or was left or finished with other settings without `restart`. That removes what the command left half done, and
        its result when the new one takes its place.
        """
        self.path = state_of(output)
        self.output = output = self.path.with_name(self.path.name.removesuffix(".state"))
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        command: str = self.settings["command"]
        self.finished = False
        """Whether `output` is the result of these settings."""
        self._made = False
        """Whether the state was not there before, or held nothing of worth."""
        self._replaces: str | None = None
        """The result that the new one takes the place of, as `REPLACES`."""
        for path in reads:
            for folder in (output, self.path):
                if path.resolve().is_relative_to(folder.resolve()):
                    raise UserError(f"{folder} would take the place of {path}, which is read: give another folder with -o")
        replaced = self.path / REPLACED
        try:
            own = worked_in_by(self.path) == command
            killed = own and (self.path / SETTINGS).exists() and replaced.exists() and not output.exists()
            if leads and killed:  # in `publish`
                os.replace(replaced, output)
            if output.exists() and not output.is_dir():
                raise UserError(f"{output} is a file: give a folder of its own with -o")
            holds = self._holds
            if holds:
                check_owner(output, command)
                if made_by(output) is None:
                    raise UserError(f"{output} is there already and not empty: give a folder of its own with -o")
            left = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set[str]()
            if left:
                check_owner(self.path, command)
            if left - {f"{SETTINGS}.part"} and not own and (restart or not holds):
                raise UserError(
                    f"{self.path} is what is worked in and holds other things: move it away or give another folder with -o"
                )
            if leads and left and (restart or (own and (self.path / REMOVED).exists())):
                remove_work(self.path)
            begun = own and (self.path / SETTINGS).exists() and not self._changed(self.path / SETTINGS, None)
            if begun:
                self._replaces = json.loads((self.path / SETTINGS).read_bytes()).get(REPLACES)
            if holds and not restart and (not begun or self._taken):
                published = self._replaces is None or (replaced.exists() and not (self.path / RESULT).exists())
                if begun and (not published or self._changed(output / DESCRIPTION, "settings")):
                    raise self._other()
                self._check(output / DESCRIPTION, "settings")
                self.finished = True
                if leads and begun:  # killed in `publish`
                    with suppress(OSError):
                        remove_work(self.path)
            if leads and not self.finished:
                if left and left <= CHEAP and not begun:
                    remove_work(self.path)
                self._made = left <= CHEAP or not self.path.exists()
                self.path.mkdir(parents=True, exist_ok=True)
                if not (self.path / SETTINGS).exists():
                    self._replaces = _digest(output) if holds else None
                    whole = {**self.settings, REPLACES: self._replaces}
                    write_whole(self.path / SETTINGS, json.dumps(whole, indent=2).encode())
            if not self.finished:
                self._check(self.path / SETTINGS, None)
        except OSError as error:
            raise UserError(f"{output} cannot be written ({error.strerror}): give another folder with -o") from None

    @classmethod
    def together(
        cls, world: World, output: Path, settings: Mapping[str, Any], *, restart: bool, reads: Sequence[Path] = ()
    ) -> WorkFolder:
        """By all processes of `world`: first the one that leads, so that the others see what it leaves. Where it raises a UserError,
        they do."""
        begin = partial(cls, output, settings, restart=restart, leads=world.leads, reads=reads)
        try:
            folder = begin() if world.leads else None
        finally:
            world.wait()
        folder = folder or begin()
        world.wait()
        return folder

    @property
    def saved(self) -> bool:
        """Whether the state holds what took longer than to begin."""
        names = {path.name for path in self.path.iterdir()} if self.path.is_dir() else set[str]()
        return any(not name.endswith(".part") for name in names - CHEAP - REMADE)

    @contextmanager
    def worked_in(self) -> Iterator[None]:
        """While the command works. Where it ends in a UserError, a state that it began is removed unless something is `saved`; where it
        is Unfinished, that says whether something is."""
        try:
            yield
        except UserError:
            if self._made and not self.saved:
                with suppress(OSError):
                    remove_work(self.path)
            raise
        except Unfinished as stopped:
            stopped.saved = self.saved
            raise

    def description(self) -> dict[str, Any]:
        """Of the finished output."""
        found: dict[str, Any] = json.loads((self.output / DESCRIPTION).read_bytes())
        return found

    def publish(self, write: Callable[[Path], None], description: Mapping[str, Any]) -> None:
        """`write` the result's files into an empty folder, which then takes its place, with `description` and the settings beside them.
        Removes the state, and with it what the result takes the place of. Raises UserError where something else is there by then, or
        it cannot be written: the state stays."""
        part, replaced = self.path / RESULT, self.path / REPLACED
        shutil.rmtree(part, ignore_errors=True)
        whole = {**description, "settings": self.settings}
        try:
            part.mkdir(parents=True)
            with _room(part):
                write(part)
                (part / DESCRIPTION).write_text(json.dumps(whole, indent=2) + "\n")
            if self._taken:
                raise self._other()
            if self.output.exists() and self._replaces is None:
                self.output.rmdir()  # an empty one
            elif self.output.exists():
                shutil.rmtree(replaced, ignore_errors=True)
                os.replace(self.output, replaced)
            os.replace(part, self.output)
        except OSError as error:
            raise UserError(f"{self.output} cannot be written ({error.strerror}): give another folder with -o") from None
        with suppress(OSError):
            remove_work(self.path)

    @property
    def _holds(self) -> bool:
        """Whether something is at `output`."""
        return self.output.exists() and (not self.output.is_dir() or any(self.output.iterdir()))

    @property
    def _taken(self) -> bool:
        """Whether something is at `output` that the result must not take the place of."""
        return self._holds and (self._replaces is None or _digest(self.output) != self._replaces)

    def _other(self) -> UserError:
        return UserError(
            f"{self.output} holds something else than when {self.path} was begun: move it away, and the same command goes on without "
            "--restart"
        )

    def _check(self, path: Path, field: str | None) -> None:
        """Raise UserError where the settings in the JSON file `path`, or in a field of it, are others."""
        if changed := self._changed(path, field):
            raise UserError(
                f"{self.output} was begun with other settings ({', '.join(changed)}): add --restart to begin anew, or give the same "
                "settings to go on"
            )

    def _changed(self, path: Path, field: str | None) -> list[str]:
        """The options that are others there."""
        try:
            found = json.loads(path.read_bytes())
            left = found if field is None else found[field]
            fields = [name for name in {*self.settings, *left} if left.get(name) != self.settings.get(name) and name != REPLACES]
            return sorted({OPTIONS.get(name, f"--{name.replace('_', '-')}") for name in fields})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [f"{path.name} is damaged"]


def _digest(output: Path) -> str | None:
    """Of a result's description, in hexadecimal; None where there is none."""
    path = output / DESCRIPTION
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def write_whole(path: Path, data: bytes) -> None:
    """Whole or not at all. Raises UserError where it cannot be written."""
    part = path.with_name(f"{path.name}.part")
    with _room(part):
        part.write_bytes(data)
        os.replace(part, path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """As safetensors, whole or not at all. Raises UserError where it cannot be written: what was there stays."""
    part = path.with_name(f"{path.name}.part")
    with _room(part):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part, dict(metadata))
        os.replace(part, path)


@contextmanager
def _room(part: Path) -> Iterator[None]:
    """Errors of a full or broken disk as UserError, what was half written removed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)
        why = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(f"{part.parent} cannot be written ({why}): once it can be, the same command goes on") from None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """What `save_tensors` wrote. Raises UserError for a damaged file."""
    source = SafetensorsSource(read_header(path))
    return {name: source.read(name) for name in source.names()}, read_metadata(path)
