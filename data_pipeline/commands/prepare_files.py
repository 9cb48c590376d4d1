"""Finds the files that a table names, by their paths or by their names alone; a file is not given to two pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from data_pipeline.commands.prepare_item import files_below, nfc, nfd, on_disk
from data_pipeline.common.errors import BadSample
from data_pipeline.content.members import IMAGE_EXTENSIONS, is_unsupported


class NamedFiles:
    """The files that the paths in a table name: relative to `root` or, if there are none, by name in a folder below.

    A path written on another computer leads to the file with its name. That would also give a missing `cats/1.jpg` the
    picture `dogs/1.jpg`: so a file found by its name alone belongs to the row whose path agrees with it best.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._claims: dict[Path, tuple[int, str]] = {}
        """File found by name -> how many parts of the best path agree with its own, and that path; empty if two do."""
        self._taken: set[Path] = set()
        """Of these files, those that another row names by its path."""
        self._folders_tell = False
        """Whether a folder in any path agrees with that of its file, so that the others' must as well."""

    def survey(self, given: Callable[[], Iterable[str]]) -> Iterator[Path]:
        """Yield the place of each path in the table, which may not exist, and learn which rows name which files.

        Args:
            given: returns all paths in the table, in order; called a second time if some files are found by name.
        """
        exact = False
        for path in given():
            place = self._exact(path)
            exact |= place is not None
            if place is None:
                with suppress(BadSample):
                    place = self._by_name(path)
                if place is not None:
                    self._claim(path, place)
            self._folders_tell |= place is not None and place.parent != self.root and _agree(path, place) > 0
            yield place or self.root / path
        if exact and self._claims:
            self._taken = {place for path in given() if (place := self._exact(path)) in self._claims}

    def find(self, given: str) -> tuple[Path, bool]:
        """Return the place of a path, which need not exist, and whether it is certain: the path leads there, or all
        folders from the root on agree.

        Raises:
            BadSample: `missing_image`, several files have this name, or the only one belongs to another row.
        """
        exact = self._exact(given)
        if exact is not None:
            return exact, True
        place = self._by_name(given)
        if place is None:
            return self.root / given, False
        claim = _agree(given, place), _one(given)
        certain = 0 < len(place.parts) - len(self.root.parts) - 1 <= claim[0]
        others = place in self._taken or self._claims.get(place, claim) != claim
        if others and not (certain and place in self._taken):
            words = f"{given}: there is no such file; {place} has the same name, but other rows refer to it"
            raise BadSample(
                "missing_image", f"{words}; set prepare.images to the folder that the paths are relative to"
            )
        folder = claim[1].rpartition("/")[0].rpartition("/")[2]
        if folder and not claim[0] and (self._folders_tell or folder in self._folders):
            words = f"{given}: there is no such file; {place} has the same name but is a different picture"
            raise BadSample("missing_image", words)
        return place, certain

    def _claim(self, given: str, place: Path) -> None:
        claim = _agree(given, place), _one(given)
        best = self._claims.get(place, claim)
        if claim[0] > best[0]:
            self._claims[place] = claim
        else:
            self._claims[place] = best if claim[0] < best[0] or claim == best else (best[0], "")

    def _exact(self, given: str) -> Path | None:
        given = given.removeprefix("file://")
        forms = (
            given,
            given.strip(),
            given.strip().strip("'"),
            given.replace("\\", "/").strip(),
            given.partition("#")[0],
            unquote(given),
        )
        for form in dict.fromkeys(composed for one in forms for composed in (one, nfc(one), nfd(one))):
            place = self.root / form
            with suppress(OSError, ValueError):
                if on_disk(place, place.is_file):
                    return place
        return None

    def _by_name(self, given: str) -> Path | None:
        """Return the only file of this name below the folder; None if there is none. Raises `BadSample` for several."""
        name = given.replace("\\", "/").strip().strip("'").rpartition("/")[2]
        whole = name.removesuffix(".0")  # of a number, by programs that know no whole ones with gaps
        coco = [whole.zfill(12)] if whole.isdecimal() else []
        for form in dict.fromkeys((name, name.partition("#")[0], name.partition("?")[0], whole, *coco)):
            places = self._below.get(nfc(form).lower(), [])
            if len(places) > 1:
                ending = Path(given.replace("\\", "/")).parts[-2:]
                places = [place for place in places if place.parts[-len(ending) :] == ending] or places
            if len(places) == 1:
                return places[0]
            if places:
                some = ", ".join(map(str, places[:3]))
                raise BadSample("missing_image", f"{given}: several files have this name ({some}); set prepare.images")
        return None

    @cached_property
    def _folders(self) -> set[str]:
        """Names of the folders of pictures below, in lower case."""
        return {nfc(place.parent.name).lower() for places in self._below.values() for place in places}

    @cached_property
    def _below(self) -> dict[str, list[Path]]:
        """Pictures below the folder by name, with and without extension; for paths that do not exist."""
        root = self.root
        if root.name.lower().startswith("annotation"):
            root = root.parent  # COCO's layout
        found: dict[str, list[Path]] = {}
        for path in files_below(root)[0]:
            stem, _, ending = path.name.rpartition(".")
            if ending.lower() in IMAGE_EXTENSIONS or is_unsupported(ending.lower()):
                found.setdefault(nfc(path.name).lower(), []).append(path)
                found.setdefault(nfc(stem).lower(), []).append(path)
        return found


def _one(given: str) -> str:
    """Return one form of a path for all ways to write it: slashes, lower case, without `#0` or `?w=9` at the end."""
    path = nfc(unquote(given)).replace("\\", "/").strip().lower()
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition("#")[0].partition("?")[0]


def _agree(given: str, place: Path) -> int:
    """Return how many folders, counted from the end, a path has in common with that of a file of the same name."""
    pairs = zip(_one(given).split("/")[-2::-1], (nfc(part).lower() for part in place.parts[-2::-1]), strict=False)
    count = 0
    for one, other in pairs:
        if one != other:
            break
        count += 1
    return count
