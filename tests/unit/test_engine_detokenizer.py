"""Streaming text equals the whole text, for tokenizers of every habit."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bitdelta_core.engine.detokenizer import HALF, Detokenizer, StopMatcher, decoder_of
from bitdelta_core.errors import CheckpointError

TEXT = "Grüße, 世界! naïve 👩‍👩‍👧 café — ok"


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Words with a leading-space mark that decoding drops from the first one; unknown characters as bytes."""
    words = ["▁the", "▁cat", "▁sat", "s", "."]
    vocab = {word: i for i, word in enumerate([*words, *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def decode_with(tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)


def stream(decode: Callable[[Sequence[int]], str], prompt: Sequence[int], ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(decode, prompt)
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


def test_multi_byte_characters_come_whole() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode(TEXT).ids
    assert len(ids) > len(TEXT)
    pieces = stream(decode_with(tokenizer), [], ids)
    assert "".join(pieces) == TEXT
    assert not any(HALF in piece for piece in pieces)


def test_the_space_before_a_word_is_kept_after_a_prompt() -> None:
    tokenizer = sentencepiece_like()
    decode = decode_with(tokenizer)
    cat, sat = tokenizer.token_to_id("▁cat"), tokenizer.token_to_id("▁sat")
    assert decode([cat]) == "cat"
    assert stream(decode, [tokenizer.token_to_id("▁the")], [cat, sat]) == [" cat", " sat", ""]
    assert stream(decode, [], [cat, sat]) == ["cat", " sat", ""]


def test_a_special_token_in_between_does_not_swallow_the_next_space() -> None:
    tokenizer = sentencepiece_like()
    special, cat = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("▁cat")
    assert "".join(stream(decode_with(tokenizer), [cat], [special, special, cat, cat])) == " cat cat"


def test_random_bytes_stream_to_what_the_whole_decodes_to() -> None:
    """Nonsense included: nothing is lost, doubled or changed afterwards."""
    tokenizer, rng = byte_level(), random.Random(7)
    decode = decode_with(tokenizer)
    for _ in range(100):
        ids = [rng.randrange(tokenizer.get_vocab_size()) for _ in range(rng.randrange(8))]
        ids += tokenizer.encode(rng.choice(TEXT)).ids
        assert "".join(stream(decode, tokenizer.encode("the").ids, ids)) == decode(ids)


def test_random_words_and_byte_tokens_stream_to_what_the_whole_decodes_to() -> None:
    tokenizer, rng = sentencepiece_like(), random.Random(8)
    decode = decode_with(tokenizer)
    prompt = [tokenizer.token_to_id("▁the")]
    for _ in range(100):
        ids: list[int] = []
        for _ in range(rng.randrange(1, 8)):
            character = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in rng.choice(TEXT).encode()]
            ids += rng.choice([[rng.randrange(5)], character, [tokenizer.token_to_id("<s>")]])
        assert "".join(stream(decode, prompt, ids)) == decode([*prompt, *ids])[len("the") :]


def test_text_that_ends_in_half_a_character_is_flushed_as_it_decodes() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a世").ids[:-1]
    assert stream(decode_with(tokenizer), [], ids) == ["a", "", "", HALF]


def test_a_prompt_that_ends_in_half_a_character() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("x世y").ids
    assert "".join(stream(decode_with(tokenizer), ids[:2], ids[2:])) == "世y"


def test_endless_nonsense_is_given_out_in_time() -> None:
    decode = decode_with(byte_level())
    invalid = byte_level().encode("é").ids[1]
    pieces = stream(decode, [], [invalid] * 60)
    assert sum(map(len, pieces)) == 60
    assert any(pieces[:20]), "held back for too long"


def test_stop_strings_are_found_across_pieces_and_never_shown() -> None:
    for pieces in (["ab", "c\n", "\nQ", ": x"], list("abc\n\nQ: x"), ["abc\n\nQ: x"]):
        matcher = StopMatcher(["\n\nQ:", "END"], include=False)
        shown, stop = "", None
        for piece in pieces:
            text, stop = matcher.push(piece)
            shown += text
            assert "\n" not in shown, "the beginning of a stop string was shown"
            if stop:
                break
        assert (shown, stop) == ("abc", "\n\nQ:")


def test_what_only_looked_like_a_stop_string_is_shown() -> None:
    matcher = StopMatcher(["aab"], include=False)
    shown = [matcher.push(c)[0] for c in "xaaac"]
    assert "".join(shown) == "xaaac"
    assert matcher.push("aa") == ("", None)
    assert matcher.flush() == "aa"


def test_the_earliest_stop_string_wins_and_can_be_included() -> None:
    assert StopMatcher(["world", "lo w"], include=False).push("hello world") == ("hel", "lo w")
    assert StopMatcher(["lo"], include=True).push("hello world") == ("hello", "lo")
    assert StopMatcher(["lo", "lo w"], include=False).push("hello world") == ("hel", "lo w")


def test_a_tokenizer_that_panics_is_the_variant_s_fault() -> None:
    """In Rust, which raises what is no Exception."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip("a", 0, 2)])
    decode = decoder_of(SimpleNamespace(backend_tokenizer=tokenizer), skip_special_tokens=True)
    assert decode(tokenizer.encode("bcd").ids) == "bcd"
    with pytest.raises(CheckpointError, match="its tokenizer cannot decode: PanicException"):
        decode(tokenizer.encode("a").ids)
