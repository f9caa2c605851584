"""Models in a folder: ``config.json`` and ``model.safetensors``."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from typing_extensions import Self

__all__ = ["PretrainedModel", "config_from_fields"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


class PretrainedModel(nn.Module):
    """What all models share: saving and loading.

    A model is made by ``Model(config, **arguments)`` and keeps both as attributes of these names;
    one that is made otherwise defines ``_fields`` and ``_from_fields``.

    Attributes:
        config: a ``config_class``.
        config_class: the dataclass of the configuration.
        saved_arguments: names of the further constructor arguments, saved with the configuration.
    """

    config: Any
    config_class: ClassVar[type[Any]]
    saved_arguments: ClassVar[tuple[str, ...]] = ()

    def _fields(self) -> dict[str, Any]:
        """What :meth:`_from_fields` makes the model from, as JSON."""
        arguments = {name: getattr(self, name) for name in self.saved_arguments}
        return {**dataclasses.asdict(self.config), **arguments}

    @classmethod
    def _from_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Raises TypeError or ValueError for fields that make no model."""
        arguments = {name: fields[name] for name in cls.saved_arguments if name in fields}
        config = {name: value for name, value in fields.items() if name not in arguments}
        return cls(config_from_fields(cls.config_class, config), **arguments)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes ``config.json`` and ``model.safetensors``; each replaces its old version at
        once."""
        from safetensors.torch import save_file

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"architecture": type(self).__name__, **self._fields()}
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        partial = folder / f"{CONFIG_FILE}.{os.getpid()}.partial"
        partial.write_text(json.dumps(config, indent=2) + "\n")
        partial_weights = folder / f"{WEIGHTS_FILE}.{os.getpid()}.partial"
        save_file(weights, partial_weights, metadata={"format": "pt"})
        os.replace(partial_weights, folder / WEIGHTS_FILE)
        os.replace(partial, folder / CONFIG_FILE)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, device: torch.device | str = "cpu"
    ) -> Self:
        """The model that :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: a file is truncated or of something else; says which and why.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config_path, weights_path = Path(directory) / CONFIG_FILE, Path(directory) / WEIGHTS_FILE
        for path in (config_path, weights_path):
            if not path.is_file():
                raise FileNotFoundError(f"{cls.__name__}.from_pretrained: no such file: {path}")
        try:
            fields = json.loads(config_path.read_text())
        except ValueError as error:
            raise ValueError(f"{config_path}: expected JSON, got {error}") from error
        architecture = fields.pop("architecture", None) if isinstance(fields, dict) else None
        if architecture != cls.__name__:
            raise ValueError(
                f"{config_path}: expected architecture {cls.__name__}, got {architecture}"
            )
        try:
            model = cls._from_fields(fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{config_path}: {error}") from error
        try:
            weights = load_file(weights_path)
        except SafetensorError as error:
            raise ValueError(f"{weights_path}: expected safetensors, got {error}") from error
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"{weights_path}: not the weights of {config_path}: {error}"
            ) from error
        return model.to(device).eval()


def config_from_fields(config_class: type[Any], fields: Mapping[str, Any]) -> Any:
    """A ``config_class`` from JSON. Raises ValueError for a field that it has not."""
    known = {field.name for field in dataclasses.fields(config_class)}
    if not set(fields) <= known:
        raise ValueError(f"unknown fields {sorted(set(fields) - known)}")
    return config_class(**fields)
