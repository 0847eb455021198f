"""The files of a model, on this disk or on the Hugging Face Hub."""

import hashlib
import json
import re
import shutil
import tempfile
from collections import defaultdict
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Iterable, Iterator, Optional

import mlx.core as mx
from safetensors import SafetensorError, safe_open

from .base import LOG, UserError, listed, note, parse_json, user_path

DEFAULT_FILES = (  # where there are several checkpoints
    "ltx-2-19b-distilled.safetensors",
    "ltx-2.5-22b-distilled-transformer-bf16.safetensors",
)
# Of LTX-2.5, with one file per component, and ComfyUI; the first holds transformers.
FOLDERS = "diffusion_models text_encoders vae latent_upscale_models".split()
FOLDERS += "model_patches loras checkpoints".split()
ASIDE = ["*.DS_Store", "._*", "*/._*", ".cache/*", ".git/*"]  # never uploaded
INSTEAD = ": use the original .safetensors file, or a folder that convert.py wrote"
DTYPES = {
    "BF16": mx.bfloat16,
    "F16": mx.float16,
    "F32": mx.float32,
    "I64": mx.int64,
    "U32": mx.uint32,
    "U8": mx.uint8,
    "F8_E4M3": mx.uint8,  # as mx.load returns it
}
Header = dict[str, tuple[str, tuple[int, ...]]]  # dtype and shape by name
TRANSFORMER = re.compile(r"\b(transformer_blocks\.0\.attn1|patchify_proj)\.")  # keys


@dataclass(eq=False)
class File:
    """A file of a model; `path` is None until it is fetched from the Hub."""

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
    def _headers(self) -> tuple[Header, dict[str, str]]:
        if self.path:
            return read_header(self.path)
        with hub_api(self.repo) as api:
            remote = api.parse_safetensors_file_metadata(self.repo, self.name)
        tensors = {k: (t.dtype, tuple(t.shape)) for k, t in remote.tensors.items()}
        return tensors, remote.metadata or {}

    header = property(lambda self: self._headers[0])  # dtype and shape of each tensor
    metadata = property(lambda self: self._headers[1])

    def json_metadata(self, key: str) -> dict[str, Any]:
        """A JSON object in the metadata."""
        if key not in self.metadata:
            what = f"no {key} in its metadata"
            raise UserError(f"{self.name} is not an LTX-2 file ({what}){INSTEAD}")
        return parse_json(self.metadata[key], f"{self.name}, {key}: ")

    @cached_property
    def problem(self) -> str:
        """Why the tensors cannot be read, or ""."""
        try:
            dtypes = {dtype for dtype, _ in self.header.values()}
        except Unreachable:
            raise
        except UserError as error:
            return str(error)
        if any(key.endswith("weight_scale_2") for key in self.header):
            return f"{self.name}: nvfp4 weights are not supported"
        unsupported = ", ".join(sorted(dtypes - DTYPES.keys()))
        return unsupported and f"{self.name}: unsupported dtype {unsupported}"

    @cached_property
    def role(self) -> str:
        """lora, upsampler, checkpoint (with a transformer), part, or "" for others."""
        if not self.name.endswith(".safetensors"):
            return ""
        folder = self.name.partition("/")[0] if "/" in self.name else ""
        try:  # by its name on the Hub: headers of remote files take time
            text = " ".join(self.header) if self.path else self.name
        except UserError:  # reported if a part is missing
            return "part"
        if folder == "loras" or "lora" in text:
            return "lora"
        if "upscaler" in text or "initial_conv.weight" in text:
            return "upsampler"
        named = not self.path and folder in ("", FOLDERS[0])
        return "checkpoint" if named or TRANSFORMER.search(text) else "part"

    def arrays(self) -> dict[str, mx.array]:
        """The tensors, lazily: evaluating one reads it. Zeros if it is on the Hub."""
        return mx.load(str(self.path), "safetensors") if self.path else self.zeros

    @cached_property
    def zeros(self) -> dict[str, mx.array]:
        """Zeros with the shapes and dtypes of the tensors, lazily."""
        return {k: mx.zeros(shape, DTYPES[t]) for k, (t, shape) in self.header.items()}

    def fetch(self) -> Path:
        """Download the file if needed; an interrupted download is resumed."""
        if self.path is None:
            from huggingface_hub import hf_hub_download

            with hub_api(self.repo):
                self.path = Path(hf_hub_download(self.repo, self.name))
        return self.path

    def json(self) -> dict[str, Any]:
        return parse_json(self.fetch().read_bytes(), f"{self.path}: ")

    def checksum(self) -> str:
        """The sha256 of the complete file."""
        if not self.sha256:
            digest = hashlib.sha256()
            with open(self.path, "rb") as f:
                while block := f.read(1 << 24):
                    digest.update(block)
            self.sha256 = digest.hexdigest()
        return self.sha256

    @property
    def fingerprint(self) -> str:
        """The sha256 if known, else one of size and ends: hashing all takes minutes."""
        if self.sha256:
            return f"sha256:{self.sha256}"
        with open(self.path, "rb") as f:
            start = f.read(1 << 20)
            f.seek(max(0, self.size - (1 << 20)))
            ends = str(self.size).encode() + start + f.read()
        return f"ends:{hashlib.sha256(ends).hexdigest()}"


