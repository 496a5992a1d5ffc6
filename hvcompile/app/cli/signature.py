"""The parameters of a command, from the fields of its request."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from typer.models import ArgumentInfo, OptionInfo, ParameterInfo

from hvcompile.app.request.parameters import EACH

RequestT = TypeVar("RequestT")


def taking(request: type[RequestT]) -> Callable[[Callable[[RequestT], None]], Callable[..., None]]:
    """Decorate a function of a request: it becomes a function of the request's fields, for typer to make a command of.

    Args:
        request: a dataclass, each field of which is ``Annotated[type, typer.Option(...)]`` or ``typer.Argument``. A
            field ``tuple[str, ...]`` is one option with commas between, or, marked ``EACH``, one that repeats, or an
            argument that repeats.

    Raises:
        TypeError: a field has no such annotation, or more than one.

    """
    hints = typing.get_type_hints(request, include_extras=True)
    fields = {
        field.name: _Parameter.of(field, hints[field.name]) for field in dataclasses.fields(typing.cast(Any, request))
    }

    def decorate(function: Callable[[RequestT], None]) -> Callable[..., None]:
        def command(**values: Any) -> None:
            function(request(**{name: fields[name].convert(value) for name, value in values.items()}))

        signature = inspect.Signature([parameter.typed for parameter in fields.values()])
        command.__signature__ = signature  # type: ignore[attr-defined]
        command.__annotations__ = {name: parameter.typed.annotation for name, parameter in fields.items()}
        command.__name__, command.__qualname__ = function.__name__, function.__qualname__
        command.__module__, command.__doc__ = function.__module__, function.__doc__
        return command

    return decorate


@dataclasses.dataclass(frozen=True)
class _Parameter:
    """A parameter as typer reads it, and what makes the field's value of that which was typed."""

    typed: inspect.Parameter
    convert: Callable[[Any], Any]

    @classmethod
    def of(cls, field: dataclasses.Field[Any], hint: Any) -> _Parameter:
        kind, *extras = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        infos = [extra for extra in extras if isinstance(extra, ParameterInfo)]
        if len(infos) != 1:
            raise TypeError(f"field {field.name!r} needs one typer.Option or typer.Argument, and has {len(infos)}")
        default: Any = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        convert: Callable[[Any], Any] = _same
        if kind == tuple[str, ...] and (isinstance(infos[0], ArgumentInfo) or EACH in extras):
            kind, default, convert = list[str] | None, None, _gather
        elif kind == tuple[str, ...] and isinstance(infos[0], OptionInfo):
            kind, default, convert = str, ",".join(default), _split
        typed = inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, infos[0]]
        )
        return cls(typed, convert)


def _same(value: Any) -> Any:
    return value


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _gather(values: list[str] | None) -> tuple[str, ...]:
    return tuple(values or ())
