"""Tiny model and tokenizer for tests."""

from distillkit.models.tiny import CHAT_TEMPLATE as CHAT_TEMPLATE
from distillkit.models.tiny import END as END
from distillkit.models.tiny import END_ID as END_ID
from distillkit.models.tiny import START as START
from distillkit.models.tiny import START_ID as START_ID
from distillkit.models.tiny import tiny_model as tiny_model
from distillkit.models.tiny import tiny_tokenizer as tiny_tokenizer
