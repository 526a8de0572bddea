"""The rules by which a beam search ends, as the release has them."""

import pytest

from beit3.model.generation import BeamHypotheses, SpecialTokens

SPECIAL_TOKENS = SpecialTokens(bos=0, eos=2, pad=1, mask=9)


@pytest.mark.parametrize(("log_prob", "is_done"), [(-4.1, True), (-3.9, False)])
def test_a_search_ends_when_no_open_sequence_can_win(log_prob, is_done):
    """The bound of an open sequence divides by the largest length less one, here 4."""
    hypotheses = BeamHypotheses(num_beams=1, length_penalty=1.0, max_length=5)
    hypotheses.finish([7, 8], -4.0)  # two tokens count four
    assert hypotheses.best is not None and hypotheses.best.score == -1.0
    hypotheses.step([(0, 7, log_prob)], SPECIAL_TOKENS, is_last=False)
    assert hypotheses.is_done is is_done
