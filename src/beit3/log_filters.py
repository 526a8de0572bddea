"""Hides messages of other libraries that say nothing to a user."""

import logging


def hide_enum_warnings() -> None:
    """Hides torch's warnings about two enums of torchao.

    torchao 0.18 registers enums with torch's pytrees, which torch 2.14 warns about whenever
    torchao is imported. transformers imports it where it is installed, so `ade20k` and `coco`
    printed the warnings into every run. Other messages of that logger are shown.
    """
    logging.getLogger("torch.utils._pytree").addFilter(is_no_enum_warning)


def is_no_enum_warning(record: logging.LogRecord) -> bool:
    return "is an Enum subclass and is now natively supported" not in str(record.msg)
