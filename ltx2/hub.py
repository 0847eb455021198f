"""The files of a model, on this disk or on the Hugging Face Hub.

The only file that knows huggingface_hub, which it imports late: what is on the disk is
found without it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Iterable, Optional

import mlx.core as mx

from .base import UserError

DEFAULT_FILES = (  # where there are several checkpoints
    "ltx-2-19b-distilled.safetensors",
    "ltx-2.5-22b-distilled-transformer-bf16.safetensors",
)
# Of LTX-2.5, which comes with a file a component; the first holds the transformers.
FOLDERS = (
    "diffusion_models text_encoders vae latent_upscale_models model_patches loras"
).split()
DTYPES = {
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
    "I64": mx.int64,
    "U32": mx.uint32,
    "U8": mx.uint8,
    "F8_E4M3": mx.uint8,  # as mx.load gives it
}


@dataclass(eq=False)
class File:
    """A file of a model; while it is still on the Hub, `path` is None."""

    name: str
    size: int
    path: Optional[Path] = None
    repo: str = ""
    sha256: str = ""

    def __post_init__(self):
        # The Hub's cache names large files by their sha256.
        target = self.path.resolve().name if self.path else ""
        if not self.sha256 and re.fullmatch("[0-9a-f]{64}", target):
            self.sha256 = target

    @cached_property
    def header(self) -> dict[str, Any]:
        """Dtype and shape of each tensor, and "__metadata__"; no tensor is read."""
        return read_remote_header(self) if self.path is None else read_header(self.path)

    @property
    def keys(self) -> list[str]:
        return [key for key in self.header if key != "__metadata__"]

    @property
    def metadata(self) -> dict[str, str]:
        return self.header["__metadata__"] or {}

    @property
    def config(self) -> dict[str, Any]:
        """The configuration in the metadata of an official file."""
        return self.described("config")

    def described(self, key: str) -> dict[str, Any]:
        """A JSON object in the metadata."""
        try:
            return dict(json.loads(self.metadata[key]))
        except (KeyError, ValueError, TypeError):
            raise UserError(f"{self.name} is no LTX-2 file, it has no {key}") from None

    @property
    def role(self) -> str:
        """ "lora", "upsampler", "checkpoint" (it has a transformer), "part" of a split
        checkpoint or, of other files, ""."""
        if not self.name.endswith(".safetensors"):
            return ""
        signs = self.name if self.path is None else " ".join(self.keys)
        if "lora" in signs:
            return "lora"
        if "upscaler" in signs or "initial_conv.weight" in signs:
            return "upsampler"
        if "diffusion_model" in signs or self.path is None and "/" not in signs:
            return "checkpoint"
        return "part"

    def arrays(self) -> dict[str, mx.array]:
        """The tensors, lazily: evaluating one reads it. Of a file still on the Hub,
        zeros, whose shapes and dtypes are enough to tell what becomes of them."""
        if self.path is None:
            tensors = {key: self.header[key] for key in self.keys}
            return {k: mx.zeros(shape, DTYPES[t]) for k, (t, shape) in tensors.items()}
        return mx.load(str(self.path), format="safetensors")

    def fetch(self) -> Path:
        """Bring the file to this disk; an interrupted fetch goes on where it was."""
        if self.path is None:
            from huggingface_hub import hf_hub_download

            with one_line(self.repo):
                self.path = Path(hf_hub_download(self.repo, self.name))
        return self.path

    def json(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.fetch().read_text()))
        except (ValueError, TypeError):
            raise UserError(f"{self.path} is not a JSON object") from None

    @property
    def is_ours(self) -> bool:
        """Whether it is the config.json of a converted folder."""
        return self.json().get("model_type") == "ltx2"

    def checksum(self) -> str:
        """The sha256 of the whole file."""
        if not self.sha256:
            digest = hashlib.sha256()
            with open(self.path, "rb") as f:
                while block := f.read(1 << 24):
                    digest.update(block)
            self.sha256 = digest.hexdigest()
        return self.sha256

    @property
    def fingerprint(self) -> str:
        """The sha256 where it is known, else one of the size and the file's ends: tens
        of gigabytes are not read for a note."""
        if self.sha256:
            return f"sha256:{self.sha256}"
        digest = hashlib.sha256(str(self.size).encode())
        with open(self.path, "rb") as f:
            digest.update(f.read(1 << 20))
            f.seek(max(0, self.size - (1 << 20)))
            digest.update(f.read())
        return f"ends:{digest.hexdigest()}"


def read_header(path: Path) -> dict[str, Any]:
    """A safetensors file's header, checked against the file's size."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        start = f.read(length) if length < size else b""
    try:
        header = json.loads(start)
        metadata = header.pop("__metadata__", {})
        end = 8 + length + max(t["data_offsets"][1] for t in header.values())
        tensors = {k: (t["dtype"], tuple(t["shape"])) for k, t in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path} is not a safetensors file") from None
    if size != end:
        raise UserError(f"{path} has {size} bytes instead of {end}: fetch it again")
    strange = {dtype for dtype, _ in tensors.values()} - DTYPES.keys()
    if strange:
        raise UserError(
            f"{path} has tensors of type {', '.join(strange)}, not read here"
        )
    return {"__metadata__": metadata, **tensors}


def read_remote_header(f: File) -> dict[str, Any]:
    from huggingface_hub import HfApi

    with one_line(f.repo):
        remote = HfApi().parse_safetensors_file_metadata(f.repo, f.name)
    tensors = {k: (t.dtype, tuple(t.shape)) for k, t in remote.tensors.items()}
    return {"__metadata__": remote.metadata, **tensors}


