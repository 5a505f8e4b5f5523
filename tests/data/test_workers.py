"""Rows made by worker processes: what goes wrong there is told as if it had gone wrong here."""

import shutil

import pytest
import worlds
from absl import flags

from depthlm_jax.data import pipeline
from depthlm_jax.errors import InputError

CHANGES = {"data.workers": 2, "data.prefetch_rows": 4, "data.read_threads": 1}


@pytest.fixture(scope="module", autouse=True)
def parsed_flags():
    flags.FLAGS.mark_as_parsed()  # as the command line does; Grain reads absl's flags when it starts a process


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return worlds.processor(worlds.HF_CONFIG, tmp_path_factory.mktemp("processor"))


def open_batches(path, processor, changes: dict) -> pipeline.Batches:
    config = worlds.config(path, CHANGES | changes)
    return pipeline.training_batches(pipeline.open_sources(config), processor, config)


def test_an_error_of_a_worker_arrives_as_it_is(scenes, processor):
    batches = open_batches(scenes, processor, {})
    shutil.move(scenes, scenes.with_name("away"))  # after the sources were opened here
    try:
        with pytest.raises(InputError, match=r"no data at source\.path|damaged data set"):
            next(batches)
    finally:
        shutil.move(scenes.with_name("away"), scenes)
        batches.close()


def test_bad_records_met_by_workers_are_counted_and_named(scenes, processor, tmp_path):
    file = worlds.write_jsonl(scenes, tmp_path, 8)
    worlds.rewrite_line(file, 3, lambda fields: fields | {"depth": [-1.0] * len(fields["depth"])})
    (tmp_path / "5.png").write_bytes(b"no picture")
    batches = open_batches(file, processor, {"data.global_batch_rows": 16})
    rows = next(batches)
    reasons = {drop.reason.splitlines()[0] for drop in rows.about.dropped}
    assert reasons == {"train.jsonl:3: depth is not a positive finite number", "train.jsonl:6: cannot decode image"}
    assert {"train.jsonl:3", "train.jsonl:6"}.isdisjoint(rows.about.record_ids)
    batches.close()
