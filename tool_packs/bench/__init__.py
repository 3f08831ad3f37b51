"""How well each technique tells a model with something planted from one without: `seer-mcp bench-techniques`.

`cases` says what is asked of each organism, `methods` how each technique makes one number a prompt
of it, `run` chooses settings on other seeds and measures on this one, `statistics` counts, `table`
writes it down.
"""
