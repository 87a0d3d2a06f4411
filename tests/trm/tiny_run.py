"""A tiny recipe of puzzles: plain values that train in a second."""

SUDOKU = {"puzzle": "Sudoku", "size": 4, "train": 12, "test": 6, "augmentations": 2, "clues": [8, 10]}
VALUES = {
    "name": "tiny",
    "puzzle": SUDOKU,
    "network": {"width": 16, "heads": 2, "inner": 1, "outer": 2, "prefix": 1, "max_steps": 3},
    "training": {
        "steps": 6,
        "batch_size": 4,
        "warmup": 2,
        "learning_rate": 1e-3,
        "ema": 0.9,
        "precision": "float32",
        "save_every": 2,
        "log_every": 2,
        "evaluate_every": 3,
    },
    "evaluation": {"puzzles": 5, "batch_size": 4, "sure": [0.5, 0.9]},
}
MAZE = VALUES | {
    "name": "maze",
    "puzzle": {"puzzle": "Maze", "size": [4, 5], "train": 6, "test": 3, "augmentations": 1},
}


def merged(values=VALUES, **sections):
    """With some values of some sections changed."""
    return {k: v | sections[k] if isinstance(sections.get(k), dict) else sections.get(k, v) for k, v in values.items()}
