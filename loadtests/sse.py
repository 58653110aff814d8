"""Server-sent events, as chat completions stream them: bytes in as they arrive, the data of whole events out."""


class EventParser:
    """Cuts a byte stream into events; pieces may end anywhere, within a character too."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        """Takes the next bytes of the stream.

        Returns:
            The data of each event that they complete, its lines joined by newlines. Comments and other fields are
            dropped.

        Raises:
            UnicodeDecodeError: an event that is not UTF-8.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        events = []
        for line in (line.removesuffix(b"\r") for line in lines):
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data).decode())
                self._data = []
        return events

    @property
    def unfinished(self) -> bool:
        """Whether the stream, if it ended here, would end within an event."""
        return bool(self._data or self._rest.strip())
