"""Models in a folder: ``config.json`` and ``model.safetensors``; the loader of all files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .formats import ABSENT, FORMAT, check_format

__all__ = ["PretrainedModel", "config_from_fields", "lasting_config", "restore_model"]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_DIGEST = "reformer_ext.sha256"  # in the metadata of the weights; tools that rewrite them drop it

# What a constructor may raise for values that come from a file.
_FIELD_ERRORS = (
    *(TypeError, ValueError, AttributeError, KeyError, ArithmeticError),
    *(RuntimeError, MemoryError, RecursionError),
)


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

    def penalty(self) -> Tensor:
        """What the layers add to the loss, a scalar, 0 for the library's kinds of attention; see
        :meth:`Reformer.penalty`."""
        parts = (getattr(part, "penalty", None) for part in self.children())
        return torch.stack([penalty() for penalty in parts if penalty is not None]).sum()

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
        once. The weights carry a digest, which :meth:`from_pretrained` checks."""
        from safetensors.torch import save_file

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"architecture": type(self).__name__, "format": FORMAT, **self._fields()}
        weights = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        partial = folder / f"{CONFIG_FILE}.{os.getpid()}.partial"
        partial.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        partial_weights = folder / f"{WEIGHTS_FILE}.{os.getpid()}.partial"
        save_file(weights, partial_weights, metadata={"format": "pt", _DIGEST: _digest(weights)})
        os.replace(partial_weights, folder / WEIGHTS_FILE)
        os.replace(partial, folder / CONFIG_FILE)

    @classmethod
    def from_pretrained(
        cls, directory: str | os.PathLike[str], *, device: torch.device | str = "cpu"
    ) -> Self:
        """The model that :meth:`save_pretrained` wrote, in evaluation mode.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: a file is truncated, damaged, of something else or of a newer version; says
                which and why.
        """
        config_path, weights_path = Path(directory) / CONFIG_FILE, Path(directory) / WEIGHTS_FILE
        for path in (config_path, weights_path):
            if not path.is_file():
                raise FileNotFoundError(f"{cls.__name__}.from_pretrained: no such file: {path}")
        try:
            fields = json.loads(config_path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{config_path}: expected JSON, got {error}") from error
        if not isinstance(fields, dict):
            fields = {}
        check_format(str(config_path), fields.pop("format", 1))
        architecture = fields.pop("architecture", None)
        if architecture != cls.__name__:
            raise ValueError(
                f"{config_path}: expected architecture {cls.__name__}, got {architecture}"
            )
        weights = _read_weights(weights_path)
        model = restore_model(cls, fields, weights, str(config_path), str(weights_path))
        return model.to(device).eval()


_Config = TypeVar("_Config")
_Model = TypeVar("_Model", bound=PretrainedModel)


def restore_model(
    model_class: type[_Model],
    fields: object,
    weights: object,
    fields_source: str,
    weights_source: str,
) -> _Model:
    """The model of a file: every loader ends here.

    Args:
        model_class: of the model.
        fields: what the file says of it, without format and architecture.
        weights: its state dict.
        fields_source, weights_source: the files, for the messages.

    Returns:
        the model on the CPU, in training mode.

    Raises:
        ValueError: fields that make no model, or weights of another; nothing large has been
            allocated by then.
    """
    if not isinstance(fields, Mapping) or not all(isinstance(name, str) for name in fields):
        raise ValueError(f"{fields_source}: expected named fields, got {type(fields).__name__}")
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    ):
        raise ValueError(f"{weights_source}: expected named tensors, got something else")
    try:
        with torch.device("meta"):  # a size from a damaged file may be any number
            outline = model_class._from_fields(fields)
    except _FIELD_ERRORS as error:
        raise ValueError(f"{fields_source}: {first_line(error)}") from error
    try:
        outline.load_state_dict({name: tensor.to("meta") for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ValueError(
            f"{weights_source}: not the weights of {fields_source}: {one_line(error)}"
        ) from error
    del outline
    model = model_class._from_fields(fields)
    model.load_state_dict(weights)
    return model


def config_from_fields(config_class: type[Any], fields: Mapping[str, Any]) -> Any:
    """A ``config_class`` from JSON. A field that is not there has the value that files mean by its
    absence, :data:`reformer_ext.nn.formats.ABSENT`, not today's default. Raises ValueError for a
    field that the class has not."""
    known = {field.name for field in dataclasses.fields(config_class)}
    if not set(fields) <= known:
        raise ValueError(f"unknown fields {sorted(set(fields) - known)}")
    return config_class(**{**ABSENT.get(config_class.__name__, {}), **fields})


def lasting_config(config_class: type[_Config], **fields: Any) -> _Config:
    """A ``config_class`` that does not move with the defaults of new models: for weights that were
    trained elsewhere."""
    return config_from_fields(config_class, fields)


def first_line(error: BaseException) -> str:
    """What an error says, or its kind if it says nothing; without the trace that torch adds."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: BaseException) -> str:
    """What an error says, its lines joined."""
    return " ".join(str(error).split())


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Raises ValueError for a file that is not whole."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get(_DIGEST)
    except SafetensorError as error:
        raise ValueError(f"{path}: expected safetensors, got {error}") from error
    if expected is not None and _digest(weights) != expected:
        raise ValueError(f"{path}: damaged: the weights are not those that were written")
    return weights


def _digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the tensors, their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
