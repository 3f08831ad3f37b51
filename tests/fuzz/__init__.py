"""Files and lines that are damaged in every way: nothing crashes, nothing hangs, and it is said."""
