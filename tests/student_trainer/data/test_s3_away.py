"""An object store that goes away while a run reads from it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from potstill.cache.errors import Unavailable
from potstill.student_trainer.train.loop import train
from tests.support.processes.faulty_proxy import Fault, faulty_proxy
from tests.support.processes.s3 import s3_server
from tests.support.tiny_runs import config_of, write_cache

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.mark.slow
def test_a_store_that_goes_away_ends_a_run_with_a_checkpoint_from_which_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_cache(tmp_path)
    away = [False]

    def choose(_: str, target: str) -> Fault | None:
        return "drop before" if away[0] and "/segments/000005-" in target else None

    with s3_server() as server, faulty_proxy(server.endpoint, choose) as proxy:
        for name, value in server.environment(proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("potstill.cache.store.object_stores._RETRIED", timedelta(milliseconds=200))
        server.make_bucket("runs")
        store = S3Store("runs", client_options={"allow_http": True})
        for file in root.rglob("*"):
            if file.is_file():
                obstore.put(store, f"cache/{file.relative_to(root)}", file.read_bytes())
        data = {"cache": "s3://runs/cache", "held_out": 0, "patience": 0.5}
        config = config_of(tmp_path, tmp_path / "run", data=data, train={"schedule": "constant"})
        away[0] = True
        told = r"segments/000005-.*the store does not answer.*; a checkpoint of step \d+ was written, and the"
        with pytest.raises(Unavailable, match=told):
            train(config)
        away[0] = False
        assert train(config).finished
