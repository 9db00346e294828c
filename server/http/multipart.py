"""Read ``multipart/form-data`` with one file as a stream. Memory holds at most one block of it.

Starlette's own form parser is not used: it writes the whole file to a temporary folder before our code can
check its size.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from server.errors import InvalidRequest
from server.http.errors import BodyNotMultipart, ClientDisconnected
from server.http.fields import Rules

FILE: Final = "file"
MAX_FIELD_BYTES = 1024
MAX_NAME_LENGTH = 255
MAX_OTHER_BYTES = 64 << 10
"""Most bytes of a form outside its file: headers, text fields, and text before and after the parts."""
BLOCK = 1 << 20


class Form:
    """The part of a form that has been read. Parsing is slow Python code: call it outside the event loop.

    Attributes:
        fields: the text fields, by name.
        filename: the name of the file; None before the file begins.
        complete: whether the last boundary was read.
    """

    def __init__(self, boundary: bytes, rules: Rules) -> None:
        """``rules`` has the form's fields. A field that is not served is refused by name."""
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.complete = False
        self._rules = rules
        self._name = ""
        self._header = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._file = bytearray()
        self._other = 0
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, data: bytes) -> bytearray:
        """Parse the next bytes of the body, and return the file's bytes in them. Raises InvalidRequest."""
        self._file = bytearray()
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise InvalidRequest(f"The body is not a valid multipart form: {error}.") from None
        self._other += len(data) - len(self._file)
        if self._other > MAX_OTHER_BYTES:
            message = f"The form has more than {MAX_OTHER_BYTES} bytes outside its file; send only the file."
            raise InvalidRequest(message)
        return self._file

    def finish(self) -> None:
        """Call it at the end of the body. Raises InvalidRequest if the form is not complete."""
        if not self.complete:
            raise InvalidRequest("The multipart form ends before its last boundary.")

    def _begin_part(self) -> None:
        self._name, self._disposition = "", b""
        self._header, self._value = bytearray(), bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._name == FILE:
            self._begin_file(options.get(b"filename", b""))
        else:
            self._refuse_unless_served()

    def _refuse_unless_served(self) -> None:
        rule = self._rules.get(self._name.partition("[")[0])  # clients write nested fields as ``a[b]``
        if rule is None or rule.kind != "served":
            remedy = "leave it out" if rule is None else rule.remedy
            message = f"{self._name[:100]!r} is not supported; {remedy}."
            raise InvalidRequest(message, self._name[:100], "unsupported_parameter")

    def _begin_file(self, filename: bytes) -> None:
        if self.filename is not None:
            raise InvalidRequest("The form has more than one 'file'; send one.", FILE)
        name = filename.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
        self.filename = "".join(each for each in name if each.isprintable())[-MAX_NAME_LENGTH:] or "upload"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._name == FILE:
            self._file += data[start:end]
            return
        self._value += data[start:end]
        if len(self._value) > MAX_FIELD_BYTES:
            raise InvalidRequest(f"'{self._name}' has more than {MAX_FIELD_BYTES} bytes.", self._name)

    def _end_part(self) -> None:
        if self._name != FILE:
            self.fields[self._name] = self._value.decode("utf-8", "replace")

    def _end(self) -> None:
        self.complete = True


def form_of(request: Request, rules: Rules) -> Form:
    """An empty form for the request's body.

    Raises:
        BodyNotMultipart: the content type is not ``multipart/form-data``.
        InvalidRequest: the boundary is not valid.
    """
    media_type, options = parse_options_header(request.headers.get("content-type"))
    if media_type != b"multipart/form-data" or not options.get(b"boundary"):
        raise BodyNotMultipart("Send a file as 'multipart/form-data', as OpenAI's clients do.")
    try:
        return Form(options[b"boundary"], rules)
    except FormParserError as error:
        raise InvalidRequest(f"The body is not a valid multipart form: {error}.") from None


async def body_blocks(request: Request) -> AsyncIterator[bytes]:
    """The request's body in blocks of about ``BLOCK``."""
    block = bytearray()
    try:
        async for chunk in request.stream():
            block += chunk
            if len(block) >= BLOCK:
                yield bytes(block)
                block.clear()
    except ClientDisconnect:
        raise ClientDisconnected("The client disconnected while it was sending a file.") from None
    if block:
        yield bytes(block)