def read_header(path: Path) -> tuple[Header, dict[str, str]]:
    """Tensors and metadata of a safetensors file, checked against the file's size."""
    if path.with_name(f"{path.name}.aria2").exists():  # it has its size from the start
        raise UserError(f"{path} is not downloaded completely: aria2 can continue it")
    try:
        with safe_open(path, framework="numpy"), open(path, "rb") as f:
            text = f.read(int.from_bytes(f.read(8), "little"))
    except SafetensorError as error:
        raise UserError(f"{path} {invalid(path, str(error))}") from None
    pairs = json.loads(text, object_pairs_hook=list)  # dict(pairs) takes the last name
    header = {key: dict(entry or ()) for key, entry in pairs}
    if len(header) < len(pairs):
        raise UserError(f"{path} has duplicate tensor names")
    metadata = header.pop("__metadata__", {})
    return {k: (t["dtype"], tuple(t["shape"])) for k, t in header.items()}, metadata


def read_arrays(path: str | Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """The tensors of a safetensors file, lazily, and its metadata; else UserError."""
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    metadata = read_header(path)[1]
    try:
        return mx.load(str(path), "safetensors"), metadata
    except RuntimeError as error:  # of dtypes
        raise UserError(f"{path} cannot be read: {error}") from None


def invalid(path: Path, error: str) -> str:
    """What is wrong with a file that safetensors cannot read."""
    with open(path, "rb") as f:
        start = f.read(64)
    if start.startswith(b"version https://git-lfs"):
        return "is a git-lfs pointer, not the file itself: run git lfs pull"
    if start.startswith(b"GGUF"):
        return f"is a GGUF file, which is not read{INSTEAD}"
    if re.search("not fully covered|header length", error) or len(start) < 8:
        return "is truncated or damaged: download it again"
    if re.fullmatch(rb"[\s -~]+", start):  # what a website says instead
        login = "download it again, after `hf auth login` if its repository is gated"
        return f"is text, not a safetensors file: {login}"
    return f"is not a safetensors file ({error.rpartition(': ')[2]})"


# From names to files


def resolve(
    name: str, file: Optional[str] = None, what: str = ""
) -> tuple[list[File], Optional[str]]:
    """The files that a name stands for, and the chosen one, if one is: a safetensors
    file, a folder, a Hub repository, or a file in a repository (owner/name/file)."""
    path = user_path(name or "/dev/null")  # "" would be this folder
    if path.is_dir():
        return folder_files(path), file
    if path.is_file():
        if path.suffix != ".safetensors":
            kind = path.suffix[1:].upper() or "such"
            raise UserError(f"{name}: {kind} files are not supported{INSTEAD}")
        if file:
            raise UserError("--file cannot be used when the source is a single file")
        for folder in path.parents[:2]:
            if folder.name == FOLDERS[0]:  # of a split model
                root = folder.parent
                return folder_files(root), path.relative_to(root).as_posix()
        return [File(path.name, path.stat().st_size, path)], path.name
    repo, inner = split_repository(name)
    if repo and (inner or not name.endswith(".safetensors")):
        return repository_files(repo), inner or file
    missing = "no such file or folder, and not the name of a Hub repository"
    raise UserError(f"{what}{name}: {missing}")


def split_repository(name: str) -> tuple[str, str]:
    """Repository and rest of owner/name/rest or a Hub page; "" if there is none."""
    page = r"https://(?:huggingface|hf)\.co/|/(?:blob|resolve|tree)/main(?=/|$)|\?.*|/$"
    name = re.sub(page, "", name) if name.startswith("https://") else name
    match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?", name)
    return (match[1], match[2] or "") if match else ("", "")


def cached_copy(repo: str) -> Optional[Path]:
    """The folder of a repository in the Hub's cache, None if there is none."""
    from huggingface_hub import errors, snapshot_download

    # allow_patterns lets it accept a partial snapshot
    options = {"local_files_only": True, "allow_patterns": "config.json"}
    with suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
        return Path(snapshot_download(repo, **options))


def single_file(name: str) -> File:
    """A file on this disk or in a repository (owner/name/file)."""
    files, file = resolve(name)
    for f in files:
        if f.name == file:
            return f
    raise UserError(f"{name}: no such file")


def choose(name: str, files: list[File], file: Optional[str] = None) -> list[File]:
    """The files of one model: config.json or checkpoint, files that may have other
    parts, the newest of each upsampler, the license."""
    weights = [f for f in files if f.name.endswith(".safetensors")]
    licenses = [f for f in files if f.name.startswith("LICENSE")]
    if not file and (config := converted_config(files)):
        return [config, *weights, *licenses]
    if file:
        chosen = [f for f in weights if file in (f.name, f.name.split("/")[-1])]
    else:
        chosen = choose_checkpoint([f for f in weights if f.role == "checkpoint"])
    if not chosen:
        raise UserError(f"{name} has no {file or 'checkpoint'}{found_instead(files)}")
    parts = [f for f in weights if f.role == "part" and f not in chosen]
    upsamplers = [f for f in weights if f.role == "upsampler" and f not in chosen]
    newest = {re.sub(r"-[\d.]+safetensors$", "", f.name): f for f in upsamplers}
    return [*chosen, *parts, *newest.values(), *licenses]


def converted_config(files: list[File]) -> Optional[File]:
    """The config.json among a converted folder's files; None for other folders."""
    config = next((f for f in files if f.name == "config.json"), None)
    return config if config and config.json().get("model_type") == "ltx2" else None


def choose_checkpoint(checkpoints: list[File]) -> list[File]:
    """The default one, else the only one, or the only one that can be used."""
    default = [f for f in checkpoints if f.name.split("/")[-1] in DEFAULT_FILES]
    if default and len(checkpoints) > 1:
        return default[:1]
    # The config tells it from LTX-Video, whose transformer has the same keys.
    usable = [f for f in checkpoints if not f.problem and "audio" in str(f.metadata)]
    if len(usable) > 1:
        both = f"{usable[0].name} and {usable[1].name} both hold the transformer"
        raise UserError(f"{both}: choose one by its path")
    if usable and len(checkpoints) > 1:
        note(f"transformer: using {usable[0].name}")
    return usable or checkpoints[:1]


def found_instead(files: list[File]) -> str:
    """What a folder without a checkpoint contains."""
    unsupported = {"model_index.json": "diffusers folders", ".gguf": "GGUF files"}
    for end, kind in unsupported.items():
        if any(f.name.endswith(end) for f in files):
            return f": {kind} are not supported{INSTEAD}"
    weights = [f for f in files if f.name.endswith(".safetensors")]
    problems = [f": {f.problem}" for f in weights if f.problem]
    others = ", ".join(f.name for f in weights) or "other files"
    return problems[0] if problems else f", only {others}{INSTEAD}"


def model_files(names: Iterable[str]) -> list[str]:
    """Names at the top and in a split model's folders; others are not ours."""
    names = sorted(names)
    split = any(name.startswith(f"{FOLDERS[0]}/") for name in names)
    folders = ("", *FOLDERS) if split else ("",)
    return [n for n in names if n.rpartition("/")[0].split("/")[0] in folders]


def folder_files(folder: Path, repo: str = "") -> list[File]:
    patterns = ["*", *(f"{sub}/{inner}" for sub in FOLDERS for inner in ("*", "*/*"))]
    paths = (path for pattern in patterns for path in listed(folder, pattern))
    names = model_files(p.relative_to(folder).as_posix() for p in paths if p.is_file())
    return [File(n, (folder / n).stat().st_size, folder / n, repo) for n in names]


def repository_files(repo: str, folder: str = "") -> list[File]:
    """The files of a model in a repository, its cached copy or one `folder` of it."""
    from huggingface_hub import try_to_load_from_cache

    try:
        with hub_api(repo) as api:
            info = api.model_info(repo, files_metadata=True)
    except Unreachable as error:
        if (cached := cached_copy(repo)) is None:
            raise error from None
        note(f"{error}; using its copy in the cache")
        return folder_files(cached / folder, repo)
    siblings, files = {s.rfilename: s for s in info.siblings}, []
    inside = [name for name in siblings if name.rpartition("/")[0] == folder]
    for name in inside if folder else model_files(siblings):
        size, lfs = siblings[name].size, siblings[name].lfs
        path = try_to_load_from_cache(repo, name, revision=info.sha)
        path = Path(path) if isinstance(path, str) else None
        files.append(File(name, size, path, repo, lfs.sha256 if lfs else ""))
    return files


# Downloads and uploads


def fetch_all(files: list[File]) -> None:
    """List the files to download; download them if the disk has room for all."""
    if missing := [f for f in files if f.path is None]:
        LOG.info(listing(missing))
        check_space({cache_folder(): sum(f.size for f in missing)})
        for f in missing:
            f.fetch()


def cache_folder() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def listing(files: list[File]) -> str:
    """One line per file: its size, its name, whether it is downloaded."""
    missing = lambda f: "" if f.path else "  to be downloaded"
    return "\n".join(f"{gigabytes(f.size):>12}  {f.name}{missing(f)}" for f in files)


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def make_folder(path: str | Path) -> Path:
    """Make a folder, unless it exists; UserError if it cannot be made."""
    try:
        folder = user_path(path)
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def check_space(needed: dict[Path, int]) -> None:
    """Report the space needed (bytes by folder) and free; UserError if too little."""
    disks: dict[int, int] = defaultdict(int)
    for folder, size in needed.items():
        while not folder.exists():
            folder = folder.absolute().parent
        disk, free = folder.stat().st_dev, shutil.disk_usage(folder).free
        disks[disk] += size
        sizes = f"{gigabytes(disks[disk])} needed, {gigabytes(free)} free"
        if size:
            LOG.info(f"disk of {folder}: {sizes}")
        if disks[disk] > free:
            raise UserError(f"not enough space on the disk of {folder}: {sizes}")


def upload(folder: Path, repo: str, message: str = "Add the converted model") -> int:
    """Upload a folder to a repository, compare what arrived, and count the files."""
    from huggingface_hub.utils import filter_repo_objects

    options = {"folder_path": folder, "ignore_patterns": ASIDE}
    with hub_api(repo) as api:
        api.upload_folder(repo_id=repo, commit_message=message, **options)
        found = api.verify_repo_checksums(repo, local_dir=folder)
    lost = filter_repo_objects(found.extra_paths, ignore_patterns=ASIDE)
    if wrong := [*lost, *(changed["path"] for changed in found.mismatches)]:
        names = ", ".join(sorted(wrong)[:5])
        raise UserError(f"{repo} differs from {folder}: {names}; run the command again")
    return found.checked_count


def create_repository(repo: str) -> None:
    """Say who uploads, and create a repository, which shows if it can be written."""
    with hub_api(repo) as api:
        note(f"uploading to {repo} as {api.whoami()['name']}")
        api.create_repo(repo_id=repo, exist_ok=True)


class Unreachable(UserError):
    """The Hub does not answer."""


@contextmanager
def hub_api(repo: str) -> Iterator[Any]:
    """The Hub's API; its errors as UserErrors."""
    from huggingface_hub import HfApi, errors

    away = errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, errors.HTTPError
    try:
        yield HfApi()
    except errors.LocalTokenNotFoundError:
        raise UserError(f"log in to upload to {repo}: `hf auth login`") from None
    except errors.GatedRepoError:
        page = f"https://huggingface.co/{repo}"
        raise UserError(f"accept the license at {page}, then `hf auth login`") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"{repo}: no such folder or Hub repository") from None
    except errors.SafetensorsParsingError as error:
        raise UserError(f"a file of {repo} is not valid: {error}") from None
    except errors.HfHubHTTPError as error:
        raise UserError(f"the Hub refuses {repo}: {error}") from None
    except away as error:
        raise Unreachable(f"the Hub cannot be reached for {repo}: {error}") from None
