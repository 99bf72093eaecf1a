"""What a packed store is called; read where nothing else of a store is."""

from typing import Final

MANIFEST: Final = "manifest.json"
FORMAT: Final = 2
