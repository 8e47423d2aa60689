"""`hf:` names: which released file each stands for, and how it is fetched.

`hf:rar-b` is a published model by name (`consonar models`), `hf:owner/repository/path/to/file` any file that `convert`
recognises; `@384` behind either says the image size where shapes do not. A file that is put into the folder named in
the messages is taken instead of a download, so that all of this works without a network.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from consonar.errors import UserError, unknown
from consonar.files.readers import beside, plain_name, read_json
from consonar.files.writers import cache_dir
from consonar.published import PUBLISHED, Published

PREFIX = "hf:"


@dataclass(frozen=True)
class Wanted:
    """What an `hf:` name stands for."""

    text: str
    file: str
    repository: str | None
    image_size: int | None
    published: Published | None = None

    @property
    def place(self) -> Path:
        """Where the released file may be put by hand."""
        folder = self.repository or (self.published.name if self.published else "")
        return cache_dir() / "released" / folder / self.file

    @property
    def converted(self) -> Path:
        name = f"{self.repository}/{self.file}" if self.repository or not self.published else self.published.name
        size = f"@{self.image_size}" if self.image_size else ""
        return cache_dir() / "converted" / f"{name.replace('/', '--')}{size}"


def read_name(text: str) -> Wanted:
    """What an `hf:` name stands for; `UserError` for a name that is neither published nor owner/repository/file."""
    rest, _, size = text.removeprefix(PREFIX).partition("@")
    if size and not re.fullmatch(r"[1-9]\d*", size):
        raise UserError(f"{text}: {size!r} behind @ is not an image size in pixels")
    model = PUBLISHED.get(rest)
    if model is not None:
        repository, file = model.repository, model.file
    else:
        parts = rest.split("/")
        # Plain names only: what stands here becomes a path below the cache folder.
        if len(parts) < 3 or not all(map(plain_name, parts)):
            raise unknown("hf: name", rest, [*PUBLISHED, "owner/repository/file"])
        repository, file = "/".join(parts[:2]), "/".join(parts[2:])
        model = next((m for m in PUBLISHED.values() if (m.repository, m.file) == (repository, file)), None)
    known_size = model.image_size if model else None
    return Wanted(text, file, repository, int(size) if size else known_size, model)


def released_file(wanted: Wanted) -> Path:
    """The released file: put there by hand, or downloaded; for an index of shards, with all shards beside it.
    `UserError` says where to put one that cannot be had."""
    if wanted.place.is_file():
        return wanted.place
    if wanted.repository is None:
        where = wanted.published and wanted.published.elsewhere
        raise UserError(f"{wanted.text}: not on the hub ({where}); put {wanted.file} at {wanted.place}")
    asked = wanted.file
    try:
        file = Path(download(wanted.repository, asked))
        if asked.endswith(".index.json"):
            for shard in sorted(set(read_index(file).values())):
                asked = str(Path(wanted.file).with_name(shard))
                download(wanted.repository, asked)
    except UserError:
        raise
    # No network, no such file, no permission, offline mode, a proxy's page: each library below has errors of its own.
    except Exception as error:
        cause = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(
            f"{wanted.text}: cannot download {asked} of https://huggingface.co/{wanted.repository} ({cause}); "
            f"get it elsewhere and put it at {wanted.place.with_name(Path(asked).name)}"
        ) from error
    return file


def download(repository: str, file: str) -> str:
    """The path of a hub file on this machine; the only place that touches the network."""
    from huggingface_hub import hf_hub_download

    return hf_hub_download(repo_id=repository, filename=file)


def read_index(index: Path) -> dict[str, str]:
    """Which file beside it holds a key, for every key, of an index of shards."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise UserError(f"{index}: not an index of shards (a JSON object with weight_map)")
    return {key: beside(index, name) for key, name in places.items()}
