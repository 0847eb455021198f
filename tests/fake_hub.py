"""A Hub repository in a folder, for tests without a network."""

import hashlib
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.hf_api import RepoFile

from ltx2 import hub


def about(path: Path, sha256: str) -> dict:
    """What the Hub says about a file, of a large one its sha256."""
    data = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = SimpleNamespace(sha256=sha256 or hashlib.sha256(data).hexdigest())
    lfs = lfs if path.suffix != ".json" else None
    return {"size": len(data), "blob_id": blob, "lfs": lfs}


class FakeHub:
    """A repository in a folder; records what is downloaded."""

    def __init__(self, repo: Path, cache: Path):
        self.repo, self.cache, self.fetched = repo, cache, []
        self.uploads = cache.parent / "uploads"
        cache.mkdir()

    def model_info(self, repo, files_metadata):
        uploaded = (self.uploads / repo).exists()
        there, sha256 = (
            (self.uploads / repo, "") if uploaded else (self.repo, "ab" * 32)
        )
        siblings = [
            SimpleNamespace(
                rfilename=p.relative_to(there).as_posix(), **about(p, sha256)
            )
            for p in sorted(there.rglob("*"))
            if p.is_file()
        ]
        return SimpleNamespace(siblings=siblings, sha="c0ffee")

    def parse_safetensors_file_metadata(self, repo, name):
        header, metadata = hub.read_header(self.repo / name)
        tensors = {
            k: SimpleNamespace(dtype=t, shape=list(s)) for k, (t, s) in header.items()
        }
        return SimpleNamespace(metadata=metadata, tensors=tensors)

    def download(self, repo, name):
        self.fetched.append(name)
        (self.cache / name).parent.mkdir(exist_ok=True)
        return shutil.copy(self.repo / name, self.cache / name)

    def whoami(self):
        return {"name": "me"}

    def create_repo(self, repo_id, exist_ok):
        self.created = repo_id

    def upload_folder(self, repo_id, folder_path, commit_message, ignore_patterns):
        ignore = shutil.ignore_patterns(*ignore_patterns)
        shutil.copytree(
            folder_path, self.uploads / repo_id, ignore=ignore, dirs_exist_ok=True
        )
        self.uploaded = repo_id, sorted(p.name for p in Path(folder_path).iterdir())

    def list_repo_tree(self, repo_id, **_):
        there = self.uploads / repo_id
        for path in (p for p in there.rglob("*") if p.is_file()):
            facts, name = about(path, ""), path.relative_to(there).as_posix()
            size, lfs = facts["size"], facts["lfs"]
            lfs = lfs and {"size": size, "oid": lfs.sha256, "pointerSize": 0}
            yield RepoFile(path=name, size=size, oid=facts["blob_id"], lfs=lfs)

    verify_repo_checksums = huggingface_hub.HfApi.verify_repo_checksums

    def cached(self, repo, name, revision):
        path = self.cache / name
        return str(path) if path.exists() else None


@pytest.fixture
def fake_hub(checkpoint, tmp_path, monkeypatch):
    repo = tmp_path / "repo"
    repo.mkdir()
    for name in ("ltx-2-19b-dev", "ltx-2-19b-distilled"):
        shutil.copy(checkpoint("ltx-2"), repo / f"{name}.safetensors")
    shutil.copy(checkpoint("ltx-2-lora"), repo / "ltx-2-19b-lora.safetensors")
    up = repo / "ltx-2-temporal-upscaler-x2-1.0.safetensors"
    shutil.copy(checkpoint("temporal-x2"), up)
    (repo / "LICENSE").write_text("the license")
    (repo / "vae").mkdir()
    (repo / "vae" / "model.safetensors").write_text("for another tool")
    fake = FakeHub(repo, tmp_path / "cache")
    api = type("HfApi", (), {"__new__": lambda _: fake})  # others name it in types
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", fake.cached)
    return fake
