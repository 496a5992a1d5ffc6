"""A form that a client sends, read by python-multipart within limits on all that it may hold."""

from __future__ import annotations

import re
from typing import Any

from hvcompile.errors import InputError

MOST_FIELDS = 32
MOST_HEADERS = 8
"""Of a field."""
LONGEST_HEADER = 1024
"""Bytes."""


def fields(body: bytes, content_type: str) -> dict[str, str | bytes]:
    """Give the fields of a form; a file in it is only seen to be one, and has no content here.

    Args:
        body: all of it; whoever has read it has seen to its size.
        content_type: with the boundary.

    Raises:
        InputError: it is no form, or has more in it than may be.

    """
    from python_multipart import MultipartParser
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import parse_options_header

    if not re.fullmatch(r"[\x20-\x7e]{1,300}", content_type):
        raise InputError("the content type can't be read")
    boundary = parse_options_header(content_type)[1].get(b"boundary")
    if not boundary:
        raise InputError("the body is no form: its boundary is missing")
    form = _Form()
    limits = {"max_header_count": MOST_HEADERS, "max_header_size": LONGEST_HEADER}
    try:
        parser = MultipartParser(boundary, form.callbacks(), **limits)
        parser.write(body)
    except FormParserError as error:
        raise InputError("the body is no form, or has headers that are too many or too long") from error
    if not form.is_whole:
        raise InputError("the body is no form: it does not end with its boundary")
    return form.fields


class _Form:
    """Takes down what the parser tells of, piece by piece."""

    def __init__(self) -> None:
        self.fields: dict[str, str | bytes] = {}
        self.is_whole = False
        self._header, self._value, self._content = bytearray(), bytearray(), bytearray()
        self._dispositions: list[bytes] = []
        self._name, self._is_file = "", False

    def callbacks(self) -> Any:
        """As the parser wants them."""
        return {
            "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header_ended,
            "on_headers_finished": self._begun,
            "on_part_data": lambda data, start, end: self._content.extend(data[start:end]),
            "on_part_end": self._ended,
            "on_end": self._finished,
        }

    def _header_ended(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._dispositions.append(bytes(self._value))
        self._header, self._value = bytearray(), bytearray()

    def _begun(self) -> None:
        from python_multipart.multipart import parse_options_header

        told, self._dispositions = self._dispositions, []
        kind, options = parse_options_header(told[0] if len(told) == 1 else b"")
        if kind != b"form-data" or not options.get(b"name"):
            raise InputError("the form has a field without a name")
        self._name, self._is_file = _text(options[b"name"]), b"filename" in options
        if self._name in self.fields:
            raise InputError("the form has a field twice: send each once")
        if len(self.fields) == MOST_FIELDS:
            raise InputError(f"the form has too many fields: send {MOST_FIELDS} or fewer")

    def _ended(self) -> None:
        content, self._content = bytes(self._content), bytearray()
        self.fields[self._name] = b"" if self._is_file else _text(content)

    def _finished(self) -> None:
        self.is_whole = True


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError("a field of the form is no text in UTF-8") from error
