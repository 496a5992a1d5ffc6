"""Reading a dump: its graph folders, and the checked content of one."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hvcompile.dump.runs import is_run, latest
from hvcompile.dump.source_reader import load
from hvcompile.errors import InputError, one_line
from hvcompile.ranks import collectives

LOWERINGS = ("eager", "aot", "inductor")
"""From the least to the most that is done to a graph."""

# As ``GraphSource`` writes a call of a collective; the group's name is its only text.
_PREFIX = collectives.__name__.replace(".", "_")
_COLLECTIVE = re.compile(rf"\b{_PREFIX}_\w+\([^'\"\n]*(['\"])(.*?)\1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dumped:
    """One graph's folder: its numbered files in order, and its journal."""

    folder: Path
    files: tuple[Path, ...]
    journal: dict[str, Any]

    @property
    def lower(self) -> str:
        """What the last graph was lowered by, one of ``LOWERINGS``."""
        return str(self.journal["lower"])

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The journal's rows, by the name of the pass."""
        return {row["name"]: row for row in self.journal["passes"]}

    def groups(self) -> dict[str, str]:
        """The process groups over which the graphs talk to other ranks, by name, with the first file that does."""
        first_file: dict[str, str] = {}
        for file in self.files:
            for match in _COLLECTIVE.finditer(file.read_text("utf-8")):
                first_file.setdefault(match[2], file.name)
        return first_file

    def dtypes(self) -> set[torch.dtype]:
        """The floating-point dtypes of the captured graph's inputs.

        Raises:
            InputError: the file can't be run, or the tensors beside it can't be read.

        """
        file = self.files[0]
        try:
            inputs = load(file).example_inputs()
        except (Exception, SystemExit) as error:
            reason = one_line(error)[:300]
            raise InputError(
                f"{str(file)!r} can't be read ({type(error).__name__}: {reason}): dump again, or undo what was changed "
                "in it"
            ) from error
        return {item.dtype for item in inputs if isinstance(item, torch.Tensor) and item.dtype.is_floating_point}

    def notes(self) -> Iterator[str]:
        """What to know of this dump before its figures are believed, one sentence each."""
        yield from self.journal["notes"]
        if not (self.folder / "inputs.pt").exists():
            yield "there is no inputs.pt (the model was compiled and not run, say): inputs are drawn at random"
        if len(self.files) > 1 and not self.files[-1].stem.endswith("_sealed"):
            yield f"the compilation broke off after {self.files[-1].name}, and the lowerings are those of that graph"
        for row in self.rows.values():
            if row["matched"] and not row["is_exact"]:
                yield f"{row['name']} may change numerics: it is compared in a computed step"


def of_rank(directory: Path, rank: int, num_ranks: int) -> Path:
    """What a rank reads of a dump: its own folder if several ranks wrote it, the whole if one process did.

    Args:
        directory: of a dump, or below it.
        rank: of this process.
        num_ranks: how many run now; as many must have written the dump.

    Returns:
        A directory for ``folders``: of the latest run, where there are several.

    Raises:
        InputError: another number of ranks wrote it, or a folder is missing.

    """
    name, ranks = str(directory), _rank_folders(directory)
    if not ranks:
        _check_of_one(directory, num_ranks)
        return latest(directory)
    runs = {rank: latest(path) for rank, path in ranks.items()}
    graphs = [folder for path in runs.values() for folder in _graph_folders(path)]
    numbers = {_num_ranks(folder, default=len(ranks)) for folder in graphs} or {len(ranks)}
    if len(numbers) > 1:
        raise InputError(
            f"{name!r} holds dumps of runs on {' and on '.join(map(str, sorted(numbers)))} ranks: dump again into an "
            "empty directory"
        )
    (needed,) = numbers
    if num_ranks != needed:
        now = f", and {num_ranks} were started" if num_ranks > 1 else ""
        raise InputError(
            f"{name!r} is the dump of {needed} ranks{now}: they run together, {command(shlex.quote(name), needed)}"
        )
    if rank not in ranks:
        raise InputError(f"{name!r} lacks rank_{rank}: the ranks read what they wrote, each on its own machine")
    if len({path.name for path in runs.values() if is_run(path)}) > 1:
        each = ", ".join(f"{path.name} of rank_{number}" for number, path in sorted(runs.items()))
        raise InputError(
            f"{name!r} holds other runs of one rank than of another (the latest are {each}): dump again into an empty "
            "directory"
        )
    return runs[rank]


