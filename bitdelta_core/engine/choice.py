"""One choice on its way out: tokens become text, text may end it, and each step becomes an event."""

from __future__ import annotations

from collections.abc import Sequence as Tokens

from bitdelta_core.engine.api import FinishReason, PositionLogprobs, TokenEvent, TokenLogprob
from bitdelta_core.engine.detokenizer import Detokenizer, StopMatcher
from bitdelta_core.engine.sampler import LogprobRow, RowState, Sample
from bitdelta_core.engine.sequence import Sequence
from bitdelta_core.engine.variants import Variant


class Choice:
    """What is known of one sequence beside its tokens and blocks."""

    def __init__(self, seq: Sequence, variant: Variant, *, seed: int) -> None:
        vocabulary, params, prompt = variant.vocabulary, seq.request.params, seq.request.prompt_token_ids
        self.seq = seq
        self.variant = variant
        self._vocabulary = vocabulary
        self.state = RowState(
            params,
            prompt=prompt,
            vocab_size=variant.vocab_size,
            stop_ids=vocabulary.stop_ids,
            seed=seed,
            index=seq.index,
        )
        decode = vocabulary.decode if params.skip_special_tokens else vocabulary.decode_all
        self._text = Detokenizer(decode, prompt)
        self._stops = StopMatcher(params.stop, include=params.include_stop_str_in_output)
        self._prompt_logprobs: list[PositionLogprobs | None] = [None]

    def accept(self, sample: Sample) -> TokenEvent:
        """The next token has been chosen."""
        seq, params, token = self.seq, self.seq.request.params, sample.token_id
        seq.receive(token)
        count = len(seq.tokens) - seq.prompt_len
        finish, reason = self._stop_by_token(token, count)
        hidden = finish == "stop" and not params.include_stop_str_in_output
        text = "" if hidden else self._text.push(token)
        if finish is not None:
            text += self._text.flush()
        stop = None
        if count >= params.min_tokens:
            text, stop = self._stops.push(text)
        if stop is not None:
            finish, reason = "stop", stop
        elif finish is not None:
            text += self._stops.flush()
        return TokenEvent(
            request_id=seq.request.request_id,
            index=seq.index,
            token_ids=(token,),
            text=text,
            logprobs=() if sample.logprobs is None else (self._position(sample.logprobs),),
            finish_reason=finish,
            stop_reason=reason,
            prompt_tokens=seq.prompt_len,
            cached_tokens=seq.cached_tokens,
            completion_tokens=count,
        )

    def add_prompt_logprobs(self, start: int, rows: Tokens[LogprobRow]) -> None:
        """`rows` are of the prompt tokens at positions start + 1 and following."""
        del self._prompt_logprobs[start + 1 :]  # a preempted prompt is computed again
        self._prompt_logprobs += [self._position(row) for row in rows]

    def prompt_event(self) -> TokenEvent:
        """The prompt's log-probabilities, complete."""
        assert len(self._prompt_logprobs) == self.seq.prompt_len
        return TokenEvent(
            request_id=self.seq.request.request_id,
            index=self.seq.index,
            prompt_logprobs=tuple(self._prompt_logprobs),
            prompt_tokens=self.seq.prompt_len,
        )

    def _stop_by_token(self, token: int, count: int) -> tuple[FinishReason | None, int | None]:
        params = self.seq.request.params
        if count >= params.min_tokens:
            if not params.ignore_eos and token in self._vocabulary.stop_ids:
                return "stop", None
            if token in params.stop_token_ids:
                return "stop", token
        return ("length" if len(self.seq.tokens) >= self.seq.max_len else None), None

    def _position(self, row: LogprobRow) -> PositionLogprobs:
        top = tuple(self._token(token, value, rank) for rank, (token, value) in enumerate(row.top, start=1))
        return PositionLogprobs(chosen=self._token(row.token_id, row.logprob, row.rank), top=top)

    def _token(self, token: int, logprob: float, rank: int) -> TokenLogprob:
        return TokenLogprob(token, self._vocabulary.decode_all([token]), logprob, rank)
