"""Converts the command line of ``manylora train`` to the config of training."""

from __future__ import annotations

import argparse
from functools import partial

from adapters.artifact.adapter import Limits
from adapters.base import PreparedBase
from adapters.base.source import name_of
from adapters.errors import AdapterNameInvalid
from adapters.paths import check_name
from adapters.training import TrainConfig
from adapters.training.servable import Serving
from server.config import ServerConfig
from server.engine.check import check_alone
from server.engine.model.supported import check_config
from server.finetune.command.options import chosen
from server.finetune.evaluation.metrics import is_short


def train_config(arguments: argparse.Namespace, server: ServerConfig) -> TrainConfig:
    """Raises RecipeInvalid."""
    return TrainConfig(
        data=arguments.data,
        eval_data=arguments.eval,
        base=server.model.name,
        home=server.home,
        quantization=server.model.quantization,
        head_quantization=server.model.head_quantization,
        hf_overrides=server.model.overrides,
        allow_special_tokens=server.model.allow_special_tokens,
        device=server.model.device,
        **chosen(arguments),
    )


def check_adapter_name(arguments: argparse.Namespace, server: ServerConfig) -> None:
    """Raises AdapterNameInvalid.

    A server that starts a job has checked the names of the base, because it may serve the base under others.
    """
    name = check_name(arguments.name)
    if arguments.job is None and name == name_of(server.model.name):
        raise AdapterNameInvalid(f"{name!r} is the base's own name; choose another name for the adapter.")


def serving_of(server: ServerConfig) -> Serving:
    """The limits of the server that will serve the adapter."""
    adapters = server.adapters

    max_model_len = server.engine.max_model_len

    def check_base(prepared: PreparedBase, device: str) -> None:
        check_alone(prepared, server.home, device, max_model_len)

    return Serving(
        Limits(adapters.max_lora_rank, adapters.max_bytes),
        adapters.extra_memory,
        is_short,
        max_model_len,
        partial(check_config, longest=max_model_len),
        check_base,
    )
