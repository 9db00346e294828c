"""Whether a job that is posted can be trained and served: the training command's own check, in a process."""

from __future__ import annotations

import json
import logging
import re
import subprocess

from server.config import ServerConfig
from server.errors import InvalidRequest
from server.jobs.child import wrapped
from server.jobs.command import FIELDS, train_command, train_environ
from server.jobs.database import Job
from server.jobs.errors import FileNotKnown
from server.jobs.files import Files

logger = logging.getLogger("manylora.jobs")

_NICE = 5  # a client waits for the answer: behind serving, but before training
_SECONDS = 60.0
_WRONG = 2


def vet(job: Job, files: Files, config: ServerConfig) -> list[str]:
    """Warnings for whoever asks for ``job``. Blocks for seconds.

    A check that cannot be made refuses nothing: the job itself will tell.

    Raises:
        InvalidRequest: it would fail, or its model could not be served; names the field.
    """
    for field in ("training_file", "validation_file"):
        file_id = getattr(job, field)
        if file_id is not None:
            try:
                files.content(file_id)
            except FileNotKnown as error:
                raise InvalidRequest(str(error), field, "invalid_file_id") from None
    command = [*train_command(job, config.home / "jobs" / job.id, files, config), "--check"]
    try:
        done = subprocess.run(
            wrapped(command, _NICE),
            env=train_environ(config.training),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            timeout=_SECONDS,
        )
        found = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        logger.warning("a job could not be checked", extra={"fields": {"job": job.id, "reason": repr(error)}})
        return []
    if done.returncode == _WRONG and found["error"]:
        raise _refusal(found["error"], job)
    return [str(warning) for warning in found["warnings"]]


def _refusal(message: str, job: Job) -> InvalidRequest:
    """The command's words in the API's: its flags are fields here."""
    for field in ("training_file", "validation_file"):
        if message.startswith(f"{getattr(job, field)} "):
            return InvalidRequest(_in_fields(message), field, "invalid_training_file")
    named = next((flag for flag in re.findall(r"--[a-z-]+", message) if flag in FIELDS), None)
    return InvalidRequest(_in_fields(message), FIELDS[named] if named else None, "invalid_value")


def _in_fields(message: str) -> str:
    return re.sub(r"--[a-z-]+", lambda flag: FIELDS.get(flag[0], flag[0]), message)
