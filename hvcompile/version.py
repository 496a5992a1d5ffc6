"""The version of the package, in the one place where it stands, and those of others."""

from importlib import metadata

__version__ = "0.1.0"


def version_of(package: str) -> str | None:
    """The version of a package that is installed; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
