import numpy as np
import pytest

from pippin.train.ledger import Bucket
from pippin.train.summary import time_line, unigram_perplexity
from pippin.v1 import job_pb2 as pb


def test_the_unigram_perplexity_is_that_of_the_counted_frequencies() -> None:
    counts = np.array([5, 2, 0])  # with one added to each: 0.6, 0.3, 0.1
    batch = {"targets": np.array([[0, 1, 2]]), "loss_weights": np.array([[1.0, 1.0, 0.0]])}
    assert unigram_perplexity(counts, [batch]) == pytest.approx((0.6 * 0.3) ** -0.5)


def test_the_time_line_names_the_largest_shares_first() -> None:
    ledger = pb.GoodputLedger(wall_seconds=100)
    for bucket, seconds in ((Bucket.GOODPUT_BUCKET_DATA, 20), (Bucket.GOODPUT_BUCKET_STEP, 79.9)):
        ledger.entries.add(bucket=bucket, seconds=seconds)
    ledger.entries.add(bucket=Bucket.GOODPUT_BUCKET_INIT, seconds=0.1)
    assert time_line(ledger) == "100 s: 80% training, 20% waiting for input"
