"""The folder of a run: settings, records of each step, checkpoints, and in the end ``theta.json``."""

import json
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter

from eos_search.data import Data
from eos_search.export import write_json
from eos_search.frozen import model_path
from eos_search.raw import weights_digest
from eos_search.settings import SearchSettings, read_settings
from eos_search.theta import layers_of
from eos_vllm.core.errors import SettingError

RECORDS = "log.jsonl"
SETTINGS = "settings.json"
DATA = "data.json"
THETA = "theta.json"
RUN = "run.json"
RESTARTS = "restarts.json"
_CHECKPOINTS = "checkpoints"
_WEIGHTS = "weights"
_KEPT = 2


class RunFolder:
    """Writes a run's files; on processes other than the main one it only reads."""

    def __init__(self, path: Path, is_main: bool) -> None:
        self.path, self.is_main = path, is_main
        self._records: Any = None
        self._board: SummaryWriter | None = None

    @property
    def theta(self) -> Path:
        """Where the profile goes."""
        return self.path / THETA

    def check_new(self, results: Sequence[str] = (SETTINGS, THETA, RESTARTS)) -> None:
        """Whether a new run can have the folder, as far as that shows without making it.

        Args:
            results: files that only a run leaves behind.

        Raises:
            SettingError: it holds a run already, or lies where nothing can be written.
        """
        if any((self.path / name).exists() for name in results):
            remedy = "go on with it by --resume, or name another folder"
            raise SettingError("output", str(self.path), "it holds a search already", remedy)
        there = next(folder for folder in (self.path.absolute(), *self.path.absolute().parents) if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise SettingError("output", str(self.path), "it cannot be written to", "name another folder")

    def create(self, settings: SearchSettings, data: Data) -> None:
        """Makes the folder for a new run.

        Raises:
            SettingError: it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / DATA, data.to_dict() | {_WEIGHTS: weights_digest(model_path(settings.model))})
            write_json(self.path / SETTINGS, settings.to_dict())
        except OSError as error:
            problem = f"it cannot be written to ({error.strerror})"
            raise SettingError("output", str(self.path), problem, "name another folder") from None

    def check_resumes(self, settings: SearchSettings) -> None:
        """Whether the run in the folder is one of these settings.

        Raises:
            SettingError: there is none, or a setting differs that may change the result.
        """
        file = self.path / SETTINGS
        try:
            before = read_settings(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            problem, remedy = "it holds no search to go on with", "leave out --resume, or name the folder of a run"
            raise SettingError("output", str(self.path), problem, remedy) from None
        if different := settings.differences(before):
            name = different[0]
            problem = f"the search in {self.path} has {name}={getattr(before, name)!r}"
            more = f" (and {len(different) - 1} more differ)" if len(different) > 1 else ""
            remedy = "give the same settings, or another output folder"
            raise SettingError(name, getattr(settings, name), problem + more, remedy)
        weights = weights_digest(model_path(settings.model))
        if self._data().get(_WEIGHTS, weights) != weights:
            problem = "its weights are not those that the search began with"
            raise SettingError("model", settings.model, problem, "bring them back, or name another output folder")

    def check_device(self, device: str) -> None:
        """Whether a run in the folder ran on the same kind of device; ``dtype`` auto and the last bits depend on it.

        Raises:
            SettingError: it ran on another.
        """
        file = self.path / RUN
        before = json.loads(file.read_text(encoding="utf-8")).get("device", device) if file.exists() else device
        if before.partition(":")[0] != device.partition(":")[0]:
            problem = f"the search in {self.path} ran on {before}"
            raise SettingError("device", device, problem, "go on there, or name another output folder")

    def check_data(self, data: Data) -> None:
        """Whether the data are those that the run in the folder began with.

        Raises:
            SettingError: they have changed.
        """
        before = {name: value for name, value in self._data().items() if name != _WEIGHTS}
        if before != data.to_dict():
            problem = "its rows are not those that the search began with"
            raise SettingError("data", data.summary()[0], problem, "bring them back, or name another output folder")

    def _data(self) -> dict[str, Any]:
        """Data and weights that the run began with; searches of before weights were kept have none of these."""
        file = self.path / DATA
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    def open(self, first_step: int) -> None:
        """Begins to record, from ``first_step``; records of later steps, which are done again, go."""
        if not self.is_main:
            return
        kept = [record for record in read_records(self.path) if record["step"] < first_step]
        file = self.path / RECORDS
        file.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
        self._records = file.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self.path / "tensorboard"), purge_step=first_step)

    def record(self, record: dict[str, Any]) -> None:
        """Adds the record of a step to the log and to TensorBoard."""
        if self._records is None or self._board is None:
            return
        self._records.write(json.dumps(record) + "\n")
        self._records.flush()
        for name, value in record["terms"].items():
            self._board.add_scalar(f"terms/{name}", value, record["step"])
        for kind, column in record.get("values", {}).items():
            for layer, value in zip(layers_of(len(column), record["acting"]), column, strict=True):
                self._board.add_scalar(f"{kind}/layer{layer:02d}", value, record["step"])

    def close(self) -> None:
        """Closes the logs."""
        if self._records is not None and self._board is not None:
            self._records.close()
            self._board.close()

    def save(self, accelerator: Accelerator, step: int) -> None:
        """Checkpoint before step ``step``; a kill at any moment leaves a whole one behind."""
        folder = self.path / _CHECKPOINTS
        part = folder / "part"
        if self.is_main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part))
        accelerator.wait_for_everyone()
        if self.is_main:
            target = folder / f"step-{step:08d}"
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
            for old in self._checkpoints()[:-_KEPT]:
                shutil.rmtree(old)
        accelerator.wait_for_everyone()

    @property
    def reached(self) -> int:
        """Step of the last checkpoint; 0 where there is none yet."""
        found = self._checkpoints()
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def load(self, accelerator: Accelerator) -> int:
        """Loads the last checkpoint and returns its step; 0 where there is none yet.

        Raises:
            SettingError: it cannot be read.
        """
        if not (found := self._checkpoints()):
            return 0
        try:
            accelerator.load_state(str(found[-1]))
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            problem = f"the checkpoint cannot be read ({type(error).__name__})"
            raise SettingError("output", str(found[-1]), problem, "remove it: the one before is taken") from None
        return self.reached

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / _CHECKPOINTS).glob("step-*"))


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Records of each step of a run's folder, in order.

    Each holds ``step``, ``terms`` (see :class:`eos_search.loop.StepResult`), ``acting`` layers, ``counts`` behind
    them, and every so many steps ``values``: Theta by kind, one number per layer, before the update of the step.
    A last line that a kill cut short is left out.
    """
    file = Path(path) / RECORDS
    if not file.exists():
        return []
    records = []
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records
