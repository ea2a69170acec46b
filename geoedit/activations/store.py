"""Collected states: a mapping from site to rows, in memory or read from shards when asked."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from geoedit.errors import EditError
from geoedit.fingerprint import Fingerprint
from geoedit.site import Site

INDEX = "index.json"
FORMAT = 1


class MissingSiteError(EditError, KeyError):
    """The site was not collected."""

    __str__ = Exception.__str__


@dataclass(frozen=True)
class Activations(Mapping[Site, Tensor]):
    """States by site, in the order of the prompts.

    `activations[site]` is (n, width), one row a prompt; for a site at the token "all", or a mask of several
    tokens, the rows of each prompt follow one another and `rows(site)` says which prompt each belongs to.

    Attributes:
        prompts: the texts.
        labels: the value that each prompt shows, or None (`values()` are the states, as in any mapping).
        fingerprint: of the model that the states come from.
    """

    prompts: tuple[str, ...]
    labels: tuple[str | None, ...]
    fingerprint: Fingerprint
    states: Mapping[Site, Tensor] = field(repr=False)
    owners: Mapping[Site, Tensor] = field(repr=False)

    def __getitem__(self, site: Site) -> Float[Tensor, "rows width"]:
        """The states at a site; read from the shards each time, where they are in a folder.

        Raises:
            EditError: the site was not collected.
        """
        return self.states[self._known(site)]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.states)

    def __len__(self) -> int:
        return len(self.states)

    def rows(self, site: Site) -> Int[Tensor, " rows"]:
        """For each row at a site, the place of its prompt.

        Raises:
            EditError: the site was not collected.
        """
        return self.owners[self._known(site)]

    def _known(self, site: Site) -> Site:
        if site not in self.states:
            raise MissingSiteError(
                f"the site {site} was not collected; there are: {', '.join(map(str, self.states))}."
            )
        return site

    @classmethod
    def load(cls, folder: str | Path) -> Activations:
        """Open a folder that `collect(out=folder)` has finished; states are read from it when asked.

        Raises:
            EditError: the folder holds no finished collection, or one of its shards is gone or damaged.
        """
        return open_folder(Path(folder))


def in_order(owners: Int[Tensor, " rows"], states: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by the prompt that they belong to; rows of one prompt keep their order."""
    order = torch.argsort(owners, stable=True)
    return owners[order], states[order]


class Memory:
    """A sink that keeps everything."""

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.states: list[list[Tensor]] = [[] for _ in sites]
        self.owners: list[list[Tensor]] = [[] for _ in sites]

    def add(self, place: int, owners: Int[Tensor, " rows"], states: Float[Tensor, "rows width"]) -> None:
        """Keep the rows on the CPU."""
        self.states[place].append(convert(states, self.dtype))
        self.owners[place].append(owners)

    def batch_done(self, indices: Sequence[int]) -> None:
        """Nothing to do."""

    def take(self, place: int) -> tuple[Tensor, Tensor]:
        """(owners, states) of all rows at a site, in the order they were read; they are given away."""
        owners, states = self.owners[place], self.states[place]
        self.owners[place], self.states[place] = [], []
        if not states:
            return torch.zeros(0, dtype=torch.long), torch.zeros(0, 0)
        return torch.cat(owners), torch.cat(states)


