"""``/v1/fine_tuning/jobs``: OpenAI's fine-tuning endpoints, and ``DELETE`` of a fine-tuned model.

The same keys open them as the file endpoints (``files.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from server.errors import InvalidRequest
from server.finetune.jobs.database import Job, JobEvent
from server.finetune.jobs.store import check_job_name
from server.finetune.jobs.training import Training
from server.http.context import context_of, training_of
from server.http.files import list_object
from server.http.fine_tuning_schema import MAX_TAGS, CreateJob, recipe_of
from server.http.generation import CompletionStream
from server.http.json_response import JSONResponse
from server.http.limits import read_body
from server.http.models import base_names, resolve_adapter
from server.http.query import ANY, SWITCH, TEXT, integer, read_query
from server.http.record import record_of
from server.http.sse import Chunks, EventStream

PAGE = {"after": TEXT, "limit": integer(1, 100, default=20)}
CHECKPOINT_PAGE = {"after": TEXT, "limit": integer(1, 100, default=10)}
EVENTS = PAGE | {"stream": SWITCH}
_METRICS = {
    "step": "step",
    "train_loss": "train_loss",
    "train_mean_token_accuracy": "train_mean_token_accuracy",
    "valid_loss": "full_valid_loss",
    "valid_mean_token_accuracy": "full_valid_mean_token_accuracy",
    "full_valid_loss": "full_valid_loss",
    "full_valid_mean_token_accuracy": "full_valid_mean_token_accuracy",
}
"""OpenAI's metrics of a checkpoint, and our names for them. We always measure the whole validation file."""


async def create_job(request: Request) -> JSONResponse:
    """Queue a job that trains an adapter for the served base."""
    context, training = context_of(request), training_of(request)
    body = await read_body(request, CreateJob, context.config.max_body_bytes)
    names = base_names(context.service.base)
    if body.model not in names:
        raise InvalidRequest(f"Only the base can be fine-tuned; set 'model' to {names[0]!r}.", "model")
    if body.name is not None:
        await _check_name(request, training, body.name)
    job = await training.create_job(body.job_request())
    return JSONResponse(job_object(job))


async def list_jobs(request: Request) -> JSONResponse:
    """A page of jobs, the newest first. ``metadata[key]=value`` selects jobs with that tag."""
    prefix, params = "metadata[", request.query_params
    tags = {key[len(prefix) : -1]: params[key] for key in params if key.startswith(prefix)}
    if len(tags) > MAX_TAGS:
        raise InvalidRequest(f"'metadata' has {len(tags)} keys; at most {MAX_TAGS} are allowed.", "metadata")
    declared = PAGE | {f"{prefix}{key}]": ANY for key in tags}
    query = read_query(request, declared)
    training = training_of(request)
    page = await training.read(training.jobs.list, query["after"], query["limit"], tags)
    return JSONResponse(list_object([job_object(job) for job in page.rows], page.has_more))


async def get_job(request: Request) -> JSONResponse:
    """One job."""
    training = training_of(request)
    return JSONResponse(job_object(await training.read(training.jobs.get, request.path_params["job"])))


async def cancel_job(request: Request) -> JSONResponse:
    """Cancel a job. It cannot be resumed."""
    return await _changed(request, training_of(request).jobs.cancel)


async def pause_job(request: Request) -> JSONResponse:
    """Stop a job at a checkpoint, until it is resumed."""
    return await _changed(request, training_of(request).jobs.pause)


async def resume_job(request: Request) -> JSONResponse:
    """Queue a paused job again."""
    return await _changed(request, training_of(request).jobs.resume)


