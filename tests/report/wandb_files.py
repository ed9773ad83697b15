"""Reader of W&B's offline file, by wandb's own library."""

import contextlib
import json
import time


def wandb_records(output_dir) -> list:
    """All records of the last part of the W&B run in `output_dir`, once its exit is among them.

    W&B's own process writes the file; `finish` of an offline run does not wait for the last of it.
    """
    until = time.monotonic() + 30
    while time.monotonic() < until:
        records = _records_so_far(output_dir)
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError("the run's exit was never written")


def _records_so_far(output_dir) -> list:
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    path = sorted(output_dir.glob("wandb/offline-run-*/*.wandb"))[-1]
    store = DataStore()
    store.open_for_scan(str(path))
    records = []
    with contextlib.suppress(AssertionError):  # a record that is being written
        while (data := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            records.append(record)
    store.close()
    return records


def wandb_history(output_dir) -> list[dict]:
    """Returns the rows logged to W&B, without wandb's own fields, which start with an underscore."""
    rows = []
    for record in wandb_records(output_dir):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            rows.append({name: value for name, value in items.items() if not name.startswith("_")})
    return rows


def wandb_exit_code(output_dir) -> int:
    (code,) = [r.exit.exit_code for r in wandb_records(output_dir) if r.WhichOneof("record_type") == "exit"]
    return code
