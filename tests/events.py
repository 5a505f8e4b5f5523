"""What TensorBoard would show of the event files in a folder."""

import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog


def read(folder: Path) -> list[Event]:
    """Returns the events in the order of files and lines, without those that a later start hides."""
    shown: list[Event] = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])  # then 4 bytes of checksum, before and after
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16
            if event.session_log.status == SessionLog.START:
                shown = [other for other in shown if other.step < event.step]
            else:
                shown.append(event)
    return shown


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns tag → (step, value)."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in read(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found
