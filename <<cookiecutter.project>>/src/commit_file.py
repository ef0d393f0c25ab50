"""Whether a file is a whole commit, and one of ours; it needs no Keras."""

import hashlib
from pathlib import Path

import h5py

USER_BLOCK = 512
SIGNATURE = b"training checkpoint, sha256 of what follows byte 512: "


class DamagedCheckpointError(OSError):
    """A file that is no commit, or whose bytes are not those that were written."""


def verify(path: Path) -> None:
    """Compare a commit's bytes with the digest in its first 512.

    Raises:
        DamagedCheckpointError: if they differ, or if the file is not one of ours.
    """
    with open(path, "rb") as file:
        head = file.read(USER_BLOCK)
        if not head.startswith(SIGNATURE):
            raise DamagedCheckpointError(f"{path} is not a checkpoint of this project, or is torn")
        digest = hashlib.file_digest(file, "sha256").hexdigest().encode()
    if head.rstrip(b"\0") != SIGNATURE + digest:
        raise DamagedCheckpointError(
            f"{path} is damaged: its bytes are not those that were written"
        )
    _refuse_foreign(path)


def _refuse_foreign(path: Path) -> None:
    """Refuse what no commit of ours has: data kept elsewhere, or larger than the file.

    A digest shows that a file is whole, not who made it; HDF5 follows links to other files.

    Raises:
        DamagedCheckpointError: naming what there is.
    """
    size = path.stat().st_size

    def look(group: h5py.Group) -> None:
        for name in group:
            link = group.get(name, getlink=True)
            place = f"{group.name.rstrip('/')}/{name}"
            if not isinstance(link, h5py.HardLink):
                raise DamagedCheckpointError(f"{path} is no checkpoint of ours: {place} is a link")
            item = group[name]
            if isinstance(item, h5py.Group):
                look(item)
            elif item.external or item.is_virtual or item.nbytes > size:
                raise DamagedCheckpointError(
                    f"{path} is no checkpoint of ours: {place} is not within the file"
                )

    with h5py.File(path, "r") as file:
        look(file)
