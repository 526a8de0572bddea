"""Checks of text tokenizers and of a directory of weights."""

from collections.abc import Iterator
from pathlib import Path

from beit3.doctor.findings import describe_error, fault, ok
from beit3.files import cache_directory

RELEASED_IDS = 64002
"""Ids of the tokenizer released with BEiT-3: 64000 pieces, <mask> and the shift by one."""


def check_text_tokenizers(text_model: str = "") -> Iterator[str]:
    """Reports number of ids and digest of a tokenizer, else of those of the cached worlds."""
    paths = sorted(cache_directory().glob("world-*-records/text.model"))
    if text_model:
        paths = [Path(text_model)]
    for path in paths:
        try:
            from beit3.tokenizer.text import TextTokenizer

            tokenizer = TextTokenizer(path)
        except (ValueError, OSError, ImportError) as error:
            yield fault(f"text tokenizer: {describe_error(error)}")
            continue
        if tokenizer.vocab_size == RELEASED_IDS:
            comparison = "as many as the released one"
        else:
            comparison = f"the released one has {RELEASED_IDS}, and released weights need it"
        yield ok(
            f"text tokenizer {path}: {tokenizer.vocab_size} ids ({comparison}), "
            f"SHA-256 {tokenizer.digest}"
        )


def check_weights(path: str, text_model: str = "") -> str:
    """Checks that weights hold every tensor of their network, and their text tokenizer."""
    from beit3.weights.loading import load_weights
    from beit3.weights.store import CONFIG_FILE, TOKENIZER_FILE, find_weights, read_config

    try:
        directory = find_weights(path)
        stored = read_config(directory)
        has_file = (directory / TOKENIZER_FILE).is_file()
        if stored.tokenizer and not text_model and not has_file:
            return fault(
                f"weights {directory}: {TOKENIZER_FILE} is missing, "
                f"copy it from the run (SHA-256 {stored.tokenizer})"
            )
        task = load_weights(directory, text_model=text_model or None)
    except (ValueError, OSError, RuntimeError) as error:
        return fault(f"weights {path}: {describe_error(error)}")
    num_tensors = sum(1 for _ in task.parameters())
    tokenizer = "no text tokenizer"
    if stored.tokenizer:
        tokenizer = f"text tokenizer {stored.tokenizer} as {CONFIG_FILE} says"
    return ok(f"weights {directory} ({stored.task}): {num_tensors} tensors, complete, {tokenizer}")
