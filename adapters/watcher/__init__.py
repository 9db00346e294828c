"""Keeps the registry in sync with the adapter folder.

``watcher.py`` scans the folder. ``folder.py`` has the state of one sub-folder. ``signature.py`` compares
files without opening them. ``suppressed.py`` has the folders that clients have unloaded. ``readers.py`` has
the threads that read folders.
"""

from adapters.watcher.watcher import Watcher

__all__ = ["Watcher"]
