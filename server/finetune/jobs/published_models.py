"""Publishes and removes the models of jobs, and distinguishes them from the operator's adapters.

A job never replaces a folder that no job made, nor a name that the operator loaded from another folder.
Clients cannot delete those either.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

from adapters.errors import AdapterExists, AdapterNotFound
from adapters.paths import folder_name
from adapters.printable import printable
from server.engine.interface import Service
from server.finetune.command.provenance import Provenance

_LOAD_SECONDS = 60.0


class PublishedModels:
    """The ``ModelPublisher`` of the runner.

    Call coroutines, ``is_known`` and ``is_in_other_folder`` on the event loop of the service. The other
    methods block, so call them on another thread.

    Attributes:
        loop: the event loop of the service. Set it before the runner starts.
    """

    def __init__(self, service: Service, root: Path, provenance: Provenance) -> None:
        """``root`` is the adapter folder."""
        self._service = service
        self._root = root.absolute()
        self._provenance = provenance
        self.loop: asyncio.AbstractEventLoop | None = None

    def is_known(self, name: str) -> bool:
        """Whether the service has an adapter of that name: served, waiting or failed."""
        return bool(self._folders(name))

    def is_in_other_folder(self, name: str) -> bool:
        """Whether an operator has loaded the name from another folder than its own."""
        return bool(self._folders(name) - {printable(str(self._folder_of(name)))})

    def has_folder(self, name: str) -> bool:
        return self._folder_of(name).exists() or self._folder_of(name).is_symlink()

    def is_made_by_job(self, name: str) -> bool:
        """Whether a job made the folder of that name."""
        return self._provenance.job_of(self._folder_of(name), name) is not None

    def check_place(self, name: str) -> None:
        """Raises AdapterExists if a job may not publish under that name. ``publish`` checks it again."""
        if self.has_folder(name) and not self.is_made_by_job(name):
            raise _taken(name)

    def publish(self, name: str, job: str) -> None:
        if self._provenance.job_of(self._folder_of(name), name) != job:
            raise _taken(name)
        self._on_loop(self._serve(name))

    def unpublish(self, name: str, job: str) -> None:
        if self._provenance.job_of(self._folder_of(name), name) == job:
            self._on_loop(self.unload(name))
            self.remove(name)

    async def unload(self, name: str) -> None:
        """Stop serving the adapter, if it is served from its own folder."""
        if not self.is_in_other_folder(name):
            with suppress(AdapterNotFound):
                await self._service.unload_adapter(name)

    def remove(self, name: str) -> bool:
        """Remove the folder of that name. Returns False and leaves it if no job made it.

        The folder is first renamed to a name that the watcher ignores, so that it never sees a part of it.
        """
        folder = self._folder_of(name)
        gone = folder.with_name(f".deleted-{secrets.token_hex(8)}")
        try:
            folder.rename(gone)
        except FileNotFoundError:
            return True
        if self._provenance.job_of(gone, name) is None:  # another folder took its place in the meantime
            gone.rename(folder)
            return False
        shutil.rmtree(gone, ignore_errors=True)
        return True

    async def _serve(self, name: str) -> None:
        if self.is_in_other_folder(name):
            raise _taken(name)
        await self._service.load_adapter(name, folder_name(name), True)

    def _folder_of(self, name: str) -> Path:
        return self._root / folder_name(name)

    def _folders(self, name: str) -> set[str]:
        """The folder from which the name is served. Empty if the adapter only finishes its last requests."""
        known = self._service.adapter(name)
        return {str(self._root / known.path)} if known is not None and known.state != "draining" else set()

    def _on_loop(self, work: Coroutine[Any, Any, object]) -> None:
        assert self.loop is not None
        asyncio.run_coroutine_threadsafe(work, self.loop).result(_LOAD_SECONDS)


def _taken(name: str) -> AdapterExists:
    return AdapterExists(
        f"{name!r} is taken by a model that no fine-tuning job has made; choose another name."
    )
