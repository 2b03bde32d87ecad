"""A reader of TensorBoard's event files that shares no code with their writer but the record's layout.

A record is: length (8 bytes), its checksum (4), an `Event` message, its checksum (4).
"""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]


def read(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of every point in the one event file of a folder, in its order."""
    (path,) = folder.glob("events.out.tfevents.*")
    content, place, points = path.read_bytes(), 0, []
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        event = Event.FromString(content[place + 12 : place + 12 + length])
        points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        place += length + 16
    return points
