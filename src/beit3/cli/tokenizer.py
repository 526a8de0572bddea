"""`beit3 tokenizer`: train and use a SentencePiece text tokenizer."""

from typing import Literal

from beit3.cli.options import Count, Size


def train_tokenizer(
    file: str,
    /,
    *files: str,
    model: str,
    vocab_size: Count = 64000,
    type: Literal["unigram", "bpe"] = "unigram",
) -> None:
    """Train a text tokenizer on texts or records.

    ```
    beit3 tokenizer train books/*.txt data/pretrain/pairs/train.jsonl --model data/text.model
    ```

    Args:
        file: A text file, or a file of records.
        files: More of them.
        model: The SentencePiece file to write.
        vocab_size: Number of ids, special tokens included.
        type: How pieces are chosen; bpe suits small vocabularies.
    """
    from beit3.tokenizer.text import TextTokenizer, read_texts

    texts = read_texts([file, *files])
    TextTokenizer.train(texts, vocab_size=vocab_size, model_type=type).save(model)
    print(f"{TextTokenizer(model).vocab_size} ids at {model}")


def encode(text: str, /, *more: str, model: str) -> None:
    """Print the ids of a text.

    ```
    beit3 tokenizer encode "a red circle" --model data/text.model
    ```

    Args:
        text: The text.
        more: More words of it.
        model: The SentencePiece file.
    """
    from beit3.tokenizer.text import TextTokenizer

    print(*TextTokenizer(model).encode(" ".join([text, *more])))


def decode(id: Size, /, *ids: Size, model: str) -> None:
    """Print the text of ids.

    ```
    beit3 tokenizer decode 5 17 9 --model data/text.model
    ```

    Args:
        id: An id.
        ids: More of them.
        model: The SentencePiece file.
    """
    from beit3.tokenizer.text import TextTokenizer

    print(TextTokenizer(model).decode([id, *ids]))
