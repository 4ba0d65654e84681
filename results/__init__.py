"""From run folders to the paper's tables and figures: files in, frame, table out. Nothing here trains or guesses."""
