"""The config: every field with its default, strict overrides, derived values.

A file under `configs/` has `get_config(arg)`, which starts from `base()`. `load` runs it, `apply_overrides` sets single
fields, `resolve` checks the result and computes what follows from it; everything else takes a resolved config.
"""

from marjax.config.files import errors_of, load, load_function, parse_arg
from marjax.config.overrides import apply_overrides, conform, flatten
from marjax.config.resolve import (
    check_fields,
    check_sample,
    data_config,
    fill_tokenizer,
    resolve,
    tokenizer_config,
    tokens_of,
    with_data,
)
from marjax.config.schema import CHOICES, MODEL_SIZES, base, set_model_size

__all__ = [
    "CHOICES",
    "MODEL_SIZES",
    "apply_overrides",
    "base",
    "check_fields",
    "check_sample",
    "conform",
    "data_config",
    "errors_of",
    "fill_tokenizer",
    "flatten",
    "load",
    "load_function",
    "parse_arg",
    "resolve",
    "set_model_size",
    "tokenizer_config",
    "tokens_of",
    "with_data",
]