def find(name: str, file: Optional[str] = None) -> list[File]:
    """The files of a model: `name` is a safetensors file, a folder, a Hub repository, or
    a file in one (owner/name/file); `file` picks one checkpoint where there are several.

    Of a converted folder: config.json first, then the rest. Of an official one: the
    checkpoint, its parts if it is split, the newest of each upsampler and the licence.
    """
    path = Path(name).expanduser()
    if path.is_file() and path.parent.name == FOLDERS[0]:
        path, file = path.parent.parent, f"{FOLDERS[0]}/{path.name}"
    if path.is_file():
        if file:
            raise UserError(f"{name} is a file, so --file {file} is one too many")
        return [File(path.name, path.stat().st_size, path)]
    repository = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", name)
    if path.is_dir():
        files = folder_files(path)
    elif repository and (repository[2] or not name.endswith(".safetensors")):
        files, file = repository_files(repository[1]), repository[2] or file
    else:
        raise UserError(f"{name}: no such file or folder, nor a Hub repository's name")
    names = {f.name: f for f in files}
    weights = [f for f in files if f.name.endswith(".safetensors")]
    licence = [f for f in files if f.name.startswith("LICENSE")]
    if not file and "config.json" in names and names["config.json"].is_ours:
        return [names["config.json"], *weights, *licence]
    upsamplers = [f for f in weights if f.role == "upsampler"]
    newest = {re.sub(r"-[\d.]+safetensors$", "", f.name): f for f in upsamplers}
    checkpoints = [f for f in weights if f.role == "checkpoint"]
    parts = [f for f in weights if f.role == "part"]
    default = [f.name for f in checkpoints if f.name.split("/")[-1] in DEFAULT_FILES]
    if len(checkpoints) > 1 and default:
        file = file or default[0]
    if file:
        checkpoints = [f for f in weights if file in (f.name, f.name.split("/")[-1])]
    if not checkpoints and (file or not parts):
        there = ", ".join(f.name for f in weights) or "other files"
        raise UserError(f"{name} has no {file or 'checkpoint'}, only {there}")
    return [*checkpoints, *parts, *newest.values(), *licence]


def of_model(names: Iterable[str]) -> list[str]:
    """The names at the top, and those in the folders of a split model. Repositories of
    older models have folders for other tools."""
    names = sorted(names)
    split = any(name.startswith(f"{FOLDERS[0]}/") for name in names)
    folders = {"", *FOLDERS} if split else {""}
    return [name for name in names if name.rpartition("/")[0] in folders]


def folder_files(folder: Path, repo: str = "") -> list[File]:
    paths = [
        *folder.iterdir(),
        *(p for sub in FOLDERS for p in folder.glob(f"{sub}/*")),
    ]
    names = of_model(p.relative_to(folder).as_posix() for p in paths if p.is_file())
    return [File(n, (folder / n).stat().st_size, folder / n, repo) for n in names]


def repository_files(repo: str) -> list[File]:
    """The files of a repository; of its copy in the cache when offline."""
    from huggingface_hub import HfApi, errors, snapshot_download, try_to_load_from_cache

    try:
        with one_line(repo):
            info = HfApi().model_info(repo, files_metadata=True)
    except Unreachable as error:
        try:  # The pattern makes it content with a part of the repository.
            folder = snapshot_download(
                repo, local_files_only=True, allow_patterns="config.json"
            )
        except errors.LocalEntryNotFoundError:
            raise error from None
        warnings.warn(f"{error}; its copy in the cache is used")
        return folder_files(Path(folder), repo)
    siblings, files = {s.rfilename: s for s in info.siblings}, []
    for name in of_model(siblings):
        path = try_to_load_from_cache(repo, name, revision=info.sha)
        path = Path(path) if isinstance(path, str) else None
        s = siblings[name]
        files.append(File(name, s.size, path, repo, s.lfs.sha256 if s.lfs else ""))
    return files


def fetch_all(files: list[File]) -> None:
    """Say what is to be fetched and fetch it, if there is room for all."""
    missing = [f for f in files if f.path is None]
    if missing:
        print(listing(missing))
        check_space({cache_folder(): sum(f.size for f in missing)})
        for f in missing:
            f.fetch()


def cache_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def listing(files: list[File]) -> str:
    """One line a file: size, name, whether it is to be fetched."""
    notes = {True: "", False: "  to be fetched"}
    return "\n".join(
        f"{gigabytes(f.size):>12}  {f.name}{notes[f.path is not None]}" for f in files
    )


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def check_space(wanted: dict[Path, int]) -> None:
    """Say what is needed and free, given bytes by folder; refuse what does not fit."""
    disks: dict[int, int] = {}
    for folder, size in wanted.items():
        while not folder.exists():
            folder = folder.absolute().parent
        disk, free = folder.stat().st_dev, shutil.disk_usage(folder).free
        disks[disk] = disks.get(disk, 0) + size
        if size:
            need = f"{gigabytes(disks[disk])} needed, {gigabytes(free)} free"
            print(f"disk of {folder}: {need}", flush=True)
            if disks[disk] > free:
                raise UserError(f"the disk of {folder} is too small: {need}")


def upload(folder: Path, repo: str) -> None:
    """Put a folder into a repository, which is created if need be."""
    from huggingface_hub import HfApi

    with one_line(repo):
        api = HfApi()
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Add the converted model"
        )


class Unreachable(UserError):
    """The Hub does not answer."""


@contextmanager
def one_line(repo: str):
    """The Hub's refusals as UserErrors."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{repo}"
        raise UserError(f"accept the licence at {page}, then `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"{repo}: no such folder, nor such a Hub repository") from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"the Hub refuses {repo}: {error}") from None
    except (
        errors.HTTPError,
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
    ) as error:
        raise Unreachable(f"the Hub cannot be reached for {repo}: {error}") from None
