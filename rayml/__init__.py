"""rayml meta-trains causal language models on Ray, so that they learn a new task from a handful of examples."""

__version__ = "0.1.0"
