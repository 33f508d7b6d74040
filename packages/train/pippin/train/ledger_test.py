import pytest

from pippin.train import ledger as ledger_module
from pippin.train.ledger import Bucket, Ledger


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(ledger_module.time, "monotonic", lambda: now[0])
    return now


def test_nested_blocks_and_the_rest_add_up_to_the_wall_time(clock: list[float]) -> None:
    ledger = Ledger(started=90.0)  # ten seconds of imports
    ledger.rest_into(Bucket.GOODPUT_BUCKET_STEP)
    with ledger.into(Bucket.GOODPUT_BUCKET_EVALUATION):
        clock[0] += 3
        with ledger.into(Bucket.GOODPUT_BUCKET_DATA):
            clock[0] += 2
        clock[0] += 1
    clock[0] += 4
    message = ledger.message()
    seconds = {e.bucket: e.seconds for e in message.entries}
    assert seconds == {
        Bucket.GOODPUT_BUCKET_INIT: 10,
        Bucket.GOODPUT_BUCKET_EVALUATION: 4,
        Bucket.GOODPUT_BUCKET_DATA: 2,
        Bucket.GOODPUT_BUCKET_STEP: 4,
    }
    assert message.wall_seconds == 20


def test_an_error_in_a_block_leaves_the_bucket(clock: list[float]) -> None:
    ledger = Ledger()
    with pytest.raises(KeyError), ledger.into(Bucket.GOODPUT_BUCKET_DATA):
        raise KeyError
    clock[0] += 5
    assert ledger.seconds(Bucket.GOODPUT_BUCKET_DATA) == 0
