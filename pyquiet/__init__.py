"""Hugging Face language models that think before they speak, on native kernels."""

__version__ = "0.1.0"
