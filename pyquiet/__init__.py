"""Language models that think before they speak: native kernels and samplers for Hugging Face models."""

__version__ = "0.1.0"