def convert(states: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Rows on the CPU in the asked dtype.

    Raises:
        EditError: a finite state does not fit into the dtype.
    """
    found = states.detach().to(device="cpu", dtype=dtype or states.dtype)
    if dtype is not None and not bool(torch.isfinite(found).all()):
        raise EditError(
            f"states up to {float(states.abs().max()):.3g} do not fit into {dtype}; choose a wider dtype."
        )
    return found


class Shards:
    """A sink that writes safetensors shards and holds at most one of them in memory.

    Each shard is written beside its place and renamed into it, so that it is there as a whole or not at all.
    The index is written last; a folder without one is an unfinished collection, which the same call takes up
    again.
    """

    def __init__(
        self,
        folder: Path,
        sites: Sequence[Site],
        request: str,
        dtype: torch.dtype | None,
        limit: int,
        rank: int,
    ) -> None:
        self.folder, self.request, self.dtype, self.limit, self.rank = folder, request, dtype, limit, rank
        self.tensors: dict[str, list[Tensor]] = {}
        self.held: list[int] = []
        self.size = 0
        folder.mkdir(parents=True, exist_ok=True)
        self.done = self._finished()

    def _finished(self) -> set[int]:
        """Places of the prompts that an earlier, unfinished run has written."""
        found: set[int] = set()
        for path in shard_paths(self.folder):
            try:
                with safe_open(path, "pt") as shard:
                    if (shard.metadata() or {}).get("request") != self.request:
                        raise EditError(
                            f"{path}: belongs to another collection (other prompts, sites, model or dtype); "
                            "give an "
                            "empty folder, or delete this one."
                        )
                    found |= set(shard.get_tensor("prompts").tolist())
            except SafetensorError as error:
                raise EditError(f"{path}: is damaged ({error}); delete it and run again.") from error
        return found

    def add(self, place: int, owners: Int[Tensor, " rows"], states: Float[Tensor, "rows width"]) -> None:
        """Take rows into the shard that is being filled."""
        kept = convert(states, self.dtype)
        self.tensors.setdefault(f"states.{place}", []).append(kept)
        self.tensors.setdefault(f"owners.{place}", []).append(owners)
        self.size += kept.nbytes + owners.nbytes

    def batch_done(self, indices: Sequence[int]) -> None:
        """Write the shard once it is full; a batch never lies in two shards."""
        self.held.extend(indices)
        if self.size >= self.limit:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if not self.held:
            return
        tensors = {name: torch.cat(parts).contiguous() for name, parts in self.tensors.items()}
        tensors["prompts"] = torch.tensor(self.held)
        number = sum(path.name.startswith(f"shard-{self.rank}-") for path in shard_paths(self.folder))
        path = self.folder / f"shard-{self.rank}-{number:05d}.safetensors"
        temporary = path.with_name(f".{path.name}.part")
        save_file(tensors, temporary, metadata={"request": self.request, "format": str(FORMAT)})
        os.replace(temporary, path)
        self.tensors, self.held, self.size = {}, [], 0


def shard_paths(folder: Path) -> list[Path]:
    """The shards of a folder, by name."""
    return sorted(folder.glob("shard-*.safetensors"))


def request_of(
    prompts: Sequence[str], values: Sequence[str | None], sites: Sequence[Site], extra: Sequence[Any]
) -> str:
    """A digest that two collections share only if they ask the same thing.

    Raises:
        EditError: a site's token is a callable, which no file can hold.
    """
    asked = [list(prompts), list(values), [site.to_dict() for site in sites], [str(part) for part in extra]]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def write_index(
    folder: Path,
    sites: Sequence[Site],
    prompts: Sequence[str],
    values: Sequence[str | None],
    fingerprint: Fingerprint,
    request: str,
) -> None:
    """Close a collection: from here on the folder loads."""
    index = {
        "format": FORMAT,
        "request": request,
        "sites": [site.to_dict() for site in sites],
        "prompts": list(prompts),
        "values": list(values),
        "fingerprint": fingerprint.to_dict(),
        "shards": [path.name for path in shard_paths(folder)],
    }
    temporary = folder / f".{INDEX}.part"
    temporary.write_text(json.dumps(index, indent=1), encoding="utf-8")
    os.replace(temporary, folder / INDEX)


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a finished collection.

    Raises:
        EditError: there is none, or it can't be read.
    """
    path = folder / INDEX
    if not path.is_file():
        raise EditError(
            f"{folder}: holds no {INDEX}, so no collection was finished there; give the folder of a "
            "finished one, or "
            "run the same collect(out=…) again to finish it."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise EditError(
                f"{path}: has format {index['format']}, this version reads {FORMAT}; collect again."
            )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, EditError):
            raise
        raise EditError(f"{path}: is no index of a collection ({error}); collect again.") from error
    return dict(index)


def open_folder(folder: Path) -> Activations:
    """Open a finished collection; nothing but the index and the shards' headers is read yet."""
    index = read_index(folder)
    paths = [folder / name for name in index["shards"]]
    places = {Site.from_dict(fields): place for place, fields in enumerate(index["sites"])}
    seen = 0
    for path in paths:
        try:
            with safe_open(path, "pt") as shard:
                if (shard.metadata() or {}).get("request") != index["request"]:
                    raise EditError(
                        f"{path}: belongs to another collection than {folder / INDEX}; collect again."
                    )
                seen += shard.get_slice("prompts").get_shape()[0]
        except (SafetensorError, OSError) as error:
            raise EditError(f"{path}: is gone or damaged ({error}); collect again.") from error
    if seen != len(index["prompts"]):
        raise EditError(
            f"{folder}: its shards hold {seen} of {len(index['prompts'])} prompts; collect again."
        )
    return Activations(
        prompts=tuple(index["prompts"]),
        labels=tuple(index["values"]),
        fingerprint=Fingerprint.from_dict(index["fingerprint"]),
        states=_Lazy(paths, places, "states"),
        owners=_Lazy(paths, places, "owners"),
    )


class _Lazy(Mapping[Site, Tensor]):
    """Reads one site's rows out of all shards when asked, and keeps none of them."""

    def __init__(self, paths: Sequence[Path], places: Mapping[Site, int], kind: str) -> None:
        self.paths, self.places, self.kind = paths, places, kind

    def __getitem__(self, site: Site) -> Tensor:
        place = self.places[site]
        owners, states = [], []
        for path in self.paths:
            with safe_open(path, "pt") as shard:
                owners.append(shard.get_tensor(f"owners.{place}"))
                states.append(shard.get_tensor(f"{self.kind}.{place}"))
        return in_order(torch.cat(owners), torch.cat(states))[1]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)
