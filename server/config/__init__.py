"""What a command was told: its options, what their values may be, and the frozen config. No torch.

Reading order: ``options.py`` (every option of ``manylora serve``), ``values.py`` (what a value may be),
``config.py`` (the config), ``shared_options.py`` (options that other commands have too).
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
