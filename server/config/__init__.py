"""The options of ``manylora serve``, their values, and the frozen config. This package does not import torch.

Reading order: ``options.py`` (every option of ``manylora serve``), ``values.py`` (which values are valid),
``config.py`` (the config), ``shared_options.py`` (the options that other commands have too).
"""

from server.config.config import (
    AdapterConfig,
    ConfigError,
    ConnectionConfig,
    EngineConfig,
    HttpConfig,
    LogConfig,
    ModelConfig,
    ServerConfig,
    TrainingConfig,
    from_args,
    from_options,
    resolve,
)

__all__ = [
    "AdapterConfig",
    "ConfigError",
    "ConnectionConfig",
    "EngineConfig",
    "HttpConfig",
    "LogConfig",
    "ModelConfig",
    "ServerConfig",
    "TrainingConfig",
    "from_args",
    "from_options",
    "resolve",
]
