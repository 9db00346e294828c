"""``/v1/files``: OpenAI's file endpoints, for training data and the results of jobs.

A client key opens them. Every client sees all files, since there are no tenants yet. If the server has no
client keys, only admins may use them (``app.py``): training data is private, and uploads can fill the disk.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse

from adapters.errors import DatasetInvalid
from server.errors import InvalidRequest
from server.finetune.jobs.database import StoredFile
from server.finetune.jobs.files import TRAINING, Upload
from server.finetune.jobs.training import Training
from server.http import fields
from server.http.context import training_of
from server.http.errors import BodyTooLarge
from server.http.json_response import JSONResponse
from server.http.multipart import MAX_OTHER_BYTES, Form, body_blocks, form_of
from server.http.query import TEXT, choice, integer, read_query

PURPOSE = "purpose"
LIST = {
    "after": TEXT,
    "limit": integer(1, 10_000, default=10_000),
    "order": choice("asc", "desc", default="desc"),
    "purpose": TEXT,
}


async def upload_file(request: Request) -> JSONResponse:
    """Write a training file to the disk while it arrives, then check each of its rows."""
    training = training_of(request)
    form = form_of(request, fields.FILE)
    most = training.config.max_file_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:18]) > most + MAX_OTHER_BYTES:
        raise _too_large(most)
    upload = await training.disk.run(training.files.begin)
    try:
        async for block in body_blocks(request):
            await training.disk.run(_take, form, upload, block, most)
        form.finish()
        file = await training.checks.run(_keep, training, upload, form)
    finally:
        await training.disk.run(upload.discard)
    return JSONResponse(file_object(file))


async def list_files(request: Request) -> JSONResponse:
    """A page of files; by default the newest first."""
    query = read_query(request, LIST)
    training = training_of(request)
    page = await training.read(
        training.files.list, query["after"], query["limit"], query["order"] == "asc", query["purpose"]
    )
    return JSONResponse(list_object([file_object(file) for file in page.rows], page.has_more))


async def get_file(request: Request) -> JSONResponse:
    """One file's object."""
    training = training_of(request)
    file = await training.read(training.files.get, request.path_params["file"])
    return JSONResponse(file_object(file))


async def get_content(request: Request) -> FileResponse:
    """The file's bytes, unchanged."""
    training = training_of(request)
    file, path = await training.read(training.files.content, request.path_params["file"])
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


async def delete_file(request: Request) -> JSONResponse:
    """Delete a file. A file that an unfinished job needs is refused."""
    training, file_id = training_of(request), request.path_params["file"]
    await training.write(training.files.delete, file_id)
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def file_object(file: StoredFile) -> dict[str, Any]:
    """OpenAI's ``file`` object, and our fields: ``sha256``, ``format``, ``rows``, ``unused_fields``."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": int(file.created_at),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
        "expires_at": None,
        "sha256": file.sha256,
        "format": file.format,
        "rows": file.rows,
        "unused_fields": file.unused_fields,
    }


def list_object(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """OpenAI's ``list`` object, with the cursors of its page."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}


def _take(form: Form, upload: Upload, block: bytes, most: int) -> None:
    data = form.feed(block)
    if upload.size + len(data) > most:
        raise _too_large(most)
    upload.write(bytes(data))


def _keep(training: Training, upload: Upload, form: Form) -> StoredFile:
    purpose = form.fields.get(PURPOSE)
    if purpose != TRAINING:
        raise InvalidRequest(f"'purpose' must be '{TRAINING}', not {purpose!r}.", PURPOSE, "invalid_value")
    if form.filename is None:
        raise InvalidRequest("The form has no 'file'.", "file", "missing_required_parameter")
    try:
        return training.files.keep(upload, form.filename, purpose)
    except DatasetInvalid as error:
        raise InvalidRequest(str(error), "file", "invalid_training_file") from None


def _too_large(most: int) -> BodyTooLarge:
    return BodyTooLarge(f"The file has more than {most} bytes; send less, or raise --max-file-bytes.", "file")