def _check_of_one(directory: Path, num_ranks: int) -> None:
    """Refuse a dump without folders of ranks where several run, or where its graphs need several."""
    name = str(directory)
    rank_folder = next(
        (path for path in (directory, *directory.parents[:2]) if re.fullmatch(r"rank_\d+", path.name)), None
    )
    root = shlex.quote(str(rank_folder.parent)) if rank_folder is not None else "DIRECTORY"
    needed = max(map(_num_ranks, folders(directory)))
    if num_ranks > 1:
        advice = f"give {root}, which holds all" if rank_folder is not None else "run it without torchrun"
        raise InputError(
            f"{name!r} is the dump of one {'rank' if rank_folder is not None else 'process'}, and {num_ranks} ranks "
            f"were started: {advice}"
        )
    if needed > 1 and any(read(folder).groups() for folder in folders(directory)):
        raise InputError(
            f"{name!r} is what one of {needed} ranks dumped, and its graphs talk to the others: run all of them, "
            f"{command(root, needed)}"
        )


def device(directory: Path) -> torch.device:
    """Where a dump was computed: the first GPU that an input is on, or the CPU.

    Raises:
        InputError: the directory is no dump.

    """
    first, *_ = _files(folders(directory)[0]) or [directory / "journal.json"]
    named = re.search(r'device="(?!cpu")([\w:]+)"', first.read_text("utf-8"))
    return torch.device(named[1] if named else "cpu")


def command(directory: str, num_ranks: int) -> str:
    """The command that bisects a dump of several ranks."""
    return f"torchrun --nproc-per-node={num_ranks} -m hvcompile bisect {directory}"


def folders(directory: Path) -> list[Path]:
    """The graph folders of a dump, oldest first.

    Args:
        directory: of a dump, of which the latest run counts, or one of its runs or of its graph folders.

    Raises:
        InputError: there is no such directory, or it is no dump.

    """
    name = str(directory)
    if not directory.exists():
        raise InputError(f"there is no directory {name!r}: give one that HVCOMPILE_DUMP or options['dump'] named")
    if not directory.is_dir():
        raise InputError(f"{name!r} is a file: give the directory of a dump, such as {str(directory.parent)!r}")
    if (directory / "journal.json").exists() or _files(directory):
        return [directory]
    graphs = _graph_folders(latest(directory))
    if not graphs:
        raise InputError(
            f"{name!r} is no dump: it has no graph_... folder with numbered graphs. Run the model with HVCOMPILE_DUMP "
            "set to a directory, and give that"
        )
    return sorted(graphs, key=lambda path: (_files(path)[0].stat().st_mtime_ns, path.name))


def read(folder: Path) -> Dumped:
    """Read a graph's folder and check that it is complete.

    Raises:
        InputError: a file is missing or broken, or was written under another version of torch.

    """
    journal = _journal(folder)
    files = _files(folder)
    numbers = [int(path.name[:2]) for path in files]
    lacking = sorted(set(range(max(numbers, default=0) + 1)) - set(numbers))
    if len(lacking) > 1 + len(numbers):
        raise InputError(
            f"{str(folder)!r} holds {files[-1].name}, a number too high for a dump's graph files: take it away"
        )
    if lacking:
        raise InputError(
            f"{str(folder)!r} lacks the graph file number {', '.join(f'{number:02d}' for number in lacking)}: each is "
            "compared with the one before; dump again and leave its files there"
        )
    for file in files:
        constants = file.with_suffix(".pt")
        if "constants = torch.load" in file.read_text("utf-8") and not constants.exists():
            raise InputError(f"{str(folder)!r} lacks {constants.name}, the constants of {file.name}: dump again")
    return Dumped(folder=folder, files=tuple(files), journal=journal)


def _rank_folders(directory: Path) -> dict[int, Path]:
    paths = directory.glob("rank_*") if directory.is_dir() else ()
    return {int(path.name[5:]): path for path in paths if path.is_dir() and path.name[5:].isdecimal()}


def _graph_folders(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_dir() and path.name.startswith("graph_") and _files(path)]


def _num_ranks(folder: Path, default: int = 1) -> int:
    """How many ranks ran a graph; ``default`` if its journal does not say."""
    return int(_journal(folder).get("ranks", default))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.py") if re.match(r"\d\d_", path.name))


def _journal(folder: Path) -> dict[str, Any]:
    file = folder / "journal.json"
    if not file.exists():
        raise InputError(
            f"{str(folder)!r} has no journal.json: a dump writes one; dump again and leave its files there"
        )
    try:
        journal: dict[str, Any] = json.loads(file.read_text("utf-8"))
        version, passes = journal["torch"], journal["passes"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{str(file)!r} is no journal of a dump ({error!r}): dump again") from error
    if version != torch.__version__:
        raise InputError(
            f"{str(folder)!r} was dumped on torch {version} and this is torch {torch.__version__}, whose lowerings are "
            "others: bisect it in the environment that it comes from, or dump again here"
        )
    complete = (
        isinstance(journal.get("ranks", 1), int)
        and isinstance(passes, list)
        and all(isinstance(row, dict) for row in passes)
    )
    complete = complete and all({"name", "section", "is_exact", "tolerance", "matched"} <= set(row) for row in passes)
    if journal.get("lower") not in LOWERINGS or "notes" not in journal or not complete:
        raise InputError(f"{str(file)!r} is no journal of this version of hvcompile: dump again")
    return journal
