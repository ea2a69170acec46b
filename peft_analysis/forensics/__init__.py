"""Forensics: what was edited in a model, read from its weights."""

from peft_analysis.forensics.method import Method
from peft_analysis.forensics.result import EditTrace
from peft_analysis.forensics.tracing import trace

__all__ = ["EditTrace", "Method", "trace"]
