"""Checks whether a posted job can be trained and served. It runs ``manylora train --check`` in a process."""

from __future__ import annotations

import json
import logging
import re
import subprocess

from server.config import ServerConfig
from server.errors import InvalidRequest
from server.finetune.jobs.child import child_command
from server.finetune.jobs.command import FIELDS, train_command, train_environ
from server.finetune.jobs.database import Job
from server.finetune.jobs.errors import FileNotKnown
from server.finetune.jobs.files import Files

logger = logging.getLogger("manylora.jobs")

_NICE = 5  # below serving, but above training, because a client waits for the answer
_SECONDS = 60.0
_WRONG = 2


class JobValidator:
    """Runs one check at a time."""

    def __init__(self, files: Files, config: ServerConfig) -> None:
        self._files, self._config = files, config
        self._process: subprocess.Popen[str] | None = None

    def validate(self, job: Job) -> list[str]:
        """Returns the warnings about ``job``. Blocks for seconds.

        If the check itself cannot run, the job is accepted and will report the error.

        Raises:
            InvalidRequest: the job would fail, or its adapter could not be served. Names the field.
        """
        for field in ("training_file", "validation_file"):
            file_id = getattr(job, field)
            if file_id is not None:
                try:
                    self._files.content(file_id)
                except FileNotKnown as error:
                    raise InvalidRequest(str(error), field, "invalid_file_id") from None
        try:
            code, output = self._check(job)
            found = json.loads(output)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            reason = {"job": job.id, "reason": repr(error)}
            logger.warning("job validation failed to run", extra={"fields": reason})
            return []
        if code == _WRONG and found["error"]:
            raise _refusal(found["error"], job)
        return [str(warning) for warning in found["warnings"]]

    def close(self) -> None:
        """Kill the process of the check that is running."""
        if (process := self._process) is not None:
            process.kill()

    def _check(self, job: Job) -> tuple[int, str]:
        """The exit code and the output of the check."""
        folder = self._config.home / "jobs" / job.id
        command = [*train_command(job, folder, self._files, self._config), "--check"]
        with subprocess.Popen(
            child_command(command, _NICE),
            env=train_environ(self._config.training),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as self._process:
            try:
                output = self._process.communicate(timeout=_SECONDS)[0]
                return self._process.returncode, output
            finally:
                self._process.kill()


def _refusal(message: str, job: Job) -> InvalidRequest:
    """The error of the command as an error of the API, which names fields instead of flags."""
    for field in ("training_file", "validation_file"):
        if message.startswith(f"{getattr(job, field)} "):
            return InvalidRequest(_in_fields(message), field, "invalid_training_file")
    named = next((flag for flag in re.findall(r"--[a-z-]+", message) if flag in FIELDS), None)
    return InvalidRequest(_in_fields(message), FIELDS[named] if named else None, "invalid_value")


def _in_fields(message: str) -> str:
    return re.sub(r"--[a-z-]+", lambda flag: FIELDS.get(flag[0], flag[0]), message)
