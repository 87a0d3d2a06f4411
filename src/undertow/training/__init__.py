"""Training on Hugging Face `Trainer`: a thin subclass, run folders, exact resume."""
