"""Event files for TensorBoard, written at once.

tensorboardX's SummaryWriter hands events to a thread: when a full disk ends that, its queue fills and the run waits for
ever. The writer below it, which is used here, raises instead.
"""

import os
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary


class TensorBoard:
    """A file of events in a folder; what cannot be written raises."""

    def __init__(self, folder: Path, after: int):
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f".{os.getpid()}.{time.monotonic_ns()}"  # two starts in one second would have one name
        self.writer = EventsWriter(str(folder / "events"), suffix)
        if after:  # what an earlier start has written of later steps is done again: not to be shown twice
            self._write(Event(step=after + 1, session_log=SessionLog(status=SessionLog.START)))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._summary(step, Summary(value=[Summary.Value(tag=tag, simple_value=one) for tag, one in values.items()]))

    def histogram(self, step: int, tag: str, values: np.ndarray) -> None:
        self._summary(step, summary.histogram(tag, values, bins="auto"))

    def image(self, step: int, tag: str, file: Path) -> None:
        with Image.open(file) as picture:
            width, height = picture.size
        shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.read_bytes())
        self._summary(step, Summary(value=[Summary.Value(tag=tag, image=shown)]))

    def close(self) -> None:
        self.writer.close()

    def _summary(self, step: int, values: Summary) -> None:
        self._write(Event(step=step, summary=values))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self.writer.write_event(event)
        self.writer.flush()
