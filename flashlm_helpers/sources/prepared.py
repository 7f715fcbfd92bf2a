"""Which texts have token files here already, found without asking anybody for the texts."""

import json
from pathlib import Path

_HEADER = 512  # bytes of JSON at the start of a token file


def find_prepared(folder: Path, name: str, key: str) -> dict | None:
    """Return the header of a text's training tokens, if those for validation are there, too.

    folder: where token files are kept. name and key: of the corpus. Returns None if a part is
    missing or damaged, or there is no such folder.
    """
    headers = {}
    for path in sorted(folder.glob(f"{name}-*.tokens")):
        # Whatever cannot be read is built anew by those who need it.
        try:
            with path.open("rb") as file:
                header = json.loads(file.read(_HEADER))
            identity = header["identity"]

            # Older files have no checksum, and those of a curriculum lack more than copies.
            whole = "checksum" in header and "held_out" not in identity
            if identity["corpus"] == key and whole:
                headers[identity["vocabulary"], identity["split"]] = header
        except (OSError, ValueError, KeyError, TypeError):
            continue

    # Both splits of one vocabulary.
    for (vocabulary, split), header in headers.items():
        if split == "train" and (vocabulary, "valid") in headers:
            return header
    return None
