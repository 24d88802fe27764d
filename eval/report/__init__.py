"""Pages about finished or unfinished work: a training run, and the report of a benchmark."""