async def list_events(request: Request) -> Response:
    """A page of a job's events, the newest first. ``stream=true``: all events in order, as they happen."""
    context, training = context_of(request), training_of(request)
    query, job_id = read_query(request, EVENTS), request.path_params["job"]
    if query["stream"]:
        stream = CompletionStream((), 0, record_of(request), context.metrics)  # it generates nothing
        return EventStream(_all_events(training, job_id, query["after"]), stream, context.closing)
    page = await training.read(training.jobs.events, job_id, query["after"], query["limit"])
    return JSONResponse(list_object([event_object(event) for event in page.rows], page.has_more))


async def list_checkpoints(request: Request) -> JSONResponse:
    """A page of a job's checkpoints, the newest first. A paused job resumes from one. They are not served."""
    training, job_id = training_of(request), request.path_params["job"]
    query = read_query(request, CHECKPOINT_PAGE)
    after = query["after"] and query["after"].replace("ftckpt-", "ftevent-", 1)
    job = await training.read(training.jobs.get, job_id)
    page = await training.read(training.jobs.checkpoints, job_id, after, query["limit"])
    return JSONResponse(list_object([checkpoint_object(job, event) for event in page.rows], page.has_more))


async def delete_model(request: Request) -> JSONResponse:
    """Stop serving a fine-tuned model, and delete its adapter."""
    context, training, model = context_of(request), training_of(request), request.path_params["model"]
    if not await training.delete_model(model):
        await resolve_adapter(context.service, model)
        raise InvalidRequest(
            f"{model!r} was not made by a fine-tuning job; use /v1/unload_lora_adapter.", "model"
        )
    return JSONResponse({"id": model, "object": "model", "deleted": True})


def job_object(job: Job) -> dict[str, Any]:
    """OpenAI's ``fine_tuning.job`` object, and our fields."""
    return recipe_of(job.recipe) | {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": int(job.created_at),
        "finished_at": _seconds(job.finished_at),
        "estimated_finish": _seconds(job.estimated_finish),
        "status": job.status,
        "error": job.error,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model if job.status == "succeeded" else None,
        "organization_id": "manylora",
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": job.result_files,
        "trained_tokens": job.trained_tokens,
        "seed": job.seed,
        "hyperparameters": job.hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": job.hyperparameters}},
        "integrations": [],
        "metadata": job.tags,
    }


def event_object(event: JobEvent) -> dict[str, Any]:
    """OpenAI's ``fine_tuning.job.event`` object."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": int(event.created_at),
        "level": event.level,
        "message": event.message,
        "type": "metrics" if event.kind == "metrics" else "message",
        "data": event.data,
    }


def checkpoint_object(job: Job, event: JobEvent) -> dict[str, Any]:
    """OpenAI's ``fine_tuning.job.checkpoint`` object."""
    step = event.data.get("step") or 0
    return {
        "id": event.id.replace("ftevent-", "ftckpt-", 1),
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(event.created_at),
        "fine_tuning_job_id": job.id,
        "fine_tuned_model_checkpoint": f"{job.fine_tuned_model}:ckpt-step-{step}",
        "step_number": step,
        "metrics": {name: event.data[ours] for name, ours in _METRICS.items() if ours in event.data},
    }


async def _changed(request: Request, change: Callable[[str], Job]) -> JSONResponse:
    job = await training_of(request).write(change, request.path_params["job"])
    return JSONResponse(job_object(job))


async def _check_name(request: Request, training: Training, name: str) -> None:
    """Refuse the name of a model that no job has made. Only models from jobs may be replaced."""
    check_job_name(name)
    is_base = name in base_names(context_of(request).service.base)
    if is_base or not (await training.is_free(name) or await training.is_made_by_job(name)):
        raise InvalidRequest(f"{name!r} is taken by a model that no fine-tuning job has made.", "name")


async def _all_events(training: Training, job_id: str, after: str | None) -> Chunks:
    """Every event after ``after``, until the job has ended and all its events were sent."""
    async with aclosing(training.broadcaster.subscribe(job_id, after)) as events:
        async for event in events:
            yield event_object(event)


def _seconds(time: float | None) -> int | None:
    return None if time is None else int(time)
