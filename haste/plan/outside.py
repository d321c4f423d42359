"""Files from outside that enter names by their content: checkpoints, and references. No torch."""

from __future__ import annotations

from pathlib import Path

from haste.config import Config
from haste.files import artefact
from haste.files.artefact import fingerprint, remembered_identity
from haste.networks import foreign
from haste.networks.headers import MissingError
from haste.networks.hub_files import HubFile, check_whole, commit_of, hub_file
from haste.networks.registry import address


class Outside:
    """What a configuration names by a path, or by an id of the hub.

    Attributes, all by what the configuration has written:
        identities: sha256 of the content; of a file that has been removed since, its earlier one.
        files: where the file lies on this machine; of a file of the hub that is not here, its id with the commit.
        keys: the key that names it.
        hub: of the hub's alone: the file and, once it is known, the commit.
        missing: of files that are not there and never were, what to do; their identities are made up.
    """

    def __init__(self, config: Config, root: str):
        """
        Args:
            config: the configuration.
            root: folder of all results, which remembers identities.

        Raises:
            ValueError: a checkpoint is a folder, or a damaged download.
        """
        self.identities, self.files, self.keys = dict[str, str](), dict[str, str](), dict[str, str]()
        self.missing, self._memory = dict[str, str](), f"{root}/identities.json"
        checkpoints = {spec.checkpoint: f"evaluate.{name}.checkpoint" for name, spec in config.evaluate.items()}
        starts = {r.warm_start.file: f"runs.{name}.warm_start.file" for name, r in config.runs.items() if r.warm_start}
        checkpoints |= dict(sorted(starts.items()))
        if folders := [Path(file) for file in checkpoints if Path(file).is_dir()]:
            raise ValueError(f"{folders[0]}: expected a checkpoint, found {foreign.folder(folders[0])}")
        self.hub: dict[str, HubFile] = {file: of for file in checkpoints if (of := hub_file(file))}
        detectors = config.detector.items()
        self.keys = checkpoints | {d.reference: f"detector.{n}.reference" for n, d in detectors if d.reference}
        for file, key in self.keys.items():
            try:
                self.files[file], self.identities[file] = (self._of_hub if file in self.hub else self._of_path)(file)
            except MissingError as error:
                self.missing[file] = f"{key}: {error}"
                self.files[file], self.identities[file] = file, fingerprint(["missing", file], 64)

    def _of_path(self, file: str) -> tuple[str, str]:
        try:
            return file, remembered_identity(file, self._memory)
        except ValueError as error:
            of = f" ADM's is at {url}" if (url := address(Path(file).name)) else ""
            raise MissingError(f"{error}. Put the file there, or correct the path.{of}") from error

    def _of_hub(self, file: str) -> tuple[str, str]:
        """Where a file of the hub lies, and its identity.

        It is that of the commit at which this results folder saw it first: were it of the main branch of the day, a row
        would change when its authors upload something, and nobody would know.
        """
        if known := artefact.remembered(file, self._memory):
            self.hub[file] = self.hub[file].at(known["revision"])
        of = self.hub[file]
        if (found := of.cached()) is None:
            if known is None:
                raise MissingError(of.absent())
            return str(of), known["sha256"]
        identity = remembered_identity(found, self._memory)
        check_whole(found, identity)
        if known and identity != known["sha256"]:  # in a cache without links, whose files have no sha256 as a name
            raise ValueError(
                f"{of}: damaged: holds {identity[:12]}, but {known['sha256'][:12]} when it was first seen. Remove "
                f"{found} and fetch it again"
            )
        if known is None:
            artefact.remember(file, {"revision": commit_of(found), "sha256": identity}, self._memory)
        return str(found), identity

    @property
    def notes(self) -> list[str]:
        """Which files are gone, and which the hub has of another commit by now, as far as this machine knows."""
        gone = "is gone; results that were made from it stay, but no more can be made"
        absent = (
            "is not on this machine any more; results that were made from it stay, and `haste fetch` loads it again"
        )
        away = [file for file in self.keys if file not in self.missing and not Path(self.files[file]).is_file()]
        said = [f"{file}: {absent if file in self.hub else gone}" for file in away]
        if keys := ", ".join(self.keys[file] for file in self.missing):
            said.append(f"{keys}: not there yet. File names depend on its content and will change once it is there")
        for file in (file for file in self.hub if file not in self.missing):
            ours = commit_of(self.files[file]) or self.hub[file].revision
            now = commit_of(found) if (asked := hub_file(file)) and (found := asked.cached()) else None
            if now not in (None, ours):
                said.append(f"{file}: is {now[:12]} by now. Here it stays {ours[:12]}; another row may name @{now}")
        return said
