"""The Tiny Recursive Model itself (arXiv 2510.04871): puzzles, not text. It fills in a whole grid, again and again.

`config`, `network`, `recursion`, `model`   what is computed in one supervision step
`losses`, `halting`                         what it is trained on, and when a row of the batch gets a new puzzle
`puzzle_embeddings`, `optimisers`, `ema`    what moves the weights
`training`, `checkpoints`                   the loop, and how it goes on after a kill
`puzzles/`                                  Sudoku, mazes and ARC-AGI: generators, files, forms, votes
`solving`                                   evaluation, early exit, and the steps of a solution

Names beside the package's legend: L cells of a puzzle, P prefix tokens, S = P + L, V tokens of the vocabulary.
"""
