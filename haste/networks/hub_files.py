"""Files of the hub by id, `hub:OWNER/NAME/PATH` or `hub:OWNER/NAME/PATH@REVISION`, and where they lie here. No torch.

Wherever a file of weights is named, such an id may stand for it. The file lies in the cache of the hub's own client,
which keeps files by the commit that they are of, and its content under the sha256 that the hub names.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from pathlib import Path

from haste.networks.headers import MissingError
from haste.networks.weights import why_not

PREFIX = "hub:"
_ID = re.compile(r"hub:([\w.-]+/[\w.-]+)/([^@\s]+)(?:@([\w./-]+))?")
_CACHED = re.compile(r".*/models--((?:(?!--)[^/])+)--([^/]+)/snapshots/([0-9a-f]{40})/(.+)")


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file of the hub: OWNER/NAME, path within it, and branch, tag or commit ("" is the main branch)."""

    repository: str
    path: str
    revision: str = ""

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}/{self.path}{'@' if self.revision else ''}{self.revision}"

    def at(self, commit: str) -> HubFile:
        """The same file at a commit."""
        return dataclasses.replace(self, revision=commit)

    def cached(self) -> Path | None:
        """Where it lies in the hub's cache on this machine; None if it does not."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repository, self.path, revision=self.revision or None)
        return Path(found) if isinstance(found, str) else None

    def absent(self, why: str = "") -> str:
        """That it is not on this machine, and what to do, for a message.

        Args:
            why: it could not be fetched; "" if nobody has tried.
        """
        from huggingface_hub import constants

        folder, page = f"models--{self.repository.replace('/', '--')}", f"https://huggingface.co/{self.repository}"
        fetch = "`haste fetch -c CONFIG` loads it where there is a network"
        tried = f", and could not be fetched: {why}. Try again where there is a network" if why else f". {fetch}"
        return (
            f"{self}: is not in this machine's cache of the hub ({constants.HF_HUB_CACHE}){tried}. Where there is "
            f"none, copy {folder} into that cache from a machine that has it, or bring {Path(self.path).name} from "
            f"{page} and give its path in place of the id"
        )


def hub_file(place: str | Path) -> HubFile | None:
    """The file of the hub that an id names; None for a path.

    Raises:
        ValueError: it begins as an id and is none.
    """
    if not (said := str(place)).startswith(PREFIX):
        return None
    match = _ID.fullmatch(said)
    if match is None or {"", ".", ".."} & {*match[2].split("/")}:
        raise ValueError(
            f"found {said!r}, expected hub:OWNER/NAME/PATH or hub:OWNER/NAME/PATH@REVISION, as in "
            "hub:nyu-visionx/SiT-collections/SiT-XL-2-256.pt"
        )
    return HubFile(match[1], match[2], match[3] or "")


def commit_of(path: str | Path) -> str | None:
    """The commit that a file in the hub's cache is of; None for any other file."""
    match = _CACHED.fullmatch(str(path))
    return match[3] if match else None


def origin(path: str | Path) -> str:
    """What a record calls a file: one in the hub's cache by its id with the commit, any other as it is given."""
    match = _CACHED.fullmatch(str(path))
    return str(HubFile(f"{match[1]}/{match[2]}", match[4], match[3])) if match else str(path)


def check_whole(path: Path, sha256: str) -> None:
    """Refuse a file in the hub's cache whose content is not what the hub says it is, as far as that is known here.

    Args:
        path: the file.
        sha256: of its content.

    Raises:
        ValueError: a damaged download; the message says what to remove.
    """
    blob = path.resolve()
    if commit_of(path) and re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.name != sha256:
        raise ValueError(
            f"{origin(path)}: damaged: this machine's copy has the sha256 {sha256[:12]}..., but the hub's file has "
            f"{blob.name[:12]}.... Remove {blob} and fetch it again"
        )


def local(place: str | Path) -> Path:
    """A file on this machine: a path as it is; for an id the file in the hub's cache, fetched if it is not there.

    Raises:
        ValueError: it cannot be fetched, or is damaged; the message says what to do.
    """
    of = hub_file(place)
    return Path(place) if of is None else fetch(of)


def fetch(of: HubFile) -> Path:
    """A file in the hub's cache, fetched if it is not there, and then checked.

    Raises:
        ValueError: as `local`.
    """
    from huggingface_hub import errors, hf_hub_download

    from haste.networks import hub

    if found := of.cached():
        return found
    page = f"https://huggingface.co/{of.repository}"
    try:
        found = hub.from_hub(functools.partial(hf_hub_download, of.repository, of.path, revision=of.revision or None))
    except errors.GatedRepoError as error:
        raise ValueError(
            f"{of}: {of.repository} is gated: ask for access at {page}, then log in by `hf auth login`, or set "
            "HF_TOKEN to a token of an account that has access"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"{of}: the hub shows no repository {of.repository}: check its name; if it is private, log in by "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{of}: {of.repository} has no revision {of.revision}; {page}/commits/main lists what it has"
        ) from error
    except errors.EntryNotFoundError as error:
        if isinstance(error, errors.LocalEntryNotFoundError):  # nobody was asked, or nobody answered
            raise _unreachable(of, error) from error
        raise ValueError(
            f"{of}: {of.repository} has no file {of.path}; {page}/tree/{of.revision or 'main'} lists its files"
        ) from error
    except (OSError, ValueError) as error:
        raise _unreachable(of, error) from error
    with open(found, "rb") as file:
        check_whole(found, hashlib.file_digest(file, "sha256").hexdigest())
    return found


def _unreachable(of: HubFile, error: Exception) -> MissingError:
    return MissingError(of.absent(why_not(error)))
