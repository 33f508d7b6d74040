"""The prompt of a check fits whatever sizes a program may have."""

import itertools

from pippin.export.program_sizes import prompt_length


def test_a_prompt_and_what_is_decoded_behind_it_fit_with_their_padding():
    padded = 0
    for context, steps in itertools.product((32, 64, 128), (1, 8, 16)):
        for prefill in range(2, context + 1):
            length = prompt_length(prefill, context, steps)
            assert 2 <= length and length + steps <= context
            assert -(-length // prefill) * prefill <= context  # the last part is filled up
            padded += prefill < length < 2 * prefill
    assert padded > 100
