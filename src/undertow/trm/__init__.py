"""The Tiny Recursive Model (arXiv 2510.04871): not autoregressive, on the same recursion as the language models."""
