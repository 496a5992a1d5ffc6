"""What one command makes: several prompts, each with several seeds, an output file each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hvcompile.errors import InputError

MOST_SEEDS = 100_000
"""Of one option; a range with a digit too many would run for years."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One clip, or picture, to make."""

    prompt: str
    seed: int
    output: Path


def jobs(prompts: Sequence[str], seeds: Sequence[int], output: Path) -> tuple[Job, ...]:
    """Every prompt with every seed.

    Args:
        prompts: one or more.
        seeds: one or more.
        output: of a single job; the files of several are named after it, with the prompt's number and the seed.

    """
    digits = len(str(len(prompts)))

    def place(number: int, seed: int) -> Path:
        parts = [output.stem]
        parts += [f"{number:0{digits}d}"] if len(prompts) > 1 else []
        parts += [f"seed{seed}"] if len(seeds) > 1 else []
        return output.with_name("-".join(parts) + output.suffix)

    return tuple(
        Job(prompt=prompt, seed=seed, output=place(number, seed))
        for number, prompt in enumerate(prompts, 1)
        for seed in seeds
    )


def read_prompts(path: Path) -> tuple[str, ...]:
    """Read a file of prompts: one a line; empty lines, and those that begin with #, are left out.

    Raises:
        InputError: the file can't be read, is no text, or holds no prompt.

    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"prompts {str(path)!r} is no text in UTF-8: give one prompt a line") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"prompts {str(path)!r} can't be read ({reason}): give a text file") from error
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not prompts:
        raise InputError(f"prompts {str(path)!r} holds no prompt: give one a line")
    return prompts


def read_seeds(text: str) -> tuple[int, ...]:
    """Read a list of seeds: numbers and ranges with commas between, such as 0-7,42.

    Raises:
        InputError: a part is neither, a range runs backwards, a seed comes twice, or there are too many.

    """
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not _is_number(first) or (last and not _is_number(last)) or part.strip().endswith("-"):
            raise InputError(
                f"seeds {text[:60]!r}: {part.strip()[:60]!r} is no number and no range: give such as 0-7,42"
            )
        begin, end = int(first), int(last or first)
        if end < begin:
            raise InputError(f"seeds {text!r}: {part.strip()!r} runs backwards: give {end}-{begin}")
        if end - begin >= MOST_SEEDS:
            raise InputError(f"seeds {text!r}: {part.strip()!r} has over {MOST_SEEDS} seeds: give fewer")
        seeds.extend(range(begin, end + 1))
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds {text!r} gives a seed twice: give each once")
    return tuple(seeds)


def _is_number(text: str) -> bool:
    """Whether a text is a number that a seed may be; a longer one Python would refuse to read."""
    return text.isdecimal() and len(text) <= 20
