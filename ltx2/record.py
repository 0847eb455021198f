"""How a result was made: what its file stores, and which files that may name."""

import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Optional

import mlx.core as mx

from . import REFERENCE, __version__, hub, media
from .base import Checked, PathName, UserError, checked, parse_json, user_path
from .linear import layer_formats
from .options import located
from .request import Request


@dataclass(frozen=True)
class Load(Checked):
    """The arguments of `pipeline.load` that decide what a request gives."""

    model: PathName
    kind: Literal["dev", "distilled", None] = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    upsamplers: tuple[PathName, ...] = ()
    parts: dict[str, PathName] = field(default_factory=dict)
    text_encoder: Optional[PathName] = None


KINDS = {"request": Request, "load": Load}  # of what a record holds


@dataclass(frozen=True)
class Record:
    """What a file stores about how it was made."""

    request: Request
    load: Load
    files: dict[str, str]  # the model's, with their fingerprints
    reference: Optional[str]  # the version of the reference that it follows

    @classmethod
    def read(cls, path: str) -> "Record":
        """From a video, a sound or the .json next to it; UserError for other files."""
        is_json = Path(path).suffix.lower() == ".json"
        found = read_json(path) if is_json else media.read_metadata(path)
        if not {"request", "load", "model"} <= found.keys():
            raise UserError(f"{path} does not say how it was made")
        kinds = {**KINDS, "model": dict, "versions": dict}
        found = {"versions": {}} | found
        o = {k: checked(kind, found[k], f"{path}: {k}") for k, kind in kinds.items()}
        files, version = o["model"].get("files"), o["versions"].get("reference")
        files = checked(dict[str, str], files, f"{path}: model.files")
        return cls(recorded(o["request"]), o["load"], files, version)

    def find(
        self, path: str, nearby: list[Path], but: set[str], trust: bool
    ) -> "Record":
        """With the files that it names, but those of the fields `but`, found next to
        the record `path`, the model's also in `nearby` folders and the Hub's cache;
        without `trust` UserError for others."""

        def locate(name: str, *nearby: Path) -> str:
            for folder in (Path(path).parent, *nearby):
                root, file = folder.resolve(), (folder / name).resolve()
                if file.exists() and root in file.parents:
                    return str(folder / name)
            if trust:
                return name
            how = "put it there, pass its flag, or --trust to use it where it is"
            what = f"{path} was made with {name}, which is not in its folder"
            raise UserError(f"{what}: {how}")

        def locate_model(name: str) -> str:
            repo = hub.split_repository(name)[0]
            return name if hub.cached_copy(repo) else locate(name, *nearby)

        load = located(self.load, locate_model, but)
        return replace(self, load=load, request=located(self.request, locate, but))


def recorded(r: Request) -> Request:
    """A request that was read; earlier versions stored hdr_keyframes in all of them."""
    return r if r.color_space and r.has_reference else replace(r, hdr_keyframes=None)


def read_json(path: str) -> dict[str, Any]:
    """The object in a .json file; UserError for any other file."""
    media.check_file(path)
    return parse_json(Path(path).read_bytes(), f"{path}: ")


def read_config(path: str) -> tuple[dict[str, Any], Request]:
    """How to load a model, and the request, from a .json that may have only a part."""
    found = read_json(path)
    if not KINDS.keys() & found.keys():
        raise UserError(f'{path} has no "request" and no "load"')
    request, load = (checked(dict, found.get(k, {}), f"{path}: {k}") for k in KINDS)
    complete = checked(Load, {"model": ""} | load, f"{path}: load")
    request = checked(Request, {"prompt": ""} | request, f"{path}: request")
    return {k: v for k, v in asdict(complete).items() if k in load}, recorded(request)


def provenance(model: Any, job: Any, seconds: Mapping[str, float]) -> dict[str, Any]:
    """How a model made a job's result: enough to make it again."""
    checkpoint = model.checkpoint
    return {
        "request": asdict(located(job.request, absolute)),
        "negative_prompt": job.negative_prompt,
        "model": {
            "version": checkpoint.model_version,
            "kind": checkpoint.kind,
            "quantization": layer_formats(checkpoint.quantization).get(""),
            "files": model.files(),
        },
        "load": asdict(located(model.origin, absolute)),
        "versions": {
            "ltx2": __version__,
            "reference": REFERENCE,
            "mlx": mx.__version__,
            "platform": platform.platform(),
        },
        "seconds": seconds,
    }


def changed(metadata: Mapping[str, Any], place: Callable[[str], str]) -> dict[str, Any]:
    """The metadata of a result with other paths."""
    moved = lambda k, kind: asdict(located(kind(**metadata[k]), place))
    return {**metadata, **{k: moved(k, kind) for k, kind in KINDS.items()}}


def name_only(path: str) -> str:
    """The name of a file or folder without its folder; a repository as it is."""
    file = user_path(path)
    return file.name if file.exists() or not hub.split_repository(path)[0] else path


def absolute(path: str) -> str:
    """The absolute path of a file; a repository as it is."""
    file = user_path(path)
    return str(file.absolute()) if file.exists() else path
